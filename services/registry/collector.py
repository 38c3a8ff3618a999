"""The loop that removes what nobody names any more: late uploads, their parts, deleted versions, blobs, logins,
strangers' refusals.

Level-triggered: each round looks at everything anew, so that it does not matter where the one before ended.
"""

import logging
import random
from datetime import timedelta

from prometheus_client import Counter

from ekiben.errors import EkibenError
from services.content.blobs import BlobStore
from services.content.digest import Digest
from services.kernel.clock import Clock
from services.kernel.db import Database
from services.registry.deletions import Deletions
from services.registry.store import accounts as account_rows
from services.registry.store import audit as audit_rows
from services.registry.store import blobs as held
from services.registry.store import uploads as upload_rows
from services.registry.store import uses as use_rows
from services.registry.uploads import Uploads

log = logging.getLogger(__name__)

_BATCH = 200
_REMEMBER_UPLOADS = timedelta(days=7)
"""How long the row of an upload that ended answers a client that asks again."""

_REMEMBER_STRANGERS = timedelta(days=30)
"""How long the audit log keeps refusals of callers without a valid token."""

_REMEMBER_USES = timedelta(days=400)
"""How long it is known what used what: whoever looks a year back still finds it."""

_collected = Counter("ekiben_blobs_collected", "Blobs that were deleted because nothing named them.")


class Collector:
    """Collects once every `interval_s`."""

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
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._uploads = uploads
        self._deletions = deletions
        self._clock = clock
        self._interval_s = interval_s
        self._garbage_grace = garbage_grace

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
        while await self._uploads.expire() == 100:
            pass
        await self._discard_ended()
        while await self._deletions.purge_expired():
            pass
        async with self._database.transaction() as connection:
            now = self._clock.now()
            await upload_rows.forget_ended(connection, now - _REMEMBER_UPLOADS)
            await account_rows.forget_logins(connection, now)
            await use_rows.forget_ended(connection, now - _REMEMBER_USES)
            await audit_rows.forget_strangers(connection, now - _REMEMBER_STRANGERS)
        await self._adopt_strays()
        return await self._delete_unheld()

    async def _discard_ended(self) -> None:
        """Free parts whose upload is not open: a crash, or a PUT that came after the end, left them."""
        ids = await self._blobs.uploads()
        for start in range(0, len(ids), _BATCH):
            batch = ids[start : start + _BATCH]
            async with self._database.read() as connection:
                still_open = await upload_rows.still_open(connection, batch)
            for upload in batch:
                if upload not in still_open:
                    await self._blobs.discard(upload)

    async def _adopt_strays(self) -> None:
        """Take blobs without a row into account, as after a database was restored from an older copy."""
        batch: list[str] = []
        async for blob in self._blobs.blobs():
            batch.append(str(blob.digest))
            if len(batch) == _BATCH:
                await self._adopt(batch)
                batch = []
        await self._adopt(batch)

    async def _adopt(self, digests: list[str]) -> None:
        async with self._database.read() as connection:
            strays = set(digests) - await held.known(connection, digests)
        if strays:
            until = self._clock.now() + self._garbage_grace
            async with self._database.transaction() as connection:
                for digest in sorted(strays):
                    await held.adopt(connection, digest, until)

    async def _delete_unheld(self) -> int:
        count = 0
        while True:
            async with self._database.read() as connection:
                digests = await held.unheld(connection, self._clock.now(), _BATCH)
            deleted = 0
            for digest in digests:
                deleted += await self._delete(digest)
            count += deleted
            if len(digests) < _BATCH or not deleted:
                return count

    async def _delete(self, digest: str) -> bool:
        """First the decision, committed; then the file; then the row: see `store/blobs.py`."""
        async with self._database.transaction() as connection:
            if not await held.condemn(connection, digest, self._clock.now()):
                return False
        async with self._database.transaction() as connection:
            # The row's lock is held while the file goes: another collector, or an upload that waits for the row to
            # go, must not see it gone while this one still is about to remove the file.
            if not await held.lock_condemned(connection, digest):
                return False
            await self._blobs.delete(Digest.parse(digest))
            await held.delete(connection, digest)
        _collected.inc()
        log.info("blob collected", extra={"digest": digest})
        return True
