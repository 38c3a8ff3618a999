"""Repositories and versions as rows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import sqlalchemy as sa

from services.kernel.db import AsyncConnection, Executor, insert_into
from services.registry.domain import LATEST, Content, ContentState, Facts, Kind, Repository, UploadState, Version
from services.registry.search import Search
from services.registry.store.searches import Explained, Matches, Position, matches
from services.registry.store.tables import aliases, label_term, labels, repositories, uploads, versions

T = TypeVar("T")

_USABLE = (ContentState.READY, ContentState.EXTERNAL)
MAX_PAGE_BYTES = 2 << 20
"""Manifests and descriptions of one page together; a page ends early rather than pass it, since a message of
gRPC has 4 MiB by default."""

MAX_COUNT = 1000
"""How far PostgreSQL counts what a search finds. See `total_size` of the proto."""
_CHEAP = 2000.0
"""What it may cost, in the planner's units: some milliseconds."""


@dataclass(frozen=True)
class Found(Generic[T]):
    """A page of a list, the position after it (None at the end), and how many match in all, counted or estimated."""

    items: Sequence[T]
    next: Position | None
    total: int
    counted: bool = True


def _latest() -> sa.ScalarSelect[str]:
    return (
        sa.select(versions.c.version)
        .where(versions.c.repository_id == repositories.c.id, versions.c.state.in_(_USABLE))
        .order_by(versions.c.create_time.desc(), versions.c.id.desc())
        .limit(1)
        .scalar_subquery()
    )


def _count() -> sa.ScalarSelect[int]:
    counted = sa.select(sa.func.count()).select_from(versions).where(versions.c.repository_id == repositories.c.id)
    return counted.scalar_subquery()


def _open_upload() -> sa.ScalarSelect[str]:
    """The newest open upload, unless one that was opened later has completed: then it is a killed client's leftover."""
    later = uploads.alias()
    completed_since = sa.exists().where(
        later.c.version_id == uploads.c.version_id,
        later.c.state == UploadState.COMPLETED,
        later.c.create_time > uploads.c.create_time,
    )
    return (
        sa.select(uploads.c.upload)
        .where(uploads.c.version_id == versions.c.id, uploads.c.state == UploadState.OPEN, ~completed_since)
        .order_by(uploads.c.create_time.desc(), uploads.c.upload)
        .limit(1)
        .scalar_subquery()
    )


def _aliases() -> sa.ScalarSelect[str]:
    joined = sa.func.aggregate_strings(aliases.c.alias, ",")
    return sa.select(joined).where(aliases.c.version_id == versions.c.id).scalar_subquery()


_REPOSITORY = (
    *(repositories.c[name] for name in ("id", "kind", "repository", "uid", "description", "labels")),
    *(repositories.c[name] for name in ("annotations", "creator")),
    *(repositories.c[name] for name in ("create_time", "update_time", "revision")),
    _latest().label("latest"),
    _count().label("version_count"),
)
_VERSION = (
    *(c for c in versions.c if c.name not in ("organization", "updater")),
    _open_upload().label("open_upload"),
    _aliases().label("aliases"),
)
_THIS_VERSION = sa.and_(
    *(versions.c[name] == sa.bindparam(name) for name in ("organization", "kind", "repository", "version"))
)
_ONE_VERSION = sa.select(*_VERSION).where(_THIS_VERSION)
"""Made once: for the most frequent question, making the statement took as long as answering it."""
_THIS_ALIAS = sa.and_(
    *(aliases.c[name] == sa.bindparam(name) for name in ("organization", "kind", "repository")),
    aliases.c.alias == sa.bindparam("version"),
)
# A version's own id or an alias: two look-ups in unique indexes, of which at most one finds something.
_MEANT = sa.union_all(
    sa.select(versions.c.id).where(_THIS_VERSION), sa.select(aliases.c.version_id).where(_THIS_ALIAS)
).limit(1)
_MEANT_VERSION = sa.select(*_VERSION).where(versions.c.id == _MEANT.scalar_subquery())
_LATEST_VERSION = (
    sa.select(*_VERSION)
    .where(
        *(versions.c[name] == sa.bindparam(name) for name in ("organization", "kind", "repository")),
        versions.c.state.in_(_USABLE),
    )
    .order_by(versions.c.create_time.desc(), versions.c.id.desc())
    .limit(1)
)


def _repository(row: sa.Row[Any]) -> Repository:
    return Repository(
        kind=Kind(row.kind),
        repository=row.repository,
        uid=row.uid,
        description=row.description,
        labels=json.loads(row.labels),
        annotations=json.loads(row.annotations),
        create_time=row.create_time,
        update_time=row.update_time,
        creator=row.creator,
        revision=row.revision,
        latest=row.latest or "",
        version_count=row.version_count,
    )


def _version(row: sa.Row[Any]) -> Version:
    return Version(
        kind=Kind(row.kind),
        repository=row.repository,
        version=row.version,
        uid=row.uid,
        description=row.description,
        labels=json.loads(row.labels),
        annotations=json.loads(row.annotations),
        create_time=row.create_time,
        update_time=row.update_time,
        creator=row.creator,
        revision=row.revision,
        manifest=row.manifest,
        facts=Facts(row.module, row.bentoml_version, row.development, models=tuple(json.loads(row.models))),
        build_time=row.build_time,
        content=Content(
            state=ContentState(row.state),
            digest=row.digest or "",
            size_bytes=row.size_bytes,
            failure=row.failure,
            upload_start_time=row.upload_start_time,
            upload_end_time=row.upload_end_time,
            open_upload=row.open_upload or "",
        ),
        aliases=tuple(sorted(row.aliases.split(","))) if row.aliases else (),
    )


def _this_repository(organization: str, kind: Kind, repository: str) -> sa.ColumnElement[bool]:
    return sa.and_(
        repositories.c.organization == organization,
        repositories.c.kind == kind,
        repositories.c.repository == repository,
    )


async def repository(
    connection: AsyncConnection, organization: str, kind: Kind, name: str, *, lock: bool = False
) -> tuple[int, Repository] | None:
    """Row id and repository, or None. `lock` keeps other writers of the row out until the transaction ends."""
    if lock and await lock_repository(connection, organization, kind, name) is None:
        return None
    statement = sa.select(*_REPOSITORY).where(_this_repository(organization, kind, name))
    row = (await connection.execute(statement)).first()
    return None if row is None else (row.id, _repository(row))


async def has_repository(connection: AsyncConnection, organization: str, kind: Kind, name: str) -> bool:
    """Whether there is one of this name."""
    statement = sa.select(repositories.c.id).where(_this_repository(organization, kind, name))
    return (await connection.execute(statement)).first() is not None


async def lock_repository(connection: AsyncConnection, organization: str, kind: Kind, name: str) -> int | None:
    """Keep other writers of the row, and other new ids in the repository, out until the transaction ends: its row id.

    None where there is none. Then look no further: on PostgreSQL this may have waited for a transaction that deleted
    it, and the next statement may see another of the same name, which nobody has locked.

    NO KEY: a second update of a version in one transaction checks its foreign key, which must not wait for who holds
    this lock and waits for that version.
    """
    locked = sa.select(repositories.c.id).where(_this_repository(organization, kind, name))
    locked = locked.with_for_update(key_share=True)
    row_id: int | None = (await connection.execute(locked)).scalar_one_or_none()
    return row_id


async def version(
    connection: AsyncConnection, organization: str, kind: Kind, repository: str, name: str, *, lock: bool = False
) -> tuple[int, Version] | None:
    """Row id and version of this very id, or None: see `meant` for aliases. `lock` as of `repository`."""
    named = {"organization": organization, "kind": kind, "repository": repository, "version": name}
    if lock:
        locked = sa.select(versions.c.id).where(_THIS_VERSION).with_for_update()
        if (await connection.execute(locked, named)).first() is None:
            return None  # see lock_repository
    row = (await connection.execute(_ONE_VERSION, named)).first()
    return None if row is None else (row.id, _version(row))


async def meant(
    connection: Executor, organization: str, kind: Kind, repository: str, name: str
) -> tuple[int, Version] | None:
    """Row id and version of this id, of this alias, or the newest with content for `latest`. None: there is none."""
    if name == LATEST:
        return await latest_version(connection, organization, kind, repository)
    named = {"organization": organization, "kind": kind, "repository": repository, "version": name}
    row = (await connection.execute(_MEANT_VERSION, named)).first()
    return None if row is None else (row.id, _version(row))


async def lock_versions(connection: AsyncConnection, repository_id: int) -> list[tuple[str, str]]:
    """Lock every version of a locked repository, in one order: their ids and uids."""
    here = sa.select(versions.c.version, versions.c.uid).where(versions.c.repository_id == repository_id)
    rows = (await connection.execute(here.order_by(versions.c.id).with_for_update())).all()
    return [(row.version, row.uid) for row in rows]


async def lock_version(connection: AsyncConnection, row_id: int) -> bool:
    """Lock a version that was found without its lock; False when it has gone since."""
    locked = sa.select(versions.c.id).where(versions.c.id == row_id).with_for_update()
    return (await connection.execute(locked)).first() is not None


async def latest_version(
    connection: Executor, organization: str, kind: Kind, repository: str
) -> tuple[int, Version] | None:
    """Row id and version of the newest that has content or needs none."""
    named = {"organization": organization, "kind": kind, "repository": repository}
    row = (await connection.execute(_LATEST_VERSION, named)).first()
    return None if row is None else (row.id, _version(row))


async def add_repository(
    connection: AsyncConnection, organization: str, kind: Kind, name: str, values: Mapping[str, Any]
) -> bool:
    """Insert a repository; False when there is one of this name."""
    row = {**values, "organization": organization, "kind": kind, "repository": name, "revision": 1}
    row_id = await _insert(connection, repositories, row)
    if row_id is not None:
        await _add_labels(connection, "repository", row_id, row)
    return row_id is not None


async def ensure_repository(
    connection: AsyncConnection, organization: str, kind: Kind, name: str, values: Mapping[str, Any]
) -> tuple[int, bool]:
    """Row id of a repository, locked, and whether it was made for that."""
    while True:  # until nobody has deleted it between the two
        made = await add_repository(connection, organization, kind, name, values)
        if (row_id := await lock_repository(connection, organization, kind, name)) is not None:
            return row_id, made


async def add_version(
    connection: AsyncConnection,
    organization: str,
    kind: Kind,
    repository_id: int,
    repository: str,
    name: str,
    values: Mapping[str, Any],
) -> bool:
    """Insert a version; False when there is one of this name."""
    row = {
        **values,
        "organization": organization,
        "kind": kind,
        "repository_id": repository_id,
        "repository": repository,
        "version": name,
        "revision": 1,
        "size_bytes": 0,
        "failure": "",
    }
    row_id = await _insert(connection, versions, row)
    if row_id is not None:
        await _add_labels(connection, "version", row_id, row)
    return row_id is not None


async def _insert(connection: AsyncConnection, table: sa.Table, row: Mapping[str, Any]) -> int | None:
    insert = insert_into(connection.dialect.name, table)
    statement = insert.values(**row).on_conflict_do_nothing().returning(table.c.id)
    row_id: int | None = (await connection.execute(statement)).scalar_one_or_none()
    return row_id


async def update(connection: AsyncConnection, table: sa.Table, row_id: int, values: Mapping[str, Any]) -> None:
    """Write columns of a locked row and count its revision up. Labels among them are written to `labels` too."""
    await connection.execute(table.update().where(table.c.id == row_id).values(**values, revision=table.c.revision + 1))
    if "labels" in values:
        owner = "repository" if table is repositories else "version"
        await set_labels(connection, owner, row_id, json.loads(values["labels"]))


async def set_labels(connection: AsyncConnection, owner: str, row_id: int, wanted: Mapping[str, str]) -> None:
    """Replace all labels of a row, as they are searched."""
    await connection.execute(labels.delete().where(labels.c.owner == owner, labels.c.owner_id == row_id))
    if not wanted:
        return
    table = repositories if owner == "repository" else versions
    statement = sa.select(table.c.organization, table.c.kind, table.c.create_time)
    row = (await connection.execute(statement.where(table.c.id == row_id))).mappings().one()
    await _add_labels(connection, owner, row_id, {**row, "labels": json.dumps(dict(wanted))})


async def _add_labels(connection: AsyncConnection, owner: str, row_id: int, row: Mapping[str, Any]) -> None:
    """Write the labels of a row that has none yet, as they are searched."""
    scope = (row["organization"], owner, row["kind"])
    rows = [
        {
            "owner": owner,
            "owner_id": row_id,
            "key": key,
            "value": value,
            "key_term": label_term(*scope, key),
            "value_term": label_term(*scope, key, value),
            "create_time": row["create_time"],
        }
        for key, value in json.loads(row["labels"]).items()
    ]
    if rows:
        await connection.execute(labels.insert(), rows)


async def delete_versions(connection: AsyncConnection, where: sa.ColumnElement[bool]) -> int:
    """Delete versions, their labels and uploads; how many versions."""
    doomed = sa.select(versions.c.id).where(where)
    await connection.execute(labels.delete().where(labels.c.owner == "version", labels.c.owner_id.in_(doomed)))
    return (await connection.execute(versions.delete().where(where))).rowcount


async def contents(connection: AsyncConnection, where: sa.ColumnElement[bool]) -> list[tuple[str, str, str]]:
    """Digest, organization and resource name of the versions that have content."""
    columns = (versions.c.digest, versions.c.organization, versions.c.kind, versions.c.repository, versions.c.version)
    rows = (await connection.execute(sa.select(*columns).where(where, versions.c.digest.is_not(None)))).all()
    return [(row.digest, row.organization, Kind(row.kind).version_name(row.repository, row.version)) for row in rows]


async def delete_version(connection: AsyncConnection, row_id: int) -> None:
    """Delete one version."""
    await delete_versions(connection, versions.c.id == row_id)


async def delete_repository(connection: AsyncConnection, row_id: int) -> int:
    """Delete a repository and all in it; how many versions that were."""
    count = await delete_versions(connection, versions.c.repository_id == row_id)
    await connection.execute(labels.delete().where(labels.c.owner == "repository", labels.c.owner_id == row_id))
    await connection.execute(repositories.delete().where(repositories.c.id == row_id))
    return count


async def list_repositories(
    connection: AsyncConnection, organization: str, kind: Kind, search: Search, size: int, after: Position | None
) -> Found[Repository]:
    """A page of repositories."""
    found = await _page(connection, repositories, matches(search, organization, kind, "repository"), size, after)
    statement = sa.select(*_REPOSITORY).where(repositories.c.id.in_(found.items))
    rows = {row.id: _repository(row) for row in (await connection.execute(statement)).all()}
    return Found([rows[row_id] for row_id in found.items if row_id in rows], found.next, found.total, found.counted)


async def repository_id(connection: AsyncConnection, organization: str, kind: Kind, name: str) -> int | None:
    """Row id of a repository, without counting what is in it."""
    statement = sa.select(repositories.c.id).where(_this_repository(organization, kind, name))
    row_id: int | None = (await connection.execute(statement)).scalar_one_or_none()
    return row_id


async def list_versions(
    connection: AsyncConnection,
    organization: str,
    kind: Kind,
    repository: int | None,
    search: Search,
    size: int,
    after: Position | None,
) -> Found[Version]:
    """A page of the versions of the repository with this row id, or of all with None."""
    wanted = matches(search, organization, kind, "version", repository)
    found = await _page(connection, versions, wanted, size, after)
    statement = sa.select(*_VERSION).where(versions.c.id.in_(found.items))
    rows = {row.id: _version(row) for row in (await connection.execute(statement)).all()}
    return Found([rows[row_id] for row_id in found.items if row_id in rows], found.next, found.total, found.counted)


async def _page(
    connection: AsyncConnection, table: sa.Table, wanted: Matches, size: int, after: Position | None
) -> Found[int]:
    """Ids of the rows of a page, without their texts; cut where the texts would grow too large together."""
    await _plan_each(connection)
    page = wanted.page(size + 1, after).subquery()
    # Bytes as stored where the database knows them without reading the text.
    length = sa.func.octet_length if connection.dialect.name == "postgresql" else sa.func.length
    texts: sa.ColumnElement[int] = length(table.c.description) + length(table.c.annotations)
    if table is versions:
        texts = texts + length(table.c.manifest)
    statement = sa.select(page.c.id, page.c.key, texts.label("texts")).join_from(page, table, table.c.id == page.c.id)
    rows = {row.id: row for row in (await connection.execute(statement)).all()}
    ordered = sorted(rows.values(), key=lambda row: (row.key, row.id), reverse=wanted.descending)
    taken = 0
    kept: list[sa.Row[Any]] = []
    for row in ordered[:size]:
        taken += row.texts
        if kept and taken > MAX_PAGE_BYTES:
            break
        kept.append(row)
    more = len(kept) < len(ordered)
    ids = [row.id for row in kept]
    if after is None and not more:
        return Found(ids, None, len(ids))
    total, exact = await _total(connection, wanted, len(ordered))
    return Found(ids, (kept[-1].key, kept[-1].id) if more and kept else None, total, exact)


_PLANNED = sa.text(
    "SELECT set_config('plan_cache_mode', 'force_custom_plan', true), set_config('jit', 'off', true), "
    "set_config('random_page_cost', '1.1', true), set_config('max_parallel_workers_per_gather', '0', true)"
)
"""To compile a plan, or to share it among processes, costs more than a page. Indexes that are in use are in memory."""


async def _plan_each(connection: AsyncConnection) -> None:
    """Let PostgreSQL plan each search by its own values: one label is on ten versions, another on a million."""
    if connection.dialect.name == "postgresql":
        await connection.execute(_PLANNED)


async def _total(connection: AsyncConnection, wanted: Matches, seen: int) -> tuple[int, bool]:
    """How many there are, and whether that was counted. PostgreSQL counts where its own estimate makes that cheap."""
    if connection.dialect.name != "postgresql":
        return (await connection.execute(wanted.count(None))).scalar_one(), True
    (explained,) = (await connection.execute(Explained(wanted.all))).scalar_one()
    plan = explained["Plan"]
    estimate = int(plan["Plan Rows"])
    if estimate > 2 * MAX_COUNT or plan["Total Cost"] > _CHEAP:
        return max(estimate, seen), False
    counted = (await connection.execute(wanted.count(MAX_COUNT + 1))).scalar_one()
    return (counted, True) if counted <= MAX_COUNT else (max(counted, estimate), False)
