"""Quotas on SQLite and on PostgreSQL alike: counts that are exact, and limits that hold, whoever else writes."""

import asyncio
import hashlib
import random
import runpy
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import EkibenError, InvalidArgument, NotFound, ResourceExhausted
from services import registry
from services.content import open_blobs
from services.content.blobs import WHOLE, BlobStore
from services.content.blobs.source import Chunks
from services.kernel.clock import ManualClock
from services.kernel.db import Database, open_database
from services.kernel.identity import Principal
from services.registry.app import MIGRATIONS
from services.registry.catalog import Catalog
from services.registry.collector import Collector
from services.registry.deletions import Deletions
from services.registry.domain import ContentState, Draft, Kind, UploadState, Usage
from services.registry.quotas import Quotas
from services.registry.signing import Signer
from services.registry.store import quotas as rows
from services.registry.uploads import Uploads
from tests.fixtures_registry import model_archive

ME = Principal("users/admin", "organizations/default", Role.ROLE_ADMIN)
OTHER = Principal("users/admin", "organizations/other", Role.ROLE_ADMIN)
ONE, TWO = model_archive(b"one" * 1000), model_archive(b"two" * 8000)
NAME = "modelRepositories/m/models/{}"


@dataclass
class Parts:
    database: Database
    blobs: BlobStore
    catalog: Catalog
    deletions: Deletions
    uploads: Uploads
    quotas: Quotas
    clock: ManualClock

    async def used(self, caller: Principal = ME) -> Usage:
        """What is counted, which is what is there."""
        async with self.database.read() as connection:
            organization = caller.organization.removeprefix("organizations/")
            quota = await rows.get(connection, organization)
            assert quota.used == await rows.count(connection, organization)
        return quota.used

    async def limit(self, **limits: int | None) -> None:
        await self.quotas.update(ME, "-", limits, "")

    async def push(self, version: str, archive: bytes, caller: Principal = ME, *, digest: bool = False) -> None:
        """Give a version its content, made when missing."""
        try:
            await self.catalog.create_version(caller, Kind.MODEL, "m", version, Draft())
        except EkibenError as error:
            if error.reason != "MODEL_EXISTS":
                raise
        wanted = f"sha256:{hashlib.sha256(archive).hexdigest()}" if digest else ""
        upload = await self.uploads.create(caller, NAME.format(version), wanted, len(archive) if digest else None)
        if upload.state is UploadState.COMPLETED:
            return
        await self.uploads.receive(upload.upload, WHOLE, Chunks(_stream(archive)), len(archive), None)
        await self.uploads.complete(caller, upload.upload, [])


async def _stream(data: bytes) -> AsyncIterator[bytes]:
    yield data


@pytest.fixture
async def parts(database_url: str, tmp_path: Path, manual_clock: ManualClock) -> AsyncIterator[Parts]:
    async with open_database(database_url) as database, open_blobs(f"file://{tmp_path}/blobs") as blobs:
        await database.migrate(MIGRATIONS)
        grace = timedelta(0)
        yield Parts(
            database,
            blobs,
            Catalog(database, manual_clock, delete_grace=timedelta(days=7)),
            Deletions(database, manual_clock),
            Uploads(database, blobs, Signer(b"k"), manual_clock, expire=timedelta(hours=1), garbage_grace=grace),
            Quotas(database, manual_clock),
            manual_clock,
        )


async def refused(call: Awaitable[Any]) -> ResourceExhausted:
    with pytest.raises(ResourceExhausted) as caught:
        await call
    assert caught.value.reason == "QUOTA_EXCEEDED"
    return caught.value


async def test_content_counts_once_and_until_it_is_purged(parts: Parts) -> None:
    assert await parts.used() == Usage()
    await parts.push("a", ONE)
    await parts.push("b", ONE, digest=True)
    await parts.push("c", TWO)
    assert await parts.used() == Usage(len(ONE) + len(TWO), 3, 1)
    await parts.push("c", ONE)  # replaces TWO
    assert await parts.used() == Usage(len(ONE), 3, 1)
    await parts.push("a", ONE, OTHER)
    assert await parts.used(OTHER) == Usage(len(ONE), 1, 1)
    for version in ("a", "b"):
        await parts.catalog.delete_version(ME, Kind.MODEL, "m", version, "")
    assert await parts.used() == Usage(len(ONE), 1, 1)
    await parts.catalog.delete_repository(ME, Kind.MODEL, "m", "", force=True)
    assert await parts.used() == Usage(len(ONE), 0, 0)
    deleted, _ = await parts.deletions.list(ME, "", 10, None)
    await parts.deletions.undelete(ME, deleted[0].uid)
    assert await parts.used() == Usage(len(ONE), 1, 1)
    await parts.catalog.delete_version(ME, Kind.MODEL, "m", deleted[0].version, "")
    await parts.deletions.purge(ME, deleted[1].uid)
    assert await parts.used() == Usage(len(ONE), 0, 1)
    parts.clock.jump(timedelta(days=8))
    while await parts.deletions.purge_expired():
        pass
    assert await parts.used() == Usage(0, 0, 1)
    assert await parts.used(OTHER) == Usage(len(ONE), 1, 1)
    for_good = Catalog(parts.database, parts.clock)
    await for_good.delete_version(OTHER, Kind.MODEL, "m", "a", "")
    await for_good.delete_repository(OTHER, Kind.MODEL, "m", "", force=False)
    assert await parts.used(OTHER) == Usage()


async def test_a_limit_holds_however_many_add_at_once(parts: Parts) -> None:
    await parts.limit(versions=5, repositories=3)
    results = await asyncio.gather(
        *(parts.catalog.create_version(ME, Kind.MODEL, f"r{n % 2}", f"v{n}", Draft()) for n in range(10)),
        return_exceptions=True,
    )
    assert sum(isinstance(result, ResourceExhausted) for result in results) == 5, results
    assert (await parts.used()).versions == 5
    results = await asyncio.gather(
        *(parts.catalog.create_repository(ME, Kind.BENTO, f"s{n}", Draft()) for n in range(4)), return_exceptions=True
    )
    assert sum(isinstance(result, ResourceExhausted) for result in results) == 3, results
    assert await parts.used() == Usage(0, 5, 3)
    error = await refused(parts.catalog.create_version(ME, Kind.MODEL, "r0", "more", Draft()))
    assert (error.metadata["quota"], error.metadata["used"], error.metadata["limit"]) == ("versions", "5", "5")
    assert "keeps 5 versions and may keep 5" in error.message and "ekiben quotas set" in error.message
    with pytest.raises(NotFound):
        await parts.catalog.get_version(ME, Kind.MODEL, "r0", "more")
    await parts.catalog.create_version(OTHER, Kind.MODEL, "r0", "more", Draft())
    await parts.limit(versions=3)  # below what is there: nothing goes, nothing comes
    first = (await parts.catalog.list_versions(ME, Kind.MODEL, None, "", 10, None)).items
    await parts.catalog.delete_version(ME, Kind.MODEL, first[0].repository, first[0].version, "")
    await refused(parts.catalog.create_version(ME, Kind.MODEL, "r0", "more", Draft()))
    deleted, _ = await parts.deletions.list(ME, "", 10, None)
    await refused(parts.deletions.undelete(ME, deleted[0].uid))
    await parts.limit(versions=None)
    await parts.deletions.undelete(ME, deleted[0].uid)
    assert await parts.used() == Usage(0, 5, 3)


async def test_bytes_beyond_the_limit_are_refused_and_can_be_completed_later(parts: Parts) -> None:
    await parts.push("a", ONE)
    await parts.limit(bytes=len(ONE) + len(TWO) - 1)
    await parts.catalog.create_version(ME, Kind.MODEL, "m", "b", Draft())
    # Announced, it is refused before a byte is sent.
    await refused(parts.uploads.create(ME, NAME.format("b"), "", len(TWO)))
    await refused(parts.uploads.create(ME, NAME.format("b"), f"sha256:{'a' * 64}", len(TWO)))
    upload = await parts.uploads.create(ME, NAME.format("b"), "", None)
    await refused(parts.uploads.receive(upload.upload, WHOLE, Chunks(_stream(TWO)), len(TWO), None))
    # In parts, whose sizes say nothing yet, when it is completed.
    half = len(TWO) // 2
    sent = [
        await parts.uploads.receive(upload.upload, number, Chunks(_stream(piece)), len(piece), None)
        for number, piece in ((1, TWO[:half]), (2, TWO[half:]))
    ]
    wanted = [(part.number, part.etag) for part in sent]
    error = await refused(parts.uploads.complete(ME, upload.upload, wanted))
    assert error.metadata["added"] == str(len(TWO))
    assert (await parts.catalog.get_version(ME, Kind.MODEL, "m", "b")).content.state is ContentState.UPLOADING
    # The same content costs nothing.
    await parts.push("c", ONE)
    await parts.push("d", ONE, digest=True)
    assert await parts.used() == Usage(len(ONE), 4, 1)
    await parts.limit(bytes=len(ONE) + len(TWO))
    assert (await parts.uploads.complete(ME, upload.upload, wanted)).state is UploadState.COMPLETED
    assert await parts.used() == Usage(len(ONE) + len(TWO), 4, 1)


async def test_of_two_uploads_that_fit_one_by_one_only_one_is_named(parts: Parts) -> None:
    await parts.limit(bytes=len(TWO) + 1)
    archives = [TWO, model_archive(b"two" * 7999 + b"TWO")]
    assert len(set(map(len, archives))) == 1
    results = await asyncio.gather(
        *(parts.push(f"v{n}", archive) for n, archive in enumerate(archives)), return_exceptions=True
    )
    assert sorted(isinstance(result, ResourceExhausted) for result in results) == [False, True], results
    assert (await parts.used()).bytes == len(TWO)


async def test_a_transaction_that_dies_counts_nothing(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crash(BaseException):
        pass

    await parts.push("a", ONE)
    real = rows.charge

    async def crash(*args: Any) -> None:
        await real(*args)
        raise Crash

    for call in (
        lambda: parts.push("b", TWO),
        lambda: parts.push("a", TWO),
        lambda: parts.catalog.create_repository(ME, Kind.BENTO, "s", Draft()),
        lambda: parts.catalog.delete_version(ME, Kind.MODEL, "m", "a", ""),
        lambda: parts.catalog.delete_repository(ME, Kind.MODEL, "m", "", force=True),
    ):
        monkeypatch.setattr(rows, "charge", crash)
        with pytest.raises(Crash):
            await call()
        monkeypatch.undo()
        assert await parts.used() == Usage(len(ONE), 1, 1)
    assert (await parts.catalog.get_version(ME, Kind.MODEL, "m", "a")).content.size_bytes == len(ONE)


@pytest.mark.parametrize("seed", [1, 2])
async def test_counts_are_exact_after_any_mixture(parts: Parts, seed: int) -> None:
    chance = random.Random(seed)
    collector = Collector(
        parts.database,
        parts.blobs,
        parts.uploads,
        parts.deletions,
        parts.clock,
        interval_s=1,
        garbage_grace=timedelta(0),
    )

    def version() -> str:
        return f"v{chance.randrange(4)}"

    async def push() -> None:
        await parts.push(version(), chance.choice([ONE, TWO]), digest=chance.random() < 0.5)

    async def delete() -> None:
        await parts.catalog.delete_version(ME, Kind.MODEL, "m", version(), "")

    async def delete_all() -> None:
        await parts.catalog.delete_repository(ME, Kind.MODEL, "m", "", force=True)

    async def one_deleted(use: Callable[[Principal, str], Awaitable[object]]) -> None:
        deleted, _ = await parts.deletions.list(ME, "", 10, None)
        if deleted:
            await use(ME, chance.choice(deleted).uid)

    async def expire() -> None:
        parts.clock.jump(timedelta(days=3))
        await collector.collect()

    async def recount() -> None:
        async with parts.database.transaction() as connection:
            counted, there = await rows.recount(connection, "default")
            assert counted == there

    async def work() -> None:
        choices: list[Callable[[], Awaitable[None]]] = [push, push, push, delete, delete, delete_all, expire, recount]
        choices += [lambda: one_deleted(parts.deletions.undelete), lambda: one_deleted(parts.deletions.purge)]
        for _ in range(8):
            try:
                await chance.choice(choices)()
            except EkibenError as error:
                allowed = {"MODEL_NOT_FOUND", "MODEL_EXISTS", "MODEL_REPOSITORY_NOT_FOUND", "UPLOAD_NOT_FOUND"}
                allowed |= {"DELETED_VERSION_NOT_FOUND", "CLAIM_LOST", "BLOB_NOT_FOUND", "UPLOAD_ENDED"}
                assert error.reason in allowed | {"CONTENT_EXISTS", "UPLOAD_INCOMPLETE"}, error

    await asyncio.gather(*(work() for _ in range(4)))
    await parts.used()


async def test_limits_are_set_lifted_and_checked(parts: Parts) -> None:
    first = await parts.quotas.get(ME, "-")
    assert (first.organization, first.used, first.revision) == ("default", Usage(), 0)
    changed = await parts.quotas.update(ME, "default", {"bytes": 10, "versions": 0}, "")
    assert (changed.limits.bytes, changed.limits.versions, changed.limits.repositories) == (10, 0, None)
    assert (changed.updater, changed.update_time) == ("users/admin", parts.clock.now())
    with pytest.raises(InvalidArgument):
        await parts.quotas.update(ME, "-", {"bytes": -1}, "")
    with pytest.raises(NotFound):
        await parts.quotas.get(ME, "other")
    await refused(parts.catalog.create_version(ME, Kind.MODEL, "m", "v1", Draft()))
    lifted = await parts.quotas.update(ME, "-", {"versions": None}, "")
    assert (lifted.limits.bytes, lifted.limits.versions, lifted.revision) == (10, None, 2)


async def test_what_was_there_before_is_counted_by_the_migration(parts: Parts) -> None:
    await parts.push("a", ONE)
    await parts.push("b", ONE)
    await parts.push("c", TWO, OTHER)
    await parts.catalog.delete_version(ME, Kind.MODEL, "m", "a", "")
    before = [await parts.used(), await parts.used(OTHER)]
    (path,) = (Path(registry.__file__).parent / "migrations" / "versions").glob("*_quotas.py")
    async with parts.database.transaction() as connection:
        await connection.exec_driver_sql("DELETE FROM quotas")
        await connection.exec_driver_sql(runpy.run_path(str(path))["_COUNT"])
    assert [await parts.used(), await parts.used(OTHER)] == before
