"""Secrets as rows: keys in the clear, values sealed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from services.kernel.db import AsyncConnection, insert_into
from services.registry.identities import Secret, SecretItem
from services.registry.store.tables import secrets


@dataclass(frozen=True)
class Kept:
    """A secret without its values, and those as they are kept."""

    secret: Secret
    key_id: str
    sealed: bytes


def _kept(row: sa.Row[Any]) -> Kept:
    secret = Secret(
        secret=row.secret,
        uid=row.uid,
        description=row.description,
        kind=row.kind,
        stage=row.stage,
        path=row.path,
        items=[SecretItem(key, sub_path) for key, sub_path in json.loads(row.items)],
        creator=row.creator,
        create_time=row.create_time,
        update_time=row.update_time,
        revision=row.revision,
    )
    return Kept(secret, row.key_id, row.sealed)


async def get(connection: AsyncConnection, organization: str, name: str, *, lock: bool = False) -> Kept | None:
    """One secret, or None."""
    statement = sa.select(secrets).where(secrets.c.organization == organization, secrets.c.secret == name)
    if lock:
        statement = statement.with_for_update()
    row = (await connection.execute(statement)).first()
    return None if row is None else _kept(row)


async def list_by_name(
    connection: AsyncConnection, organization: str, words: list[str], size: int, after: str
) -> tuple[list[Secret], int]:
    """At most `size` secrets by name, from beyond `after`, and how many match in all."""
    where: list[sa.ColumnElement[bool]] = [secrets.c.organization == organization]
    for word in words:
        places = (secrets.c.secret, secrets.c.description)
        where.append(sa.or_(*(place.icontains(word, autoescape=True) for place in places)))
    counted = sa.select(sa.func.count()).select_from(secrets).where(*where)
    total = int((await connection.execute(counted)).scalar_one())
    # By bytes in either database, whatever the collation of PostgreSQL's, so that pages neither repeat nor skip.
    name = sa.collate(secrets.c.secret, "C") if connection.dialect.name == "postgresql" else secrets.c.secret
    statement = sa.select(secrets).where(*where, name > after).order_by(name).limit(size)
    return [_kept(row).secret for row in (await connection.execute(statement)).all()], total


async def used_keys(connection: AsyncConnection) -> set[str]:
    """Ids of the keys that seal something."""
    return set((await connection.execute(sa.select(secrets.c.key_id).distinct())).scalars())


async def key_ids(connection: AsyncConnection) -> dict[str, int]:
    """How many secrets are sealed with each key."""
    statement = sa.select(secrets.c.key_id, sa.func.count()).group_by(secrets.c.key_id)
    return {row[0]: row[1] for row in (await connection.execute(statement)).all()}


@dataclass(frozen=True)
class SealedRow:
    """What a rotation needs of a secret."""

    organization: str
    secret: str
    uid: str
    key_id: str
    sealed: bytes


async def sealed_otherwise(connection: AsyncConnection, key_id: str, after: str, limit: int) -> list[SealedRow]:
    """At most `limit` secrets that are sealed with another key, by uid from beyond `after`."""
    statement = (
        sa.select(secrets.c.organization, secrets.c.secret, secrets.c.uid, secrets.c.key_id, secrets.c.sealed)
        .where(secrets.c.key_id != key_id, secrets.c.uid > after)
        .order_by(secrets.c.uid)
        .limit(limit)
    )
    return [SealedRow(*row) for row in (await connection.execute(statement)).all()]


async def reseal(connection: AsyncConnection, row: SealedRow, key_id: str, sealed: bytes) -> bool:
    """Exchange how a value is sealed; False when it was written or deleted meanwhile. The secret stays what it was."""
    statement = (
        secrets.update()
        .where(secrets.c.uid == row.uid, secrets.c.key_id == row.key_id, secrets.c.sealed == row.sealed)
        .values(key_id=key_id, sealed=sealed)
    )
    return (await connection.execute(statement)).rowcount == 1


async def add(connection: AsyncConnection, organization: str, values: Mapping[str, Any]) -> bool:
    """Insert a secret; False when there is one of this name."""
    statement = insert_into(connection.dialect.name, secrets).values(organization=organization, revision=1, **values)
    statement = statement.on_conflict_do_nothing(index_elements=[secrets.c.organization, secrets.c.secret])
    return (await connection.execute(statement.returning(secrets.c.uid))).first() is not None


async def update(connection: AsyncConnection, organization: str, name: str, values: Mapping[str, Any]) -> None:
    """Write columns and count the revision up."""
    where = (secrets.c.organization == organization, secrets.c.secret == name)
    await connection.execute(secrets.update().where(*where).values(**values, revision=secrets.c.revision + 1))


async def delete(connection: AsyncConnection, organization: str, name: str) -> None:
    """Delete a secret."""
    where = (secrets.c.organization == organization, secrets.c.secret == name)
    await connection.execute(secrets.delete().where(*where))
