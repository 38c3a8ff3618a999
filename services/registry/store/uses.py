"""Who uses what, as rows.

A delete must not pass by a use that is just being claimed: a claim takes the locks of the versions that it names, and a
delete that of its version, before either looks at or writes a use.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from services.kernel.db import AsyncConnection, insert_into
from services.registry.domain import Kind, KnownUse, Use
from services.registry.store.tables import deleted_versions, uses, versions

_AT_ONCE = 500
"""Names in one statement: SQLite takes some thousands of parameters."""


def _use(row: Any) -> Use:
    return Use(
        consumer=row.consumer,
        consumer_uid=row.consumer_uid,
        resource=row.resource,
        digest=row.digest,
        live=row.live,
        create_time=row.create_time,
        end_time=row.end_time,
    )


async def of_owner(connection: AsyncConnection, organization: str, owner_uid: str) -> list[KnownUse]:
    """Every use that an owner told of. Locked, so that two who tell at once go one after the other."""
    statement = (
        sa.select(uses)
        .where(uses.c.owner_uid == owner_uid, uses.c.organization == organization)
        .order_by(uses.c.id)
        .with_for_update()
    )
    rows = (await connection.execute(statement)).all()
    return [KnownUse(_use(row), row.generation, row.claim_end_time) for row in rows]


async def put(
    connection: AsyncConnection, organization: str, owner: str, owner_uid: str, changed: Sequence[KnownUse]
) -> None:
    """Write uses, new or changed."""
    if not changed:
        return
    statement = insert_into(connection.dialect.name, uses)
    keys = [uses.c.organization, uses.c.consumer_uid, uses.c.resource]
    fixed = {"id", "organization", "consumer_uid", "resource", "create_time"}
    statement = statement.on_conflict_do_update(
        index_elements=keys, set_={c.name: statement.excluded[c.name] for c in uses.c if c.name not in fixed}
    )
    rows = [
        {
            "organization": organization,
            "owner": owner,
            "owner_uid": owner_uid,
            "consumer": one.use.consumer,
            "consumer_uid": one.use.consumer_uid,
            "resource": one.use.resource,
            "digest": one.use.digest,
            "live": one.use.live,
            "generation": one.generation,
            "claim_end_time": one.claim_end_time,
            "create_time": one.use.create_time,
            "end_time": one.use.end_time,
        }
        for one in changed
    ]
    await connection.execute(statement, rows)


async def end_of(connection: AsyncConnection, organization: str, owner_uids: Sequence[str], now: datetime) -> None:
    """End all that these owners use."""
    for some in _portions(owner_uids):
        here = (uses.c.owner_uid.in_(some), uses.c.organization == organization, uses.c.live == sa.true())
        await connection.execute(uses.update().where(*here).values(live=False, end_time=now))


async def live_users(
    connection: AsyncConnection, organization: str, resources: Sequence[str], limit: int
) -> tuple[list[str], int]:
    """At most `limit` names of what uses any of these, in order, and how many there are."""
    found: set[str] = set()
    for some in _portions(resources):
        where = (uses.c.organization == organization, uses.c.resource.in_(some), uses.c.live == sa.true())
        found.update((await connection.execute(sa.select(uses.c.consumer).where(*where).distinct())).scalars())
    return sorted(found)[:limit], len(found)


def _portions(items: Sequence[str]) -> Iterator[Sequence[str]]:
    """Lists that a statement can take. Not a subquery over the versions: PostgreSQL, while it has no statistics of
    tables that just grew, ran one for each row (30 s for 5,000 bentos)."""
    return (items[start : start + _AT_ONCE] for start in range(0, len(items), _AT_ONCE))


async def neighbours(
    connection: AsyncConnection, organization: str, names: Sequence[str], *, used: bool, live_only: bool, limit: int
) -> list[Use]:
    """Uses by any of `names` (`used`), or else of any of them; the newest, at most `limit`."""
    found: list[Use] = []
    column = uses.c.consumer if used else uses.c.resource
    for some in _portions(names):
        where = [uses.c.organization == organization, column.in_(some)]
        if live_only:
            where.append(uses.c.live == sa.true())
        statement = sa.select(uses).where(*where).order_by(uses.c.id.desc()).limit(limit - len(found))
        found += [_use(row) for row in (await connection.execute(statement)).all()]
        if len(found) >= limit:
            break
    return found


async def consumers_of_owner(
    connection: AsyncConnection, organization: str, owner: str, *, live_only: bool, limit: int
) -> list[Use]:
    """Uses that owners of this name told of, whichever had it, the newest first."""
    where = [uses.c.organization == organization, uses.c.owner == owner]
    if live_only:
        where.append(uses.c.live == sa.true())
    statement = sa.select(uses).where(*where).order_by(uses.c.id.desc()).limit(limit)
    return [_use(row) for row in (await connection.execute(statement)).all()]


async def presence(
    connection: AsyncConnection,
    organization: str,
    wanted: Mapping[tuple[Kind, str], Sequence[str]],
    now: datetime,
) -> tuple[dict[str, str], set[str]]:
    """Of versions by kind and repository: resource names of those that are there with their digests (empty for none),
    and the names of those that were deleted and can be restored."""
    present: dict[str, str] = {}
    deleted: set[str] = set()
    for (kind, repository), names in wanted.items():
        for some in _portions(names):
            for table in (versions, deleted_versions):
                where = [table.c.organization == organization, table.c.kind == kind]
                where += [table.c.repository == repository, table.c.version.in_(some)]
                if table is deleted_versions:
                    where.append(table.c.expire_time > now)
                for row in (await connection.execute(sa.select(table.c.version, table.c.digest).where(*where))).all():
                    name = kind.version_name(repository, row.version)
                    if table is versions:
                        present[name] = row.digest or ""
                    else:
                        deleted.add(name)
    return present, deleted


async def owners(
    connection: AsyncConnection, prefix: str, now: datetime, size: int, after: str
) -> list[tuple[str, str, str]]:
    """At most `size` owners with live uses, as (organization, name, uid) by uid; not those with a claim that holds."""
    statement = (
        sa.select(uses.c.organization, sa.func.max(uses.c.owner), uses.c.owner_uid)
        .where(uses.c.live == sa.true(), uses.c.owner.startswith(prefix, autoescape=True), uses.c.owner_uid > after)
        .group_by(uses.c.owner_uid, uses.c.organization)
        .having(sa.func.max(sa.func.coalesce(uses.c.claim_end_time, uses.c.create_time)) <= now)
        .order_by(uses.c.owner_uid)
        .limit(size)
    )
    return [(row[0], row[1], row[2]) for row in (await connection.execute(statement)).all()]


async def forget_ended(connection: AsyncConnection, before: datetime) -> None:
    """Delete uses that ended before then."""
    await connection.execute(uses.delete().where(uses.c.end_time < before, uses.c.live == sa.false()))
