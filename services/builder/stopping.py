"""Programs that SIGTERM ends as Ctrl-C does: with what they began taken away."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

STATUS = 128 + signal.SIGTERM
"""What such a program exits with, as a shell says of one that the signal ended."""


class Stopped(Exception):
    """Whoever supervises the program ended it."""


def run(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, cancelled by the first SIGTERM; a second one ends the process at once.

    Raises:
        Stopped: it was.
    """
    received = False

    async def main() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def stop() -> None:
            nonlocal received
            received = True
            loop.remove_signal_handler(signal.SIGTERM)
            task.cancel()

        loop.add_signal_handler(signal.SIGTERM, stop)
        return await work

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        if received:
            raise Stopped from None
        raise
