"""Bytes of models and bentos, to and from signed URLs: in parts, resumable, checked by digest.

The bytes pass in threads (`signed.py`), what is said about them passes over gRPC. A broken connection, a server
that restarts and a URL that expires in between are tried again for a while; a refusal is not. `uploading.py` and
`downloading.py` are the two directions.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc.aio

from ekiben import archives, downloading
from ekiben import signed as signed_urls
from ekiben.downloading import Write
from ekiben.endpoints import Endpoint
from ekiben.errors import FailedPrecondition
from ekiben.registry.v1 import files_pb2
from ekiben.registry.v1 import registry_pb2 as pb
from ekiben.registry.v1.registry_pb2_grpc import UploadsStub
from ekiben.uploading import Progress, Uploading

__all__ = ["Progress", "Transfer", "Write", "no_progress"]


def no_progress(_: int) -> None:
    """Say nothing."""


class Transfer:
    """Uploads and downloads through one channel and the endpoint it leads to."""

    def __init__(self, channel: grpc.aio.Channel, endpoint: Endpoint) -> None:
        self._stub, self._endpoint = UploadsStub(channel), endpoint

    async def upload(
        self,
        resource: str,
        archive: archives.Archive,
        *,
        progress: Progress = no_progress,
        resume: bool = False,
        open_upload: str = "",
    ) -> tuple[pb.Upload, str]:
        """Give a model or a bento its bytes; returns the completed upload and the digest of what was sent.

        Bytes that are there already are not sent: an archive is hashed before where it is small or where the registry
        has content of its size, else while it is sent. It goes in parallel parts, or whole to a registry on this
        machine. `resume` takes up an upload of the same bytes that did not end, be its client killed, the registry or
        both: one that this machine remembers, else `open_upload`. Parts which arrived then are not sent again.

        An upload in parts which ends because the server stays away, or by being cancelled, is left open for that.

        Raises:
            FailedPrecondition: a file was changed meanwhile (FILE_CHANGED), or the bytes were refused.
            Aborted: another push of this version was completed first (CONTENT_EXISTS).
            Unavailable: the server stayed away.
        """
        uploading = Uploading(
            stub=self._stub,
            server=self._endpoint.target,
            address=self._addresses(),
            resource=resource,
            archive=archive,
            progress=progress,
            near=self._endpoint.loopback,
        )
        return await uploading.run(resume=resume, open_upload=open_upload)

    async def download(
        self,
        resource: str,
        into: Path,
        *,
        digest: str,
        size_bytes: int = 0,
        unpack: bool = True,
        work: Path | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """Fetch the content of a model or a bento: unpacked to the new folder `into`, or as the tar file `into`.

        Nothing appears at `into` before the whole has passed and has the digest `sha256:<hex>`; a broken connection is
        taken up where it broke, and so is a download that was killed: what it has left lies beside `into`, or in
        `work`. From elsewhere than this machine a large one comes in parallel ranges. `into` must not exist as a
        folder; a file is replaced.

        Raises:
            DataLoss: what arrived has another digest (DIGEST_MISMATCH).
            FailedPrecondition: the archive cannot be unpacked (ARCHIVE_INVALID), or `into` exists (TARGET_EXISTS).
        """
        if unpack and into.exists():
            raise FailedPrecondition(f"{into} exists already.", reason="TARGET_EXISTS", path=str(into))
        into.parent.mkdir(parents=True, exist_ok=True)
        loop, stop, address = asyncio.get_running_loop(), signed_urls.Stop(), self._addresses()

        def sign() -> str:
            async def ask() -> pb.SignedUrl:
                return await self._stub.SignDownload(pb.SignDownloadRequest(resource=resource))

            return address(asyncio.run_coroutine_threadsafe(ask(), loop).result(60))

        source = downloading.Source(
            sign=sign,
            digest=digest,
            size_bytes=size_bytes,
            stop=stop,
            progress=progress,
            parallel=lambda url: not self._endpoint.is_near(url),
        )
        try:
            await asyncio.to_thread(downloading.fetch, source, into, unpack=unpack, work=work)
        finally:
            stop.set()

    async def read_file(
        self, signed: files_pb2.SignedFile, again: Callable[[], Awaitable[files_pb2.SignedFile]], write: Write
    ) -> None:
        """Read what a signed file is, once more signed by `again` where it breaks. See `Files.read`."""
        loop, stop, address = asyncio.get_running_loop(), signed_urls.Stop(), self._addresses()
        first = [signed]

        def sign() -> str:
            if first:
                return address(first.pop().content)
            return address(asyncio.run_coroutine_threadsafe(_awaited(again()), loop).result(60).content)

        try:
            await asyncio.to_thread(downloading.read_file, signed.file, sign, write, stop)
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


async def _awaited(signing: Awaitable[files_pb2.SignedFile]) -> files_pb2.SignedFile:
    return await signing
