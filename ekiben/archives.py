"""A folder as the tar that it would be: its size known at once, any range of it readable, nothing written to disk.

The archive is deterministic (names in order, owner 0, whole seconds), so that equal folders give equal digests.
It is plain POSIX: ustar headers, with a pax extended header where a name or a size does not fit one.
Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header".
"""

import hashlib
import os
import stat
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ekiben.errors import FailedPrecondition, InvalidArgument

_BLOCK = 512
_RECORD = 10240  # tar files end on a whole record of 20 blocks
_LARGEST_USTAR_SIZE = 8**11 - 1
CHUNK_BYTES = 1 << 20
"""How much is read at once: large enough that Python's part in it does not show."""


@dataclass(frozen=True)
class FileRange:
    """Bytes of a file which go out as they are."""

    path: Path
    offset: int
    size_bytes: int

    def chunks(self) -> Iterator[bytes]:
        """The bytes in chunks of at most 1 MiB."""
        left = self.size_bytes
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while left:
                chunk = file.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise _changed(self.path)
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True)
class _Piece:
    start: int
    size: int
    data: bytes
    path: Path | None = None
    mtime_ns: int = 0


class Archive:
    """A byte string made of pieces, some of them in memory, some of them files."""

    def __init__(self, pieces: list[_Piece]) -> None:
        self._pieces = pieces
        self._starts = [piece.start for piece in pieces]
        last = pieces[-1]
        self.size_bytes = last.start + last.size
        """The size of the whole, in bytes."""

    def ranges(self, start: int, end: int) -> Iterator[bytes | FileRange]:
        """What makes up the bytes from `start` to `end`, in order.

        Raises:
            FailedPrecondition: a file was changed since the archive was laid out (FILE_CHANGED).
        """
        index = bisect_right(self._starts, start) - 1
        while start < end:
            piece = self._pieces[index]
            stop = min(end, piece.start + piece.size)
            offset = start - piece.start
            if piece.path is None:
                yield piece.data[offset : stop - piece.start]
            elif stop > start:
                _check_unchanged(piece)
                yield FileRange(piece.path, offset, stop - start)
            start, index = stop, index + 1

    def chunks(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` to `end`, read in chunks of at most 1 MiB."""
        for part in self.ranges(start, self.size_bytes if end is None else end):
            if isinstance(part, bytes):
                yield part
                continue
            yield from part.chunks()

    def digest(self, stop: Callable[[], bool] = lambda: False) -> str:
        """`sha256:<hex>` of the whole; `stop` is asked between chunks and ends the reading early."""
        hashed = hashlib.sha256()
        for chunk in self.chunks():
            hashed.update(chunk)
            if stop():
                break
        return f"sha256:{hashed.hexdigest()}"

    def fingerprint(self) -> str:
        """Hex that changes with the layout, or with the path, size or time of a file; no file is read for it."""
        hashed = hashlib.sha256()
        for piece in self._pieces:
            named = f"{piece.start} {piece.size} {piece.mtime_ns} {piece.path.absolute() if piece.path else ''}\n"
            hashed.update(named.encode("utf-8", "surrogateescape") + piece.data)
        return hashed.hexdigest()


def of_folder(folder: Path, *, exclude: Callable[[str], bool] = lambda name: False) -> Archive:
    """The tar of a folder, names starting with `./`. Symbolic links are followed: archives hold no links.

    `exclude` is asked with each name relative to the folder (`models/x`) and leaves out what it says yes to.

    Raises:
        NotFound, FailedPrecondition: the folder is not there, or holds something that is neither file nor folder.
    """
    if not folder.is_dir():
        raise FailedPrecondition(f"{folder} is not a folder.", reason="FOLDER_NOT_FOUND", path=str(folder))
    pieces: list[_Piece] = []
    at = 0

    def add(data: bytes, path: Path | None = None, size: int = 0, mtime_ns: int = 0) -> None:
        nonlocal at
        piece = _Piece(at, size if path else len(data), data, path, mtime_ns)
        if piece.size:
            pieces.append(piece)
            at += piece.size

    for name, path, status in _walk(folder, "", exclude, frozenset()):
        if stat.S_ISDIR(status.st_mode):
            mode = 0o700 if not name else status.st_mode & 0o777
            add(_header(f"./{name}/" if name else "./", 0, mode, int(status.st_mtime), b"5"))
            continue
        add(_header(f"./{name}", status.st_size, status.st_mode & 0o777, int(status.st_mtime), b"0"))
        add(b"", path, status.st_size, status.st_mtime_ns)
        add(bytes(-status.st_size % _BLOCK))
    end = at + 2 * _BLOCK
    add(bytes(2 * _BLOCK + -end % _RECORD))
    return Archive(pieces)


def of_file(path: Path) -> Archive:
    """A tar that somebody made already, sent as it is.

    Raises:
        FailedPrecondition: there is no such file, or it is empty.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise FailedPrecondition(
            f"{path} cannot be read: {error.strerror}.", reason="FILE_NOT_FOUND", path=str(path)
        ) from error
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        raise FailedPrecondition(f"{path} is not an archive.", reason="FILE_NOT_FOUND", path=str(path))
    return Archive([_Piece(0, status.st_size, b"", path, status.st_mtime_ns)])


def _walk(
    folder: Path, name: str, exclude: Callable[[str], bool], above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, Path, os.stat_result]]:
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise InvalidArgument(f"{folder} is a link to a folder that holds it.", reason="LINK_LOOP", path=str(folder))
    yield name, folder, status
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        relative = f"{name}/{entry.name}" if name else entry.name
        if exclude(relative):
            continue
        path = Path(entry.path)
        try:
            entered = entry.stat()
        except OSError as error:
            raise FailedPrecondition(
                f"{path} cannot be read: {error.strerror}.", reason="FILE_NOT_READABLE", path=str(path)
            ) from error
        if stat.S_ISDIR(entered.st_mode):
            yield from _walk(path, relative, exclude, above | {here})
        elif stat.S_ISREG(entered.st_mode):
            yield relative, path, entered
        else:
            raise FailedPrecondition(
                f"{path} is neither a file nor a folder.", reason="FILE_NOT_READABLE", path=str(path)
            )


def _header(name: str, size: int, mode: int, mtime: int, kind: bytes) -> bytes:
    """One entry's header: 512 bytes, or 1,536 and more with a pax header before it."""
    mtime = max(0, mtime)
    raw = os.fsencode(name)
    split = _split(raw)
    records = b""
    if split is None or not raw.isascii():
        records += _pax(b"path", os.fsdecode(raw).encode("utf-8", "surrogateescape"))
        split = (b"", raw[:100])
    if size > _LARGEST_USTAR_SIZE:
        records += _pax(b"size", str(size).encode())
    extended = b""
    if records:
        extended = _ustar((b"", b"././@PaxHeader"), len(records), 0o644, 0, b"x") + records
        extended += bytes(-len(records) % _BLOCK)
    return extended + _ustar(split, size if size <= _LARGEST_USTAR_SIZE else 0, mode, mtime, kind)


def _split(name: bytes) -> tuple[bytes, bytes] | None:
    """`(prefix, name)` of at most 155 and 100 bytes, or None where the name has no such split."""
    if len(name) <= 100:
        return b"", name
    cut = name.find(b"/", len(name) - 101)
    if 0 < cut <= 155 and cut < len(name) - 1:
        return name[:cut], name[cut + 1 :]
    return None


def _pax(key: bytes, value: bytes) -> bytes:
    """`LENGTH key=value\\n`, where LENGTH counts its own digits too."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _ustar(split: tuple[bytes, bytes], size: int, mode: int, mtime: int, kind: bytes) -> bytes:
    prefix, name = split
    fields = (
        name.ljust(100, b"\0")
        + b"%07o\0" % mode
        + b"0000000\0" * 2
        + b"%011o\0" % size
        + b"%011o\0" % mtime
        + b" " * 8
        + kind
        + bytes(100)
        + b"ustar\x0000"
        + bytes(64)
        + b"0000000\0" * 2
        + prefix.ljust(155, b"\0")
        + bytes(12)
    )
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


def _check_unchanged(piece: _Piece) -> None:
    assert piece.path is not None
    try:
        status = piece.path.stat()
    except OSError as error:
        raise _changed(piece.path) from error
    if (status.st_size, status.st_mtime_ns) != (piece.size, piece.mtime_ns):
        raise _changed(piece.path)


def _changed(path: Path) -> FailedPrecondition:
    return FailedPrecondition(
        f"{path} was changed while it was being sent. Send it again.", reason="FILE_CHANGED", path=str(path)
    )
