"""The bytes of models and bentos: presigned, multipart and proxied uploads, presigned and proxied downloads.

Nothing is kept here: the upload id that a client holds is the id of the registry's upload, and a single PUT, of
which the client says only that it ended, is found again as the open upload of its version.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import aiohttp
from aiohttp import web
from yarl import URL

from ekiben.errors import EkibenError, FailedPrecondition, InvalidArgument, Unavailable
from ekiben.registry.v1 import registry_pb2 as registry
from services.gateway.bentocloud.api import Call
from services.gateway.bentocloud.manifests import read_manifest
from services.gateway.bentocloud.repositories import Kind, Version
from services.gateway.bentocloud.versions import find, find_itself, version_reply
from services.gateway.bentocloud.wire import Reply, member, required
from services.gateway.responses import Refusal

_CHUNK_BYTES = 256 << 10
_PATIENCE_S = 50.0
"""Of the 60 s that BentoML's clients give any request."""
_THERE = (registry.Content.READY, registry.Content.EXTERNAL)


async def presign(call: Call, kind: Kind) -> Reply:
    """PATCH …/presign_upload_url: where the whole archive is PUT. Empty where the setting says proxy."""
    version = await find_itself(call, kind)
    if call.api.upload_strategy == "proxy":
        return version_reply(kind, version, strategy="proxy")
    upload = await _open(call, version)
    signed = await call(call.api.uploads.SignUpload, registry.SignUploadRequest(name=upload.name))
    return version_reply(
        kind, version, strategy=call.api.upload_strategy, upload_url=_public(call, signed), upload_id=_id(upload)
    )


async def start(call: Call, kind: Kind) -> Reply:
    """PATCH …/start_upload: the client begins. The upload itself says so once it is open."""
    version = await find_itself(call, kind)
    return version_reply(kind, version, strategy=call.api.upload_strategy, upload_status="uploading")


async def start_multipart(call: Call, kind: Kind) -> Reply:
    """PATCH …/start_multipart_upload: an upload whose id the client sends with each part."""
    version = await find_itself(call, kind)
    upload = await _open(call, version)
    return version_reply(
        kind, version, strategy=call.api.upload_strategy, upload_status="uploading", upload_id=_id(upload)
    )


async def presign_part(call: Call, kind: Kind) -> Reply:
    """PATCH …/presign_multipart_upload_url: where one part is PUT. Calls for several parts overlap."""
    body = await call.body()
    part = required(body, "part_number", int)
    if part < 1:
        raise InvalidArgument("'part_number' counts from 1.", reason="FIELD_INVALID")
    upload_id = required(body, "upload_id")
    version, signed = await asyncio.gather(
        find_itself(call, kind),
        call(call.api.uploads.SignUpload, registry.SignUploadRequest(name=f"uploads/{upload_id}", part_number=part)),
    )
    return version_reply(
        kind, version, strategy=call.api.upload_strategy, upload_url=_public(call, signed), upload_id=upload_id
    )


async def complete_multipart(call: Call, kind: Kind) -> Reply:
    """PATCH …/complete_multipart_upload. A client whose part failed calls it too, with parts missing: refused."""
    body = await call.body()
    parts = [
        registry.Upload.Part(part_number=required(part, "part_number", int), etag=required(part, "etag"))
        for part in member(body, "parts", list, [])
        if isinstance(part, dict)
    ]
    if not parts:
        raise FailedPrecondition("No part was uploaded; push again.", reason="UPLOAD_INCOMPLETE")
    parts.sort(key=lambda part: part.part_number)
    name = f"uploads/{required(body, 'upload_id')}"
    await _complete(call, registry.CompleteUploadRequest(name=name, parts=parts))
    return version_reply(kind, await find_itself(call, kind), strategy=call.api.upload_strategy)


async def finish(call: Call, kind: Kind) -> Reply:
    """PATCH …/finish_upload: the client's own opinion of its upload. `success` is believed only if it is true.

    Raises:
        FailedPrecondition: the client says success and the content is not there.
    """
    body = await call.body()
    version = await find_itself(call, kind)
    reason = member(body, "reason", str, "")
    if member(body, "status", str, "") == "success":
        await _finish_well(call, version)
    elif version.content.open_upload:
        failure = reason[:1000] or "The client reported a failed upload."
        abort = registry.AbortUploadRequest(name=version.content.open_upload, failure=failure)
        await call(call.api.uploads.AbortUpload, abort)
    return version_reply(kind, await find_itself(call, kind), strategy=call.api.upload_strategy)


async def _finish_well(call: Call, version: Version) -> None:
    content = version.content
    if content.open_upload:
        await _complete(call, registry.CompleteUploadRequest(name=content.open_upload))
    elif content.failure:
        raise FailedPrecondition(content.failure, reason="UPLOAD_FAILED")
    elif content.state not in _THERE:
        if not read_manifest(version.manifest).get("dev"):
            raise FailedPrecondition("Nothing was uploaded; push again.", reason="UPLOAD_INCOMPLETE")
        upload = await _open(call, version)  # a bento under development has no bytes, and says so by ending at once
        await call(call.api.uploads.CompleteUpload, registry.CompleteUploadRequest(name=upload.name))


async def _complete(call: Call, request: registry.CompleteUploadRequest) -> None:
    """Complete an upload, or leave the registry to it: the client gives us a minute, and reading many gigabytes back
    from a bucket takes longer. The version says then that it is uploading, until it is there or has failed.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(_PATIENCE_S):
            await call(call.api.uploads.CompleteUpload, request, timeout_s=_PATIENCE_S + 30)


async def receive(call: Call, kind: Kind) -> Reply:
    """PUT …/upload: the archive passes through us to the registry, which is told when it is whole."""
    size = call.request.content_length
    if size is None:
        raise Refusal(411, "LENGTH_REQUIRED", "An upload needs a Content-Length.")
    version = await find_itself(call, kind)
    upload = await _open(call, version, size)
    if upload.state != registry.Upload.COMPLETED:
        try:
            signed = await call(call.api.uploads.SignUpload, registry.SignUploadRequest(name=upload.name))
            async with _bytes(call, "PUT", signed, data=call.request.content, headers={"Content-Length": str(size)}):
                pass
            await _complete(call, registry.CompleteUploadRequest(name=upload.name))
        except BaseException as error:
            await _give_up(call, upload, error)
            raise
    return version_reply(kind, await find_itself(call, kind), strategy=call.api.upload_strategy)


async def presign_download(call: Call, kind: Kind) -> Reply:
    """PATCH …/presign_download_url: where the archive is read. Empty for what has no bytes of its own."""
    version = await find(call, kind)
    url = ""
    if version.content.state != registry.Content.EXTERNAL and call.api.upload_strategy != "proxy":
        signed = await call(call.api.uploads.SignDownload, registry.SignDownloadRequest(resource=version.name))
        url = _public(call, signed)
    return version_reply(kind, version, strategy=call.api.upload_strategy, download_url=url)


async def send(call: Call, kind: Kind) -> web.StreamResponse:
    """GET …/download: the archive passes through us to the client."""
    version = await find(call, kind)
    signed = await call(call.api.uploads.SignDownload, registry.SignDownloadRequest(resource=version.name))
    async with _bytes(call, "GET", signed) as source:
        response = web.StreamResponse(headers={"Content-Type": "application/x-tar"})
        response.content_length = source.content_length
        await response.prepare(call.request)
        async for chunk in source.content.iter_chunked(_CHUNK_BYTES):
            await response.write(chunk)
        await response.write_eof()
        return response


async def _open(call: Call, version: Version, size: int = 0) -> registry.Upload:
    upload = registry.Upload(resource=version.name, size_bytes=size)
    return await call(call.api.uploads.CreateUpload, registry.CreateUploadRequest(upload=upload))


async def _give_up(call: Call, upload: registry.Upload, error: BaseException) -> None:
    """Free what an upload has received; what was there before stays."""
    reason = str(error) if isinstance(error, EkibenError | Refusal) else "The client left during the upload."
    abort = registry.AbortUploadRequest(name=upload.name, failure=reason[:1000])
    # It may have ended already, or the registry is away: then it expires.
    with suppress(EkibenError):
        # Shielded: a client that left cancels its request, and would cancel this with it.
        await asyncio.shield(asyncio.ensure_future(call(call.api.uploads.AbortUpload, abort)))


@asynccontextmanager
async def _bytes(
    call: Call, method: str, signed: registry.SignedUrl, **options: object
) -> AsyncIterator[aiohttp.ClientResponse]:
    """The response at a signed URL, if it is a good one.

    Raises:
        FailedPrecondition: the registry refused the bytes; its own words.
        Unavailable: the registry's endpoint for bytes, or its store, cannot be reached.
    """
    elsewhere = "://" in signed.url
    session: aiohttp.ClientSession = call.request.app[STORE_SESSION if elsewhere else BLOBS_SESSION]
    url = signed.url if elsewhere else _address(call.api.blobs) + signed.url
    try:
        async with session.request(method, URL(url, encoded=True), **options) as response:  # type: ignore[arg-type]
            if response.status != 200:
                raise FailedPrecondition(await _words(response), reason="TRANSFER_REFUSED")
            yield response
    except aiohttp.ClientConnectorError as error:
        raise Unavailable("The registry cannot be reached for bytes now; try again.", reason="BLOBS_AWAY") from error


async def _words(response: aiohttp.ClientResponse) -> str:
    text = (await response.content.read(4096)).decode("utf-8", "replace").strip()
    return text or f"The registry refused the bytes with status {response.status}."


BLOBS_SESSION: web.AppKey[aiohttp.ClientSession] = web.AppKey("blobs_session", aiohttp.ClientSession)
"""For URLs of the registry."""
STORE_SESSION: web.AppKey[aiohttp.ClientSession] = web.AppKey("store_session", aiohttp.ClientSession)
"""For URLs of the store in which its blobs lie."""


def blobs_session(blobs: str) -> aiohttp.ClientSession:
    """A client of the registry's endpoint for bytes, at `unix:/path` or an HTTP address; without a time limit."""
    connector = aiohttp.UnixConnector(blobs.removeprefix("unix:"), limit=0) if blobs.startswith("unix:") else None
    return _session(connector)


def store_session() -> aiohttp.ClientSession:
    """A client of any host; without a time limit."""
    return _session(None)


def _session(connector: aiohttp.BaseConnector | None) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        auto_decompress=False,
        read_bufsize=_CHUNK_BYTES,
        skip_auto_headers=["Content-Type"],  # some S3 servers refuse what was not signed
    )


def _address(blobs: str) -> str:
    return "http://blobs" if blobs.startswith("unix:") else blobs.rstrip("/")


def _public(call: Call, signed: registry.SignedUrl) -> str:
    return signed.url if "://" in signed.url else call.public_url + signed.url


def _id(upload: registry.Upload) -> str:
    return upload.name.rsplit("/", 1)[-1]
