"""Blobs as objects: `content/<upload>` has the bytes, `sha256/ab/<hex>/<upload>.<size>` makes them a blob.

The second is an empty object, whose key says all: a blob is named without copying it, a name is never overwritten, and
one listing tells all blobs. Where equal bytes were uploaded twice, the newest name counts whose content is there; who
writes it removes the older ones. What is on its way is in `records.py`.

What ends an upload is decided by one object that is written once (`ends/<upload>`). So of two registries, one of which
completes an upload while the other gives it up, one wins; who finds that it shall be a blob makes it one, since that is
always right: a blob without a name in the database is garbage, which is collected in its turn.

    commit   end = commit → name → remove older names of the digest
    delete   end = delete → remove name → remove content → remove records
    discard  end = discard → end multipart uploads → remove content → remove records
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from ekiben.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from services.content.blobs import MAX_PART_NUMBER, WHOLE, Blob, Check, Part
from services.content.blobs.parts import busy
from services.content.blobs.s3.bucket import Bucket, Found, Missing, open_bucket
from services.content.blobs.s3.gates import Gates
from services.content.blobs.s3.joining import join, received
from services.content.blobs.s3.location import MAX_PART_BYTES, Location
from services.content.blobs.s3.reading import Seeking, Windows, examine
from services.content.blobs.s3.records import Records, content_key, end_key, record_key
from services.content.blobs.s3.sending import Sending
from services.content.blobs.source import Source
from services.content.digest import Digest

_UPLOAD = re.compile(r"[A-Za-z0-9][-A-Za-z0-9]{0,63}")
_NAME = re.compile(r"sha256/[0-9a-f]{2}/([0-9a-f]{64})/([-A-Za-z0-9]{1,64})\.(\d{1,15})")
_CHUNK_BYTES = 1 << 20
_FORMAT_KEY, _FORMAT = "ekiben-blobs", b"1\n"
_MOST_EXAMINED = 4
"""Contents that are read back at once: each holds a few windows, and hashing one takes a core."""


@contextlib.asynccontextmanager
async def open_s3(url: str) -> AsyncIterator["S3BlobStore"]:
    """The store at `url`, whose bucket exists; see `location.py` for its form.

    Raises:
        InvalidArgument: BLOBS_URL_INVALID.
        FailedPrecondition: BUCKET_NOT_FOUND, BLOBS_REFUSED; or the server lacks what the store needs
            (BLOBS_UNSUITABLE).
        Unavailable: BLOBS_UNAVAILABLE, CLOCK_SKEWED.
    """
    location = Location.parse(url)
    async with open_bucket(location) as bucket:
        if await bucket.put_once(_FORMAT_KEY, _FORMAT) and await bucket.put_once(_FORMAT_KEY, _FORMAT):
            raise FailedPrecondition(
                "This S3 server writes objects anew that should be written only once (If-None-Match). Use one that "
                "does not: AWS, Ceph, MinIO and versitygw do it right.",
                reason="BLOBS_UNSUITABLE",
            )
        if await bucket.get(_FORMAT_KEY) != _FORMAT:
            raise FailedPrecondition(
                f"The blobs in the bucket {location.bucket!r} were written by a newer registry. Start that one.",
                reason="BLOBS_UNSUITABLE",
            )
        yield S3BlobStore(bucket, location)


@dataclass(frozen=True, slots=True)
class _Name:
    """An object that makes a content a blob."""

    found: Found
    digest: Digest
    upload: str
    size_bytes: int

    @property
    def age(self) -> tuple[datetime, str]:
        """Newer ones have more: by the server's clock, the same for all who ask."""
        return self.found.modify_time, self.found.key

    @property
    def blob(self) -> Blob:
        """What it makes."""
        return Blob(self.digest, self.size_bytes, self.found.modify_time)


class S3BlobStore:
    """The BlobStore in a bucket, which any number of registries share. See the port for its promises."""

    reads_whole = True
    """Nobody else has seen the bytes yet."""

    def __init__(self, bucket: Bucket, location: Location) -> None:
        self._bucket = bucket
        self._records = Records(bucket)
        self._sending = Sending(bucket, self._records, location.part_bytes)
        self._gates = Gates()
        self._examined = asyncio.Semaphore(_MOST_EXAMINED)

    # Reading

    def path(self, digest: Digest) -> None:
        """An object is no file."""

    async def stat(self, digest: Digest) -> Blob:
        """Size and age of a blob. Raises NotFound (BLOB_NOT_FOUND)."""
        return (await self._resolve(digest))[0].blob

    async def read(self, digest: Digest, *, offset: int = 0, size_bytes: int | None = None) -> AsyncIterator[bytes]:
        """Stream a blob in chunks of at most 1 MiB. Raises NotFound (BLOB_NOT_FOUND)."""
        end = None if size_bytes is None else offset + size_bytes
        while True:
            found = (await self._resolve(digest))[1]
            windows = Windows(self._bucket, found, offset, end)
            try:
                while window := await windows.read():
                    for start in range(0, len(window), _CHUNK_BYTES):
                        chunk = window[start : start + _CHUNK_BYTES]
                        offset += len(chunk)
                        yield chunk
                return
            except Missing:
                continue  # its equal took its place
            finally:
                await windows.close()

    async def inspect(self, digest: Digest, check: Check) -> None:
        """Call `check` with the bytes of a blob. Raises NotFound (BLOB_NOT_FOUND)."""
        found = (await self._resolve(digest))[1]
        file = Seeking(self._bucket, found, asyncio.get_running_loop())
        try:
            await asyncio.to_thread(check, file)  # type: ignore[arg-type]
        except Missing:
            raise _no_blob(digest) from None

    async def read_url(self, digest: Digest, *, expire_time: datetime) -> str:
        """A presigned URL. Raises NotFound (BLOB_NOT_FOUND)."""
        found = (await self._resolve(digest))[1]
        return await self._bucket.sign("get_object", found.key, _seconds(expire_time))

    async def blobs(self) -> AsyncIterator[Blob]:
        """Every blob, by digest."""
        newest: _Name | None = None
        async for name in self._names("sha256/"):
            if newest is not None and newest.digest != name.digest:
                yield newest.blob
                newest = None
            if newest is None or newest.age < name.age:
                newest = name
        if newest is not None:
            yield newest.blob

    async def delete(self, digest: Digest) -> None:
        """Remove a blob; one that is not there is no error."""
        for name in [name async for name in self._names(_names_of(digest))]:
            await self._remove(name)

    async def _resolve(self, digest: Digest) -> tuple[_Name, Found]:
        names = [name async for name in self._names(_names_of(digest))]
        for name in sorted(names, key=lambda name: name.age, reverse=True):
            with contextlib.suppress(Missing):
                found = await self._bucket.head(content_key(name.upload))
                if found.size_bytes == name.size_bytes:
                    return name, found
        raise _no_blob(digest)

    async def _names(self, prefix: str) -> AsyncIterator[_Name]:
        async for found in self._bucket.objects(prefix):
            if match := _NAME.fullmatch(found.key):
                yield _Name(found, Digest(match[1]), match[2], int(match[3]))

    # Writing

    async def write(
        self,
        upload: str,
        number: int,
        source: Source,
        size_bytes: int,
        *,
        digest: Digest | None = None,
        check: Check | None = None,
    ) -> Part:
        """Keep one part; `check` is left to `assemble`. See BlobWriter.write for the errors."""
        _know(upload)
        if not WHOLE <= number <= MAX_PART_NUMBER:
            raise InvalidArgument(
                f"Part number {number} is not between 0 and {MAX_PART_NUMBER:,}.", reason="PART_NUMBER_INVALID"
            )
        if number != WHOLE and size_bytes > MAX_PART_BYTES:
            raise InvalidArgument(
                f"A part has at most {MAX_PART_BYTES:,} bytes, and {size_bytes:,} were announced. Send smaller ones.",
                reason="PART_TOO_LARGE",
                size_bytes=size_bytes,
            )
        async with self._gates.writing(upload):
            await self._must_take_parts(upload)
            try:
                if number == WHOLE:
                    return await self._sending.whole(upload, source, size_bytes, digest)
                return await self._sending.part(upload, number, source, size_bytes, digest)
            except Missing:
                raise busy(upload) from None

    async def write_url(
        self, upload: str, number: int, *, expire_time: datetime, size_bytes: int | None = None
    ) -> str | None:
        """A presigned URL; None for what is too large for one PUT."""
        _know(upload)
        if number == WHOLE and size_bytes is not None and size_bytes > MAX_PART_BYTES:
            return None
        upload_id = await self._records.multipart(upload, "whole" if number == WHOLE else "parts")
        if upload_id is None:
            return None
        place = {"UploadId": upload_id, "PartNumber": number or 1}
        return await self._bucket.sign("upload_part", content_key(upload), _seconds(expire_time), **place)

    async def parts(self, upload: str) -> list[Part]:
        """The parts received so far, by number."""
        _know(upload)
        state = await self._records.load(upload)
        if state.joined is not None:
            return state.joined
        return [part.part for _, part in sorted((await received(self._bucket, upload, state)).items())]

    @contextlib.asynccontextmanager
    async def assemble(
        self, upload: str, parts: Sequence[tuple[int, str]], *, check: Check | None = None
    ) -> AsyncIterator["S3Assembly"]:
        """Join parts, then read them back. See BlobWriter.assemble; once joined, an upload takes no more parts.

        Raises also:
            FailedPrecondition: a part but the last has less than 5 MiB (PART_TOO_SMALL).
        """
        _know(upload)
        async with self._gates.seal(upload):
            try:
                found = await join(self._bucket, self._records, upload, parts)
                async with self._examined:
                    digest = await examine(self._bucket, found, check)
            except Missing:
                raise busy(upload) from None  # another registry ended it
            yield S3Assembly(self, upload, digest, found.size_bytes)

    async def discard(self, upload: str) -> None:
        """End writers of the upload and free what it holds; of one that became a blob, the records only."""
        _know(upload)
        async with self._gates.seal(upload, wait=True):
            state = await self._records.load(upload)
            if not state.keys:
                return
            if not state.end:
                if await self._bucket.put_once(end_key(upload), b"discard"):
                    state.end = ("discard",)
                else:
                    state = await self._records.load(upload)
            match state.end:
                case ("commit", hexdigest, size):
                    with contextlib.suppress(Aborted):
                        await self._name(upload, Digest(hexdigest), int(size))
                    await self._bucket.abort_all(content_key(upload))
                case ("delete", hexdigest) if await self._has_name(upload, Digest(hexdigest)):
                    return  # whoever decided that goes on with it
                case _:
                    # In this order: what was being joined meanwhile is content by now, or never will be.
                    await self._bucket.abort_all(content_key(upload))
                    await self._bucket.delete(content_key(upload))
            await self._records.forget(upload, state, ended=not await self._has_content(upload))

    async def uploads(self) -> list[str]:
        """Uploads that hold anything but a blob."""
        return [upload for upload in await self._bucket.folders("uploads/") if _UPLOAD.fullmatch(upload)]

    async def commit(self, upload: str, digest: Digest, size_bytes: int) -> Blob:
        """Make checked content a blob."""
        decision = f"commit {digest.hex} {size_bytes}".encode()
        if not await self._bucket.put_once(end_key(upload), decision):
            try:
                decided = await self._bucket.get(end_key(upload))
            except Missing:
                decided = b""
            if decided != decision:
                raise busy(upload)
        return await self._name(upload, digest, size_bytes)

    async def _name(self, upload: str, digest: Digest, size_bytes: int) -> Blob:
        """Write the name of a content that is decided to be a blob. Can be done again at any time, by anybody."""
        key = f"{_names_of(digest)}{upload}.{size_bytes}"
        await self._bucket.put_once(key, b"")
        # In this order. A name that is listed here was there before the content was seen to be there.
        names = {name.upload: name async for name in self._names(_names_of(digest))}
        try:
            await self._bucket.head(content_key(upload))
            mine = names[upload]
        except (Missing, KeyError):
            # Slept so long meanwhile that it was collected, or a newer equal took its place.
            await self._bucket.delete(key)
            try:
                return (await self._resolve(digest))[0].blob
            except NotFound:
                raise Aborted(
                    "The content was collected before it was named: the registry slept. Push again.",
                    reason="CLAIM_LOST",
                ) from None
        for name in names.values():
            if name.age < mine.age:
                await self._remove(name)
        return mine.blob

    async def _remove(self, name: _Name) -> None:
        """Remove a blob's name and content; the records tell of a content whose name is gone already."""
        await self._bucket.put(record_key(name.upload, "open"), b"")
        await self._bucket.put(end_key(name.upload), f"delete {name.digest.hex}".encode())
        await self._bucket.delete(name.found.key)
        await self._bucket.delete(content_key(name.upload))
        await self._records.forget(name.upload, await self._records.load(name.upload), ended=True)

    async def _has_content(self, upload: str) -> bool:
        try:
            await self._bucket.head(content_key(upload))
        except Missing:
            return False
        return True

    async def _has_name(self, upload: str, digest: Digest) -> bool:
        return any([name.upload == upload async for name in self._names(_names_of(digest))])

    async def _must_take_parts(self, upload: str) -> None:
        state = await self._records.load(upload)
        if state.joined is not None or state.end:
            raise busy(upload)


@dataclass(frozen=True)
class S3Assembly:
    """Joined content that was read back."""

    store: S3BlobStore
    upload: str
    digest: Digest
    size_bytes: int

    async def commit(self) -> Blob:
        """Name it. Raises FailedPrecondition (UPLOAD_BUSY) when it was given up, Aborted (CLAIM_LOST)."""
        return await self.store.commit(self.upload, self.digest, self.size_bytes)


def _names_of(digest: Digest) -> str:
    return f"sha256/{digest.hex[:2]}/{digest.hex}/"


def _know(upload: str) -> None:
    if _UPLOAD.fullmatch(upload) is None:
        raise NotFound(f"Upload {upload[:64]!r} does not exist.", reason="UPLOAD_NOT_FOUND", upload=upload[:64])


def _seconds(expire_time: datetime) -> int:
    return int((expire_time - datetime.now(UTC)).total_seconds())


def _no_blob(digest: Digest) -> NotFound:
    return NotFound(f"Blob {digest} does not exist.", reason="BLOB_NOT_FOUND", digest=digest)
