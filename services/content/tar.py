"""Reading tar archives that nobody vouches for.

A reader of our own rather than `tarfile`: it holds one header at a time, so that neither a million entries nor a
header that claims gigabytes costs memory, and the same code that checks an archive unpacks it later, so that the
two cannot read it differently. It takes what BentoML's clients and GNU tar write of files and folders (ustar, PAX
and GNU long names) and refuses links, devices, sparse files and whatever else an archive could hold.

Source: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Header Block"; GNU tar manual, "Basic Tar Format".
"""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

from ekiben.errors import InvalidArgument

_BLOCK = 512
_MAX_HEADER_BYTES = 1 << 20
"""Of one PAX header or long name: a path has at most 4,096 bytes, and nothing else in there is used."""
_MAX_PATH_BYTES = 4096
_MAX_SEGMENT_BYTES = 255
MAX_MEMBERS = 1_000_000
"""Files and folders of one archive: each costs an inode, whatever its size."""
_MAX_RATIO = 200
"""Unpacked to packed size of a gzip archive; weights seldom shrink to less than a tenth."""
_FREE_BYTES = 1 << 30
"""Unpacked size that is allowed whatever the ratio."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file or folder. `path` is relative, without `.` and `..`; empty for the root."""

    path: str
    folder: bool
    mode: int
    modify_time: float
    size_bytes: int


class Source(Protocol):
    """Where an archive is read from, forward only."""

    def read(self, size: int) -> bytes:
        """At most `size` bytes; fewer only at the end."""
        ...

    def skip(self, size: int) -> int:
        """Pass over bytes; how many there were."""
        ...


class SeekableSource:
    """A plain archive in a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._end = file.seek(0, io.SEEK_END)
        file.seek(0)

    def read(self, size: int) -> bytes:
        """At most `size` bytes."""
        return self._file.read(size)

    def skip(self, size: int) -> int:
        """Pass over bytes by seeking."""
        here = self._file.tell()
        passed = min(size, self._end - here)
        self._file.seek(here + passed)
        return passed


class GzipSource:
    """A compressed archive; refuses to go on past a size that only a bomb has."""

    def __init__(self, file: BinaryIO, packed_bytes: int) -> None:
        self._file = gzip.GzipFile(fileobj=file, mode="rb")
        self._left = max(_FREE_BYTES, packed_bytes * _MAX_RATIO)

    def read(self, size: int) -> bytes:
        """At most `size` bytes, unpacked."""
        try:
            data = self._file.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
            raise refused("the gzip stream is damaged or ends early") from exc
        self._left -= len(data)
        if self._left < 0:
            raise refused(f"it unpacks to more than {_MAX_RATIO} times its size")
        return data

    def skip(self, size: int) -> int:
        """Pass over bytes by unpacking them."""
        passed = 0
        while passed < size and (data := self.read(min(1 << 20, size - passed))):
            passed += len(data)
        return passed


def refused(why: str) -> InvalidArgument:
    """An archive that is not taken (ARCHIVE_INVALID)."""
    return InvalidArgument(f"The archive is refused: {why}.", reason="ARCHIVE_INVALID", cause=why)


class TarReader:
    """Iterates over the members of an archive; `read` gives the bytes of the one just returned.

    Raises:
        InvalidArgument: anything but a whole archive of files and folders (ARCHIVE_INVALID).
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._left = 0
        self._padding = 0
        self._pax: dict[str, str] = {}

    def read(self, size: int) -> bytes:
        """The next bytes of the current member; empty at its end."""
        size = min(size, self._left)
        if not size:
            return b""
        data = self._source.read(size)
        if not data:
            raise refused("it ends in the middle of a file")
        self._left -= len(data)
        return data

    def __iter__(self) -> Iterator[Member]:
        count = 0
        while (member := self._next()) is not None:
            count += 1
            if count > MAX_MEMBERS:
                raise refused(f"it holds more than {MAX_MEMBERS:,} files and folders")
            yield member

    def _next(self) -> Member | None:
        self._pass_over(self._left + self._padding)
        self._left = self._padding = 0
        long_name = ""
        own: dict[str, str] = {}
        while True:
            block = self._source.read(_BLOCK)
            if len(block) < _BLOCK:
                raise refused("it ends without the mark of its end: it was cut off")
            if not any(block):
                return None
            kind = block[156:157]
            size = _number(block[124:136], "size")
            if not _checksum_fits(block):
                raise refused("a header is damaged")
            if kind in (b"x", b"g", b"L", b"K"):
                if size > _MAX_HEADER_BYTES:
                    raise refused("an extended header is too large")
                data = self._read_exactly(size)
                self._pass_over(-size % _BLOCK)
                if kind == b"x":
                    own = _pax_records(data)
                elif kind == b"g":
                    self._pax.update(_pax_records(data))
                elif kind == b"L":
                    long_name = _text(data.rstrip(b"\0"))
                continue
            return self._member(block, kind, size, long_name, {**self._pax, **own})

    def _member(self, block: bytes, kind: bytes, size: int, long_name: str, pax: dict[str, str]) -> Member:
        name = _text(block[:100].split(b"\0", 1)[0])
        if block[257:263] == b"ustar\0" and (prefix := block[345:500].split(b"\0", 1)[0]):
            name = f"{_text(prefix)}/{name}"
        name = pax.get("path", long_name or name)
        if kind in (b"1", b"2"):
            raise refused(f"{_shown(name)} is a link")
        if kind in (b"3", b"4", b"6"):
            raise refused(f"{_shown(name)} is a device or a pipe")
        if kind == b"S" or any(key.startswith("GNU.sparse") for key in pax):
            raise refused(f"{_shown(name)} is a sparse file")
        folder = kind == b"5" or (kind in (b"0", b"\0") and name.endswith("/"))
        if not folder and kind not in (b"0", b"\0", b"7"):
            raise refused(f"{_shown(name)} is neither a file nor a folder")
        if "size" in pax:
            size = _decimal(pax["size"])
        path = _path(name)
        if folder:
            size = 0  # some writers leave the size of the folder's own data there, without any data
        elif not path:
            raise refused("its root is a file")
        self._left, self._padding = size, -size % _BLOCK
        mode = _number(block[100:108], "mode")
        try:
            modify_time = float(pax["mtime"]) if "mtime" in pax else float(_number(block[136:148], "time"))
        except (ValueError, OverflowError):
            modify_time = 0.0
        return Member(path, folder, mode, modify_time, size)

    def _read_exactly(self, size: int) -> bytes:
        data = self._source.read(size)
        if len(data) < size:
            raise refused("it ends in the middle of a header")
        return data

    def _pass_over(self, size: int) -> None:
        if size and self._source.skip(size) < size:
            raise refused("it ends in the middle of a file")


def _path(name: str) -> str:
    if name.startswith("/"):
        raise refused(f"{_shown(name)} is an absolute path")
    if "\0" in name or len(os.fsencode(name)) > _MAX_PATH_BYTES:
        raise refused(f"{_shown(name)} is not a path")
    segments = [segment for segment in name.split("/") if segment not in ("", ".")]
    if ".." in segments:
        raise refused(f"{_shown(name)} leads out of the archive")
    if any(len(os.fsencode(segment)) > _MAX_SEGMENT_BYTES for segment in segments):
        raise refused(f"{_shown(name)} has a name longer than {_MAX_SEGMENT_BYTES} bytes")
    return "/".join(segments)


def _pax_records(data: bytes) -> dict[str, str]:
    records: dict[str, str] = {}
    position = 0
    while position < len(data) and data[position] != 0:
        space = data.find(b" ", position, position + 20)
        digits = data[position:space]
        if space < 0 or not digits.isdigit():
            raise refused("an extended header is damaged")
        end = position + int(digits)
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end > len(data) or end <= space or data[end - 1 : end] != b"\n" or not equals:
            raise refused("an extended header is damaged")
        records[_text(key)] = _text(value)
        position = end
    return records


def _number(field: bytes, what: str) -> int:
    """Octal digits, or base-256 where the first bit is set (GNU)."""
    if field[0] & 0x80:
        if field[0] != 0x80:  # 0xff is a negative number
            raise refused(f"a header has a {what} out of range") if what == "size" else refused("a header is damaged")
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    try:
        if text and not all(digit in b"01234567" for digit in text):
            raise ValueError
        return int(text or b"0", 8)
    except ValueError:
        raise refused(f"a header has no readable {what}") from None


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise refused("a header has no readable size")
    return int(text)


def _checksum_fits(block: bytes) -> bool:
    wanted = _number(block[148:156], "checksum")
    bare = block[:148] + b" " * 8 + block[156:]
    if sum(bare) == wanted:
        return True
    return sum(byte - 256 if byte > 127 else byte for byte in bare) == wanted  # as old programs summed


def _text(data: bytes) -> str:
    return os.fsdecode(data)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 100 else name[:100] + "…").encode("utf-8", "replace").decode()
