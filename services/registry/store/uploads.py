"""Uploads as rows. An upload leaves OPEN once, by a compare-and-set."""

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from services.kernel.db import AsyncConnection
from services.registry.domain import Content, ContentState, Kind, Upload, UploadState
from services.registry.store import blobs, files
from services.registry.store.tables import uploads, versions


def _upload(row: sa.Row[Any]) -> Upload:
    return Upload(
        upload=row.upload,
        organization=row.organization,
        resource=row.resource,
        digest=row.digest,
        size_bytes=row.size_bytes,
        state=UploadState(row.state),
        failure=row.failure,
        create_time=row.create_time,
        expire_time=row.expire_time,
        creator=row.creator,
        replaces=row.replaces,
    )


async def add(connection: AsyncConnection, upload: Upload, version_id: int) -> None:
    """Insert an upload."""
    await connection.execute(
        uploads.insert().values(
            upload=upload.upload,
            organization=upload.organization,
            version_id=version_id,
            resource=upload.resource,
            digest=upload.digest,
            size_bytes=upload.size_bytes,
            state=upload.state,
            failure=upload.failure,
            creator=upload.creator,
            create_time=upload.create_time,
            expire_time=upload.expire_time,
            replaces=upload.replaces,
        )
    )


async def get(
    connection: AsyncConnection, upload: str, organization: str | None = None, *, lock: bool = False
) -> tuple[int, Upload] | None:
    """Version's row id and upload, or None. Without an organization: of whichever (the caller holds a signature).

    `lock` locks the upload's version, in front of every change of either: one order for all, so no deadlock.
    """
    where = [uploads.c.upload == upload]
    if organization is not None:
        where.append(uploads.c.organization == organization)
    if lock:
        ids = sa.select(uploads.c.version_id).where(*where).scalar_subquery()
        await connection.execute(sa.select(versions.c.id).where(versions.c.id == ids).with_for_update())
    row = (await connection.execute(sa.select(uploads).where(*where))).first()
    return None if row is None else (row.version_id, _upload(row))


async def leave_open(
    connection: AsyncConnection, upload: str, state: UploadState, failure: str = "", digest: str = ""
) -> bool:
    """Move an upload out of OPEN, with the digest of what it brought; False when it had left before."""
    statement = (
        uploads.update()
        .where(uploads.c.upload == upload, uploads.c.state == UploadState.OPEN)
        .values({"state": state, "failure": failure} | ({"digest": digest} if digest else {}))
    )
    return (await connection.execute(statement)).rowcount == 1


async def set_opened(connection: AsyncConnection, version_id: int, now: datetime) -> None:
    """Note on a locked version that an upload began."""
    state = ContentState((await connection.execute(_state_of(version_id))).scalar_one())
    await connection.execute(
        versions.update()
        .where(versions.c.id == version_id)
        .values(state=state.when_opened(), failure="", upload_start_time=now, upload_end_time=None)
    )


async def set_lost(connection: AsyncConnection, version_id: int, failure: str, now: datetime) -> None:
    """Note on a locked version that an upload ended without content. Another open upload keeps it UPLOADING."""
    others = sa.select(uploads.c.upload).where(uploads.c.version_id == version_id, uploads.c.state == UploadState.OPEN)
    if (await connection.execute(others.limit(1))).first() is not None:
        return
    state = ContentState((await connection.execute(_state_of(version_id))).scalar_one())
    await connection.execute(
        versions.update()
        .where(versions.c.id == version_id)
        .values(state=state.when_lost(), failure=failure, upload_end_time=now)
    )


async def set_content(
    connection: AsyncConnection, version_id: int, digest: str | None, size_bytes: int, now: datetime
) -> None:
    """Name the content of a locked version, and let its files be listed; None makes it EXTERNAL.

    What it had before is let go of.
    """
    before = sa.select(versions.c.digest, versions.c.organization, versions.c.kind, versions.c.repository)
    before = before.add_columns(versions.c.version).where(versions.c.id == version_id)
    row = (await connection.execute(before)).one()
    if row.digest is not None and row.digest != digest:
        name = Kind(row.kind).version_name(row.repository, row.version)
        await blobs.let_go(connection, [(row.digest, row.organization, name)], now)
    state = ContentState.EXTERNAL if digest is None else ContentState.READY
    await connection.execute(
        versions.update()
        .where(versions.c.id == version_id)
        .values(
            state=state,
            digest=digest,
            size_bytes=size_bytes,
            failure="",
            upload_start_time=sa.func.coalesce(
                versions.c.upload_start_time, sa.literal(now, versions.c.upload_start_time.type)
            ),
            upload_end_time=now,
            update_time=now,
            revision=versions.c.revision + 1,
        )
    )
    if digest is not None:
        await files.want(connection, digest)


async def content_of_size(connection: AsyncConnection, organization: str, kind: Kind, size_bytes: int) -> bool:
    """Whether a model (or a bento) of the organization has content of this size."""
    statement = sa.select(versions.c.id).where(
        versions.c.organization == organization,
        versions.c.kind == kind,
        versions.c.size_bytes == size_bytes,
        versions.c.digest.is_not(None),
    )
    return (await connection.execute(statement.limit(1))).first() is not None


async def content_of(connection: AsyncConnection, version_id: int) -> Content:
    """What content a version has; the digest is empty where it has none."""
    statement = sa.select(versions.c.state, versions.c.digest, versions.c.size_bytes).where(versions.c.id == version_id)
    row = (await connection.execute(statement)).one()
    return Content(ContentState(row.state), row.digest or "", row.size_bytes)


async def expired(connection: AsyncConnection, now: datetime, limit: int) -> list[str]:
    """Open uploads whose time is over."""
    statement = (
        sa.select(uploads.c.upload)
        .where(uploads.c.state == UploadState.OPEN, uploads.c.expire_time <= now)
        .order_by(uploads.c.expire_time)
        .limit(limit)
    )
    return list((await connection.execute(statement)).scalars())


async def still_open(connection: AsyncConnection, ids: list[str]) -> set[str]:
    """Those of `ids` that are open."""
    statement = sa.select(uploads.c.upload).where(uploads.c.upload.in_(ids), uploads.c.state == UploadState.OPEN)
    return set((await connection.execute(statement)).scalars())


async def forget_ended(connection: AsyncConnection, before: datetime) -> int:
    """Delete uploads that ended and were due before then; how many."""
    statement = uploads.delete().where(uploads.c.state != UploadState.OPEN, uploads.c.expire_time < before)
    return (await connection.execute(statement)).rowcount


def _state_of(version_id: int) -> sa.Select[Any]:
    return sa.select(versions.c.state).where(versions.c.id == version_id)
