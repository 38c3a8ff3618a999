"""An upload from its opening to its end: whole or in parallel parts, begun anew or taken up where another ended."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import grpc.aio

from ekiben import pending, signed
from ekiben.archives import Archive
from ekiben.errors import EkibenError, FailedPrecondition, NotFound, Unavailable
from ekiben.patience import first_of, patiently
from ekiben.pending import Pending
from ekiben.registry.v1 import registry_pb2 as pb

if TYPE_CHECKING:
    from ekiben.registry.v1.registry_pb2_grpc import UploadsAsyncStub

Progress = Callable[[int], None]
"""Told how many more bytes have passed; negative where some must pass again. Called from other threads."""

PART_BYTES = 64 << 20
"""Size of a part: lost at most when a connection breaks, and large enough that signing it does not show."""
MOST_PARTS = 10_000
PARALLEL_PARTS = 4
_COMPLETE_S = 600.0
_READ_BACK_BYTES_PER_S = 50e6
"""The registry reads what lies in an object store once more before anybody sees it; this is a slow one."""
HASH_FIRST_BYTES = 64 << 20
"""Up to this size an archive is hashed before it is sent, which takes no time to speak of: it may be there already."""


@dataclass
class Uploading:
    """One archive on its way to one resource."""

    stub: "UploadsAsyncStub"
    server: str
    """Names the server, for what is remembered of uploads to it."""
    address: Callable[[pb.SignedUrl], str]
    resource: str
    archive: Archive
    progress: Progress
    near: bool
    """Whether the registry is on this machine."""
    stop: signed.Stop = field(default_factory=signed.Stop)

    async def run(self, *, resume: bool, open_upload: str) -> tuple[pb.Upload, str]:
        """See `Transfer.upload`."""
        kept = pending.load(self.server, self.resource) if resume else None
        if kept is not None and kept.fingerprint != self.archive.fingerprint():
            kept = None
        hashing = asyncio.ensure_future(self._digest(kept.digest if kept else ""))
        try:
            begun = await self._begun(hashing, kept, open_upload) if resume else None
            if begun is None:
                begun = await self._begin(hashing, whole_is_fine=self.near and not resume)
            return await self._send(*begun, hashing)
        finally:
            self.stop.set()
            hashing.cancel()

    async def _digest(self, known: str) -> str:
        return known or await asyncio.to_thread(self.archive.digest, self.stop.is_set)

    async def _begun(
        self, hashing: "asyncio.Future[str]", kept: Pending | None, open_upload: str
    ) -> tuple[pb.Upload, int] | None:
        """An upload of these bytes that did not end, with the size of its parts: what this machine remembers, else
        what the registry has, whoever began it."""
        if kept is not None:
            with contextlib.suppress(NotFound):
                upload = await self.stub.GetUpload(pb.GetUploadRequest(name=kept.upload))
                if upload.state in (pb.Upload.OPEN, pb.Upload.COMPLETED):
                    return upload, kept.part_bytes
        if open_upload:
            with contextlib.suppress(NotFound):
                upload = await self.stub.GetUpload(pb.GetUploadRequest(name=open_upload))
                size = max((part.size_bytes for part in upload.parts), default=0)
                if upload.state == pb.Upload.OPEN and size and upload.digest and upload.digest == await hashing:
                    return upload, size
        return None

    async def _begin(self, hashing: "asyncio.Future[str]", *, whole_is_fine: bool) -> tuple[pb.Upload, int]:
        """A new upload, with the size of its parts; 0 for the whole in one piece."""
        size = self.archive.size_bytes
        upload = await self._create(await hashing if size <= HASH_FIRST_BYTES else "")
        if upload.digest_wanted:
            await self._abort(upload.name, "Begun again with its digest.")
            upload = await self._create(await hashing)
        if upload.state == pb.Upload.COMPLETED or size <= PART_BYTES:
            return upload, 0
        if whole_is_fine:
            # A registry that keeps its bytes itself takes them whole from its own machine; an object store does not.
            url = await self.stub.SignUpload(pb.SignUploadRequest(name=upload.name, part_number=1))
            if url.url.startswith("/") or not url.url.startswith("http"):
                return upload, 0
        return upload, max(PART_BYTES, -(-size // MOST_PARTS))

    async def _create(self, digest: str) -> pb.Upload:
        wanted = pb.Upload(resource=self.resource, digest=digest, size_bytes=self.archive.size_bytes)
        return await self.stub.CreateUpload(pb.CreateUploadRequest(upload=wanted))

    async def _send(self, upload: pb.Upload, part_bytes: int, hashing: "asyncio.Future[str]") -> tuple[pb.Upload, str]:
        if upload.state == pb.Upload.COMPLETED:
            self.progress(self.archive.size_bytes)
            pending.forget(self.server, self.resource)
            return upload, await hashing
        remembering: asyncio.Future[None] | None = None
        if part_bytes:
            digest = hashing.result() if hashing.done() else upload.digest
            kept = Pending(self.resource, upload.name, part_bytes, self.archive.fingerprint(), digest)
            pending.save(self.server, kept)
            remembering = asyncio.ensure_future(self._remember(kept, hashing))
        try:
            if part_bytes:
                completed = await self._in_parts(upload, part_bytes)
            else:
                await self._put(upload.name, 0, 0, self.archive.size_bytes)
                completed = await self._complete(upload.name, [])
            digest = await hashing
        except BaseException as error:
            away = isinstance(error, Unavailable) or (part_bytes and not isinstance(error, Exception))
            if not away:
                pending.forget(self.server, self.resource)
                await self._abort(upload.name, str(error) or type(error).__name__)
            raise
        finally:
            if remembering is not None:
                remembering.cancel()
        pending.forget(self.server, self.resource)
        return completed, digest

    async def _in_parts(self, upload: pb.Upload, part_bytes: int) -> pb.Upload:
        """Send what is missing, and complete; again where the registry has lost parts meanwhile, as a machine that
        was restarted does."""
        tries = 3
        while True:
            parts = await self._put_parts(upload, part_bytes)
            try:
                return await self._complete(upload.name, parts)
            except FailedPrecondition as error:
                tries -= 1
                if error.reason != "UPLOAD_INCOMPLETE" or not tries:
                    raise
            upload = await self.stub.GetUpload(pb.GetUploadRequest(name=upload.name))
            self.progress(-self.archive.size_bytes)

    async def _complete(self, name: str, parts: list[pb.Upload.Part]) -> pb.Upload:
        request = pb.CompleteUploadRequest(name=name, parts=parts)
        timeout_s = max(_COMPLETE_S, self.archive.size_bytes / _READ_BACK_BYTES_PER_S)
        return await patiently(lambda: self.stub.CompleteUpload(request, timeout=timeout_s))

    async def _remember(self, kept: Pending, hashing: "asyncio.Future[str]") -> None:
        """The digest too, once it is known: whoever resumes need not read all files for it again."""
        pending.save(self.server, replace(kept, digest=await asyncio.shield(hashing)))

    async def _abort(self, name: str, failure: str) -> None:
        """Free the bytes of an upload that will not be completed; a failure to do so is the collector's."""
        with contextlib.suppress(EkibenError, TimeoutError, grpc.aio.AioRpcError):
            async with asyncio.timeout(5):
                await self.stub.AbortUpload(pb.AbortUploadRequest(name=name, failure=failure[:500]))

    async def _put_parts(self, upload: pb.Upload, size: int) -> list[pb.Upload.Part]:
        there = {part.part_number: part for part in upload.parts}
        limit = asyncio.Semaphore(PARALLEL_PARTS)

        async def one(number: int) -> pb.Upload.Part:
            start = (number - 1) * size
            end = min(start + size, self.archive.size_bytes)
            if number in there and there[number].size_bytes == end - start:
                self.progress(end - start)
                return there[number]
            async with limit:
                etag = await self._put(upload.name, number, start, end)
            return pb.Upload.Part(part_number=number, etag=etag, size_bytes=end - start)

        try:
            async with asyncio.TaskGroup() as group:
                count = -(-self.archive.size_bytes // size)
                tasks = [group.create_task(one(number)) for number in range(1, count + 1)]
        except BaseExceptionGroup as failed:
            raise first_of(failed) from failed
        return [task.result() for task in tasks]

    async def _put(self, name: str, number: int, start: int, end: int) -> str:
        """PUT one part, again where the connection breaks; a URL is signed for each attempt."""

        async def attempt() -> str:
            url = await self.stub.SignUpload(pb.SignUploadRequest(name=name, part_number=number))
            counted = _Counted(self.progress)
            try:
                return await asyncio.to_thread(
                    signed.put,
                    self.address(url),
                    self.archive,
                    start,
                    end,
                    progress=counted,
                    stop=self.stop,
                )
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError):
                    self.stop.set()
                counted.take_back()
                raise

        return await patiently(attempt)


class _Counted:
    """Progress that can be taken back when an attempt fails."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._passed = progress, 0

    def __call__(self, count: int) -> None:
        self._passed += count
        self._progress(count)

    def take_back(self) -> None:
        """As if nothing had passed."""
        self._progress(-self._passed)
        self._passed = 0
