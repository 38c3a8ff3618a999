"""Use cases over what was deleted: each public method is one transaction.

Deleting moves a version's row to a table of its own, where only these look; restoring moves it back. The name is free
in between, and who took it meanwhile keeps it. The bytes stay as long as either row names them.
"""

import uuid
from collections.abc import Sequence

from ekiben import names
from ekiben.errors import NotFound
from services.kernel.clock import Clock
from services.kernel.db import AsyncConnection, Database
from services.kernel.identity import Principal
from services.registry.catalog import is_alias, organization_of, version_exists
from services.registry.domain import Deleted, Kind, Usage
from services.registry.store import aliases as alias_rows
from services.registry.store import blobs as held
from services.registry.store import catalog as catalog_rows
from services.registry.store import deletions as rows
from services.registry.store import quotas as quota_rows
from services.registry.store.deletions import Position
from services.registry.uses import tell_bento

_PURGED_AT_ONCE = 200


def parse_parent(parent: str) -> tuple[Kind | None, str, str]:
    """Kind, repository and version that a list is limited to, empty for any. Raises InvalidArgument (NAME_INVALID)."""
    if not parent:
        return None, "", ""
    bentos, several = parent.startswith("bentoRepositories/"), parent.count("/") == 1
    if several:
        kind = Kind.BENTO if bentos else Kind.MODEL
        cls: type[names.ModelRepository | names.BentoRepository] = (
            names.BentoRepository if bentos else names.ModelRepository
        )
        repository = cls.parse(parent, wildcard=True).repository
        return kind, "" if repository == names.WILDCARD else repository, ""
    if bentos:
        bento = names.Bento.parse(parent)
        return Kind.BENTO, bento.repository, bento.bento
    model = names.Model.parse(parent)
    return Kind.MODEL, model.repository, model.model


class Deletions:
    """What can be restored."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def list(
        self, caller: Principal, parent: str, size: int, after: Position | None
    ) -> tuple[Sequence[Deleted], Position | None]:
        """A page of deleted versions, deleted last first, and the position after it."""
        kind, repository, version = parse_parent(parent)
        async with self._database.read() as connection:
            return await rows.list_versions(
                connection,
                organization_of(caller),
                self._clock.now(),
                kind=kind,
                repository=repository,
                version=version,
                size=size,
                after=after,
            )

    async def undelete(self, caller: Principal, uid: str) -> Deleted:
        """Restore a version, and its repository where that is gone.

        Raises:
            NotFound: it is not there, or its time is over (DELETED_VERSION_NOT_FOUND).
            AlreadyExists: another version has the name (MODEL_EXISTS, BENTO_EXISTS); nothing changed.
            FailedPrecondition: the name is an alias by now (VERSION_IS_ALIAS).
            ResourceExhausted: the organization has as many versions or repositories as it may (QUOTA_EXCEEDED).
        """
        organization, now = organization_of(caller), self._clock.now()
        async with self._database.transaction() as connection:
            found = await rows.version(connection, organization, uid, now)
            if found is None:
                raise _not_there(uid)
            row_id, deleted = found
            repository_id, made = await self._repository(connection, caller, deleted)
            if await alias_rows.exists(connection, organization, deleted.kind, deleted.repository, deleted.version):
                raise is_alias(deleted.kind, deleted.repository, deleted.version)
            if await rows.restore_version(connection, row_id, repository_id, now) is None:
                raise version_exists(
                    deleted.kind, deleted.repository, deleted.version, todo="Delete that one first: it can be restored."
                )
            if deleted.kind is Kind.BENTO:
                await tell_bento(connection, organization, deleted.resource, uid, deleted.models, now)
            await quota_rows.charge(connection, organization, Usage(versions=1, repositories=int(made)))
        return deleted

    async def purge(self, caller: Principal, uid: str) -> Deleted:
        """Delete a version for good. Raises NotFound (DELETED_VERSION_NOT_FOUND)."""
        async with self._database.transaction() as connection:
            found = await rows.version(connection, organization_of(caller), uid, self._clock.now())
            if found is None:
                raise _not_there(uid)
            await self._purge(connection, [found])
        return found[1]

    async def expired(self, limit: int) -> Sequence[Deleted]:
        """At most so many of those whose time is over."""
        async with self._database.read() as connection:
            found = await rows.expired(connection, self._clock.now(), limit)
        return [deleted for _, deleted in found]

    async def purge_expired(self) -> Sequence[Deleted]:
        """Delete for good some of those whose time is over; which. Call it until it gives none."""
        now = self._clock.now()
        async with self._database.transaction() as connection:
            await rows.forget_repositories(connection, now)
            found = await rows.expired(connection, now, _PURGED_AT_ONCE)
            return await self._purge(connection, found)

    async def _purge(self, connection: AsyncConnection, found: Sequence[tuple[int, Deleted]]) -> Sequence[Deleted]:
        await quota_rows.lock_blobs(connection, (deleted.digest for _, deleted in found))
        gone = [deleted for row_id, deleted in found if await rows.purge(connection, row_id)]
        former = [(deleted.digest, deleted.organization, deleted.resource) for deleted in gone if deleted.digest]
        await held.let_go(connection, former, self._clock.now())
        for organization in sorted({deleted.organization for deleted in gone}):
            contents = {d.digest: d.size_bytes for d in gone if d.digest and d.organization == organization}
            freed = await quota_rows.freed(connection, organization, contents)
            await quota_rows.charge(connection, organization, Usage(bytes=-freed))
        return gone

    async def _repository(self, connection: AsyncConnection, caller: Principal, deleted: Deleted) -> tuple[int, bool]:
        """Row id of the version's repository, and whether it had to be made or brought back."""
        organization, kind, name = organization_of(caller), deleted.kind, deleted.repository
        made = False
        while True:  # until nobody has deleted it between the two
            if (row_id := await catalog_rows.lock_repository(connection, organization, kind, name)) is not None:
                return row_id, made
            made = await rows.restore_repository(connection, organization, kind, name)
            if not made:
                now = self._clock.now()
                values = {"uid": str(uuid.uuid4()), "description": "", "labels": "{}", "creator": caller.user}
                values |= {"updater": caller.user, "create_time": now, "update_time": now}  # type: ignore[dict-item]
                made = await catalog_rows.add_repository(connection, organization, kind, name, values)


def _not_there(uid: str) -> NotFound:
    return NotFound(
        f"There is no deleted version {uid!r}: it was restored, purged, or its grace period is over.",
        reason="DELETED_VERSION_NOT_FOUND",
        deleted_version=f"deletedVersions/{uid}",
    )
