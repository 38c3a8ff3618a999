"""The labels of repositories and versions, and the table by which they are searched."""

import json
from collections.abc import AsyncIterator, Mapping
from datetime import datetime

import sqlalchemy as sa

from services.kernel.db import AsyncConnection, Database
from services.operations.findings import Finding, Severity
from services.registry.domain import Kind
from services.registry.store import catalog
from services.registry.store.tables import label_term, labels, versions

_BATCH = 500


async def of_labels(
    connection: AsyncConnection, database: Database, table: sa.Table, owner: str
) -> AsyncIterator[Finding]:
    """`labels` repeats what each row holds as JSON, for searches."""
    ours = labels.c.owner == owner
    wanted = [table.c[name] for name in ("id", "organization", "kind", "repository", "labels", "create_time")]
    wanted += [versions.c.version] if table is versions else []
    last = 0
    while batch := (
        await connection.execute(sa.select(*wanted).where(table.c.id > last).order_by(table.c.id).limit(_BATCH))
    ).all():
        kept: dict[int, dict[str, tuple[str, bytes, bytes, datetime]]] = {}
        statement = sa.select(labels).where(ours, labels.c.owner_id.between(batch[0].id, batch[-1].id))
        for label in (await connection.execute(statement)).all():
            terms = (label.value, bytes(label.key_term), bytes(label.value_term), label.create_time)
            kept.setdefault(label.owner_id, {})[label.key] = terms
        for row in batch:
            said: Mapping[str, str] = json.loads(row.labels)
            right = {
                key: (
                    value,
                    label_term(row.organization, owner, row.kind, key),
                    label_term(row.organization, owner, row.kind, key, value),
                    row.create_time,
                )
                for key, value in said.items()
            }
            if kept.pop(row.id, {}) != right:
                kind = Kind(row.kind)
                named = (
                    kind.version_name(row.repository, row.version)
                    if table is versions
                    else kind.repository_name(row.repository)
                )
                yield _labels_differ(database, table, owner, row.id, named)
        for stray in sorted(kept):
            yield _labels_orphaned(database, table, owner, stray)
        last = batch[-1].id
    beyond = sa.select(labels.c.owner_id).where(ours, labels.c.owner_id > last).distinct()
    for stray in (await connection.execute(beyond)).scalars():
        yield _labels_orphaned(database, table, owner, stray)


def _labels_differ(database: Database, table: sa.Table, owner: str, row_id: int, named: str) -> Finding:
    async def index_again() -> bool:
        async with database.transaction() as connection:
            locked = sa.select(table.c.labels).where(table.c.id == row_id).with_for_update()
            said = (await connection.execute(locked)).scalar_one_or_none()
            if said is not None:
                await catalog.set_labels(connection, owner, row_id, json.loads(said))
            return said is not None

    return Finding(
        "LABELS_DIFFER",
        Severity.ERROR,
        "registry",
        named,
        "Searches find other labels than it has.",
        "A repair indexes its labels again.",
        repair=index_again,
    )


def _labels_orphaned(database: Database, table: sa.Table, owner: str, row_id: int) -> Finding:
    async def forget() -> bool:
        async with database.transaction() as connection:
            there = sa.select(table.c.id).where(table.c.id == row_id)
            if (await connection.execute(there)).first() is not None:
                return False
            await connection.execute(labels.delete().where(labels.c.owner == owner, labels.c.owner_id == row_id))
            return True

    return Finding(
        "LABELS_ORPHANED",
        Severity.ERROR,
        "registry",
        f"{owner} row {row_id}",
        "There are labels of it, and it does not exist: searches count it.",
        "A repair deletes them.",
        repair=forget,
    )
