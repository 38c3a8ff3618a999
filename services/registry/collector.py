"""The loop that removes what nobody names any more: late uploads, their parts, deleted versions, blobs, logins,
strangers' refusals.

What goes can be proven afterwards: the transaction that forgets a blob writes an audit entry with its digest, its size
and who named it last. A crash leaves a blob condemned, and the next round ends it and writes the one entry.

Level-triggered: each round looks at everything anew, so that it does not matter where the one before ended.
"""

import logging
import random
import secrets
from collections.abc import AsyncIterator
from datetime import timedelta

from prometheus_client import Counter

from ekiben.errors import EkibenError, NotFound
from services.content.blobs import BlobStore
from services.content.digest import Digest
from services.kernel.clock import Clock
from services.kernel.db import Database
from services.registry.deletions import Deletions
from services.registry.domain import Garbage, GarbageKind, Unnamed
from services.registry.identities import AuditEntry
from services.registry.store import accounts as account_rows
from services.registry.store import audit as audit_rows
from services.registry.store import blobs as held
from services.registry.store import uploads as upload_rows
from services.registry.store import uses as use_rows
from services.registry.uploads import Uploads

log = logging.getLogger(__name__)

_BATCH = 200
_MOST_PLANNED = 10_000
"""Late uploads, and deleted versions, that a plan tells of: nobody reads more."""
_REMEMBER_UPLOADS = timedelta(days=7)
"""How long the row of an upload that ended answers a client that asks again."""

_REMEMBER_STRANGERS = timedelta(days=30)
"""How long the audit log keeps refusals of callers without a valid token."""

_REMEMBER_USES = timedelta(days=400)
"""How long it is known what used what: whoever looks a year back still finds it."""

_METHOD = "ekiben.registry.v1.Garbage/CollectGarbage"
"""What audit entries of collected blobs name, whether a call or the loop collected."""

_collected = Counter("ekiben_blobs_collected", "Blobs that were deleted because nothing named them.")
_collected_bytes = Counter("ekiben_blob_bytes_collected", "Bytes of blobs that were deleted.")


class Collector:
    """Collects once every `interval_s`. The end of a blob that no known version held is told to `organization`."""

    def __init__(
        self,
        database: Database,
        blobs: BlobStore,
        uploads: Uploads,
        deletions: Deletions,
        clock: Clock,
        *,
        interval_s: float,
        garbage_grace: timedelta,
        organization: str = "default",
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._uploads = uploads
        self._deletions = deletions
        self._clock = clock
        self._interval_s = interval_s
        self._garbage_grace = garbage_grace
        self._organization = organization

    async def run(self) -> None:
        """Collect for ever. A round that fails is logged, and the next one tries again."""
        while True:
            try:
                # Rounds of several registries do one another no harm; one at a time spares the work.
                async with self._database.alone("collector", wait=False) as mine:
                    if mine:
                        await self.collect()
            except EkibenError as exc:
                log.warning("a round of collecting ended early", extra={"cause": exc.message})
            except OSError as exc:
                log.error("a round of collecting ended early", extra={"cause": str(exc)})
            await self._clock.sleep(self._interval_s * random.uniform(0.8, 1.2))

    async def collect(self) -> int:
        """One round; how many blobs were deleted."""
        return sum([one.kind is GarbageKind.BLOB async for one in self.sweep()])

    async def sweep(self) -> AsyncIterator[Garbage]:
        """One round, telling of each thing once it is gone. Whoever leaves early leaves the rest to the next round."""
        while late := await self._uploads.late():
            for garbage in [await self._parts(upload) for upload in late]:
                yield garbage
            await self._uploads.expire()
        for upload in await self._ended():
            garbage = await self._parts(upload)
            await self._blobs.discard(upload)
            yield garbage
        while gone := await self._deletions.purge_expired():
            for deleted in gone:
                yield Garbage(GarbageKind.DELETED_VERSION, deleted.resource)
        async with self._database.transaction() as connection:
            now = self._clock.now()
            await upload_rows.forget_ended(connection, now - _REMEMBER_UPLOADS)
            await account_rows.forget_logins(connection, now)
            await use_rows.forget_ended(connection, now - _REMEMBER_USES)
            await audit_rows.forget_strangers(connection, now - _REMEMBER_STRANGERS)
        async for strays in self._strays():
            until = self._clock.now() + self._garbage_grace
            async with self._database.transaction() as connection:
                for stray in strays:
                    await held.adopt(connection, stray.name, until)
            for stray in strays:
                yield stray
        async for garbage in self._delete_unheld():
            yield garbage

    async def plan(self) -> AsyncIterator[Garbage]:
        """What a round would free now. Nothing is changed.

        While a hold is there, which comes first, the blobs that are told of go once it has ended.
        """
        now = self._clock.now()
        async with self._database.read() as connection:
            holds = await held.holds(connection, now)
            late = await upload_rows.expired(connection, now, _MOST_PLANNED)
        for purpose, expire_time in holds:
            yield Garbage(GarbageKind.HOLD, purpose, release_time=expire_time)
        for upload in [*late, *(one for one in await self._ended() if one not in set(late))]:
            yield await self._parts(upload)
        for deleted in await self._deletions.expired(_MOST_PLANNED):
            yield Garbage(GarbageKind.DELETED_VERSION, deleted.resource)
        async for strays in self._strays():
            for stray in strays:
                yield stray
        async with self._database.read() as connection:
            unnamed = await held.condemnable(connection, now)
        for blob in unnamed:
            yield _garbage(blob, await self._size(blob.digest))

    async def _ended(self) -> list[str]:
        """Uploads that hold parts and are not open: a crash, or a PUT that came after the end, left them."""
        ids, ended = await self._blobs.uploads(), []
        for start in range(0, len(ids), _BATCH):
            batch = ids[start : start + _BATCH]
            async with self._database.read() as connection:
                still_open = await upload_rows.still_open(connection, batch)
            ended += [upload for upload in batch if upload not in still_open]
        return ended

    async def _parts(self, upload: str) -> Garbage:
        parts = await self._blobs.parts(upload)
        return Garbage(GarbageKind.PARTS, f"uploads/{upload}", sum(part.size_bytes for part in parts))

    async def _strays(self) -> AsyncIterator[list[Garbage]]:
        """Blobs without a row, as after a database was restored from an older copy; some at a time."""
        batch: dict[str, int] = {}
        async for blob in self._blobs.blobs():
            batch[str(blob.digest)] = blob.size_bytes
            if len(batch) == _BATCH:
                if strays := await self._without_row(batch):
                    yield strays
                batch = {}
        if strays := await self._without_row(batch):
            yield strays

    async def _without_row(self, sizes: dict[str, int]) -> list[Garbage]:
        async with self._database.read() as connection:
            unknown = sorted(sizes.keys() - await held.known(connection, list(sizes)))
        return [Garbage(GarbageKind.STRAY, digest, sizes[digest]) for digest in unknown]

    async def _delete_unheld(self) -> AsyncIterator[Garbage]:
        while True:
            async with self._database.read() as connection:
                digests = await held.unheld(connection, self._clock.now(), _BATCH)
            deleted = 0
            for digest in digests:
                if (garbage := await self._delete(digest)) is not None:
                    deleted += 1
                    yield garbage
            if len(digests) < _BATCH or not deleted:
                return

    async def _delete(self, digest: str) -> Garbage | None:
        """First the decision, committed; then the file; then the row: see `store/blobs.py`."""
        size_bytes = await self._size(digest)
        async with self._database.transaction() as connection:
            if not await held.condemn(connection, digest, self._clock.now(), size_bytes):
                return None
        async with self._database.transaction() as connection:
            # The row's lock is held while the file goes: another collector, or an upload that waits for the row to
            # go, must not see it gone while this one still is about to remove the file.
            blob = await held.lock_condemned(connection, digest)
            if blob is None:
                return None
            await self._blobs.delete(Digest.parse(digest))
            await held.delete(connection, digest)
            entry = self._entry(blob)
            await audit_rows.add(connection, blob.organization or self._organization, [entry])
        garbage = _garbage(blob, blob.size_bytes)
        _collected.inc()
        _collected_bytes.inc(garbage.size_bytes)
        facts = {"digest": digest, "size_bytes": blob.size_bytes, "last_holder": blob.last_holder}
        log.info("blob collected", extra=facts)
        return garbage

    async def _size(self, digest: str) -> int | None:
        try:
            return (await self._blobs.stat(Digest.parse(digest))).size_bytes
        except NotFound:
            return None

    def _entry(self, blob: Unnamed) -> AuditEntry:
        size = "size unknown" if blob.size_bytes is None else f"{blob.size_bytes} bytes"
        until = f" until {blob.release_time:%Y-%m-%dT%H:%M:%SZ}" if blob.release_time else ""
        holder = f"last held by {blob.last_holder}{until}" if blob.last_holder else "held by no version that is known"
        return AuditEntry(
            entry=secrets.token_hex(12),
            create_time=self._clock.now(),
            user="services/registry",
            api_token="",
            method=_METHOD,
            resource=f"blobs/{blob.digest}",
            outcome="OK",
            detail=f"Collected: {size}; {holder}.",
            request_id="",
            trace_id="",
            peer="",
        )


def _garbage(blob: Unnamed, size_bytes: int | None) -> Garbage:
    return Garbage(GarbageKind.BLOB, blob.digest, size_bytes or 0, blob.last_holder, blob.release_time)
