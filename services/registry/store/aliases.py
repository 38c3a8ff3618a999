"""Aliases as rows: what each names now, and its history.

A new alias and a new version both take the lock of their repository first (`catalog.repository(lock=True)`), so that
neither can take the other's id. Whoever makes an alias name a version, or deletes the version, takes that version's
lock, after the repository's where both are taken.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from services.kernel.db import AsyncConnection, Executor, insert_into
from services.registry.domain import AliasChange, Kind
from services.registry.store.tables import alias_changes, aliases

Place = tuple[str, str]
"""Of an alias in a list: its repository and its id."""


def _change(row: sa.Row[Any]) -> AliasChange:
    return AliasChange(
        kind=Kind(row.kind),
        repository=row.repository,
        alias=row.alias,
        number=row.number,
        create_time=row.create_time,
        user=row.user_name,
        before=row.before,
        version=row.version,
        version_uid=row.version_uid,
        reason=row.reason,
    )


_NEWEST_CHANGE = (
    sa.select(alias_changes)
    .where(*(alias_changes.c[name] == sa.bindparam(name) for name in ("organization", "kind", "repository", "alias")))
    .order_by(alias_changes.c.number.desc())
    .limit(1)
)
_CHANGE_BY = _NEWEST_CHANGE.where(alias_changes.c.create_time <= sa.bindparam("at"))


async def newest_change(
    connection: Executor, organization: str, kind: Kind, repository: str, alias: str, at: datetime | None = None
) -> AliasChange | None:
    """The newest change of an alias, or the newest that was made by a time; None where there was none."""
    named: dict[str, Any] = {"organization": organization, "kind": kind, "repository": repository, "alias": alias}
    statement, values = (_NEWEST_CHANGE, named) if at is None else (_CHANGE_BY, {**named, "at": at})
    row = (await connection.execute(statement, values)).first()
    return None if row is None else _change(row)


async def exists(connection: AsyncConnection, organization: str, kind: Kind, repository: str, alias: str) -> bool:
    """Whether an alias names something now."""
    statement = sa.select(aliases.c.version_id).where(
        aliases.c.organization == organization,
        aliases.c.kind == kind,
        aliases.c.repository == repository,
        aliases.c.alias == alias,
    )
    return (await connection.execute(statement)).first() is not None


async def add_change(
    connection: AsyncConnection, organization: str, change: AliasChange, version_id: int | None
) -> None:
    """Write a change, and make the alias name the version of this row id, or none. The repository is locked."""
    key = {
        "organization": organization,
        "kind": change.kind,
        "repository": change.repository,
        "alias": change.alias,
    }
    await connection.execute(
        alias_changes.insert().values(
            **key,
            number=change.number,
            create_time=change.create_time,
            user_name=change.user,
            before=change.before,
            version=change.version,
            version_uid=change.version_uid,
            reason=change.reason,
        )
    )
    if version_id is None:
        await connection.execute(aliases.delete().where(*(aliases.c[name] == value for name, value in key.items())))
        return
    statement = insert_into(connection.dialect.name, aliases).values(**key, version_id=version_id)
    await connection.execute(
        statement.on_conflict_do_update(index_elements=list(key), set_={"version_id": statement.excluded.version_id})
    )


async def list_aliases(
    connection: AsyncConnection,
    organization: str,
    kind: Kind,
    repository: str | None,
    size: int | None,
    after: Place | None,
) -> Sequence[AliasChange]:
    """At most `size` aliases of a repository, or of all with None, by repository and id: the newest change of each."""
    key = ("organization", "kind", "repository", "alias")
    where = [aliases.c.organization == organization, aliases.c.kind == kind]
    if repository is not None:
        where.append(aliases.c.repository == repository)
    if after is not None:
        where.append(sa.tuple_(aliases.c.repository, aliases.c.alias) > sa.tuple_(*map(sa.literal, after)))
    newer = alias_changes.alias()
    newest = (
        sa.select(sa.func.max(newer.c.number))
        .where(*(newer.c[name] == aliases.c[name] for name in key))
        .correlate(aliases)
    ).scalar_subquery()
    statement = (
        sa.select(alias_changes)
        .join(aliases, sa.and_(*(alias_changes.c[name] == aliases.c[name] for name in key)))
        .where(*where, alias_changes.c.number == newest)
        .order_by(aliases.c.repository, aliases.c.alias)
        .limit(size)
    )
    return [_change(row) for row in (await connection.execute(statement)).all()]


async def list_changes(
    connection: AsyncConnection,
    organization: str,
    kind: Kind,
    repository: str | None,
    alias: str | None,
    size: int,
    before: int | None,
) -> Sequence[tuple[int, AliasChange]]:
    """At most `size` changes, newest first, each with its row id; None stands for all repositories or aliases."""
    where = [alias_changes.c.organization == organization, alias_changes.c.kind == kind]
    if repository is not None:
        where.append(alias_changes.c.repository == repository)
    if alias is not None:
        where.append(alias_changes.c.alias == alias)
    if before is not None:
        where.append(alias_changes.c.id < before)
    statement = sa.select(alias_changes).where(*where).order_by(alias_changes.c.id.desc()).limit(size)
    return [(row.id, _change(row)) for row in (await connection.execute(statement)).all()]
