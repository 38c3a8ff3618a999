"""Which deployer runs the replicas of a cluster: one of those on the database, while it shows signs of life.

Replicas are processes of one machine, so that only a deployer there can look after them. All deployers answer what is
in the database; the one that has the cluster starts and ends replicas and knows the routes; the others stand by. It
counts a number up in the cluster's row. A deployer that watched it stand still for `owner_lease_s` takes the cluster
and starts everything on its own machine; the former one, should it only have slept, finds that out with its next sign
of life, and ends what it has.

While the database is away nobody can show a sign of life, and nobody can take the cluster: whoever has it goes on.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from ekiben.errors import EkibenError, Unavailable
from services.deployer.store import Store
from services.kernel.clock import Clock
from services.kernel.leases import Vigil

log = logging.getLogger(__name__)


class Ownership:
    """See the module. `me` is the id of the data directory: a restart on it takes its cluster up at once."""

    def __init__(self, store: Store, cluster: str, me: str, clock: Clock, *, lease_s: float) -> None:
        self._store, self._cluster, self._me, self._clock, self._lease_s = store, cluster, me, clock, lease_s
        self._vigil = Vigil(lease_s, clock)
        self._changed = asyncio.Condition()
        self._released = False
        self._behind = ""
        self.held = False
        """Whether the cluster is this deployer's."""
        self.changed: Callable[[], None] = lambda: None
        """Called when `held` is another."""

    def check(self) -> None:
        """Raises Unavailable (DEPLOYER_STANDBY) where another deployer has the cluster."""
        if not self.held:
            raise Unavailable(
                "Another deployer runs the replicas of this cluster, and answers this; this one takes over when that "
                "one is gone.",
                reason="DEPLOYER_STANDBY",
                retry_after_s=self._lease_s,
            )

    def standby(self) -> str:
        """Why another deployer is to be called; empty where this one has the cluster."""
        try:
            self.check()
        except Unavailable as exc:
            return exc.message
        return ""

    async def look(self) -> None:
        """Show a sign of life, or take the cluster where nobody has it."""
        if self._released:
            return
        if not self.held:
            owner, sign = await self._store.owner_of(self._cluster)
            if owner != self._me:
                free = not owner or bool(self._vigil.silent({owner: sign}))
                if free and await self._store.take_cluster(self._cluster, self._me, owner, sign):
                    await self._set(True, expected=not owner)
                elif owner != self._behind:
                    self._behind = owner
                    log.warning("another deployer has the cluster; standing by", extra={"cluster": self._cluster})
                return
            await self._set(True)  # before the sign, which a full disk does not take: what runs is looked after
        if not await self._store.renew_cluster(self._cluster, self._me):
            await self._set(False, expected=False)

    async def run(self) -> None:
        """Look again and again, for ever."""
        while True:
            try:
                await self.look()
            except EkibenError as exc:
                log.warning("the owner of the cluster is not known", extra={"reason": exc.reason})
            await self._clock.sleep(self._lease_s / 5)

    async def release(self) -> None:
        """Give the cluster up, once nothing of it runs here: whoever stands by takes it at its next look."""
        self._released = True
        if self.held:
            await self._store.release_cluster(self._cluster, self._me)
            await self._set(False)

    async def while_held(self, loop: Callable[[], Awaitable[None]]) -> None:
        """Run a loop while the cluster is this deployer's, for ever."""
        while True:
            await self._until(True)
            running = asyncio.ensure_future(loop())
            lost = asyncio.ensure_future(self._until(False))
            try:
                await asyncio.wait([running, lost], return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    running.result()
            finally:
                for task in (running, lost):
                    task.cancel()
                await asyncio.wait([running, lost])

    async def _until(self, held: bool) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.held is held)

    async def _set(self, held: bool, *, expected: bool = True) -> None:
        if held is self.held:
            return
        self.held = held
        level = logging.INFO if expected else logging.WARNING
        log.log(level, "cluster taken" if held else "cluster given up", extra={"cluster": self._cluster})
        async with self._changed:
            self._changed.notify_all()
        self.changed()
