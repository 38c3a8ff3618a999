"""A download to a new folder or file: hashed in one thread while another writes, without a copy in between.

The bytes of the files are never objects of Python's: they go from the socket into a few buffers, and from there into
the hash and the file.
"""

import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ekiben.archives import CHUNK_BYTES
from ekiben.errors import DataLoss, FailedPrecondition
from ekiben.hashing import AHEAD, Hasher

ReadInto = Callable[[memoryview], int]
"""Fills a buffer; fewer bytes than it has room for mean the end."""
_GZIP = b"\x1f\x8b"


def fetch(readinto: ReadInto, into: Path, digest: str, *, unpack: bool) -> None:
    """Read to the end; then the new folder `into` (or the tar file, without `unpack`) is there, or nothing is.

    Raises:
        DataLoss: what arrived has another digest than `digest`, unless that is empty (DIGEST_MISMATCH).
        FailedPrecondition: the archive cannot be unpacked (ARCHIVE_INVALID).
    """
    with Hasher() as hasher:
        stream = _Stream(readinto, hasher)
        if unpack:
            work = Path(tempfile.mkdtemp(prefix=f".{into.name}.", dir=into.parent))
            try:
                _unpack(stream, work)
                _check(hasher, digest)
                work.replace(into)
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
            return
        new = into.with_name(f".{into.name}.part")
        try:
            with new.open("wb", buffering=0) as out:
                stream.copy(None, out)
            _check(hasher, digest)
            new.replace(into)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


class _Stream:
    """A download as a file that can be read forwards."""

    def __init__(self, readinto: ReadInto, hasher: Hasher) -> None:
        self._readinto, self._hasher = readinto, hasher
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
            self._pass(len(here))
        return got

    def tell(self) -> int:
        """How many bytes have passed."""
        return self._at

    def seek(self, position: int) -> None:
        """Let pass what is before `position`. Raises tarfile.StreamError where that has passed already."""
        if position < self._at:
            raise tarfile.StreamError("the archive refers to what has passed")
        self.copy(position - self._at, None)

    def copy(self, size: int | None, out: BinaryIO | None) -> int:
        """Write the next `size` bytes, or all, to an unbuffered file, or nowhere; how many there were."""
        copied = 0
        while piece := self._here()[: None if size is None else size - copied]:
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
            self._ended = got < len(buffer)
            self._rest = buffer[:got]
            self._hasher.update(self._rest)
        return self._rest

    def _pass(self, count: int) -> None:
        self._rest = self._rest[count:]
        self._at += count


class _Tar(tarfile.TarFile):
    """Writes files straight from the stream."""

    def makefile(self, tarinfo: tarfile.TarInfo, targetpath: Any) -> None:
        """What tarfile calls for each file."""
        stream: Any = self.fileobj
        if tarinfo.sparse is not None:
            raise tarfile.ReadError("it holds a sparse file")
        stream.seek(tarinfo.offset_data)
        with open(targetpath, "wb", buffering=0) as out:
            if stream.copy(tarinfo.size, out) < tarinfo.size:
                raise tarfile.ReadError("unexpected end of data")


def _unpack(stream: _Stream, into: Path) -> None:
    """Unpack without leaving the folder: no absolute name, no `..`, no device (tarfile's `data` filter)."""
    source: Any = stream
    try:
        if stream.peek(2) == _GZIP:
            with tarfile.open(fileobj=source, mode="r|*", bufsize=CHUNK_BYTES) as tar:
                tar.extractall(into, filter="data")
        else:
            with _Tar(fileobj=source, mode="r") as tar:
                tar.extractall(into, filter="data")
        stream.copy(None, None)  # the blocks after its end
    except tarfile.TarError as error:
        raise FailedPrecondition(f"The archive cannot be unpacked: {error}.", reason="ARCHIVE_INVALID") from error


def _check(hasher: Hasher, digest: str) -> None:
    found = hasher.digest()
    if digest and found != digest:
        raise DataLoss(
            f"What arrived has the digest {found}, and {digest} was expected. Try again.",
            reason="DIGEST_MISMATCH",
            digest=digest,
        )
