"""A bucket: the few requests of S3 that the store makes, with retries, and errors that say what to do.

The client is aioboto3's, without what costs and gives nothing here: no hash of each body beside the one that the store
makes itself, no checksum that old servers refuse. botocore tries again what may be tried again (500, 503, a broken
connection, a time-out), with jitter; reading a body is tried again here.
"""

import asyncio
import contextlib
import logging
import random
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import aioboto3
import aiohttp
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from yarl import URL

from ekiben.errors import EkibenError, FailedPrecondition, ResourceExhausted, Unavailable
from services.content.blobs.s3.location import Location

log = logging.getLogger(__name__)

_ATTEMPTS = 5
_CONNECT_S = 5.0
_READ_S = 60.0
"""Without a byte. A server that joins parts by copying them may take as long for large ones: see `Bucket.complete`."""
_MISSING = frozenset({"NoSuchKey", "404", "NotFound", "NoSuchUpload"})
_EXISTS = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict"})
_FULL = frozenset({"QuotaExceeded", "InsufficientStorage", "InsufficientCapacity", "XMinioStorageFull", "507"})
_REFUSED = frozenset(
    {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403", "401"}
)
_CODE = re.compile("<Code>([A-Za-z0-9]+)</Code>")
_SKEWED = frozenset({"RequestTimeTooSkewed", "RequestInTheFuture"})


@dataclass(frozen=True, slots=True)
class Found:
    """An object of the bucket."""

    key: str
    """Without the prefix."""
    size_bytes: int
    etag: str
    modify_time: datetime


class Missing(Exception):
    """There is no such object or multipart upload."""


class Refused(Exception):
    """The server does not join these parts; `code` is S3's."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def client_config(location: Location) -> Config:
    """How botocore's client speaks."""
    return Config(
        signature_version="s3v4",
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        retries={"mode": "standard", "max_attempts": _ATTEMPTS},
        connect_timeout=_CONNECT_S,
        read_timeout=_READ_S,
        max_pool_connections=64,
        tcp_keepalive=True,
        s3={"addressing_style": "path" if location.path_style else "auto", "payload_signing_enabled": False},
    )


@contextlib.asynccontextmanager
async def open_bucket(location: Location) -> AsyncIterator["Bucket"]:
    """The bucket, which is not asked anything yet."""
    session = aioboto3.Session()
    options = {"config": client_config(location), "region_name": location.region or session.region_name or "us-east-1"}
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(session.client("s3", endpoint_url=location.endpoint, **options))
        signer = client
        if location.public_endpoint is not None:
            signer = await stack.enter_async_context(
                session.client("s3", endpoint_url=location.public_endpoint, **options)
            )
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_READ_S)
        http = await stack.enter_async_context(
            aiohttp.ClientSession(timeout=timeout, skip_auto_headers=["Content-Type"], auto_decompress=False)
        )
        yield Bucket(location, client, signer, http)


class Bucket:
    """Requests. Keys are given without the prefix.

    Each raises Unavailable (BLOBS_UNAVAILABLE) when the server stays away or goes wrong, and what `_error` says.
    """

    def __init__(self, location: Location, client: Any, signer: Any, http: aiohttp.ClientSession) -> None:
        self._location = location
        self._client = client
        self._signer = signer
        self._http = http

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._location.bucket, "Key": self._location.prefix + key}

    # Objects

    async def put(self, key: str, body: bytes) -> str:
        """Write an object; its ETag."""
        with self._translated("write an object"):
            answer = await self._client.put_object(**self._at(key), Body=body)
            return str(answer["ETag"])

    async def put_once(self, key: str, body: bytes) -> bool:
        """Write an object unless there is one; False when there was, which may be one's own of an earlier attempt."""
        with self._translated("write an object"):
            for attempt in range(_ATTEMPTS):
                try:
                    await self._client.put_object(**self._at(key), Body=body, IfNoneMatch="*")
                except ClientError as exc:
                    if _code(exc) not in _EXISTS:
                        raise
                    if _code(exc) != "ConditionalRequestConflict":
                        return False
                    await _pause(attempt)  # two at once, of which none is known to have come first
                else:
                    return True
            return False

    async def get(self, key: str) -> bytes:
        """A small object. Raises Missing."""
        with self._translated("read an object"):
            return await self._body(self._at(key), None)

    async def head(self, key: str) -> Found:
        """What is known of an object. Raises Missing."""
        with self._translated("ask for an object"):
            answer = await self._client.head_object(**self._at(key))
        return Found(key, answer["ContentLength"], answer["ETag"], answer["LastModified"])

    async def get_range(self, found: Found, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of an object as it was found. Raises Missing, also where it was replaced."""
        params = {**self._at(found.key), "Range": f"bytes={start}-{end - 1}", "IfMatch": found.etag}
        with self._translated("read an object"):
            try:
                return await self._body(params, end - start)
            except ClientError as exc:
                if _code(exc) in _EXISTS:
                    raise Missing(found.key) from exc
                raise

    async def _body(self, params: dict[str, Any], size_bytes: int | None) -> bytes:
        """The whole body of an answer: botocore tries again to get the answer, this to get the body."""
        for attempt in range(_ATTEMPTS):
            try:
                answer = await self._client.get_object(**params)
                async with answer["Body"] as body:
                    data: bytes = await body.read()
                if size_bytes is None or len(data) == size_bytes:
                    return data
                why: object = f"{len(data)} bytes came instead of {size_bytes}"
            except (BotoCoreError, aiohttp.ClientError, TimeoutError, OSError) as exc:
                if attempt == _ATTEMPTS - 1:
                    raise
                why = exc
            log.info("an object is read again", extra={"key": params["Key"], "cause": str(why)})
            await _pause(attempt)
        raise _unavailable("read an object", "what it sends ends early")

    async def delete(self, key: str) -> None:
        """Remove an object; none is no error."""
        with contextlib.suppress(Missing), self._translated("remove an object"):
            await self._client.delete_object(**self._at(key))

    async def objects(self, prefix: str) -> AsyncIterator[Found]:
        """Objects whose key begins so, by key."""
        async for answer in self._pages("list_objects_v2", Prefix=self._location.prefix + prefix):
            for item in answer.get("Contents", ()):
                key = item["Key"].removeprefix(self._location.prefix)
                yield Found(key, item["Size"], item["ETag"], item["LastModified"])

    async def folders(self, prefix: str) -> list[str]:
        """What stands between `prefix` and the next slash, of all keys."""
        found = []
        async for answer in self._pages("list_objects_v2", Prefix=self._location.prefix + prefix, Delimiter="/"):
            for item in answer.get("CommonPrefixes", ()):
                found.append(item["Prefix"].removeprefix(self._location.prefix + prefix).rstrip("/"))
        return found

    # Multipart uploads

    async def start(self, key: str) -> str:
        """Begin a multipart upload; its id."""
        with self._translated("begin an upload"):
            answer = await self._client.create_multipart_upload(**self._at(key), ContentType="application/x-tar")
            return str(answer["UploadId"])

    async def put_part(self, key: str, upload_id: str, number: int, body: memoryview) -> str:
        """Write a part; its ETag. Raises Missing when the upload has ended."""
        with self._translated("write a part"):
            for attempt in range(_ATTEMPTS):
                try:
                    return await self.stream_part(key, upload_id, number, _slices(body), len(body))
                except (aiohttp.ClientError, TimeoutError, OSError, Unavailable) as exc:
                    if attempt == _ATTEMPTS - 1:
                        raise
                    log.info("a part is sent again", extra={"key": key, "part": number, "cause": str(exc)})
                await _pause(attempt)
        raise AssertionError("unreachable")

    async def stream_part(
        self, key: str, upload_id: str, number: int, body: AsyncIterator[bytes | memoryview], size_bytes: int
    ) -> str:
        """Write a part as it comes, without holding it; its ETag. It cannot be tried again.

        When `body` raises, an aiohttp.ClientError passes, and the part is not kept. Raises Missing when the upload has
        ended.
        """
        params = {**self._at(key), "UploadId": upload_id, "PartNumber": number}
        # Not by the client: it would keep the whole body, twice, and parse nothing that is needed.
        url = await self._client.generate_presigned_url("upload_part", params, ExpiresIn=24 * 3600)
        async with self._http.put(
            URL(url, encoded=True), data=body, headers={"Content-Length": str(size_bytes)}
        ) as answer:
            if answer.status == 200:
                return answer.headers["ETag"]
            text = (await answer.content.read(4096)).decode("utf-8", "replace")
        code = match[1] if (match := _CODE.search(text)) else str(answer.status)
        if code in _MISSING:
            raise Missing(key)
        raise _error(ClientError({"Error": {"Code": code}}, "UploadPart"), "write a part", self._location.bucket)

    async def parts(self, key: str, upload_id: str) -> list[tuple[int, str, int, datetime]]:
        """(number, ETag, size, time) of each part. Raises Missing when the upload has ended."""
        found = []
        async for answer in self._pages("list_parts", **self._without_bucket(key), UploadId=upload_id):
            for item in answer.get("Parts", ()):
                found.append((item["PartNumber"], item["ETag"], item["Size"], item["LastModified"]))
        return found

    async def complete(self, key: str, upload_id: str, parts: Sequence[tuple[int, str]]) -> None:
        """Join parts as an object, and return once it is there.

        A server may have joined them and its answer been lost; trying again then says that there is no such upload. So
        what counts is whether the object is there.

        Raises:
            Refused: InvalidPart, EntityTooSmall, …
            Missing: neither the upload nor the object is there.
        """
        listed = [{"PartNumber": number, "ETag": etag} for number, etag in parts]
        with self._translated("join the parts"):
            for attempt in range(_ATTEMPTS):
                try:
                    await self._client.complete_multipart_upload(
                        **self._at(key), UploadId=upload_id, MultipartUpload={"Parts": listed}
                    )
                    return
                except ClientError as exc:
                    code = _code(exc)
                    if code in ("InvalidPart", "InvalidPartOrder", "EntityTooSmall", "EntityTooLarge"):
                        raise Refused(code) from exc
                    if code not in _MISSING:
                        raise
                    why = code
                except BotoCoreError as exc:
                    if attempt == _ATTEMPTS - 1:
                        raise
                    why = str(exc)
                log.info("whether parts were joined is asked", extra={"key": key, "cause": why})
                with contextlib.suppress(Missing):
                    await self.head(key)
                    return
                await _pause(attempt)
        raise Missing(key)

    async def abort(self, key: str, upload_id: str) -> None:
        """End a multipart upload and free its parts; none is no error."""
        with contextlib.suppress(Missing), self._translated("end an upload"):
            await self._client.abort_multipart_upload(**self._at(key), UploadId=upload_id)

    async def abort_all(self, key: str) -> None:
        """End every multipart upload of a key."""
        wanted = self._location.prefix + key
        found = []
        async for answer in self._pages("list_multipart_uploads", Prefix=wanted):
            found += [item["UploadId"] for item in answer.get("Uploads", ()) if item["Key"] == wanted]
        for upload_id in found:
            await self.abort(key, upload_id)

    # URLs

    async def sign(self, operation: str, key: str, seconds: int, **params: Any) -> str:
        """A URL for clients that allows one request on one object for so long."""
        with self._translated("sign a URL"):
            url: str = await self._signer.generate_presigned_url(
                operation, {**self._at(key), **params}, ExpiresIn=min(max(seconds, 1), 7 * 24 * 3600)
            )
            return url

    # How

    def _without_bucket(self, key: str) -> dict[str, str]:
        return {"Key": self._location.prefix + key}

    async def _pages(self, operation: str, **params: Any) -> AsyncIterator[dict[str, Any]]:
        pages = self._client.get_paginator(operation).paginate(Bucket=self._location.bucket, **params)
        iterator = aiter(pages)
        while True:
            with self._translated("list objects"):
                try:
                    answer = await anext(iterator)
                except StopAsyncIteration:
                    return
            yield answer

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except (ClientError, BotoCoreError, aiohttp.ClientError, TimeoutError) as exc:
            if isinstance(exc, ClientError) and _code(exc) in _MISSING:
                raise Missing(what) from exc
            raise _error(exc, what, self._location.bucket) from exc


def _code(exc: ClientError) -> str:
    return str(exc.response.get("Error", {}).get("Code", ""))


def _error(exc: Exception, what: str, bucket: str) -> EkibenError:
    code = _code(exc) if isinstance(exc, ClientError) else ""
    if isinstance(exc, NoCredentialsError):
        return FailedPrecondition(
            "There are no credentials for S3. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, where "
            "the registry runs.",
            reason="BLOBS_REFUSED",
            bucket=bucket,
        )
    if code == "NoSuchBucket":
        return FailedPrecondition(
            f"The bucket {bucket!r} does not exist. Create it, or correct the blobs' URL.",
            reason="BUCKET_NOT_FOUND",
            bucket=bucket,
        )
    if code in _SKEWED:
        return Unavailable(
            "S3 refuses the registry's signatures because their clocks differ. Set the clock where the registry runs.",
            reason="CLOCK_SKEWED",
        )
    if code in _REFUSED:
        return FailedPrecondition(
            f"S3 does not let the registry {what} in the bucket {bucket!r}: {code}. Correct its credentials or policy.",
            reason="BLOBS_REFUSED",
            bucket=bucket,
            code=code,
        )
    if code in _FULL:
        return ResourceExhausted(
            "The registry's storage is full: nothing was kept. Free space there, then send again.",
            reason="STORAGE_FULL",
        )
    return _unavailable(what, code or str(exc) or type(exc).__name__)


def _unavailable(what: str, why: str) -> Unavailable:
    why = why[:300]
    return Unavailable(
        f"The registry could not {what} on S3: {why}. Try again.",
        reason="BLOBS_UNAVAILABLE",
        retry_after_s=1,
        cause=why,
    )


async def _slices(body: memoryview) -> AsyncIterator[memoryview]:
    for start in range(0, len(body), 1 << 20):
        yield body[start : start + (1 << 20)]


async def _pause(attempt: int) -> None:
    """Wait before the next attempt, with jitter."""
    await asyncio.sleep(random.uniform(0.5, 1.0) * min(5.0, 0.1 * 2.0**attempt))
