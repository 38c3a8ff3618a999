"""Follow a resource through its Watch stream until a state; resumes a broken stream.

A Watch stream gives the resource as it is now and then after each change, so opening it anew loses
nothing but states that have passed: following is level-triggered, and a server that restarts meanwhile
is no error.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, TypeVar

from ekiben.errors import DeadlineExceeded, Unavailable

T = TypeVar("T")

PATIENCE_S = 60.0
"""How long a server may be away before following gives up: a restart of the suite takes seconds."""
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 3.0


class Stream(Protocol):
    """What a stub's streaming method returns."""

    def __aiter__(self) -> AsyncIterator[Any]: ...
    def cancel(self) -> bool: ...


async def follow(
    open_stream: Callable[[], Any],
    *,
    until: Callable[[Any], bool],
    timeout_s: float | None = None,
    patience_s: float = PATIENCE_S,
) -> AsyncIterator[Any]:
    """Give each state of a resource, the first at once, the last the one for which `until` is true.

    A stream that ends early or breaks with UNAVAILABLE is opened again, with growing pauses, for
    `patience_s` seconds counted from the last state seen. Leaving the iteration cancels the call.

    Raises:
        DeadlineExceeded: `timeout_s` seconds passed before `until` was true (FOLLOW_TIMEOUT).
        Unavailable: the server stayed away for `patience_s`.
        NotFound: the resource is gone.
    """
    end = None if timeout_s is None else time.monotonic() + timeout_s
    pause_s, seen = _FIRST_PAUSE_S, time.monotonic()
    while True:
        call = open_stream()
        try:
            states = aiter(call)
            while True:
                try:
                    async with asyncio.timeout(None if end is None else max(0.0, end - time.monotonic())):
                        state = await anext(states)
                except TimeoutError:
                    raise DeadlineExceeded(
                        f"Gave up after {timeout_s:g} s of waiting. It goes on without you.", reason="FOLLOW_TIMEOUT"
                    ) from None
                pause_s, seen = _FIRST_PAUSE_S, time.monotonic()
                yield state
                if until(state):
                    return
        except StopAsyncIteration:
            broken: Unavailable | None = None
        except Unavailable as error:
            broken = error
        finally:
            call.cancel()
        if time.monotonic() - seen > patience_s:
            raise broken or Unavailable("The server ends the stream each time it is opened.", reason="STREAM_ENDS")
        await asyncio.sleep(pause_s * random.uniform(0.7, 1.3))
        pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)


async def resume(
    open_stream: Callable[[], Any],
    *,
    retry: tuple[type[Exception], ...] = (Unavailable,),
    patience_s: float = PATIENCE_S,
) -> AsyncIterator[Any]:
    """Give each message of a stream, opening it again where it breaks; a stream that ends well is the end.

    The caller's `open_stream` asks from where it is, or drops what it had already.
    """
    pause_s, seen = _FIRST_PAUSE_S, time.monotonic()
    while True:
        call = open_stream()
        try:
            async for message in call:
                pause_s, seen = _FIRST_PAUSE_S, time.monotonic()
                yield message
            return
        except retry:
            if time.monotonic() - seen > patience_s:
                raise
        finally:
            call.cancel()
        await asyncio.sleep(pause_s * random.uniform(0.7, 1.3))
        pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
