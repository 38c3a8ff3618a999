"""Trying again while a server is away."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ekiben.errors import EkibenError, Unavailable

T = TypeVar("T")

PATIENCE_S = 60.0
"""How long a server may stay away before a transfer gives up."""


async def patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """Try until it is no longer UNAVAILABLE, or a minute has passed since the last attempt began."""
    pause_s, begun = 0.2, time.monotonic()
    while True:
        started = time.monotonic()
        try:
            return await attempt()
        except Unavailable:
            # An attempt that ran for long got somewhere: it has earned its patience anew.
            if time.monotonic() - started > PATIENCE_S / 2:
                begun = time.monotonic()
            if time.monotonic() - begun > PATIENCE_S:
                raise
        await asyncio.sleep(pause_s * random.uniform(0.7, 1.3))
        pause_s = min(pause_s * 2, 5.0)


def first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error of a group that says most: a refusal rather than what followed from it."""
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves.append(first_of(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((leaf for leaf in leaves if isinstance(leaf, EkibenError)), leaves[0])
