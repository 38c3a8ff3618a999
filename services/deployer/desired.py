"""Deployments as their rows are, kept in memory: of thousands of rows only those are read that are another.

A change of what is desired counts the row's generation up. So a look at all generations, which costs little, tells of
every change, whoever made it and whether or not anybody said so. What is observed only the deployer writes that keeps
them here.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

from services.deployer.domain import Deployment, Status
from services.deployer.store import Store
from services.kernel.clock import Clock

LOOK_S = 5.0
"""So often generations are read though nobody said that one changed: what says so may be lost."""


class Desired:
    """See the module."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store, self._clock = store, clock
        self._rows: dict[str, Deployment] = {}
        self._looked_at: float | None = None
        self._told = False

    @property
    def rows(self) -> Mapping[str, Deployment]:
        """All deployments by uid, as of the last `refresh`."""
        return self._rows

    @property
    def read(self) -> bool:
        """Whether they were read at all."""
        return self._looked_at is not None

    def tell(self) -> None:
        """Something changed: the next `refresh` finds out what."""
        self._told = True

    def reset(self) -> None:
        """Read everything anew: another deployer may have written meanwhile."""
        self._looked_at = None
        self._rows = {}

    async def refresh(self, also: Collection[str] = ()) -> set[str]:
        """Read what is another than before, and these. Gives the uids of rows that are new, changed or gone."""
        now = self._clock.monotonic()
        if self._looked_at is None:
            self._told = False
            self._rows = {one.uid: one for one in await self._store.list_deployments()}
            self._looked_at = now
            return set(self._rows)
        wanted = set(also)
        looks = self._told or now - self._looked_at >= LOOK_S
        told, self._told = self._told, False
        try:
            if looks:
                generations = await self._store.generations()
                wanted |= {
                    uid
                    for uid in generations.keys() | self._rows.keys()
                    if uid not in generations or uid not in self._rows or self._rows[uid].generation != generations[uid]
                }
            found = {one.uid: one for one in await self._store.deployments_of(wanted)} if wanted else {}
        except BaseException:
            self._told = self._told or told
            raise
        if looks:
            self._looked_at = now
        changed = {uid for uid in wanted if found.get(uid) != self._rows.get(uid)}
        for uid in changed:
            if uid in found:
                self._rows[uid] = found[uid]
            else:
                del self._rows[uid]
        return changed

    def observed(self, uid: str, *, status: Status | None = None, build: str | None = None) -> None:
        """This was written as what is observed of a deployment."""
        if (row := self._rows.get(uid)) is not None:
            status, build = row.status if status is None else status, row.build if build is None else build
            self._rows[uid] = replace(row, status=status, build=build)

    def removed(self, uid: str) -> None:
        """Its row was removed."""
        self._rows.pop(uid, None)
