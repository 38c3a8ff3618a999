"""The archives of models and bentos: checked before they are kept, unpacked where they run.

An archive is a tar, plain or gzipped, as a client sent it: names perhaps with a leading `./`, a bento with
`bento.yaml` and a model with `model.yaml` at its root.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import queue
import random
import secrets
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, Literal

import aiohttp
from opentelemetry import propagate
from yarl import URL

from ekiben.errors import DataLoss, EkibenError, InvalidArgument, Unavailable
from ekiben.registry.v1 import registry_pb2, registry_pb2_grpc
from services.content.digest import Digest
from services.content.files import make_folder, storage_error, sync_folder
from services.content.tar import GzipSource, SeekableSource, Source, TarReader, refused

log = logging.getLogger(__name__)

Kind = Literal["model", "bento"]
_DESCRIPTIONS = {"model": "model.yaml", "bento": "bento.yaml"}
_GZIP = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 20
_ATTEMPTS = 5
"""Without a byte in between."""


def check_archive(archive: Path | BinaryIO, kind: Kind) -> None:
    """Refuse an archive that is cut off, leads out of its folder, or holds anything but files and folders.

    Reads headers only (of a gzipped archive: everything). Blocks: call it in a thread.

    Raises:
        InvalidArgument: it is refused; the message says why (ARCHIVE_INVALID).
    """
    if isinstance(archive, Path):
        with archive.open("rb") as file:
            check_archive(file, kind)
        return
    end = archive.seek(0, os.SEEK_END)
    archive.seek(0)
    zipped = archive.read(2) == _GZIP
    archive.seek(0)
    source: Source = GzipSource(archive, end) if zipped else SeekableSource(archive)
    if not end:
        raise refused("it is empty")
    wanted = _DESCRIPTIONS[kind]
    found = False
    for member in TarReader(source):
        found = found or (member.path == wanted and not member.folder)
    if not found:
        raise refused(f"there is no {wanted} at its root, so it is no {kind}")


def unpack_archive(archive: Path, into: Path) -> None:
    """Unpack a checked archive into the folder `into`, which must not exist; all of it or nothing. Blocks."""
    with archive.open("rb") as file:
        zipped = file.read(2) == _GZIP
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        with _made_whole(into) as folder:
            _unpack(GzipSource(file, size) if zipped else SeekableSource(file), folder)


async def fetch_content(
    uploads: "registry_pb2_grpc.UploadsAsyncStub", blobs_address: str, resource: str, into: Path
) -> Digest:
    """Fetch the content of a model or a bento and unpack it as the folder `into`, unless that exists.

    The bytes are hashed and unpacked as they stream; `into` appears by a rename once they proved to be what the
    registry named. Returns the digest that the registry names for the resource at this moment.

    Args:
        uploads: stub of the registry's Uploads.
        blobs_address: the registry's bytes endpoint, `unix:/path` or `http://host:port`; not used
            for content that lies elsewhere.
        resource: `modelRepositories/…/models/…` or `bentoRepositories/…/bentos/…`.

    Raises:
        NotFound, FailedPrecondition: as SignDownload.
        DataLoss: other bytes than the digest says came (BLOB_CORRUPT).
        Unavailable: the bytes endpoint could not be reached or broke off (BLOBS_UNAVAILABLE).
        ResourceExhausted: no space to unpack it (STORAGE_FULL).
    """
    signed = await uploads.SignDownload(registry_pb2.SignDownloadRequest(resource=resource))
    digest = Digest.parse(signed.digest)
    if into.exists():
        return digest
    feed = _Feed(signed.size_bytes)
    unpacking = asyncio.create_task(asyncio.to_thread(_unpack_stream, feed, into, digest))
    try:
        async for chunk in _stream(uploads, blobs_address, resource, signed):
            if not feed.offer(chunk):
                await asyncio.to_thread(feed.give, chunk)
            if unpacking.done():
                break
        feed.end(whole=True)
        await asyncio.shield(unpacking)
    except (aiohttp.ClientError, TimeoutError, OSError) as exc:
        raise Unavailable(
            f"The content of {resource} could not be fetched: {exc}. Try again.",
            reason="BLOBS_UNAVAILABLE",
            resource=resource,
        ) from exc
    finally:
        feed.end(whole=False)
        await asyncio.wait([unpacking])
        unpacking.exception()
    return digest


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


class _Feed:
    """Bytes from the event loop to the thread that unpacks, at most eight chunks ahead."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._chunks: queue.Queue[bytes | None] = queue.Queue(maxsize=8)
        self._broken = False
        self._ended = False
        self.unread = False
        self._rest = b""
        self.sha256 = hashlib.sha256()

    def offer(self, chunk: bytes) -> bool:
        """Give a chunk, unless eight wait already."""
        try:
            self._chunks.put_nowait(chunk)
        except queue.Full:
            return False
        return True

    def give(self, chunk: bytes) -> None:
        """Give a chunk once there is room; at once when nobody reads any more. Blocks."""
        while not self.unread:
            with contextlib.suppress(queue.Full):
                self._chunks.put(chunk, timeout=0.5)
                return

    def end(self, *, whole: bool) -> None:
        """No more bytes come; not `whole` makes the reader fail."""
        if self._ended:
            return
        self._ended = True
        self._broken = not whole
        with contextlib.suppress(queue.Full):
            self._chunks.put_nowait(None)

    def _next(self) -> bytes:
        while True:
            try:
                chunk = self._chunks.get(timeout=0.5)
            except queue.Empty:
                if not self._ended:
                    continue
                chunk = None
            if chunk is None or self._broken:
                if self._broken:
                    raise ConnectionError("the stream broke off")
                self._chunks.put(None)  # for whoever asks again
                return b""
            self.sha256.update(chunk)
            return chunk

    def read(self, size: int = -1) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        pieces = [self._rest]
        have = len(self._rest)
        while have < size and (chunk := self._next()):
            pieces.append(chunk)
            have += len(chunk)
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        data, self._rest = data[:size], data[size:]
        return data

    def skip(self, size: int) -> int:
        """Pass over bytes."""
        passed = 0
        while passed < size and (data := self.read(min(_CHUNK_BYTES, size - passed))):
            passed += len(data)
        return passed

    def peek(self, size: int) -> bytes:
        """The first bytes, left where they are."""
        first = self.read(size)
        self._rest = first + self._rest
        return first


def _unpack_stream(feed: _Feed, into: Path, digest: Digest) -> None:
    try:
        with _made_whole(into) as folder:
            if feed.peek(2) == _GZIP:
                _unpack(GzipSource(feed, 0), folder)  # type: ignore[arg-type]
            else:
                _unpack(feed, folder)
            while feed.skip(_CHUNK_BYTES):
                pass
            if feed.sha256.hexdigest() != digest.hex:
                raise DataLoss(
                    f"Other bytes than {digest} came. Push the model or bento again with --force.",
                    reason="BLOB_CORRUPT",
                    digest=digest,
                )
    except InvalidArgument as exc:
        if feed.sha256.hexdigest() != digest.hex:
            raise DataLoss(f"Other bytes than {digest} came.", reason="BLOB_CORRUPT", digest=digest) from exc
        raise
    finally:
        feed.unread = True


@contextlib.contextmanager
def _made_whole(into: Path):  # type: ignore[no-untyped-def]
    """A folder beside `into` that is renamed to it at the end; one that appeared meanwhile is left."""
    make_folder(into.parent)
    folder = into.with_name(f".{into.name}.{secrets.token_hex(6)}")
    folder.mkdir(mode=0o700)
    try:
        yield folder
        try:
            folder.rename(into)
        except OSError:
            if not into.is_dir():
                raise
        sync_folder(into.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(source: Source, folder: Path) -> None:
    reader = TarReader(source)
    try:
        for member in reader:
            path = folder / member.path
            if member.folder:
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            # Nothing in `folder` is a link, since no member can be one: this writes below it.
            with open(path, "wb", buffering=0) as file:
                while data := reader.read(_CHUNK_BYTES):
                    file.write(data)
                os.fsync(file.fileno())
            path.chmod((member.mode & 0o755) | 0o600)
            with contextlib.suppress(OSError, OverflowError, ValueError):
                os.utime(path, (member.modify_time, member.modify_time))
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as exc:
        raise refused("one name is both a file and a folder") from exc
    except OSError as exc:
        raise storage_error(exc) from exc


__all__ = ["EkibenError", "Kind", "check_archive", "fetch_content", "unpack_archive"]
