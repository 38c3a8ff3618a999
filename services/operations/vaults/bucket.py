"""A vault in a bucket. Give each vault a prefix of its own; one writer at a time is up to whoever calls."""

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.content.blobs.s3.bucket import Bucket, Missing, open_bucket
from services.content.blobs.s3.location import Location
from services.content.blobs.s3.reading import Windows
from services.operations.vaults.files import no_file


class BucketVault:
    """See Vault: an object appears whole or not at all, so that a file is one."""

    def __init__(self, bucket: Bucket, part_bytes: int) -> None:
        self._bucket = bucket
        self._part_bytes = part_bytes

    async def write(self, path: str, chunks: AsyncIterator[bytes]) -> int:
        """See Vault: in one request, or as a multipart upload where it is larger than a part."""
        part = bytearray()
        upload, parts, size = "", list[tuple[int, str]](), 0
        try:
            async for chunk in chunks:
                size += len(chunk)
                part += chunk
                while len(part) > self._part_bytes:
                    if not upload:
                        await self._bucket.abort_all(path)  # of a backup that was killed
                        upload = await self._bucket.start(path)
                    parts.append(await self._put(path, upload, len(parts) + 1, part[: self._part_bytes]))
                    del part[: self._part_bytes]
            if not upload:
                await self._bucket.put(path, bytes(part))
                return size
            parts.append(await self._put(path, upload, len(parts) + 1, part))
            await self._bucket.complete(path, upload, parts)
        except BaseException:
            if upload:
                with contextlib.suppress(Exception):
                    await self._bucket.abort(path, upload)
            raise
        return size

    async def _put(self, path: str, upload: str, number: int, body: bytearray) -> tuple[int, str]:
        return number, await self._bucket.put_part(path, upload, number, memoryview(body))

    async def read(self, path: str) -> AsyncIterator[bytes]:
        """See Vault."""
        try:
            windows = Windows(self._bucket, await self._bucket.head(path))
            try:
                while data := await windows.read():
                    yield data
            finally:
                await windows.close()
        except Missing:
            raise no_file(path) from None

    async def sizes(self, folder: str) -> dict[str, int]:
        """See Vault."""
        return {found.key: found.size_bytes async for found in self._bucket.objects(f"{folder}/" if folder else "")}

    async def delete(self, path: str) -> None:
        """See Vault."""
        await self._bucket.delete(path)


@asynccontextmanager
async def open_bucket_vault(url: str) -> AsyncIterator[BucketVault]:
    """Open a vault in a bucket. Raises InvalidArgument (BLOBS_URL_INVALID)."""
    location = Location.parse(url)
    async with open_bucket(location) as bucket:
        yield BucketVault(bucket, location.part_bytes)
