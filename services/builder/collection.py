"""Images that are kept no longer, and what of the layout nobody has: found and taken away, now and then or when asked.

1. Images beyond the newest of their repository that no build gave for long and no deployment uses are deleted.
2. References without a row, as a crash or a cancelled build leaves them, are taken away.
3. Rows whose reference is gone, as after the database was put back from a copy, are forgotten.
4. Blobs that no reference leads to are removed (`services.content.images.collecting`).

Each step leaves a state in which the next round does the rest. Several builders may do it side by side.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby

from prometheus_client import Counter, Gauge

from ekiben.errors import EkibenError, FailedPrecondition
from services.builder.domain import Image, kept_no_longer
from services.builder.places import Place, pin_of
from services.builder.settings import Settings
from services.builder.store import ImageRows, Store
from services.builder.usage import Usage
from services.content.digest import Digest
from services.content.images.collecting import Blob, Contents, LayoutCollector
from services.content.images.layout import LayoutImageStore
from services.kernel.clock import Clock

log = logging.getLogger(__name__)

_GRACE_AFTER_BUILD_S = 600.0
_PAUSE_S = 60.0
_images = Gauge("ekiben_images", "Images in the platform's place.")
_bytes = Gauge("ekiben_image_store_bytes", "Bytes of the layout of images, garbage included.")
_removed = Counter("ekiben_image_garbage_bytes_total", "Bytes of blobs that were removed because no image had them.")


@dataclass(frozen=True)
class Collected:
    """What a round took away, or would."""

    images: Sequence[Image]
    blobs: Sequence[Blob]


class Collection:
    """Keeps the platform's place from growing for ever."""

    def __init__(
        self, place: Place, store: Store, rows: ImageRows, usage: Usage, settings: Settings, clock: Clock
    ) -> None:
        self._place = place
        self._store = store
        self._rows = rows
        self._usage = usage
        self._settings = settings
        self._clock = clock
        self._layout = LayoutCollector(place.layout) if place.layout is not None else None
        self._alone = asyncio.Lock()

    async def run(self) -> None:
        """Collect until cancelled."""
        while True:
            try:
                await self.contents()  # for the metrics
                await self._clock.sleep(self._settings.images_collect_interval_s)
                found = await self.collect()
            except (EkibenError, OSError, ValueError, KeyError) as exc:  # also what others wrote into the layout
                log.warning("images were not collected", extra={"error": str(exc)})
                await self._clock.sleep(_PAUSE_S)
                continue
            if found.images or found.blobs:
                size_bytes = sum(blob.size_bytes for blob in found.blobs)
                count = {"images": len(found.images), "blobs": len(found.blobs), "size_bytes": size_bytes}
                log.info("images were collected", extra=count)

    async def collect(self, *, dry_run: bool = False) -> Collected:
        """Run a round."""
        async with self._alone:
            expired = await self._expired()
            before = self._before()
            if not dry_run:
                expired = [image for image in expired if await self.delete(image, force=True)]
            if self._layout is None:
                return Collected(expired, ())
            if dry_run:
                return Collected(expired, await asyncio.to_thread(self._layout.garbage, before))
            await self._reconcile(before)
            blobs = await asyncio.to_thread(self._layout.collect, before)
            _removed.inc(sum(blob.size_bytes for blob in blobs))
            return Collected(expired, blobs)

    async def delete(self, image: Image, *, force: bool = False) -> bool:
        """Forget an image, and take away what names it.

        In a layout its row goes first: a crash between leaves references to the next round. In a registry that goes
        last, since nobody else knows its tags: a crash between leaves a row, whose image is deleted again.

        False where it is kept, since it is not as it was when the caller looked: a build gave it again, somebody
        pulled it, or it is gone.

        Args:
            force: forget it even where a registry takes no tags away.

        Raises:
            FailedPrecondition: such a registry has it (TAGS_NOT_DELETABLE).
        """
        tags = [tag for tag in (image.tag, pin_of(image.id)) if tag]
        if self._layout is None:
            there = await self._rows.get(image.organization, image.id)
            if there is None or there.use_time != image.use_time:
                return False
            try:
                await self._place.untag(image.repository, tags, Digest.parse(image.digest))
            except FailedPrecondition as exc:
                if exc.reason != "TAGS_NOT_DELETABLE" or not force:
                    raise
                log.warning("an image stays in its registry", extra={"image": image.id, "error": exc.message})
        gone = await self._rows.delete(image.organization, image.id, used=image.use_time)
        if gone and self._layout is not None:
            await self._place.untag(image.repository, tags, Digest.parse(image.digest))
        elif not gone and self._layout is not None:
            return False
        # A build that gave the same image wrote its row meanwhile, or will look itself.
        if (again := await self._rows.get(image.organization, image.id)) is not None:
            await self._place.restore(again)
        return gone

    async def contents(self) -> tuple[int, Contents]:
        """How many images there are, and what the layout holds."""
        count = await self._rows.count()
        found = Contents(0, 0, 0, 0, 0)
        if self._layout is not None:
            async with self._alone:
                found = await asyncio.to_thread(self._layout.contents)
        _images.set(count)
        _bytes.set(found.size_bytes)
        return count, found

    def _before(self) -> float:
        grace_s = max(self._settings.images_grace_s, self._settings.build_timeout_s + _GRACE_AFTER_BUILD_S)
        return time.time() - grace_s  # of the file system, whose times are the machine's

    async def _expired(self) -> list[Image]:
        until = self._clock.now() - timedelta(days=self._settings.images_keep_days)
        found = []
        for _, images in groupby(await self._rows.all(), key=lambda image: image.repository):
            for image in kept_no_longer(list(images), self._settings.images_keep_newest, until):
                if not await self._usage.users(image):
                    found.append(image)
        return found

    async def _reconcile(self, before: float) -> None:
        """Make references and rows agree, where what disagrees is not new: builds tag before they write the row."""
        assert self._place.layout is not None
        store = LayoutImageStore(self._place.layout)
        unfinished = await self._store.unfinished()
        named = {str(e.annotations.get("org.opencontainers.image.ref.name")): e for e in await store.entries()}
        rows = {(row.repository, row.id): row for row in await self._rows.all()}
        stale, digests = [], set()
        for reference, entry in named.items():
            repository, _, tag = reference.rpartition(":")
            if store.is_new(entry.digest, before):
                continue
            if tag.startswith("BUILD-") and tag.removeprefix("BUILD-") not in unfinished:
                stale.append(reference)
            elif tag.startswith("IMAGE-") and (repository, tag.removeprefix("IMAGE-")) not in rows:
                stale.append(reference)
                digests.add((repository, entry.digest))
        stale += [ref for ref, each in named.items() if (ref.rpartition(":")[0], each.digest) in digests]
        if stale:
            await store.untag(stale, {named[reference].digest for reference in stale}, before=before)
        left = set(await store.references())
        for (repository, image), row in rows.items():
            if f"{repository}:{pin_of(image)}" in left:
                if row.tag and f"{repository}:{row.tag}" not in left:
                    await self._place.restore(row)  # what had the tag meanwhile came from a build that was cancelled
            elif row.use_time.timestamp() < before:
                log.warning("an image is gone from its layout", extra={"image": image, "digest": row.digest})
                await self._rows.delete(row.organization, image, used=row.use_time)
