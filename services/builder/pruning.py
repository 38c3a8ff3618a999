"""What the builder's folder holds and nobody needs any more: found and taken away, now and then or when asked.

1. What can be made again the same way (environments, bytecode, downloads) goes when nobody used it for long; and the
   longest unused first where all of it takes too much. Environments of live deployments count as used.
2. Locks, and wheels that were built from source, are kept longer: made anew, they may be others. What bentos brought
   along is kept as long as one of them names it.
3. Logs go after a time of their own, and what killed builds left once no build can be at it any more.

Nothing goes that was used within the time that a build may take, so that no build loses what it found. A crash leaves a
state in which the next round does the rest; see `caches`.
"""

import asyncio
import logging
import time
from collections import Counter as Counts
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge

from ekiben.errors import EkibenError, Unavailable
from services.builder.caches import SAME_AGAIN, Amount, Caches, Kind, Thing
from services.builder.settings import Settings
from services.builder.uv import Programs
from services.kernel.clock import Clock

if TYPE_CHECKING:
    # `ekiben images build`, which prunes too, needs none of their half second of imports.
    from services.builder.store import Store
    from services.builder.usage import Usage

log = logging.getLogger(__name__)

_GRACE_AFTER_BUILD_S = 600.0
_PAUSE_S = 300.0
_DAY_S = 86_400.0
_bytes = Gauge("ekiben_builder_cache_bytes", "Bytes in the builder's folder besides images, by kind.", ["kind"])
_removed = Counter(
    "ekiben_builder_cache_removed_bytes_total", "Bytes of the builder's folder that were freed, by kind.", ["kind"]
)


@dataclass
class Pruned:
    """What a round took away, or would."""

    counts: Counts[Kind] = field(default_factory=Counts)
    size_bytes: Counts[Kind] = field(default_factory=Counts)

    def add(self, kind: Kind, size_bytes: int) -> None:
        """One thing that went."""
        self.counts[kind] += 1
        self.size_bytes[kind] += size_bytes


class Pruning:
    """Keeps the builder's folder from growing for ever."""

    def __init__(
        self,
        caches: Caches,
        store: "Store | None",
        usage: "Usage | None",
        programs: Programs,
        settings: Settings,
        clock: Clock,
    ) -> None:
        """Without a store there are no builds but those that have ended, without usage no deployments."""
        self._caches = caches
        self._store = store
        self._usage = usage
        self._programs = programs
        self._settings = settings
        self._clock = clock

    async def run(self) -> None:
        """Prune until cancelled."""
        while True:
            await self._clock.sleep(self._settings.caches_prune_interval_s)
            try:
                found = await self.prune()
                await self.amounts()  # for the metrics
            except (EkibenError, OSError) as exc:
                log.warning("the builder's folder was not pruned", extra={"error": str(exc)})
                await self._clock.sleep(_PAUSE_S)
                continue
            if found.counts:
                count = {"things": found.counts.total(), "size_bytes": found.size_bytes.total()}
                log.info("the builder's folder was pruned", extra=count)

    async def amounts(self) -> Mapping[Kind, Amount]:
        """How much there is of each kind."""
        found = await asyncio.to_thread(self._caches.amounts)
        for kind, amount in found.items():
            _bytes.labels(str(kind)).set(amount.size_bytes)
        return found

    async def prune(self, *, dry_run: bool = False) -> Pruned:
        """Run a round.

        Raises:
            Unavailable: another builder of the folder is at it (CACHES_BUSY).
        """
        pruned, settings, now = Pruned(), self._settings, time.time()  # times of files are the machine's
        grace = now - max(settings.images_grace_s, settings.build_timeout_s + _GRACE_AFTER_BUILD_S)
        old = min(grace, now - settings.caches_keep_days * _DAY_S)
        with ExitStack() as stack:
            if not dry_run:
                stack.enter_context(self._caches.alone())
            for kind in SAME_AGAIN:
                await self._go(await self._unused(kind, old), pruned, dry_run)
            if settings.caches_most_bytes:
                await self._shrink(grace, pruned, dry_run)
            before = min(grace, now - settings.locks_keep_days * _DAY_S)
            await self._go(await self._unused(Kind.LOCKS, before), pruned, dry_run)
            shipped = await asyncio.to_thread(self._caches.unnamed_shipped)
            await self._go([each for each in shipped if each.used < old], pruned, dry_run)
            active = await self._store.unfinished() if self._store is not None else ()
            logs = await self._unused(Kind.LOGS, min(grace, now - settings.logs_keep_days * _DAY_S))
            await self._go([each for each in logs if each.path.stem not in active], pruned, dry_run)
            await self._go(await self._unused(Kind.UNFINISHED, grace), pruned, dry_run)
            if not dry_run and pruned.counts[Kind.DOWNLOADS]:
                await self._prune_uv()
        return pruned

    async def _unused(self, kind: Kind, before: float) -> Sequence[Thing]:
        things = await asyncio.to_thread(self._caches.things, kind)
        return [each for each in things if each.used < before]

    async def _shrink(self, grace: float, pruned: Pruned, dry_run: bool) -> None:
        """Take away the longest unused until the rest is within its bound."""
        amounts = await self.amounts()
        left = sum(amounts[kind].size_bytes for kind in SAME_AGAIN)
        left -= sum(pruned.size_bytes[kind] for kind in SAME_AGAIN) if dry_run else pruned.size_bytes[Kind.DOWNLOADS]
        # Downloads last: what an environment was made of is free to go only once that is gone.
        for kinds in ([kind for kind in SAME_AGAIN if kind is not Kind.DOWNLOADS], [Kind.DOWNLOADS]):
            things = [each for kind in kinds for each in await self._unused(kind, grace)]
            for thing in sorted(things, key=lambda each: each.used):
                if left <= self._settings.caches_most_bytes:
                    return
                left -= await self._go([thing], pruned, dry_run)

    async def _go(self, things: Sequence[Thing], pruned: Pruned, dry_run: bool) -> int:
        """Take things away; the bytes that are free then."""
        freed = 0
        for thing in things:
            if thing.kind is Kind.ENVIRONMENTS and await self._is_used(thing, dry_run):
                continue
            what = self._caches.size_of if dry_run else self._caches.remove
            size_bytes = await asyncio.to_thread(what, thing)
            if size_bytes is not None:
                pruned.add(thing.kind, size_bytes)
                freed += size_bytes
                if not dry_run:
                    _removed.labels(str(thing.kind)).inc(size_bytes)
        return freed

    async def _is_used(self, thing: Thing, dry_run: bool) -> bool:
        """Whether a deployment may run from an environment: then it counts as used now, as long as that lives."""
        if self._usage is None:
            return False
        try:
            used = await self._usage.runs_from(f"sha256:{thing.path.name}")
        except Unavailable:
            return True
        if used and not dry_run:
            await asyncio.to_thread(self._caches.keep, thing)
        return used

    async def _prune_uv(self) -> None:
        for cache in await asyncio.to_thread(self._caches.uv_caches):
            outcome = await self._programs.uv("cache", "prune", cwd=cache.parent, cache_dir=cache)
            if outcome.returncode:
                log.warning("uv did not prune its cache", extra={"error": outcome.text[-400:]})
