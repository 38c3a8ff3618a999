"""Parts that pass through the registry on their way to the bucket.

Content in one piece is cut into parts of the store's size, a few of which are under way while the next is received:
they are all that is held of it. A numbered part passes as it comes, a MiB at a time; its last bytes are held back until
all is checked, since a part that is not whole is not kept.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator

import aiohttp

from ekiben.errors import EkibenError, Unavailable
from services.content.blobs import MAX_PART_NUMBER, WHOLE, Part
from services.content.blobs.parts import wrong_digest, wrong_size
from services.content.blobs.s3.bucket import Bucket
from services.content.blobs.s3.location import MIN_PART_BYTES
from services.content.blobs.s3.records import Records, Whole, content_key, record_key
from services.content.blobs.source import Source
from services.content.digest import Digest

UNDER_WAY = 2
"""Parts that are sent while the next is received; more only help where one connection is slow."""
_CHUNK_BYTES = 1 << 20


class Sending:
    """Receives from a client, sends to the bucket."""

    def __init__(self, bucket: Bucket, records: Records, part_bytes: int) -> None:
        self._bucket = bucket
        self._records = records
        self._part_bytes = part_bytes

    async def whole(self, upload: str, source: Source, size_bytes: int, digest: Digest | None) -> Part:
        """Receive the content in one piece. See BlobWriter.write for the errors."""
        await self._records.open(upload)
        key = content_key(upload)
        upload_id = await self._bucket.start(key)
        try:
            parts, found = await self._parts(key, upload_id, source, size_bytes)
            await _must_end(source, size_bytes)
            if digest is not None and found != digest:
                raise wrong_digest(digest, found)
            whole = Whole(upload_id, parts, f'"{found.hex}"', size_bytes)
            await self._records.keep_whole(upload, whole)
        except BaseException:
            await asyncio.shield(asyncio.ensure_future(self._bucket.abort(key, upload_id)))
            raise
        return Part(WHOLE, whole.etag, size_bytes)

    async def _parts(
        self, key: str, upload_id: str, source: Source, size_bytes: int
    ) -> tuple[tuple[tuple[int, str], ...], Digest]:
        sha256 = hashlib.sha256()
        part_bytes = max(self._part_bytes, -(-size_bytes // MAX_PART_NUMBER))
        buffers = [bytearray(min(part_bytes, max(size_bytes, 1))) for _ in range(UNDER_WAY + 1)]
        tasks: list[asyncio.Task[str]] = []
        left = size_bytes
        try:
            while left or not tasks:
                number = len(tasks) + 1
                if number > len(buffers):
                    await tasks[number - len(buffers) - 1]
                body = memoryview(buffers[number % len(buffers)])[: min(part_bytes, left)]
                filled = await source.readinto(body) if body else 0
                if filled < len(body):
                    raise wrong_size(size_bytes, str(size_bytes - left + filled))
                tasks.append(asyncio.ensure_future(self._bucket.put_part(key, upload_id, number, body)))
                await asyncio.to_thread(sha256.update, body)
                left -= filled
            etags = [await task for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return tuple(enumerate(etags, start=1)), Digest(sha256.hexdigest())

    async def part(self, upload: str, number: int, source: Source, size_bytes: int, digest: Digest | None) -> Part:
        """Receive a numbered part. See BlobWriter.write for the errors."""
        await self._records.open(upload)
        passing = _Passing(source, size_bytes, digest)
        if size_bytes < MIN_PART_BYTES:
            body = b"".join([bytes(chunk) async for chunk in passing])
            etag = await self._bucket.put(record_key(upload, f"small-{number:05d}"), body)
            return Part(number, etag, size_bytes)
        upload_id = await self._records.multipart(upload, "parts")
        assert upload_id is not None
        try:
            etag = await self._bucket.stream_part(content_key(upload), upload_id, number, aiter(passing), size_bytes)
        except (aiohttp.ClientError, TimeoutError) as exc:
            if passing.fault is not None:
                raise passing.fault from None
            raise Unavailable(
                f"Part {number} could not be passed on to S3: {exc}. Send it again.", reason="BLOBS_UNAVAILABLE"
            ) from exc
        return Part(number, etag, size_bytes)


class _Passing:
    """Iterates over what comes, and fails before the last bytes where it is not what was announced."""

    def __init__(self, source: Source, size_bytes: int, digest: Digest | None) -> None:
        self._source = source
        self._size_bytes = size_bytes
        self._digest = digest
        self.fault: BaseException | None = None

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        try:
            async for chunk in self._chunks():
                yield chunk
        except (EkibenError, OSError, aiohttp.ClientError) as exc:
            self.fault = exc
            raise

    async def _chunks(self) -> AsyncIterator[memoryview]:
        sha256 = hashlib.sha256()
        left = self._size_bytes
        while left:
            chunk = memoryview(bytearray(min(_CHUNK_BYTES, left)))
            filled = await self._source.readinto(chunk)
            if filled < len(chunk):
                raise wrong_size(self._size_bytes, str(self._size_bytes - left + filled))
            left -= filled
            if self._digest is not None:
                await asyncio.to_thread(sha256.update, chunk)
            if not left:
                await self._check(sha256)
            yield chunk
        if not self._size_bytes:
            await self._check(sha256)

    async def _check(self, sha256: "hashlib._Hash") -> None:
        await _must_end(self._source, self._size_bytes)
        if self._digest is not None and sha256.hexdigest() != self._digest.hex:
            raise wrong_digest(self._digest, Digest(sha256.hexdigest()))


async def _must_end(source: Source, size_bytes: int) -> None:
    if await source.readinto(memoryview(bytearray(1))):
        raise wrong_size(size_bytes, "more")
