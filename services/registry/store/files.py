"""The files of blobs as rows, and whose files are still to be listed.

Rows of files follow from a blob's bytes alone. So whoever lists a blob again, after a crash or beside another who
lost his lease, writes the same rows over the same rows, and nothing has to be fenced.
"""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from services.kernel.db import AsyncConnection, insert_into
from services.registry.domain import File, ListingState
from services.registry.store.tables import blob_files, blob_listings

_LONG_AGO = datetime.fromtimestamp(0, UTC)


async def want(connection: AsyncConnection, digest: str) -> None:
    """The blob's files are to be listed, unless they are, or are being."""
    statement = insert_into(connection.dialect.name, blob_listings).values(
        digest=digest, state=ListingState.WAITING, lease_end_time=_LONG_AGO, file_count=0, failure=""
    )
    await connection.execute(
        statement.on_conflict_do_update(
            index_elements=[blob_listings.c.digest],
            set_={"state": ListingState.WAITING, "lease_end_time": _LONG_AGO, "failure": ""},
            where=blob_listings.c.state == ListingState.FAILED,
        )
    )


async def take(connection: AsyncConnection, now: datetime, until: datetime) -> str | None:
    """A blob to list, for the caller alone until then; None where there is none."""
    statement = (
        sa.select(blob_listings.c.digest)
        .where(
            blob_listings.c.state.in_((ListingState.WAITING, ListingState.WORKING)),
            blob_listings.c.lease_end_time <= now,
        )
        .order_by(blob_listings.c.lease_end_time)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    digest: str | None = (await connection.execute(statement)).scalar()
    if digest is not None:
        await _set(connection, digest, state=ListingState.WORKING, lease_end_time=until)
    return digest


async def renew(connection: AsyncConnection, digest: str, until: datetime) -> None:
    """Keep a blob that was taken."""
    await _set(connection, digest, lease_end_time=until)


async def add(connection: AsyncConnection, digest: str, first: int, files: Sequence[File]) -> None:
    """Keep files, counted from `first`. Of two with one path the later counts, as when they are unpacked."""
    insert = insert_into(connection.dialect.name, blob_files)
    named = ("path", "size_bytes", "offset", "mode", "file_digest")
    statement = insert.on_conflict_do_update(
        index_elements=[blob_files.c.digest, blob_files.c.path_key],
        set_={name: insert.excluded[name] for name in named},
    )
    rows = [
        {
            "digest": digest,
            "number": number,
            "path_key": _key(file.path),
            "path": file.path,
            "size_bytes": file.size_bytes,
            "offset": file.offset,
            "mode": file.mode,
            "file_digest": file.digest,
        }
        for number, file in enumerate(files, start=first)
    ]
    await connection.execute(statement, rows)


async def end(connection: AsyncConnection, digest: str, failure: str = "") -> None:
    """All files are there, or cannot be listed."""
    count = sa.select(sa.func.count()).select_from(blob_files).where(blob_files.c.digest == digest).scalar_subquery()
    state = ListingState.FAILED if failure else ListingState.DONE
    await _set(connection, digest, state=state, failure=failure, file_count=count)


async def state_of(connection: AsyncConnection, digest: str) -> tuple[ListingState, int, str] | None:
    """State, number of files and failure of a blob's listing; None where nobody wants one."""
    columns = (blob_listings.c.state, blob_listings.c.file_count, blob_listings.c.failure)
    row = (await connection.execute(sa.select(*columns).where(blob_listings.c.digest == digest))).first()
    return None if row is None else (ListingState(row.state), row.file_count, row.failure)


async def page(connection: AsyncConnection, digest: str, size: int, after: int) -> list[tuple[int, File]]:
    """At most `size` files with their numbers, those after `after`."""
    statement = sa.select(blob_files).where(blob_files.c.digest == digest, blob_files.c.number > after)
    rows = await connection.execute(statement.order_by(blob_files.c.number).limit(size))
    return [(row.number, _file(row)) for row in rows]


async def get(connection: AsyncConnection, digest: str, path: str) -> File | None:
    """One file, or None."""
    statement = sa.select(blob_files).where(blob_files.c.digest == digest, blob_files.c.path_key == _key(path))
    row = (await connection.execute(statement)).first()
    return None if row is None else _file(row)


async def _set(connection: AsyncConnection, digest: str, **values: Any) -> None:
    await connection.execute(blob_listings.update().where(blob_listings.c.digest == digest).values(values))


def _key(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()


def _file(row: sa.Row[Any]) -> File:
    return File(row.path, row.size_bytes, row.offset, row.mode, row.file_digest)
