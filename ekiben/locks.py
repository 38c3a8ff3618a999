"""Locks of files, which end with the process that holds them."""

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # not POSIX: nobody else is looked out for
    fcntl = None  # type: ignore[assignment]


class Lock:
    """A lock that is held."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        """Let go."""
        os.close(self._fd)


def take(path: Path) -> Lock | None:
    """The lock of a file, made when absent; None where somebody holds it, or its folder is being removed."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    except OSError:
        return None
    try:
        if fcntl is not None:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held it may have removed it meanwhile: then it locks nothing that others see.
        if path.stat().st_ino == os.fstat(fd).st_ino:
            return Lock(fd)
    except OSError:
        pass
    os.close(fd)
    return None
