"""The content of a model or a bento as it comes from the registry, hashed as it passes; one thread reads it."""

import asyncio
import contextlib
import hashlib
import logging
import queue
import random
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, BinaryIO, cast

import aiohttp
from opentelemetry import propagate
from yarl import URL

from ekiben.errors import DataLoss, InvalidArgument, Unavailable
from ekiben.registry.v1 import registry_pb2
from services.content.digest import Digest
from services.content.tar import GzipSource, Source

if TYPE_CHECKING:
    from ekiben.registry.v1 import registry_pb2_grpc

log = logging.getLogger(__name__)

_GZIP = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 20
_ATTEMPTS = 5
"""Without a byte in between."""


@contextlib.asynccontextmanager
async def incoming(
    uploads: "registry_pb2_grpc.UploadsAsyncStub", blobs_address: str, resource: str
) -> AsyncIterator["Incoming"]:
    """The archive of a resource, which begins to come at once; nothing more comes after the context.

    Whoever leaves has ended its thread first; `Incoming.stop` makes that soon.

    Args:
        uploads: stub of the registry's Uploads.
        blobs_address: the registry's bytes endpoint, `unix:/path` or `http://host:port`; not used
            for content that lies elsewhere.
        resource: `modelRepositories/…/models/…` or `bentoRepositories/…/bentos/…`.

    Raises:
        NotFound, FailedPrecondition: as SignDownload.
    """
    signed = await uploads.SignDownload(registry_pb2.SignDownloadRequest(resource=resource))
    content = Incoming(Digest.parse(signed.digest), signed.size_bytes)
    moving = asyncio.create_task(_move(content, _stream(uploads, blobs_address, resource, signed), resource))
    try:
        yield content
    finally:
        content.stop()
        moving.cancel()
        await asyncio.wait([moving])


async def _move(content: "Incoming", chunks: AsyncIterator[bytes], resource: str) -> None:
    try:
        async for chunk in chunks:
            if not content.offer(chunk):
                await asyncio.to_thread(content.give, chunk)
        content.end()
    except (aiohttp.ClientError, TimeoutError, OSError) as exc:
        content.end(unavailable(resource, exc))
    except Exception as error:
        content.end(error)  # whoever reads raises it


def unavailable(resource: str, cause: Exception) -> Unavailable:
    """Content that could not be had (BLOBS_UNAVAILABLE)."""
    return Unavailable(
        f"The content of {resource} could not be fetched: {cause}. Try again.",
        reason="BLOBS_UNAVAILABLE",
        resource=resource,
    )


class Incoming:
    """Bytes from the event loop to the thread that reads them, at most eight chunks ahead."""

    def __init__(self, digest: Digest, size_bytes: int) -> None:
        self.digest = digest
        """What the registry named when it was asked."""
        self._size_bytes = size_bytes
        self._chunks: queue.Queue[bytes | None] = queue.Queue(maxsize=8)
        self._error: Exception | None = None
        self._ended = False
        self._stopped = False
        self._rest = b""
        self._hashed = hashlib.sha256()

    def offer(self, chunk: bytes) -> bool:
        """Give a chunk, unless eight wait already."""
        try:
            self._chunks.put_nowait(chunk)
        except queue.Full:
            return False
        return True

    def give(self, chunk: bytes) -> None:
        """Give a chunk once there is room; at once when nobody reads any more. Blocks."""
        while not self._stopped:
            with contextlib.suppress(queue.Full):
                self._chunks.put(chunk, timeout=0.5)
                return

    def end(self, error: Exception | None = None) -> None:
        """No more bytes come; with an error the reader raises it."""
        if not self._ended:
            self._error, self._ended = error, True
            with contextlib.suppress(queue.Full):
                self._chunks.put_nowait(None)

    def stop(self) -> None:
        """Nobody wants more: a thread that reads ends with an error."""
        self.end(ConnectionError("nobody wants the rest"))
        self._stopped = True

    @contextlib.contextmanager
    def checked(self) -> Iterator[Source]:
        """What to read the archive from. At the end of the context the rest has been read and all of it is right.

        Raises:
            DataLoss: other bytes than the digest says came (BLOB_CORRUPT).
            Unavailable: the bytes endpoint could not be reached or broke off (BLOBS_UNAVAILABLE).
        """
        try:
            zipped = self.peek(2) == _GZIP
            yield GzipSource(cast("BinaryIO", self), self._size_bytes) if zipped else self
        except InvalidArgument as exc:
            self._check(exc)
            raise
        self._check()

    def _check(self, cause: Exception | None = None) -> None:
        while self.skip(_CHUNK_BYTES):
            pass
        if self._hashed.hexdigest() != self.digest.hex:
            raise DataLoss(
                f"Other bytes than {self.digest} came. Push the model or bento again with --force.",
                reason="BLOB_CORRUPT",
                digest=self.digest,
            ) from cause

    def _next(self) -> bytes:
        while True:
            try:
                chunk = self._chunks.get(timeout=0.5)
            except queue.Empty:
                if not self._ended:
                    continue
                chunk = None
            if self._error is not None:
                raise self._error
            if chunk is None:
                self._chunks.put(None)  # for whoever asks again
                return b""
            self._hashed.update(chunk)
            return chunk

    def read(self, size: int = -1) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        pieces, have = [self._rest], len(self._rest)
        while have < size and (chunk := self._next()):
            pieces.append(chunk)
            have += len(chunk)
        last = pieces[-1]
        cut = len(last) - max(have - size, 0)
        self._rest, pieces[-1] = last[cut:], last[:cut]
        return b"".join(pieces)

    def skip(self, size: int) -> int:
        """Pass over bytes; how many there were."""
        passed = 0
        while passed < size and (data := self.read(min(_CHUNK_BYTES, size - passed))):
            passed += len(data)
        return passed

    def peek(self, size: int) -> bytes:
        """The next bytes, left where they are."""
        first = self.read(size)
        self._rest = first + self._rest
        return first


async def _stream(
    uploads: "registry_pb2_grpc.UploadsAsyncStub", address: str, resource: str, signed: registry_pb2.SignedUrl
) -> AsyncIterator[bytes]:
    """The bytes at a signed URL. Where they break off they are taken up there, at a URL that is signed anew."""
    passed, failures = 0, 0
    while True:
        try:
            async for chunk in _get(address, signed.url, passed):
                passed, failures = passed + len(chunk), 0
                yield chunk
            return
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            failures += 1
            if failures == _ATTEMPTS:
                raise
            log.info("content is fetched on", extra={"resource": resource, "offset": passed, "cause": str(exc)})
        await asyncio.sleep(random.uniform(0.5, 1.0) * 0.2 * 2**failures)
        again = await uploads.SignDownload(registry_pb2.SignDownloadRequest(resource=resource))
        if again.digest != signed.digest:
            raise ConnectionError("it was replaced meanwhile")
        signed = again


async def _get(address: str, url: str, offset: int) -> AsyncIterator[bytes]:
    connector: aiohttp.BaseConnector = aiohttp.TCPConnector()
    headers: dict[str, str] = {}
    if "://" not in url:
        propagate.inject(headers)  # to our own only: some S3 servers refuse headers that were not signed
        if address.startswith("unix:"):
            connector = aiohttp.UnixConnector(address.removeprefix("unix:"))
            url = "http://registry" + url
        else:
            url = address.rstrip("/") + url
    if offset:
        headers["Range"] = f"bytes={offset}-"
    # No limit on the whole: a model may be large. A minute without a byte is a dead peer.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
        async with session.get(URL(url, encoded=True), headers=headers) as response:
            if response.status == 416 and offset:
                return  # it had come to its end
            response.raise_for_status()
            if offset and response.status != 206:
                raise ConnectionError(f"a range was asked for, and status {response.status} came")
            async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
                yield chunk
