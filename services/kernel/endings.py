"""How a process ends: in an orderly way, or with a sentence that a person can act on."""

import asyncio
import gc
import sys
from collections.abc import Coroutine, Iterator
from typing import Any

from services.kernel.settings import SettingsError


class NotStarted(Exception):
    """A component cannot be opened, for a reason that is no bug; the text is a sentence for whoever started it."""


# Objects that are made before the youngest are looked through. Python's 700 are one or two calls.
_YOUNG = 10_000

_owned = False


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a process's coroutine to its end.

    What stops the start is told on stderr without a traceback, and the process exits: with 2 where settings are wrong,
    with 1 where something is missing that they name. Any other error passes with its traceback: it is a bug.
    """
    global _owned
    _owned = True
    try:
        asyncio.run(main)
    except (asyncio.CancelledError, KeyboardInterrupt):
        sys.exit(130)  # a second signal: whoever sent it knows
    except (SettingsError, NotStarted, ExceptionGroup) as exc:
        # Components opened before have task groups, through which the error of a later one comes wrapped.
        causes = list(_leaves(exc))
        faults = [fault for cause in causes if isinstance(cause, SettingsError) for fault in cause.faults]
        sentences = [str(cause) for cause in causes if isinstance(cause, NotStarted)]
        if any(not isinstance(cause, SettingsError | NotStarted) for cause in causes):
            raise
        print("\n".join(([str(SettingsError(faults))] if faults else []) + sentences), file=sys.stderr)
        sys.exit(2 if faults else 1)


def settled() -> None:
    """To be called when all is open: what is alive then stays, and the garbage collector need not look at it again.

    A full collection walks everything that was imported, half a million objects: 150 ms in which no call is answered,
    after every second or so of work. Only in a process that `run` runs, since what is garbage now is never freed.
    """
    if _owned:
        gc.freeze()
        gc.set_threshold(_YOUNG)


def _leaves(exc: BaseException) -> Iterator[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        for inner in exc.exceptions:
            yield from _leaves(inner)
    else:
        yield exc
