"""Which blobs are held, so that none is deleted that somebody is about to name.

A row says what the registry intends with a blob:

- CLAIMED: an upload is about to store it. The row comes before the file.
- STORED: the file is there, whole and durable.
- DELETING: nobody names it and the collector deletes the file. The row goes after the file.

`claim_end_time` keeps a blob from the collector whoever names it. An upload claims before it stores, and the
transaction that names the blob moves the time too; both write the same row that the collector's `condemn`
writes. So one of them comes first: either `condemn` sees a claim that has not ended, or the upload sees
DELETING and waits until the row is gone. `condemn` alone looks at `versions`, and looks again once it has the row's
lock, whatever the clocks of two registries say (READ COMMITTED, 13.2.1). A version that is deleted or restored moves
between two tables in one transaction: each snapshot shows it in one of them.

A *hold* stops `condemn` as a whole until it ends: whoever reads rows and then copies the bytes that they name (a
backup) takes one before it reads. What was condemned before was named by no row then, and nobody names it again
before its row is gone; so every blob that a reader under a hold finds named stays.
"""

from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from services.kernel.db import AsyncConnection, insert_into
from services.registry.domain import BlobState, Kind, Unnamed
from services.registry.store.tables import blobs, collection_holds, deleted_versions, versions


def is_named(now: datetime | None = None) -> sa.ColumnElement[bool]:
    """Whether a version names the blob of the row, or a deleted one; with `now`, one whose time is not over."""
    there = sa.exists().where(versions.c.digest == blobs.c.digest)
    deleted = sa.exists().where(deleted_versions.c.digest == blobs.c.digest)
    return sa.or_(there, deleted if now is None else deleted.where(deleted_versions.c.expire_time > now))


_UNNAMED = (
    *(blobs.c[name] for name in ("digest", "size_bytes", "holder_organization", "last_holder")),
    blobs.c.release_time,
)


def _unnamed(row: Any) -> Unnamed:
    return Unnamed(row.digest, row.size_bytes, row.holder_organization or "", row.last_holder or "", row.release_time)


def _insert(connection: AsyncConnection) -> Any:
    return insert_into(connection.dialect.name, blobs)


async def claim(connection: AsyncConnection, digest: str, until: datetime) -> bool:
    """Keep the blob from the collector until then; False while it is being deleted."""
    statement = _insert(connection).values(digest=digest, state=BlobState.CLAIMED, claim_end_time=until)
    statement = statement.on_conflict_do_update(
        index_elements=[blobs.c.digest],
        set_={
            "claim_end_time": sa.case(
                (blobs.c.claim_end_time > statement.excluded.claim_end_time, blobs.c.claim_end_time),
                else_=statement.excluded.claim_end_time,
            )
        },
        where=blobs.c.state != BlobState.DELETING,
    )
    return (await connection.execute(statement.returning(blobs.c.digest))).first() is not None


async def store(connection: AsyncConnection, digest: str, until: datetime, *, only_if_stored: bool = False) -> bool:
    """Say that the file is there, and keep it until then. False when the row is not there to be held (any more).

    Call it in the transaction that names the blob, before the naming: it takes the row's lock.
    """
    states = (BlobState.STORED,) if only_if_stored else (BlobState.CLAIMED, BlobState.STORED)
    statement = (
        blobs.update()
        .where(blobs.c.digest == digest, blobs.c.state.in_(states))
        .values(
            state=BlobState.STORED,
            claim_end_time=sa.case(
                (blobs.c.claim_end_time > until, blobs.c.claim_end_time),
                else_=sa.bindparam("until", until, blobs.c.claim_end_time.type),
            ),
        )
    )
    return (await connection.execute(statement)).rowcount == 1


async def forget(connection: AsyncConnection, digest: str) -> None:
    """The file turned out to be missing: let the next upload store it anew."""
    await connection.execute(
        blobs.update()
        .where(blobs.c.digest == digest, blobs.c.state == BlobState.STORED)
        .values(state=BlobState.CLAIMED)
    )


async def unheld(connection: AsyncConnection, now: datetime, limit: int) -> list[str]:
    """Digests that look like garbage, or whose deletion began before a crash."""
    statement = (
        sa.select(blobs.c.digest)
        .where(sa.or_(blobs.c.state == BlobState.DELETING, sa.and_(blobs.c.claim_end_time <= now, ~is_named())))
        .order_by(blobs.c.claim_end_time)
        .limit(limit)
    )
    return list((await connection.execute(statement)).scalars())


async def condemn(connection: AsyncConnection, digest: str, now: datetime, size_bytes: int | None = None) -> bool:
    """Decide that the blob goes, unless it is named, claimed or under a hold. True also when decided before.

    Its size is kept with the decision: after a crash the file may be gone already.
    """
    await connection.execute(
        blobs.update()
        .where(
            blobs.c.digest == digest,
            blobs.c.state != BlobState.DELETING,
            blobs.c.claim_end_time <= now,
            ~is_named(),
            ~sa.exists().where(collection_holds.c.expire_time > now),
        )
        .values(
            state=BlobState.DELETING,
            size_bytes=sa.func.coalesce(sa.literal(size_bytes, sa.BigInteger), blobs.c.size_bytes),
        )
    )
    if await lock_condemned(connection, digest) is None:
        return False
    # Once more, now that the row's lock is held: PostgreSQL answered `is_named` above by a snapshot from before it
    # waited for the lock, and a claim that had ended by this clock did not tell of the naming meanwhile.
    named = blobs.update().where(blobs.c.digest == digest, is_named()).values(state=BlobState.STORED)
    return (await connection.execute(named)).rowcount == 0


async def lock_condemned(connection: AsyncConnection, digest: str) -> Unnamed | None:
    """Take the row's lock; the blob if it is (still) DELETING."""
    statement = (
        sa.select(*_UNNAMED).where(blobs.c.digest == digest, blobs.c.state == BlobState.DELETING).with_for_update()
    )
    row = (await connection.execute(statement)).first()
    return None if row is None else _unnamed(row)


async def let_go(connection: AsyncConnection, former: Iterable[tuple[str, str, str]], now: datetime) -> None:
    """Note on blobs who names them no more: digest, organization and resource name each."""
    rows = [
        {"of": digest, "organization": organization, "holder": holder, "now": now}
        for digest, organization, holder in sorted(former)  # one order for all, so no deadlock
    ]
    if rows:
        statement = (
            blobs.update()
            .where(blobs.c.digest == sa.bindparam("of"))
            .values(
                holder_organization=sa.bindparam("organization"),
                last_holder=sa.bindparam("holder"),
                release_time=sa.bindparam("now", type_=blobs.c.release_time.type),
            )
        )
        await connection.execute(statement, rows)


async def condemnable(connection: AsyncConnection, now: datetime) -> list[Unnamed]:
    """Blobs that a round of the collector would delete now, were no hold there."""
    free = sa.and_(blobs.c.claim_end_time <= now, ~is_named(now))
    statement = sa.select(*_UNNAMED).where(sa.or_(blobs.c.state == BlobState.DELETING, free)).order_by(blobs.c.digest)
    return [_unnamed(row) for row in (await connection.execute(statement)).all()]


async def holds(connection: AsyncConnection, now: datetime) -> list[tuple[str, datetime]]:
    """Purpose and end of each hold."""
    statement = sa.select(collection_holds.c.purpose, collection_holds.c.expire_time)
    rows = (await connection.execute(statement.where(collection_holds.c.expire_time > now))).all()
    return [(row.purpose, row.expire_time) for row in rows]


async def delete(connection: AsyncConnection, digest: str) -> None:
    """The file is gone: so goes the row."""
    await connection.execute(blobs.delete().where(blobs.c.digest == digest, blobs.c.state == BlobState.DELETING))


async def adopt(connection: AsyncConnection, digest: str, until: datetime) -> None:
    """Take a file without a row into account, so that it is collected in its turn."""
    statement = _insert(connection).values(digest=digest, state=BlobState.CLAIMED, claim_end_time=until)
    await connection.execute(statement.on_conflict_do_nothing(index_elements=[blobs.c.digest]))


async def known(connection: AsyncConnection, digests: list[str]) -> set[str]:
    """Those of `digests` that have a row."""
    statement = sa.select(blobs.c.digest).where(blobs.c.digest.in_(digests))
    return set((await connection.execute(statement)).scalars())


async def named(connection: AsyncConnection) -> AsyncIterator[tuple[str, int]]:
    """Digest and size of every blob that a version names, or a deleted one that can be restored; once, in order."""
    naming = sa.union_all(
        *(sa.select(t.c.digest, t.c.size_bytes).where(t.c.digest.is_not(None)) for t in (versions, deleted_versions))
    ).subquery()
    statement = sa.select(naming.c.digest, sa.func.max(naming.c.size_bytes)).group_by(naming.c.digest)
    async with connection.stream(statement.order_by(naming.c.digest)) as rows:
        async for digest, size_bytes in rows:
            yield digest, size_bytes


async def still_named(connection: AsyncConnection, digests: Sequence[str]) -> set[str]:
    """Those of `digests` that a version names, or a deleted one that can be restored."""
    found: set[str] = set()
    for table in (versions, deleted_versions):
        for start in range(0, len(digests), 500):
            wanted = table.c.digest.in_(digests[start : start + 500])
            found.update((await connection.execute(sa.select(table.c.digest).where(wanted))).scalars())
    return found


async def namers(connection: AsyncConnection, digests: Sequence[str]) -> dict[str, list[str]]:
    """Resource names of the versions that name each of some blobs; those of deleted ones too."""
    found: dict[str, list[str]] = {}
    for table in (versions, deleted_versions):
        columns = [table.c[name] for name in ("digest", "kind", "repository", "version")]
        for start in range(0, len(digests), 500):
            wanted = table.c.digest.in_(digests[start : start + 500])
            for row in (await connection.execute(sa.select(*columns).where(wanted).order_by(table.c.id))).all():
                found.setdefault(row.digest, []).append(Kind(row.kind).version_name(row.repository, row.version))
    return found


async def hold(connection: AsyncConnection, name: str, purpose: str, now: datetime, until: datetime) -> None:
    """Keep every blob that is named from being condemned until then; again moves the end. Ended holds are dropped."""
    await connection.execute(collection_holds.delete().where(collection_holds.c.expire_time <= now))
    statement = insert_into(connection.dialect.name, collection_holds).values(
        hold=name, purpose=purpose, create_time=now, expire_time=until
    )
    await connection.execute(
        statement.on_conflict_do_update(index_elements=[collection_holds.c.hold], set_={"expire_time": until})
    )


async def release(connection: AsyncConnection, name: str) -> None:
    """End a hold; one that is not there is no error."""
    await connection.execute(collection_holds.delete().where(collection_holds.c.hold == name))
