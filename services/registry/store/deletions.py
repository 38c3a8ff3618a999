"""Deleted versions and repositories as rows: each is moved whole, in one transaction, and moved back whole."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from services.kernel.db import AsyncConnection, insert_into
from services.registry.domain import ContentState, Deleted, Kind
from services.registry.store.catalog import delete_versions, set_labels
from services.registry.store.tables import deleted_repositories, deleted_versions, labels, repositories, versions

Position = tuple[int, int]
"""Of a deleted version in a list: when it was deleted, in microseconds, then its id."""

_KEPT = tuple(c.name for c in versions.c if c.name not in ("id", "repository_id"))
_KEPT_OF_REPOSITORY = tuple(c.name for c in repositories.c if c.name != "id")


async def keep_versions(
    connection: AsyncConnection,
    where: sa.ColumnElement[bool],
    *,
    now: datetime,
    expire_time: datetime,
    deleter: str,
) -> int:
    """Move versions, with their labels, out of sight until `expire_time`; how many. Their uploads end."""
    # Else an upload that completes between the two statements would be moved without its content.
    await connection.execute(sa.select(versions.c.id).where(where).order_by(versions.c.id).with_for_update())
    columns = (
        *(versions.c[name] for name in _KEPT),
        sa.literal(now, deleted_versions.c.delete_time.type),
        sa.literal(expire_time, deleted_versions.c.expire_time.type),
        sa.literal(deleter, sa.String),
    )
    names = [*_KEPT, "delete_time", "expire_time", "deleter"]
    await connection.execute(deleted_versions.insert().from_select(names, sa.select(*columns).where(where)))
    return await delete_versions(connection, where)


async def keep_repository(connection: AsyncConnection, row_id: int, *, now: datetime, expire_time: datetime) -> None:
    """Move a repository, which holds nothing any more, out of sight."""
    columns = (
        *(repositories.c[name] for name in _KEPT_OF_REPOSITORY),
        sa.literal(now, deleted_repositories.c.delete_time.type),
        sa.literal(expire_time, deleted_repositories.c.expire_time.type),
    )
    names = [*_KEPT_OF_REPOSITORY, "delete_time", "expire_time"]
    moved = sa.select(*columns).where(repositories.c.id == row_id)
    await connection.execute(deleted_repositories.insert().from_select(names, moved))
    await connection.execute(labels.delete().where(labels.c.owner == "repository", labels.c.owner_id == row_id))
    await connection.execute(repositories.delete().where(repositories.c.id == row_id))


def _deleted(row: Any) -> Deleted:
    return Deleted(
        organization=row.organization,
        kind=Kind(row.kind),
        repository=row.repository,
        version=row.version,
        uid=row.uid,
        labels=json.loads(row.labels),
        digest=row.digest or "",
        size_bytes=row.size_bytes,
        create_time=row.create_time,
        delete_time=row.delete_time,
        expire_time=row.expire_time,
        deleter=row.deleter,
        models=tuple(json.loads(row.models)),
    )


_COLUMNS: Sequence[sa.Column[Any]] = (
    *(deleted_versions.c[name] for name in ("id", "organization", "kind", "repository", "version", "uid", "labels")),
    *(deleted_versions.c[name] for name in ("digest", "size_bytes", "create_time", "delete_time", "expire_time")),
    deleted_versions.c.deleter,
    deleted_versions.c.models,
)


async def list_versions(
    connection: AsyncConnection,
    organization: str,
    now: datetime,
    *,
    kind: Kind | None,
    repository: str,
    version: str,
    size: int,
    after: Position | None,
) -> tuple[Sequence[Deleted], Position | None]:
    """At most `size` that can be restored, deleted last first, and the position after them; empty means any."""
    where = [deleted_versions.c.organization == organization, deleted_versions.c.expire_time > now]
    if kind is not None:
        where.append(deleted_versions.c.kind == kind)
    if repository:
        where.append(deleted_versions.c.repository == repository)
    if version:
        where.append(deleted_versions.c.version == version)
    key = sa.type_coerce(deleted_versions.c.delete_time, sa.BigInteger)
    if after is not None:
        before, row_id = after
        where.append(sa.or_(key < before, sa.and_(key == before, deleted_versions.c.id < row_id)))
    statement = sa.select(*_COLUMNS, key.label("key")).where(*where)
    statement = statement.order_by(key.desc(), deleted_versions.c.id.desc()).limit(size + 1)
    rows = (await connection.execute(statement)).all()
    more = len(rows) > size
    return [_deleted(row) for row in rows[:size]], (rows[size - 1].key, rows[size - 1].id) if more else None


async def version(
    connection: AsyncConnection, organization: str, uid: str, now: datetime
) -> tuple[int, Deleted] | None:
    """Row id and deleted version, or None once its time is over. Locked: whoever comes second finds it gone."""
    here = (
        deleted_versions.c.organization == organization,
        deleted_versions.c.uid == uid,
        deleted_versions.c.expire_time > now,
    )
    row = (await connection.execute(sa.select(*_COLUMNS).where(*here).with_for_update())).first()
    return None if row is None else (row.id, _deleted(row))


async def restore_repository(connection: AsyncConnection, organization: str, kind: Kind, repository: str) -> bool:
    """Bring back the repository of this name that was deleted last, where there is one and the name is free."""
    here = (
        deleted_repositories.c.organization == organization,
        deleted_repositories.c.kind == kind,
        deleted_repositories.c.repository == repository,
    )
    last = sa.select(deleted_repositories.c.id).where(*here).order_by(deleted_repositories.c.id.desc()).limit(1)
    row_id = (await connection.execute(last)).scalar_one_or_none()
    if row_id is None:
        return False
    columns = [deleted_repositories.c[name] for name in _KEPT_OF_REPOSITORY]
    moved = sa.select(*columns).where(deleted_repositories.c.id == row_id)
    insert = insert_into(connection.dialect.name, repositories).from_select(list(_KEPT_OF_REPOSITORY), moved)
    statement = insert.on_conflict_do_nothing().returning(repositories.c.id, repositories.c.labels)
    row = (await connection.execute(statement)).first()
    if row is None:
        return False
    await connection.execute(deleted_repositories.delete().where(deleted_repositories.c.id == row_id))
    await set_labels(connection, "repository", row.id, json.loads(row.labels))
    return True


async def restore_version(connection: AsyncConnection, row_id: int, repository_id: int, now: datetime) -> int | None:
    """Move a locked deleted version back into its repository: the new row's id, or None where the name is taken."""
    changed: dict[str, sa.ColumnElement[Any]] = {
        # Its upload is gone.
        "state": sa.case(
            (deleted_versions.c.state == ContentState.UPLOADING, sa.literal(ContentState.PENDING.value)),
            else_=deleted_versions.c.state,
        ),
        "revision": deleted_versions.c.revision + 1,
        "update_time": sa.literal(now, deleted_versions.c.update_time.type),
    }
    columns = [changed.get(name, deleted_versions.c[name]) for name in _KEPT]
    moved = sa.select(sa.literal(repository_id, versions.c.repository_id.type), *columns).where(
        deleted_versions.c.id == row_id
    )
    insert = insert_into(connection.dialect.name, versions).from_select(["repository_id", *_KEPT], moved)
    statement = insert.on_conflict_do_nothing().returning(versions.c.id, versions.c.labels)
    row = (await connection.execute(statement)).first()
    if row is None:
        return None
    await connection.execute(deleted_versions.delete().where(deleted_versions.c.id == row_id))
    await set_labels(connection, "version", row.id, json.loads(row.labels))
    new_id: int = row.id
    return new_id


async def expired(connection: AsyncConnection, now: datetime, limit: int) -> Sequence[tuple[int, Deleted]]:
    """Deleted versions whose time is over, with their row ids."""
    statement = (
        sa.select(*_COLUMNS)
        .where(deleted_versions.c.expire_time <= now)
        .order_by(deleted_versions.c.expire_time, deleted_versions.c.id)
        .limit(limit)
    )
    return [(row.id, _deleted(row)) for row in (await connection.execute(statement)).all()]


async def purge(connection: AsyncConnection, row_id: int) -> bool:
    """Delete one for good; False when it went before: restored, or purged by another."""
    statement = deleted_versions.delete().where(deleted_versions.c.id == row_id)
    return (await connection.execute(statement)).rowcount == 1


async def forget_repositories(connection: AsyncConnection, now: datetime) -> None:
    """Delete for good the repositories whose time is over."""
    await connection.execute(deleted_repositories.delete().where(deleted_repositories.c.expire_time <= now))
