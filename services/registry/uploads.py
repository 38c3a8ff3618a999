"""Use cases over uploads and downloads: bytes first, then the row that names them.

The order in which an upload ends well, each step of which may be the last before a crash:

1. The parts are joined, checked and synced beside the blobs; the digest is known.
2. A row claims the digest, so that the collector keeps away from it.
3. The file is renamed to its digest.
4. One transaction marks the blob stored, the upload COMPLETED, and names the digest in the version.
5. What is left of the parts is removed.

After a crash before 4 the version is as it was, and the collector finds the file once the claim has ended.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import BinaryIO, TypeVar

from ekiben import names
from ekiben.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from services.content.archives import check_archive
from services.content.blobs import MAX_PART_NUMBER, WHOLE, Assembly, BlobStore, Part
from services.content.blobs.source import Source
from services.content.digest import Digest
from services.kernel.clock import Clock
from services.kernel.db import AsyncConnection, Database
from services.kernel.identity import Principal
from services.registry import listings
from services.registry.catalog import no_version, not_itself, organization_of
from services.registry.domain import Content, ContentState, File, Kind, Upload, UploadState, Usage, Version
from services.registry.listings import CheckedListing
from services.registry.signing import Signer
from services.registry.store import blobs as held
from services.registry.store import catalog as catalog_rows
from services.registry.store import quotas as quota_rows
from services.registry.store import uploads as rows

log = logging.getLogger(__name__)

T = TypeVar("T")

_CLAIM = timedelta(minutes=1)
"""From a claim to the row that names the blob are a rename and a transaction. A machine that sleeps longer in between
loses the claim, and the upload says so."""
_DELETING_PATIENCE_S = 30.0
_DOWNLOAD_URL = timedelta(hours=12)


@dataclass(frozen=True)
class Signed:
    """A URL and what is behind it."""

    url: str
    expire_time: datetime
    digest: str = ""
    size_bytes: int = 0


def parse_resource(resource: str) -> tuple[Kind, str, str]:
    """Kind, repository and version of a model's or a bento's resource name. Raises InvalidArgument (NAME_INVALID)."""
    if resource.startswith("bentoRepositories/"):
        bento = names.Bento.parse(resource)
        return Kind.BENTO, bento.repository, bento.bento
    model = names.Model.parse(resource)
    return Kind.MODEL, model.repository, model.model


class Uploads:
    """Moves bytes in and out."""

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        signer: Signer,
        clock: Clock,
        *,
        expire: timedelta,
        garbage_grace: timedelta,
        direct: bool = True,
        named: Callable[[], None] = lambda: None,
    ) -> None:
        """`named` is called when a content was named."""
        self._direct = direct
        self._named = named
        self._database = database
        self._blobs = blobs
        self._signer = signer
        self._clock = clock
        self._expire = expire
        self._garbage_grace = garbage_grace
        self._turns: dict[str, tuple[asyncio.Lock, int]] = {}
        self._completing: dict[str, asyncio.Task[Upload]] = {}

    async def aclose(self) -> None:
        """End what is being completed; completing it again goes on from there."""
        tasks = list(self._completing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def create(self, caller: Principal, resource: str, digest: str, size_bytes: int | None) -> Upload:
        """Open an upload; COMPLETED at once where content of this digest is stored.

        Raises:
            NotFound: no such model or bento.
            FailedPrecondition: it is an alias, and not the version's own id (VERSION_REQUIRED).
            ResourceExhausted: content of this size is more than the organization may keep (QUOTA_EXCEEDED).
            InvalidArgument: DIGEST_INVALID, SIZE_INVALID; or the stored content does not fit (SIZE_MISMATCH,
                ARCHIVE_INVALID).
        """
        kind, repository, version = parse_resource(resource)
        if size_bytes is not None and size_bytes < 0:
            raise InvalidArgument(
                "size_bytes must not be negative.",
                reason="SIZE_INVALID",
                violations=[("upload.size_bytes", "must not be negative")],
            )
        wanted = Digest.parse(digest) if digest else None
        stored = await self._fits(kind, wanted, size_bytes) if wanted else None
        now = self._clock.now()
        organization = organization_of(caller)
        upload = Upload(
            upload=secrets.token_hex(16),
            organization=organization,
            resource=resource,
            digest=digest,
            size_bytes=size_bytes,
            state=UploadState.OPEN,
            failure="",
            create_time=now,
            expire_time=now + self._expire,
            creator=caller.user,
        )
        alike = False

        async def open_it(connection: AsyncConnection) -> None:
            nonlocal upload, alike
            found = await catalog_rows.version(connection, organization, kind, repository, version, lock=True)
            if found is None:
                raise await not_itself(connection, organization, kind, repository, version)
            there = found[1].content
            upload = replace(upload, replaces=there.state.usable)
            await rows.add(connection, upload, found[0])
            await rows.set_opened(connection, found[0], now)
            until = now + self._garbage_grace
            alike = wanted is None and size_bytes is not None
            alike = alike and await rows.content_of_size(connection, organization, kind, size_bytes or 0)
            if stored is not None:
                await quota_rows.lock_blobs(connection, (digest, there.digest))
            if stored is not None and await held.store(connection, digest, until, only_if_stored=True):
                await rows.leave_open(connection, upload.upload, UploadState.COMPLETED)
                await _set_content(connection, organization, found[0], there, digest, stored, now)
            else:
                await _check_room(connection, organization, digest, size_bytes)

        await self._database.attempt(open_it)
        self._named()
        return replace(await self._row(caller, upload.upload), digest_wanted=alike)

    async def get(self, caller: Principal, upload: str) -> tuple[Upload, list[Part]]:
        """An upload and its parts so far. Raises NotFound (UPLOAD_NOT_FOUND)."""
        row = await self._row(caller, upload)
        return row, await self._blobs.parts(upload) if row.state is UploadState.OPEN else []

    async def sign_upload(self, caller: Principal, upload: str, part_number: int) -> Signed:
        """A URL for one part, valid as long as the upload is open.

        Raises:
            NotFound: UPLOAD_NOT_FOUND.
            InvalidArgument: PART_NUMBER_INVALID.
            FailedPrecondition: it is not open (UPLOAD_ENDED).
        """
        if not WHOLE <= part_number <= MAX_PART_NUMBER:
            raise InvalidArgument(
                f"part_number is {part_number}; it must be from 0 to {MAX_PART_NUMBER:,}.",
                reason="PART_NUMBER_INVALID",
                violations=[("part_number", f"from 0 to {MAX_PART_NUMBER:,}")],
                part_number=part_number,
            )
        row = await self._row(caller, upload)
        self._must_be_open(row)
        elsewhere = None
        if self._direct:
            size_bytes = row.size_bytes if part_number == WHOLE else None
            elsewhere = await self._blobs.write_url(
                upload, part_number, expire_time=row.expire_time, size_bytes=size_bytes
            )
        path = f"/blobs/uploads/{upload}/{part_number}"
        return Signed(elsewhere or self._signer.sign("PUT", path, row.expire_time), row.expire_time)

    async def sign_download(self, caller: Principal, resource: str) -> Signed:
        """A URL from which the content of a model or a bento, maybe named by an alias or as `latest`, can be read.

        Raises:
            NotFound: MODEL_NOT_FOUND, BENTO_NOT_FOUND.
            FailedPrecondition: nothing was uploaded yet (CONTENT_NOT_READY), or it has none (CONTENT_EXTERNAL).
        """
        content = (await self.readable(caller, resource)).content
        digest = Digest.parse(content.digest)
        expire_time = self._clock.now() + _DOWNLOAD_URL
        url = await self._blobs.read_url(digest, expire_time=expire_time) if self._direct else None
        url = url or self._signer.sign("GET", f"/blobs/content/{digest}", expire_time)
        return Signed(url, expire_time, content.digest, content.size_bytes)

    async def readable(self, caller: Principal, resource: str) -> Version:
        """A model or a bento whose content is READY. Raises as `sign_download`."""
        kind, repository, version = parse_resource(resource)
        found = await self._version(caller, kind, repository, version)
        content = found.content
        if content.state is ContentState.EXTERNAL:
            raise FailedPrecondition(
                f"{found.name} has no content here: it lies elsewhere.",
                reason="CONTENT_EXTERNAL",
                resource=found.name,
            )
        if content.state is not ContentState.READY:
            raise FailedPrecondition(
                f"The content of {found.name} is {content.state.lower()}: push it first.",
                reason="CONTENT_NOT_READY",
                resource=found.name,
                state=content.state,
            )
        return found

    async def receive(
        self, upload: str, part_number: int, source: Source, size_bytes: int, digest: Digest | None
    ) -> Part:
        """Keep one part from whoever holds a signature for it. See BlobWriter.write for the errors."""
        async with self._database.read() as connection:
            found = await rows.get(connection, upload)
        if found is None:
            raise no_upload(upload)
        row = found[1]
        self._must_be_open(row)
        check = None
        if part_number == WHOLE:
            async with self._database.read() as connection:
                await _check_room(connection, row.organization, row.digest, size_bytes)
            check = _check_of(parse_resource(row.resource)[0])
            self._check_size(row, size_bytes)
            digest = digest or (Digest.parse(row.digest) if row.digest else None)
        return await self._blobs.write(upload, part_number, source, size_bytes, digest=digest, check=check)

    async def complete(self, caller: Principal, upload: str, parts: Sequence[tuple[int, str]]) -> Upload:
        """Make the content visible. Completing again changes nothing.

        It goes on when the caller leaves: to read back what lies on S3 takes longer than BentoML's clients wait. Who
        asks meanwhile waits for the same.

        Raises:
            NotFound: UPLOAD_NOT_FOUND.
            FailedPrecondition: a part is missing (UPLOAD_INCOMPLETE), and nothing changed; or it ended
                otherwise before (UPLOAD_ENDED).
            InvalidArgument: SIZE_MISMATCH, DIGEST_MISMATCH, ARCHIVE_INVALID; the upload is FAILED by that.
            Aborted: another upload, opened like this one before there was content, has brought other bytes first
                (CONTENT_EXISTS); the upload is FAILED by that.
            ResourceExhausted: STORAGE_FULL, or more than the organization may keep (QUOTA_EXCEEDED), and nothing
                changed: complete it again once there is room.
        """
        await self._row(caller, upload)  # the caller's own
        task = self._completing.get(upload)
        if task is None:
            task = self._completing[upload] = asyncio.ensure_future(self._complete(caller, upload, parts))
            task.add_done_callback(partial(self._completed, upload))
        return await asyncio.shield(task)

    def _completed(self, upload: str, task: "asyncio.Task[Upload]") -> None:
        del self._completing[upload]
        if not task.cancelled() and (exc := task.exception()) is not None:
            log.info("an upload was not completed", extra={"upload": upload, "cause": str(exc)})

    async def _complete(self, caller: Principal, upload: str, parts: Sequence[tuple[int, str]]) -> Upload:
        async with self._turn(upload):
            row = await self._row(caller, upload)
            if row.state is UploadState.COMPLETED:
                return row
            self._must_be_open(row)
            kind, repository, version = parse_resource(row.resource)
            empty = not parts and await self._may_be_empty(caller, kind, repository, version)
            if empty and not await self._blobs.parts(upload):
                await self._name(row, None, 0)
                return await self._row(caller, upload)
            try:
                check = CheckedListing(kind, lists=self._blobs.reads_whole)
                async with self._blobs.assemble(upload, parts, check=check) as assembly:
                    self._check_size(row, assembly.size_bytes)
                    if row.digest and row.digest != str(assembly.digest):
                        raise InvalidArgument(
                            f"The bytes sent have the digest {assembly.digest}, not {row.digest}. Send them again.",
                            reason="DIGEST_MISMATCH",
                            expected=row.digest,
                            received=assembly.digest,
                        )
                    await _to_the_end(self._commit(row, assembly, check.files))
            except (InvalidArgument, Aborted) as exc:
                if exc.reason in ("TRANSACTION_LOST", "COMMIT_UNKNOWN"):
                    raise  # all that was sent is there: it can be completed again
                await self._end(upload, UploadState.FAILED, exc.message)
                raise
            except FailedPrecondition:
                row = await self._row(caller, upload)
                if row.state is UploadState.COMPLETED:  # by another registry, meanwhile
                    return row
                raise
            await self._blobs.discard(upload)
            return await self._row(caller, upload)

    async def abort(self, caller: Principal, upload: str, failure: str) -> Upload:
        """Give an upload up. One that ended without content before is left as it is.

        Raises:
            NotFound: UPLOAD_NOT_FOUND.
            FailedPrecondition: it was completed (UPLOAD_ENDED).
        """
        async with self._turn(upload):
            row = await self._row(caller, upload)
            if row.state is UploadState.COMPLETED:
                self._must_be_open(row)
            await self._end(upload, UploadState.ABORTED, failure[:4000].replace("\0", "") or "The client gave it up.")
            return await self._row(caller, upload)

    async def late(self, limit: int = 100) -> list[str]:
        """Some of the uploads whose time is over."""
        async with self._database.read() as connection:
            return await rows.expired(connection, self._clock.now(), limit)

    async def expire(self, limit: int = 100) -> int:
        """Abort uploads whose time is over; how many."""
        async with self._database.read() as connection:
            late = await rows.expired(connection, self._clock.now(), limit)
        for upload in late:
            async with self._turn(upload):
                await self._end(upload, UploadState.ABORTED, "The upload was not completed in time.")
        return len(late)

    # Steps

    async def _row(self, caller: Principal, upload: str) -> Upload:
        async with self._database.read() as connection:
            found = await rows.get(connection, upload, organization_of(caller))
        if found is None:
            raise no_upload(upload)
        return found[1]

    async def _commit(self, row: Upload, assembly: Assembly, files: Sequence[File] | None) -> None:
        digest = str(assembly.digest)
        # Before anything changes, so that the upload can be completed once there is room; `_name` counts exactly.
        async with self._database.read() as connection:
            await _check_room(connection, row.organization, digest, assembly.size_bytes)
        await self._claim(digest)
        if files is not None:
            await listings.keep(self._database, digest, files)
        await assembly.commit()
        await self._name(row, digest, assembly.size_bytes)

    async def _claim(self, digest: str) -> None:
        deadline = self._clock.monotonic() + _DELETING_PATIENCE_S
        while True:
            until = self._clock.now() + max(_CLAIM, self._garbage_grace)
            if await self._database.attempt(partial(held.claim, digest=digest, until=until)):
                return
            if self._clock.monotonic() >= deadline:
                raise Unavailable(
                    f"Blob {digest} is being deleted. Complete the upload again.", reason="BLOB_BUSY", digest=digest
                )
            await asyncio.sleep(0.05)

    async def _name(self, row: Upload, digest: str | None, size_bytes: int) -> None:
        """The transaction that makes content visible."""
        now = self._clock.now()

        async def name_it(connection: AsyncConnection) -> None:
            found = await rows.get(connection, row.upload, lock=True)
            if found is None:
                raise no_upload(row.upload)
            there = await rows.content_of(connection, found[0])
            await quota_rows.lock_blobs(connection, (digest or "", there.digest))
            if digest is not None and not await held.store(connection, digest, now + self._garbage_grace):
                raise Aborted(
                    "The content was collected before it was named: the registry's clock jumped. Push again.",
                    reason="CLAIM_LOST",
                )
            if not await rows.leave_open(connection, row.upload, UploadState.COMPLETED, digest=digest or ""):
                self._must_be_open(found[1])
            if there.digest and there.digest != digest and not found[1].replaces:
                raise Aborted(
                    f"Another push gave {row.resource} its content first. Push it again with --force to replace that, "
                    "or under another version.",
                    reason="CONTENT_EXISTS",
                    resource=row.resource,
                    digest=there.digest,
                )
            await _set_content(connection, row.organization, found[0], there, digest, size_bytes, now)

        await self._database.attempt(name_it)
        self._named()

    async def _end(self, upload: str, state: UploadState, failure: str) -> None:
        async def end_it(connection: AsyncConnection) -> None:
            found = await rows.get(connection, upload, lock=True)
            if found is not None and await rows.leave_open(connection, upload, state, failure):
                await rows.set_lost(connection, found[0], failure, self._clock.now())

        await self._database.attempt(end_it)
        await self._blobs.discard(upload)

    async def _fits(self, kind: Kind, digest: Digest, size_bytes: int | None) -> int | None:
        """Size of the stored content of this digest; None where there is none."""
        try:
            blob = await self._blobs.stat(digest)
        except NotFound:
            async with self._database.transaction() as connection:
                await held.forget(connection, str(digest))
            return None
        if size_bytes is not None and size_bytes != blob.size_bytes:
            raise _wrong_size(size_bytes, blob.size_bytes)
        await self._blobs.inspect(digest, _check_of(kind))
        return blob.size_bytes

    async def _version(self, caller: Principal, kind: Kind, repository: str, version: str) -> Version:
        async with self._database.read() as connection:
            found = await catalog_rows.meant(connection, organization_of(caller), kind, repository, version)
        if found is None:
            raise no_version(kind, repository, version)
        return found[1]

    async def _may_be_empty(self, caller: Principal, kind: Kind, repository: str, version: str) -> bool:
        return kind is Kind.BENTO and (await self._version(caller, kind, repository, version)).facts.development

    def _must_be_open(self, row: Upload) -> None:
        if row.state is UploadState.OPEN and row.expire_time > self._clock.now():
            return
        state = row.state.lower() if row.state is not UploadState.OPEN else "over its time"
        raise FailedPrecondition(
            f"Upload {row.upload!r} is {state}. Open another.", reason="UPLOAD_ENDED", upload=row.upload, state=state
        )

    @staticmethod
    def _check_size(row: Upload, size_bytes: int) -> None:
        if row.size_bytes is not None and row.size_bytes != size_bytes:
            raise _wrong_size(row.size_bytes, size_bytes)

    @contextlib.asynccontextmanager
    async def _turn(self, upload: str) -> AsyncIterator[None]:
        """One at a time for each upload: a client that retries waits for its first try."""
        lock, waiting = self._turns.get(upload, (asyncio.Lock(), 0))
        self._turns[upload] = (lock, waiting + 1)
        try:
            async with lock:
                yield
        finally:
            lock, waiting = self._turns[upload]
            if waiting == 1:
                del self._turns[upload]
            else:
                self._turns[upload] = (lock, waiting - 1)


async def _set_content(
    connection: AsyncConnection,
    organization: str,
    version_id: int,
    before: Content,
    digest: str | None,
    size_bytes: int,
    now: datetime,
) -> None:
    """Name the content of a locked version, and count what that adds; the locks of both blobs are held."""
    new = digest is not None and not await quota_rows.held(connection, organization, [digest])
    await rows.set_content(connection, version_id, digest, size_bytes, now)
    old = {before.digest: before.size_bytes} if before.digest and before.digest != digest else {}
    added = (size_bytes if new else 0) - await quota_rows.freed(connection, organization, old)
    await quota_rows.charge(connection, organization, Usage(bytes=added))


async def _check_room(connection: AsyncConnection, organization: str, digest: str, size_bytes: int | None) -> None:
    """Refuse early what is certain not to fit; content that may be there already (an empty digest: unknown) passes.

    Raises:
        ResourceExhausted: QUOTA_EXCEEDED.
    """
    quota = await quota_rows.get(connection, organization)
    if not size_bytes or quota.limits.bytes is None or quota.used.bytes + size_bytes <= quota.limits.bytes:
        return
    if digest:
        there = bool(await quota_rows.held(connection, organization, [digest]))
    else:
        there = await quota_rows.any_of_size(connection, organization, size_bytes)
    if not there:
        replace(quota, used=replace(quota.used, bytes=quota.used.bytes + size_bytes)).check(Usage(bytes=size_bytes))


def no_upload(upload: str) -> NotFound:
    """There is no upload of this id."""
    return NotFound(f"Upload {upload!r} does not exist.", reason="UPLOAD_NOT_FOUND", upload=f"uploads/{upload}")


def _wrong_size(wanted: int, got: int) -> InvalidArgument:
    return InvalidArgument(
        f"The content has {got:,} bytes where {wanted:,} were announced.",
        reason="SIZE_MISMATCH",
        expected_bytes=wanted,
        received_bytes=got,
    )


def _check(kind: Kind, file: BinaryIO) -> None:
    check_archive(file, kind.value)


def _check_of(kind: Kind) -> "partial[None]":
    return partial(_check, kind)


async def _to_the_end(work: Awaitable[T]) -> T:
    """Await work that is not left half done: a cancelled caller waits for it, then is cancelled."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
