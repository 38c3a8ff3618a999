"""Of the registry's rows alone; what concerns bytes is asked in `fsck.py`."""

import json
from collections.abc import AsyncIterator, Collection
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from ekiben import names
from ekiben.api.v1.annotations_pb2 import Role
from services.kernel.db import AsyncConnection, Database
from services.operations.findings import Finding, Severity
from services.operations.store.checks.files import of_files
from services.operations.store.checks.labels import of_labels
from services.operations.store.checks.quotas import of_quotas
from services.registry.domain import BlobState, ContentState, Kind, UploadState
from services.registry.store import catalog, files, uploads
from services.registry.store.blobs import is_named
from services.registry.store.tables import (
    alias_changes,
    aliases,
    api_tokens,
    blobs,
    deleted_versions,
    organizations,
    repositories,
    secrets,
    users,
    uses,
    versions,
)
from services.registry.store.tables import uploads as upload_table


def _name(row: Any) -> str:
    return Kind(row.kind).version_name(row.repository, row.version)


async def of_registry(
    connection: AsyncConnection, database: Database, now: datetime, keys: Collection[str] | None
) -> AsyncIterator[Finding]:
    """What is wrong among the registry's rows. `keys`: ids in the key file; None where nobody knows them."""
    for check in (_copies, _uploading, _blob_rows, _aliases, _people, _facts):
        async for finding in check(connection, database, now):
            yield finding
    for table, owner in ((repositories, "repository"), (versions, "version")):
        async for finding in of_labels(connection, database, table, owner):
            yield finding
    async for finding in of_files(connection, database):
        yield finding
    async for finding in of_quotas(connection, database):
        yield finding
    async for finding in _secrets(connection, keys):
        yield finding


async def _copies(connection: AsyncConnection, database: Database, now: datetime) -> AsyncIterator[Finding]:
    """A version repeats the organization, kind and name of its repository."""
    same = sa.and_(*(versions.c[name] == repositories.c[name] for name in ("organization", "kind", "repository")))
    join = versions.outerjoin(repositories, sa.and_(repositories.c.id == versions.c.repository_id, same))
    statement = sa.select(versions.c.kind, versions.c.repository, versions.c.version).select_from(join)
    for row in (await connection.execute(statement.where(repositories.c.id.is_(None)))).all():
        yield Finding(
            "VERSION_MISPLACED",
            Severity.ERROR,
            "registry",
            _name(row),
            "It says another repository or organization than the repository that it is in.",
            "Somebody changed rows by hand. Restore a backup.",
        )


async def _uploading(connection: AsyncConnection, database: Database, now: datetime) -> AsyncIterator[Finding]:
    opened = sa.exists().where(upload_table.c.version_id == versions.c.id, upload_table.c.state == UploadState.OPEN)
    wanted = (versions.c.id, versions.c.kind, versions.c.repository, versions.c.version)
    waiting = sa.select(*wanted).where(versions.c.state == ContentState.UPLOADING, ~opened)
    for row in (await connection.execute(waiting)).all():

        async def lose(version_id: int = row.id) -> bool:
            async with database.transaction() as connection:
                locked = sa.select(versions.c.state).where(versions.c.id == version_id).with_for_update()
                if (await connection.execute(locked)).scalar_one_or_none() != ContentState.UPLOADING:
                    return False
                await uploads.set_lost(connection, version_id, "Its upload is gone. Push again.", now)
                return True

        yield Finding(
            "UPLOAD_GONE",
            Severity.ERROR,
            "registry",
            _name(row),
            "It is UPLOADING, and no upload of it is open.",
            "Push it again; a repair marks it FAILED.",
            repair=lose,
        )
    late = sa.select(upload_table.c.upload, upload_table.c.resource, upload_table.c.expire_time).where(
        upload_table.c.state == UploadState.OPEN, upload_table.c.expire_time < now
    )
    for upload in (await connection.execute(late)).all():
        yield Finding(
            "UPLOAD_LATE",
            Severity.NOTE,
            "registry",
            f"uploads/{upload.upload}",
            f"It was to be completed by {upload.expire_time:%Y-%m-%d %H:%M}, for {upload.resource}.",
            "The next round of the collector ends it.",
        )


async def _blob_rows(connection: AsyncConnection, database: Database, now: datetime) -> AsyncIterator[Finding]:
    for table in (versions, deleted_versions):
        join = table.outerjoin(blobs, blobs.c.digest == table.c.digest)
        unheld = sa.or_(blobs.c.digest.is_(None), blobs.c.state != BlobState.STORED)
        columns = [table.c[name] for name in ("kind", "repository", "version", "digest")]
        statement = sa.select(*columns, blobs.c.state.label("held")).select_from(join)
        for row in (await connection.execute(statement.where(table.c.digest.is_not(None), unheld))).all():
            yield Finding(
                "BLOB_NOT_HELD",
                Severity.ERROR,
                "registry",
                _name(row),
                f"Nothing keeps the collector from its blob {row.digest}, whose row is {row.held or 'missing'}.",
                "A repair holds the blob, if its bytes are there.",
                row.digest,
            )
    garbage = sa.select(sa.func.count()).select_from(blobs).where(blobs.c.claim_end_time <= now, ~is_named())
    if count := (await connection.execute(garbage)).scalar_one():
        yield Finding(
            "GARBAGE",
            Severity.NOTE,
            "registry",
            "",
            f"{count:,} blobs are named by nothing.",
            "The collector deletes them.",
        )


async def hold_again(database: Database, digest: str, now: datetime) -> bool:
    """The repair of BLOB_NOT_HELD, for a blob whose bytes are there; not for one whose deletion has begun."""
    async with database.transaction() as connection:
        state = (await connection.execute(sa.select(blobs.c.state).where(blobs.c.digest == digest))).scalar()
        if state == BlobState.DELETING:
            return False
        if state is None:
            await connection.execute(blobs.insert().values(digest=digest, state=BlobState.STORED, claim_end_time=now))
        else:
            await connection.execute(blobs.update().where(blobs.c.digest == digest).values(state=BlobState.STORED))
        await files.want(connection, digest)
        return True


async def _aliases(connection: AsyncConnection, database: Database, now: datetime) -> AsyncIterator[Finding]:
    place = ("organization", "kind", "repository")
    join = aliases.join(versions, versions.c.id == aliases.c.version_id)
    other = sa.or_(*(aliases.c[name] != versions.c[name] for name in place))
    statement = sa.select(aliases.c.kind, aliases.c.repository, aliases.c.alias).select_from(join).where(other)
    row: Any
    for row in (await connection.execute(statement)).all():
        yield Finding(
            "ALIAS_MISPLACED",
            Severity.ERROR,
            "registry",
            f"{Kind(row.kind).repository_name(row.repository)} alias {row.alias}",
            "It names a version of another repository.",
            "Set it again with `ekiben models alias` or `ekiben bentos alias`.",
        )
    newest = (
        sa.select(
            *(alias_changes.c[name] for name in (*place, "alias")), sa.func.max(alias_changes.c.number).label("number")
        )
        .group_by(*(alias_changes.c[name] for name in (*place, "alias")))
        .subquery()
    )
    same = sa.and_(*(alias_changes.c[name] == newest.c[name] for name in (*place, "alias", "number")))
    now_named = sa.and_(*(aliases.c[name] == alias_changes.c[name] for name in (*place, "alias")))
    join = alias_changes.join(newest, same).outerjoin(aliases, now_named)
    join = join.outerjoin(versions, versions.c.id == aliases.c.version_id)
    differs = sa.func.coalesce(versions.c.version, "") != alias_changes.c.version
    wanted = (alias_changes.c.kind, alias_changes.c.repository, alias_changes.c.alias, alias_changes.c.version)
    statement = sa.select(*wanted, versions.c.version.label("named")).select_from(join).where(differs)
    for row in (await connection.execute(statement)).all():
        yield Finding(
            "ALIAS_HISTORY_DIFFERS",
            Severity.ERROR,
            "registry",
            f"{Kind(row.kind).repository_name(row.repository)} alias {row.alias}",
            f"It names {row.named or 'nothing'}, and the last change in its history says {row.version or 'nothing'}.",
            "Somebody changed rows by hand. Set the alias again.",
        )


async def _people(connection: AsyncConnection, database: Database, now: datetime) -> AsyncIterator[Finding]:
    admin = sa.exists().where(
        users.c.organization == organizations.c.organization,
        users.c.role == int(Role.ROLE_ADMIN),
        sa.not_(users.c.disabled),
        api_tokens.c.organization == users.c.organization,
        api_tokens.c.user_id == users.c.user_id,
        sa.or_(api_tokens.c.expire_time.is_(None), api_tokens.c.expire_time > now),
    )
    for row in (await connection.execute(sa.select(organizations.c.organization).where(~admin))).all():
        yield Finding(
            "NO_ADMIN",
            Severity.WARNING,
            "registry",
            f"organizations/{row.organization}",
            "No admin has a token that works.",
            "Delete the admin token's file and start the registry: it writes another. Where the file is a Secret's, "
            "put another token into that (docs/install-kubernetes.md).",
        )


async def _facts(connection: AsyncConnection, database: Database, now: datetime) -> AsyncIterator[Finding]:
    """A bento may be pushed before its models; when it runs, they must be there."""
    statement = sa.select(versions.c.organization, versions.c.repository, versions.c.version, versions.c.models).where(
        versions.c.kind == Kind.BENTO, versions.c.state == ContentState.READY, versions.c.models != "[]"
    )
    async with connection.stream(statement) as rows:
        bentos = [row async for row in rows]
    known: dict[tuple[str, str], bool] = {}
    for row in bentos:
        for model in json.loads(row.models):
            if (row.organization, model) not in known:
                named = names.Model.parse(model)
                found = await catalog.version(connection, row.organization, Kind.MODEL, named.repository, named.model)
                known[row.organization, model] = found is not None and found[1].content.state.usable
            if not known[row.organization, model]:
                yield Finding(
                    "MODEL_MISSING",
                    Severity.WARNING,
                    "registry",
                    Kind.BENTO.version_name(row.repository, row.version),
                    f"It needs {model}, which is not here or has no content.",
                    "Push that model before the bento is deployed.",
                )


async def _secrets(connection: AsyncConnection, keys: Collection[str] | None) -> AsyncIterator[Finding]:
    if keys is None:
        return
    for row in (await connection.execute(sa.select(secrets.c.secret, secrets.c.key_id))).all():
        if row.key_id not in keys:
            yield Finding(
                "SECRET_KEY_MISSING",
                Severity.ERROR,
                "registry",
                f"secrets/{row.secret}",
                f"It is sealed with the key {row.key_id}, which is not in the key file.",
                "Put the key back, or write the secret again.",
            )


async def live_uses_of_deployments(connection: AsyncConnection) -> list[Any]:
    """Uses that a deployment told of and has not ended."""
    statement = sa.select(uses.c.owner, uses.c.owner_uid, uses.c.resource).where(
        uses.c.live, uses.c.owner.like("deployments/%")
    )
    return list((await connection.execute(statement)).all())
