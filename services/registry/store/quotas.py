"""What each organization keeps, counted as it changes, and its limits.

One row for each organization. `charge` writes it as the last statement of a transaction that adds or takes away, so
that others wait for it no longer than a commit takes; under its lock counts are exact, and a limit holds however many
add at once.

Content counts once in an organization. Who names a digest, or ceases to, holds the lock of its row in `blobs` (of
several in order: `lock_blobs`) while it asks whether anybody else in the organization names it: of two at once, one
sees the other. That lock comes after the version's, and the quota's after both.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from services.kernel.db import AsyncConnection, insert_into
from services.registry.domain import Limits, Quota, Usage
from services.registry.store.tables import blobs, deleted_versions, quotas, repositories, versions

_NAMERS = (versions, deleted_versions)
_NEW = {"bytes": 0, "versions": 0, "repositories": 0, "updater": "", "revision": 0}
_AT_ONCE = 500


def _quota(row: sa.Row[Any] | None, organization: str) -> Quota:
    if row is None:
        return Quota(organization)
    return Quota(
        organization=row.organization,
        used=Usage(row.bytes, row.versions, row.repositories),
        limits=Limits(row.max_bytes, row.max_versions, row.max_repositories),
        updater=row.updater,
        update_time=row.update_time,
        revision=row.revision,
    )


async def get(connection: AsyncConnection, organization: str, *, lock: bool = False) -> Quota:
    """The quota of an organization; nothing and no limits where it has no row yet. `lock` makes and locks one."""
    if lock:
        new = insert_into(connection.dialect.name, quotas).values(organization=organization, **_NEW)
        await connection.execute(new.on_conflict_do_nothing())
        locked = sa.select(quotas.c.organization).where(quotas.c.organization == organization).with_for_update()
        await connection.execute(locked)
    row = (await connection.execute(sa.select(quotas).where(quotas.c.organization == organization))).first()
    return _quota(row, organization)


async def charge(connection: AsyncConnection, organization: str, added: Usage) -> None:
    """Count what the transaction adds, or takes away. Last in it: it keeps other writers of the organization out.

    Raises:
        ResourceExhausted: what is added does not fit (QUOTA_EXCEEDED).
    """
    counts = {"bytes": added.bytes, "versions": added.versions, "repositories": added.repositories}
    if not any(counts.values()):
        return
    new = insert_into(connection.dialect.name, quotas).values(organization=organization, **{**_NEW, **counts})
    statement = new.on_conflict_do_update(
        index_elements=[quotas.c.organization], set_={name: quotas.c[name] + new.excluded[name] for name in counts}
    )
    row = (await connection.execute(statement.returning(quotas))).one()
    _quota(row, organization).check(added)


async def set_limits(connection: AsyncConnection, organization: str, limits: Limits, user: str, now: datetime) -> None:
    """Write the limits of a locked quota, and who set them when."""
    await connection.execute(
        quotas.update()
        .where(quotas.c.organization == organization)
        .values(
            max_bytes=limits.bytes,
            max_versions=limits.versions,
            max_repositories=limits.repositories,
            updater=user,
            update_time=now,
            revision=quotas.c.revision + 1,
        )
    )


# Content


async def lock_blobs(connection: AsyncConnection, digests: Iterable[str]) -> None:
    """Take the locks of the rows of these blobs, in order; empty digests are passed over."""
    wanted = sorted(set(digests) - {""})
    for start in range(0, len(wanted), _AT_ONCE):
        ordered = sa.select(blobs.c.digest).where(blobs.c.digest.in_(wanted[start : start + _AT_ONCE]))
        await connection.execute(ordered.order_by(blobs.c.digest).with_for_update())


async def held(connection: AsyncConnection, organization: str, digests: Iterable[str]) -> set[str]:
    """Those of `digests` that a version of the organization names, be it deleted."""
    wanted = sorted(digests)
    found: set[str] = set()
    for start in range(0, len(wanted), _AT_ONCE):
        some = wanted[start : start + _AT_ONCE]
        # One statement: of two, a version that is restored in between would be seen by neither.
        named = sa.union(
            *(
                sa.select(table.c.digest).where(table.c.digest.in_(some), table.c.organization == organization)
                for table in _NAMERS
            )
        )
        found.update((await connection.execute(named)).scalars())
    return found


async def contents(connection: AsyncConnection, where: sa.ColumnElement[bool]) -> Mapping[str, int]:
    """Digests that these locked versions name, with their sizes; the locks of their blobs are taken."""
    statement = sa.select(versions.c.digest, versions.c.size_bytes).where(where, versions.c.digest.is_not(None))
    found = {row.digest: row.size_bytes for row in (await connection.execute(statement.distinct())).all()}
    await lock_blobs(connection, found)
    return found


async def freed(connection: AsyncConnection, organization: str, contents: Mapping[str, int]) -> int:
    """Bytes of those contents, whose locks are held, that no version of the organization names any more."""
    there = await held(connection, organization, contents)
    return sum(size_bytes for digest, size_bytes in contents.items() if digest not in there)


async def any_of_size(connection: AsyncConnection, organization: str, size_bytes: int) -> bool:
    """Whether the organization has content of this size: what is about to be sent may be the same."""
    for table in _NAMERS:
        there = sa.select(table.c.id).where(
            table.c.organization == organization,
            table.c.kind.in_(("model", "bento")),  # so that an index of sizes serves
            table.c.size_bytes == size_bytes,
            table.c.digest.is_not(None),
        )
        if (await connection.execute(there.limit(1))).first() is not None:
            return True
    return False


# Counting anew


async def count(connection: AsyncConnection, organization: str) -> Usage:
    """What an organization keeps, from the rows themselves."""
    named = [
        sa.select(table.c.digest, table.c.size_bytes).where(
            table.c.organization == organization, table.c.digest.is_not(None)
        )
        for table in _NAMERS
    ]
    stored = sa.union(*named).subquery()
    found = [int((await connection.execute(sa.select(sa.func.sum(stored.c.size_bytes)))).scalar_one() or 0)]
    for table in (versions, repositories):
        counted = sa.select(sa.func.count()).select_from(table).where(table.c.organization == organization)
        found.append((await connection.execute(counted)).scalar_one())
    return Usage(*found)


async def recount(connection: AsyncConnection, organization: str) -> tuple[Usage, Usage]:
    """Write down what is there: what was counted before, and what is. Exact beside writers, which wait meanwhile."""
    counted = (await get(connection, organization, lock=True)).used
    found = await count(connection, organization)
    values = {"bytes": found.bytes, "versions": found.versions, "repositories": found.repositories}
    await connection.execute(quotas.update().where(quotas.c.organization == organization).values(**values))
    return counted, found


async def organizations_with_rows(connection: AsyncConnection) -> list[str]:
    """Every organization that has a quota's row, or a repository that such a row should count."""
    statement = sa.union(sa.select(quotas.c.organization), sa.select(repositories.c.organization))
    return sorted((await connection.execute(statement)).scalars())
