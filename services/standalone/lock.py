"""One process a data directory: a lock that the kernel gives back however the holder ends."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.kernel.settings import SettingsError


@contextmanager
def locked(data: Path) -> Iterator[None]:
    """Hold the data directory, made when it is not there.

    Raises:
        SettingsError: another process holds it, or it cannot be made or written to.
    """
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise unusable(data, exc) from exc
    with os.fdopen(descriptor, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read().strip() or "unknown"
            raise SettingsError(
                [f"The data directory {data} is in use by process {holder}; stop that one, or name another --data."]
            ) from None
        try:
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
        except OSError as exc:
            raise unusable(data, exc) from exc
        yield


def unusable(data: Path, exc: OSError) -> SettingsError:
    """What to say of a data directory in which something cannot be made or written."""
    instead = "make room there" if exc.errno == errno.ENOSPC else "give this one to the user who runs it"
    why = exc.strerror or str(exc)
    return SettingsError([f"The data directory {data} cannot be used: {why}. Name another with --data, or {instead}."])
