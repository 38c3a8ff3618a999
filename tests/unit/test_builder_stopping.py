"""What SIGTERM ends takes away what it began."""

import asyncio
import os
import signal

import pytest

from services.builder import stopping


def test_the_first_signal_lets_work_tidy_up() -> None:
    tidied = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            tidied.append(signal.getsignal(signal.SIGTERM))

    with pytest.raises(stopping.Stopped):
        stopping.run(work())
    assert tidied == [signal.SIG_DFL]  # a second one would not be waited for


def test_work_that_ends_by_itself_gives_what_it_gives() -> None:
    async def work() -> str:
        return "made"

    async def cancelled() -> None:
        raise asyncio.CancelledError

    assert stopping.run(work()) == "made"
    with pytest.raises(asyncio.CancelledError):
        stopping.run(cancelled())
