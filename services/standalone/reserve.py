"""Room set aside on the disk of the data directory, so that the platform can start where not a byte is left.

A database that was not closed makes its index anew at the next start, and routes are written; what a start frees for
that, others that write to the same disk (Envoy with its captures) take first.
"""

import asyncio
import contextlib
import logging
import os
import shutil
from pathlib import Path

log = logging.getLogger(__name__)

RESERVE_BYTES = 8 << 20
_LOOK_AGAIN_S = 10.0


def release(data: Path) -> None:
    """Give the room back where the disk has less than that. The next `set_aside` takes it anew."""
    file = data / "reserve"
    (data / "reserve.part").unlink(missing_ok=True)
    if file.exists() and shutil.disk_usage(data).free < RESERVE_BYTES:
        log.warning("the disk is full; this start takes the room that is kept for it", extra={"data": str(data)})
        file.unlink()


def set_aside(data: Path) -> None:
    """Take the room, unless that leaves less than as much again to others."""
    file = data / "reserve"
    with contextlib.suppress(OSError):
        if file.exists() or shutil.disk_usage(data).free < 2 * RESERVE_BYTES:
            return
        # Under another name first: a start must not count on a part of it.
        part = data / "reserve.part"
        try:
            with open(part, "wb") as made:
                os.posix_fallocate(made.fileno(), 0, RESERVE_BYTES)
            part.rename(file)
        finally:
            part.unlink(missing_ok=True)


async def keep(data: Path, stop: asyncio.Event) -> None:
    """Set the room aside as soon as there is some, until `stop`."""
    while not stop.is_set():
        set_aside(data)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _LOOK_AGAIN_S)
