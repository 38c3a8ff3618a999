"""A download to a new folder or file: hashed in one thread while another writes, without a copy in between.

The bytes of the files are never objects of Python's: they go from the socket into a few buffers, and from there into
the hash and the file. Until its digest is known to be right, all of it lies in a folder of another name (`kept.py`),
in which the next download of the same content goes on when this one is killed.
"""

import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from ekiben import locks
from ekiben.archives import CHUNK_BYTES
from ekiben.errors import DataLoss, FailedPrecondition, Unavailable
from ekiben.hashing import AHEAD, Hasher
from ekiben.kept import Kept
from ekiben.signed import Stopped

if sys.version_info >= (3, 11, 4):
    import tarfile
else:  # Debian 12 has 3.11.2, whose tarfile cannot refuse what leads out of the folder
    from backports import tarfile  # type: ignore[import-untyped,no-redef,unused-ignore]

ReadInto = Callable[[memoryview], int]
"""Fills a buffer as far as it can; no bytes mean the end. What came before an error is given before it is raised."""
_GZIP = b"\x1f\x8b"
_STALE_S = 7 * 86400
"""What nobody has gone on with for a week is removed."""


class Receiving:
    """One download. A context manager: it is kept for later where the server or the caller went away."""

    def __init__(self, into: Path, digest: str, *, unpack: bool, work: Path | None = None) -> None:
        self._into, self._digest, self._unpack = into, digest, unpack
        self._folder, self._lock = _place(into, digest, work)
        self._kept = Kept(self._folder)
        self._whole = self._folder / "whole"
        self.there_bytes = self._kept.there_bytes
        """How many of the first bytes are there from before; `take` wants those that follow."""
        if not unpack:
            self.there_bytes = self._whole.stat().st_size if self._whole.exists() else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._kept.close()
        away = isinstance(error, Unavailable | Stopped) or (error is not None and not isinstance(error, Exception))
        if not (away and self._digest):
            shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()

    def take(self, readinto: ReadInto) -> None:
        """Read to the end; then the new folder (or the tar file, without `unpack`) is there, or nothing is.

        Raises:
            DataLoss: what arrived has another digest, unless that is empty (DIGEST_MISMATCH).
            FailedPrecondition: the archive cannot be unpacked (ARCHIVE_INVALID), or a folder of the name has
                appeared meanwhile (TARGET_EXISTS).
        """
        with Hasher() as hasher:
            if self._unpack:
                _unpack(_Stream(_joined(self._kept.chunks(), readinto), hasher, self._kept), self._kept)
            else:
                stream = _Stream(_joined(_file(self._whole, self.there_bytes), readinto), hasher, None)
                with self._whole.open("ab", buffering=0) as out:
                    stream.copy(self.there_bytes, None)
                    stream.copy(None, out)
            self._check(hasher)
        done = self._kept.tree if self._unpack else self._whole
        try:
            done.replace(self._into)
        except OSError as error:
            if not self._into.is_dir():
                raise
            raise FailedPrecondition(
                f"{self._into} has appeared meanwhile.", reason="TARGET_EXISTS", path=str(self._into)
            ) from error

    def _check(self, hasher: Hasher) -> None:
        found = hasher.digest()
        if self._digest and found != self._digest:
            raise DataLoss(
                f"What arrived has the digest {found}, and {self._digest} was expected. Try again.",
                reason="DIGEST_MISMATCH",
                digest=self._digest,
            )


def _place(into: Path, digest: str, work: Path | None) -> tuple[Path, locks.Lock]:
    """A folder to work in, on the file system of `into`: that of the download before, unless somebody is at it."""
    base = into.parent
    if work is not None:
        with contextlib.suppress(OSError):
            work.mkdir(parents=True, exist_ok=True)
            if work.stat().st_dev == base.stat().st_dev:
                base = work
                _remove_stale(work)
    if digest:
        folder = base / f".{into.name}.{digest[7:23]}.part"
        folder.mkdir(exist_ok=True)
        if (lock := locks.take(folder / "lock")) is not None:
            return folder, lock
    folder = Path(tempfile.mkdtemp(prefix=f".{into.name}.", suffix=".part", dir=base))
    lock = locks.take(folder / "lock")
    assert lock is not None
    return folder, lock


def _remove_stale(work: Path) -> None:
    for folder in work.glob(".*.part"):
        with contextlib.suppress(OSError):
            if time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) < _STALE_S:
                continue
            if (lock := locks.take(folder / "lock")) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                lock.close()


def _joined(first: Iterator[bytes], then: ReadInto) -> ReadInto:
    """What is there, then what comes."""
    rest = memoryview(b"")

    def readinto(buffer: memoryview) -> int:
        nonlocal rest
        filled = 0
        while filled < len(buffer):
            rest = rest or memoryview(next(first, b""))
            if not rest:
                return filled or then(buffer)
            count = min(len(rest), len(buffer) - filled)
            buffer[filled : filled + count] = rest[:count]
            rest, filled = rest[count:], filled + count
        return filled

    return readinto


def _file(path: Path, size_bytes: int) -> Iterator[bytes]:
    if not size_bytes:
        return
    with path.open("rb") as file:
        while size_bytes and (data := file.read(min(CHUNK_BYTES, size_bytes))):
            size_bytes -= len(data)
            yield data


class _Stream:
    """A download as a file that can be read forwards."""

    def __init__(self, readinto: ReadInto, hasher: Hasher, kept: Kept | None) -> None:
        self._readinto, self._hasher, self._kept = readinto, hasher, kept
        # One is filled, one is being hashed, the others wait for that: `update` returns when it is so.
        self._buffers = [memoryview(bytearray(CHUNK_BYTES)) for _ in range(AHEAD + 2)]
        self._rest = memoryview(b"")
        self._at = 0
        self._ended = False

    def peek(self, size: int) -> bytes:
        """The next bytes, at most `size`, which are still to come."""
        return bytes(self._here()[:size])

    def read(self, size: int) -> bytes:
        """The next `size` bytes, or what there is."""
        got = b""
        while len(got) < size and (here := self._here()[: size - len(got)]):
            got += here
            self._keep(here)
            self._pass(len(here))
        return got

    def keep_nothing(self) -> None:
        """From here on no bytes are kept for another download."""
        self._kept = None

    def tell(self) -> int:
        """How many bytes have passed."""
        return self._at

    def seek(self, position: int) -> None:
        """Let pass what is before `position`. Raises tarfile.StreamError where that has passed already."""
        if position < self._at:
            raise tarfile.StreamError("the archive refers to what has passed")
        self.copy(position - self._at, None, keep=True)

    def copy(self, size: int | None, out: BinaryIO | None, *, keep: bool = False) -> int:
        """Write the next `size` bytes, or all, to an unbuffered file, or nowhere; how many there were.

        `keep` is for bytes that are no file's.
        """
        copied = 0
        while piece := self._here()[: None if size is None else size - copied]:
            if keep:
                self._keep(piece)
            self._pass(len(piece))
            copied += len(piece)
            while out is not None and piece:
                piece = piece[out.write(piece) :]
        return copied

    def _here(self) -> memoryview:
        if not self._rest and not self._ended:
            buffer = self._buffers[0]
            self._buffers.append(self._buffers.pop(0))
            got = self._readinto(buffer)
            self._ended = not got
            self._rest = buffer[:got]
            self._hasher.update(self._rest)
        return self._rest

    def _keep(self, piece: memoryview) -> None:
        if self._kept is not None:
            self._kept.keep(self._at, piece)

    def _pass(self, count: int) -> None:
        self._rest = self._rest[count:]
        self._at += count


class _Tar(tarfile.TarFile):
    """Writes files straight from the stream."""

    def __init__(self, kept: Kept, source: Any) -> None:
        self._kept_bytes = kept
        super().__init__(fileobj=source, mode="r")

    def makefile(self, tarinfo: tarfile.TarInfo, targetpath: Any) -> None:
        """What tarfile calls for each file."""
        stream: Any = self.fileobj
        if tarinfo.sparse is not None:
            raise tarfile.ReadError("it holds a sparse file")
        stream.seek(tarinfo.offset_data)
        there = self._kept_bytes.there_of(tarinfo.offset_data)
        if there is None:
            self._kept_bytes.begin(tarinfo.offset_data, tarinfo.size, targetpath)
        with open(targetpath, "ab" if there else "wb", buffering=0) as out:
            if there:
                out.truncate(there)
            passed = stream.copy(there or 0, None)
            if passed + stream.copy(tarinfo.size - passed, out) < tarinfo.size:
                raise tarfile.ReadError("unexpected end of data")


def _unpack(stream: _Stream, kept: Kept) -> None:
    """Unpack without leaving the folder: no absolute name, no `..`, no device (tarfile's `data` filter)."""
    source: Any = stream
    try:
        if stream.peek(2) == _GZIP:
            # Its bytes are not those of the files: what is read of it is kept nowhere, and it begins anew each time.
            stream.keep_nothing()
            with tarfile.open(fileobj=source, mode="r|*", bufsize=CHUNK_BYTES) as tar:
                tar.extractall(kept.tree, filter="data")
        else:
            with _Tar(kept, source) as tar:
                tar.extractall(kept.tree, filter="data")
        stream.copy(None, None, keep=True)  # the blocks after its end
    except tarfile.TarError as error:
        raise FailedPrecondition(f"The archive cannot be unpacked: {error}.", reason="ARCHIVE_INVALID") from error
