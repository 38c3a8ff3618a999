"""The files of an archive, each with its digest, while the whole is hashed once more.

What a file's digest says is worth no more than what the content's says: both are computed from the same pass over the
same bytes, and the first counts only where the second is right.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from ekiben.hashing import Hasher
from services.content.digest import Digest
from services.content.tar import GzipSource, TarReader

COMPRESSED = -1
"""The offset of a file in an archive that is compressed."""
_GZIP = b"\x1f\x8b"
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ListedFile:
    """One file. `offset` is where its bytes begin in the archive, or COMPRESSED."""

    path: str
    size_bytes: int
    offset: int
    mode: int
    digest: Digest


class Listing:
    """Iterates over the files of an archive; `digest` is that of the whole, once the iteration has ended. Blocks.

    Without `whole` there is no such digest, for whom the archive gives its bytes through a hash of his own.

    Raises:
        InvalidArgument: it is no archive (ARCHIVE_INVALID).
    """

    def __init__(self, archive: BinaryIO, *, whole: bool = True) -> None:
        self._archive, self._whole = archive, whole
        self.digest: Digest | None = None

    def __iter__(self) -> Iterator[ListedFile]:
        packed = self._archive.seek(0, io.SEEK_END)
        self._archive.seek(0)
        with Hasher() as hasher:
            source = _Passed(self._archive, hasher if self._whole else None)
            zipped = source.peek() == _GZIP
            reader = TarReader(GzipSource(source, packed) if zipped else source)  # type: ignore[arg-type]
            for member in reader:
                if member.folder:
                    continue
                offset, sha256 = COMPRESSED if zipped else source.at, hashlib.sha256()
                while data := reader.read(_READ_BYTES):
                    sha256.update(data)
                yield ListedFile(member.path, member.size_bytes, offset, member.mode, Digest(sha256.hexdigest()))
            if self._whole:
                while source.skip(_READ_BYTES):
                    pass
                self.digest = Digest.parse(hasher.digest())


class _Passed:
    """A file read forwards, all of which goes through the hash: a source, and for gzip a file."""

    def __init__(self, file: BinaryIO, hasher: Hasher | None) -> None:
        self._file, self._hasher = file, hasher
        self._first = b""
        self.at = 0

    def peek(self) -> bytes:
        """The first two bytes, which are still to come."""
        self._first = self._file.read(2)
        self._pass(self._first)
        return self._first

    def _pass(self, data: bytes) -> None:
        if self._hasher is not None:
            self._hasher.update(data)

    def read(self, size: int = _READ_BYTES) -> bytes:
        """At most `size` bytes; fewer only at the end."""
        data, self._first = self._first[:size], self._first[size:]
        if len(data) < size:
            more = self._file.read(size - len(data))
            self._pass(more)
            data = data + more if data else more
        self.at += len(data)
        return data

    def skip(self, size: int) -> int:
        """Pass over bytes: they count too."""
        passed = 0
        while passed < size and (data := self.read(min(_READ_BYTES, size - passed))):
            passed += len(data)
        return passed
