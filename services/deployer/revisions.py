"""Revisions, and what is read from them, kept in memory: they never change."""

from collections.abc import Iterable, Sequence

from ekiben.errors import NotFound
from services.deployer import specs
from services.deployer.domain import Revision
from services.deployer.specs import Version
from services.deployer.store import Store

REVISIONS = 10
"""So many of each deployment are kept: the latest, and those that have replicas still."""


class Revisions:
    """See the module."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, dict[int, Revision]] = {}
        self._versions: dict[str, dict[int, list[Version]]] = {}
        """Both by the uid of the deployment, and number."""

    def keep(self, found: Iterable[Revision]) -> None:
        """These were read."""
        for one in found:
            self._known.setdefault(one.deployment_uid, {})[one.number] = one

    def forget(self, uid: str) -> None:
        """Keep none of a deployment."""
        self._known.pop(uid, None)
        self._versions.pop(uid, None)

    async def get(self, uid: str, number: int) -> Revision:
        """One revision. Raises NotFound (REVISION_NOT_FOUND)."""
        found = self._known.get(uid, {}).get(number)
        if found is None:
            found = await self._store.get_revision(uid, number)
            if found is None:
                raise NotFound(f"Revision {number} of {uid} does not exist.", reason="REVISION_NOT_FOUND")
            if len(self._known.get(uid, ())) >= REVISIONS:
                self.forget(uid)
            self.keep([found])
        return found

    async def versions(self, uid: str, number: int) -> Sequence[Version]:
        """The targets of one, main first. Raises NotFound (REVISION_NOT_FOUND)."""
        revision = await self.get(uid, number)
        known = self._versions.setdefault(uid, {})
        if number not in known:
            known[number] = specs.versions_of(revision)
        return known[number]
