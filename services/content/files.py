"""Durable files: written whole or not at all, in the order that a crash needs.

A name counts only once the folder that holds it is synced, and a folder may reach the disk before the bytes
of a file in it; so bytes first, then the rename, then the folder.
"""

import contextlib
import errno
import os
import secrets
from pathlib import Path

from ekiben.errors import EkibenError, ResourceExhausted

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def sync_folder(folder: Path) -> None:
    """Make renames, links and removals in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path, mode: int = 0o700) -> None:
    """Make `folder` and its parents, durably. One that exists is left as it is."""
    if folder.is_dir():
        return
    make_folder(folder.parent, mode)
    folder.mkdir(mode=mode, exist_ok=True)
    sync_folder(folder.parent)


def touch(path: Path) -> None:
    """Say that something is used now, by its time. What is gone, or another's, is left alone."""
    with contextlib.suppress(OSError):
        os.utime(path)


def write_whole(path: Path, content: bytes, mode: int = 0o600, *, durable: bool = True) -> None:
    """Replace the file at `path` by `content`: after a crash it is the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(fd)
        temporary.rename(path)
    except BaseException as exc:
        temporary.unlink(missing_ok=True)
        if isinstance(exc, OSError):
            exc.filename = str(path)  # a failed write names no file, a failed rename the temporary one too
            del exc.filename2
        raise
    if durable:
        sync_folder(path.parent)


def storage_error(exc: OSError, image: str = "") -> EkibenError | OSError:
    """The error for a full disk or quota (STORAGE_FULL); any other is given back as it is.

    `image` says where, if it is an image that is written and not the registry's storage.
    """
    if exc.errno in _FULL and image:
        return ResourceExhausted(
            f"The disk is full, or its quota, where {image} is written: nothing was tagged. Free some space there and "
            "try again.",
            reason="STORAGE_FULL",
        )
    if exc.errno in _FULL:
        return ResourceExhausted(
            "The registry's storage is full: nothing was kept. Free space there, then send again.",
            reason="STORAGE_FULL",
        )
    return exc
