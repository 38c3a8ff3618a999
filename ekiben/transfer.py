"""Bytes of models and bentos, to and from signed URLs: chunked, resumable, checked by digest.

The bytes pass in threads (`signed.py`), what is said about them passes over gRPC. A broken connection, a server
that restarts and a URL that expires in between are tried again for a while; a refusal is not.
"""

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Self, TypeVar

import grpc.aio

from ekiben import archives, receiving, signed
from ekiben.endpoints import Endpoint
from ekiben.errors import EkibenError, FailedPrecondition, Unavailable
from ekiben.registry.v1 import registry_pb2 as pb
from ekiben.registry.v1.registry_pb2_grpc import UploadsStub

T = TypeVar("T")
Progress = Callable[[int], None]
"""Told how many more bytes have passed; negative where some must pass again. Called from other threads."""

PART_BYTES = 64 << 20
"""Size of a part: lost at most when a connection breaks, and large enough that signing it does not show."""
_MOST_PARTS = 10_000
_PARALLEL_PARTS = 4
_PATIENCE_S = 60.0
_HASH_FIRST_BYTES = 64 << 20
"""Up to this size an archive is hashed before it is sent even to this machine: it may be there already."""


def no_progress(_: int) -> None:
    """Say nothing."""


class Transfer:
    """Uploads and downloads through one channel and the endpoint it leads to."""

    def __init__(self, channel: grpc.aio.Channel, endpoint: Endpoint) -> None:
        self._stub, self._endpoint = UploadsStub(channel), endpoint

    async def upload(
        self, resource: str, archive: archives.Archive, *, progress: Progress = no_progress, resume: str = ""
    ) -> tuple[pb.Upload, str]:
        """Give a model or a bento its bytes; returns the completed upload and the digest of what was sent.

        To a server elsewhere the archive is hashed first (bytes that are there already are not sent) and sent in
        parallel parts. On the same machine a large archive is sent whole and hashed meanwhile. `resume` names an
        upload that was left open: parts which arrived then are not sent again.

        Raises:
            FailedPrecondition: a file was changed meanwhile (FILE_CHANGED), or the bytes were refused.
            DataLoss: what arrived is not what was sent (DIGEST_MISMATCH).
            Unavailable: the server stayed away; the upload is left open, to be resumed.
        """
        stop = threading.Event()
        alone = self._endpoint.loopback and archive.size_bytes > _HASH_FIRST_BYTES and not resume
        hashing = asyncio.ensure_future(asyncio.to_thread(archive.digest, stop.is_set))
        upload = None
        try:
            if resume:
                upload = await self._stub.GetUpload(pb.GetUploadRequest(name=resume))
            else:
                digest = "" if alone else await hashing
                wanted = pb.Upload(resource=resource, digest=digest, size_bytes=archive.size_bytes)
                upload = await self._stub.CreateUpload(pb.CreateUploadRequest(upload=wanted))
            if upload.state == pb.Upload.COMPLETED:
                progress(archive.size_bytes)
                return upload, await hashing
            if alone or archive.size_bytes <= PART_BYTES:
                await self._put(upload.name, archive, 0, 0, archive.size_bytes, progress, stop)
                parts: list[pb.Upload.Part] = []
            else:
                parts = await self._put_parts(upload, archive, progress, stop)
            request = pb.CompleteUploadRequest(name=upload.name, parts=parts)
            completed = await _patiently(lambda: self._stub.CompleteUpload(request, timeout=600))
            return completed, await hashing
        except BaseException as error:
            if upload is not None and not isinstance(error, Unavailable):
                await self._abort(upload.name, error)
            raise
        finally:
            stop.set()
            hashing.cancel()

    async def _abort(self, name: str, error: BaseException) -> None:
        """Free the bytes of an upload that will not be completed; a failure to do so is the collector's."""
        said = str(error) or type(error).__name__
        with contextlib.suppress(EkibenError, TimeoutError, grpc.aio.AioRpcError):
            async with asyncio.timeout(5):
                await self._stub.AbortUpload(pb.AbortUploadRequest(name=name, failure=said[:500]))

    async def _put_parts(
        self, upload: pb.Upload, archive: archives.Archive, progress: Progress, stop: threading.Event
    ) -> list[pb.Upload.Part]:
        size = max(PART_BYTES, -(-archive.size_bytes // _MOST_PARTS))
        there = {part.part_number: part for part in upload.parts}
        limit = asyncio.Semaphore(_PARALLEL_PARTS)

        async def one(number: int) -> pb.Upload.Part:
            start = (number - 1) * size
            end = min(start + size, archive.size_bytes)
            if number in there and there[number].size_bytes == end - start:
                progress(end - start)
                return there[number]
            async with limit:
                etag = await self._put(upload.name, archive, number, start, end, progress, stop)
            return pb.Upload.Part(part_number=number, etag=etag, size_bytes=end - start)

        try:
            async with asyncio.TaskGroup() as group:
                count = -(-archive.size_bytes // size)
                tasks = [group.create_task(one(number)) for number in range(1, count + 1)]
        except BaseExceptionGroup as failed:
            raise _first(failed) from failed
        return [task.result() for task in tasks]

    async def _put(
        self,
        name: str,
        archive: archives.Archive,
        number: int,
        start: int,
        end: int,
        progress: Progress,
        stop: threading.Event,
    ) -> str:
        """PUT one part, again where the connection breaks; a URL is signed for each attempt."""
        address = self._addresses()

        async def attempt() -> str:
            url = await self._stub.SignUpload(pb.SignUploadRequest(name=name, part_number=number))
            counted = _Counted(progress)
            try:
                return await asyncio.to_thread(
                    signed.put,
                    address(url),
                    archive,
                    start,
                    end,
                    progress=counted,
                    stopped=stop.is_set,
                )
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError):
                    stop.set()
                counted.take_back()
                raise

        return await _patiently(attempt)

    async def download(
        self, resource: str, into: Path, *, digest: str, unpack: bool = True, progress: Progress = no_progress
    ) -> None:
        """Fetch the content of a model or a bento: unpacked to the new folder `into`, or as the tar file `into`.

        Nothing appears at `into` before the whole has passed and has the digest `sha256:<hex>`; a broken
        connection is taken up where it broke. `into` must not exist as a folder; a file is replaced.

        Raises:
            DataLoss: what arrived has another digest (DIGEST_MISMATCH).
            FailedPrecondition: the archive cannot be unpacked (ARCHIVE_INVALID), or `into` exists.
        """
        if unpack and into.exists():
            raise FailedPrecondition(f"{into} exists already.", reason="TARGET_EXISTS", path=str(into))
        into.parent.mkdir(parents=True, exist_ok=True)
        loop, stop, address = asyncio.get_running_loop(), threading.Event(), self._addresses()

        def sign() -> str:
            async def ask() -> pb.SignedUrl:
                return await self._stub.SignDownload(pb.SignDownloadRequest(resource=resource))

            return address(asyncio.run_coroutine_threadsafe(ask(), loop).result(60))

        try:
            await asyncio.to_thread(_fetch, sign, into, digest, unpack, progress, stop.is_set)
        finally:
            stop.set()

    def _addresses(self) -> Callable[[pb.SignedUrl], str]:
        """Where a signed URL is: the first time past the public port where we may; whatever comes of that, never
        again.
        """
        tried = False

        def address(url: pb.SignedUrl) -> str:
            nonlocal tried
            short = "" if tried else self._endpoint.shortcut(url.url, url.socket_path)
            tried = True
            return short or self._endpoint.resolve(url.url)

        return address


class _Counted:
    """Progress that can be taken back when an attempt fails."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._passed = progress, 0

    def __call__(self, count: int) -> None:
        self._passed += count
        self._progress(count)

    def take_back(self) -> None:
        self._progress(-self._passed)
        self._passed = 0


async def _patiently(attempt: Callable[[], Awaitable[T]]) -> T:
    """Try until it is no longer UNAVAILABLE, or a minute has passed since the last attempt began."""
    pause_s, begun = 0.2, time.monotonic()
    while True:
        started = time.monotonic()
        try:
            return await attempt()
        except Unavailable:
            # An attempt that ran for long got somewhere: it has earned its patience anew.
            if time.monotonic() - started > _PATIENCE_S / 2:
                begun = time.monotonic()
            if time.monotonic() - begun > _PATIENCE_S:
                raise
        await asyncio.sleep(pause_s * random.uniform(0.7, 1.3))
        pause_s = min(pause_s * 2, 5.0)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error of a group that says most: a refusal rather than what followed from it."""
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves.append(_first(error) if isinstance(error, BaseExceptionGroup) else error)
    return next((leaf for leaf in leaves if isinstance(leaf, EkibenError)), leaves[0])


class _Resumed:
    """A download that is taken up where a connection breaks."""

    def __init__(self, sign: Callable[[], str], progress: Progress, stopped: Callable[[], bool]) -> None:
        self._sign, self._progress, self._stopped = sign, progress, stopped
        self._offset, self._pause_s, self._seen = 0, 0.2, time.monotonic()
        self._connection = contextlib.ExitStack()
        self._read: Callable[[memoryview], int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer; fewer bytes than it has room for mean the end."""
        filled = 0
        while filled < len(buffer) and (got := self._some(buffer[filled:])):
            filled += got
            self._offset += got
            self._progress(got)
        return filled

    def _some(self, buffer: memoryview) -> int:
        while True:
            if self._stopped():
                raise signed.Stopped
            try:
                if self._read is None:
                    self._read = self._connection.enter_context(signed.get(self._sign(), self._offset))
                got = self._read(buffer)
            except Unavailable:
                self._connection.close()
                self._read = None
                if self._stopped() or time.monotonic() - self._seen > _PATIENCE_S:
                    raise
                time.sleep(self._pause_s)
                self._pause_s = min(self._pause_s * 2, 5.0)
            else:
                self._pause_s, self._seen = 0.2, time.monotonic()
                return got


def _fetch(
    sign: Callable[[], str],
    into: Path,
    digest: str,
    unpack: bool,
    progress: Progress,
    stopped: Callable[[], bool],
) -> None:
    with _Resumed(sign, progress, stopped) as download:
        receiving.fetch(download.readinto, into, digest, unpack=unpack)
