"""Work in threads that goes on when whoever waits for it is cancelled: what it works on must outlast it."""

import asyncio
import contextvars
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """`asyncio.to_thread` for what must have ended before its caller is left, also when that is cancelled.

    Whoever is cancelled closes files and takes folders away: a thread that still works on them would rename what is
    gone in part to where others take it for whole.
    """
    context = contextvars.copy_context()
    running = asyncio.get_running_loop().run_in_executor(None, lambda: context.run(function, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await ended([running])
        raise


async def ended(futures: Iterable["asyncio.Future[Any]"]) -> None:
    """Wait for all of them, also when cancelled, once or again; then that is raised. What they raise is not."""
    waiting, cancelled = list(futures), None
    while left := [each for each in waiting if not each.done()]:
        try:
            await asyncio.wait(left)
        except asyncio.CancelledError as exc:
            cancelled = exc
    for each in waiting:
        if not each.cancelled():
            each.exception()  # else it would be told as never looked at
    if cancelled is not None:
        raise cancelled
