"""A download to a new folder or file, in threads: one stream, or ranges in parallel where that is faster."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ekiben import patience, ranges, receiving, signed
from ekiben.archives import CHUNK_BYTES
from ekiben.errors import DataLoss, Unavailable
from ekiben.registry.v1 import files_pb2

Write = Callable[[memoryview], object]
"""Takes some bytes, all of them, before they are overwritten."""


@dataclass(frozen=True)
class Source:
    """Where content can be read, and what it must be."""

    sign: Callable[[], str]
    """Gives a URL that is whole; blocks."""
    digest: str
    """`sha256:<hex>`."""
    size_bytes: int
    """0 where it is not known."""
    stop: signed.Stop
    progress: Callable[[int], None]
    parallel: Callable[[str], bool]
    """Whether what is at this URL comes faster over several connections."""


def fetch(source: Source, into: Path, *, unpack: bool, work: Path | None = None) -> None:
    """Fetch to the new folder `into`, or to the tar file `into` without `unpack`; going on where a killed one ended.

    What has come by then is kept beside `into`, or in the folder `work`, under a name made of the digest.

    Raises:
        As `receiving.Receiving.take`, and Unavailable: the server stayed away.
    """
    with receiving.Receiving(into, source.digest, unpack=unpack, work=work) as received:
        source.progress(received.there_bytes)
        with _opened(source, received.there_bytes) as readinto:

            def counted(buffer: memoryview) -> int:
                if source.stop.is_set():
                    raise signed.Stopped
                got = readinto(buffer)
                source.progress(got)
                return got

            received.take(counted)


def read_file(file: files_pb2.File, sign: Callable[[], str], write: Write, stop: signed.Stop) -> None:
    """Write one file of a content, and check its digest at the end. See `Files.read`."""
    hashed, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    end = file.offset + file.size_bytes
    with ranges.Ranges(sign, end, offset=file.offset, stop=stop, patience_s=patience.PATIENCE_S) as reading:
        while got := reading.readinto(buffer):
            hashed.update(buffer[:got])
            write(buffer[:got])
    if f"sha256:{hashed.hexdigest()}" != file.digest:
        raise DataLoss(
            f"What arrived of {file.path} has not the digest {file.digest}. Try again.",
            reason="DIGEST_MISMATCH",
            digest=file.digest,
        )


@contextlib.contextmanager
def _opened(source: Source, offset: int) -> Iterator[receiving.ReadInto]:
    if source.size_bytes - offset > 2 * ranges.RANGE_BYTES and source.parallel(url := source.sign()):
        first = [url]

        def sign() -> str:
            return first.pop() if first else source.sign()

        with ranges.Ranges(
            sign, source.size_bytes, offset=offset, stop=source.stop, patience_s=patience.PATIENCE_S
        ) as read:
            yield read.readinto
        return
    with _Stream(source, offset) as stream:
        yield stream.readinto


class _Stream:
    """One connection, which is taken up where it breaks."""

    def __init__(self, source: Source, offset: int) -> None:
        self._source, self._offset = source, offset
        self._pause_s, self._seen = 0.2, time.monotonic()
        self._connection = contextlib.ExitStack()
        self._read: Callable[[memoryview], int] | None = None
        self._error: Unavailable | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def readinto(self, buffer: memoryview) -> int:
        """See receiving.ReadInto."""
        if self._error is not None:
            raise self._error
        filled = 0
        try:
            while filled < len(buffer) and (got := self._some(buffer[filled:])):
                filled += got
                self._offset += got
        except Unavailable as error:
            if not filled:
                raise
            self._error = error
        return filled

    def _some(self, buffer: memoryview) -> int:
        if 0 < self._source.size_bytes <= self._offset:
            return 0
        while True:
            if self._source.stop.is_set():
                raise signed.Stopped
            try:
                if self._read is None:
                    self._read = self._connection.enter_context(
                        signed.get(self._source.sign(), self._offset, stop=self._source.stop)
                    )
                got = self._read(buffer)
            except Unavailable:
                self._connection.close()
                self._read = None
                if self._source.stop.is_set() or time.monotonic() - self._seen > patience.PATIENCE_S:
                    raise
                time.sleep(self._pause_s)
                self._pause_s = min(self._pause_s * 2, 5.0)
            else:
                self._pause_s, self._seen = 0.2, time.monotonic()
                return got
