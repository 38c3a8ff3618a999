"""The registry killed between any two steps: no name dangles, nothing is lost, and garbage is collected.

A crash is an exception that nothing catches, after which everything is opened anew: what was only in memory is gone.
"""

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import EkibenError
from services.content import open_blobs
from services.content.blobs import WHOLE, BlobStore
from services.content.blobs.filesystem import FileAssembly, FilesystemBlobStore
from services.content.blobs.source import Chunks
from services.content.digest import Digest
from services.kernel.clock import ManualClock
from services.kernel.db import Database, open_database
from services.kernel.identity import Principal
from services.operations.fsck import look
from services.registry.app import MIGRATIONS
from services.registry.catalog import Catalog
from services.registry.collector import Collector
from services.registry.deletions import Deletions
from services.registry.domain import ContentState, Draft, Kind, UploadState, Version
from services.registry.signing import Signer
from services.registry.store import blobs as held
from services.registry.store import uploads as upload_rows
from services.registry.uploads import Uploads
from tests.fixtures_registry import model_archive

ME = Principal("users/admin", "organizations/default", Role.ROLE_ADMIN)
NAME = "modelRepositories/m/models/{}"
ONE, TWO = model_archive(b"one" * 1000), model_archive(b"two" * 1000)


class Crash(BaseException):
    """The process was killed here."""


@dataclass
class Parts:
    database: Database
    blobs: BlobStore
    catalog: Catalog
    uploads: Uploads
    deletions: Deletions
    collector: Collector
    clock: ManualClock


def parts_of(
    database: Database, blobs: BlobStore, clock: ManualClock, *, delete_grace: timedelta = timedelta(0)
) -> Parts:
    """A registry on what is open, which remembers nothing."""
    grace = timedelta(0)
    uploads = Uploads(database, blobs, Signer(b"k"), clock, expire=timedelta(hours=1), garbage_grace=grace)
    deletions = Deletions(database, clock)
    collector = Collector(database, blobs, uploads, deletions, clock, interval_s=1, garbage_grace=grace)
    catalog = Catalog(database, clock, delete_grace=delete_grace)
    return Parts(database, blobs, catalog, uploads, deletions, collector, clock)


@asynccontextmanager
async def opened(
    url: str, folder: Path, clock: ManualClock, *, delete_grace: timedelta = timedelta(0)
) -> AsyncIterator[Parts]:
    async with open_database(url) as database, open_blobs(f"file://{folder}/blobs") as blobs:
        await database.migrate(MIGRATIONS)
        yield parts_of(database, blobs, clock, delete_grace=delete_grace)


async def send(parts: Parts, version: str, archive: bytes, *, pieces: int = 1) -> None:
    async def chunks(data: bytes) -> AsyncIterator[bytes]:
        yield data

    upload = (await parts.uploads.create(ME, NAME.format(version), "", None)).upload
    if pieces == 1:
        await parts.uploads.receive(upload, WHOLE, Chunks(chunks(archive)), len(archive), None)
        await parts.uploads.complete(ME, upload, [])
        return
    size = -(-len(archive) // pieces)
    sent = []
    for number in range(1, pieces + 1):
        piece = archive[(number - 1) * size : number * size]
        part = await parts.uploads.receive(upload, number, Chunks(chunks(piece)), len(piece), None)
        sent.append((number, part.etag))
    await parts.uploads.complete(ME, upload, sent)


async def read(parts: Parts, version: str) -> Version:
    return await parts.catalog.get_version(ME, Kind.MODEL, "m", version)


async def no_name_dangles(parts: Parts) -> None:
    found = await parts.catalog.list_versions(ME, Kind.MODEL, None, "", 100, None)
    for version in found.items:
        if version.content.state is ContentState.READY:
            data = b"".join([chunk async for chunk in parts.blobs.read(Digest.parse(version.content.digest))])
            assert f"sha256:{hashlib.sha256(data).hexdigest()}" == version.content.digest


async def only_named_blobs_are_left(parts: Parts) -> None:
    parts.clock.jump(timedelta(hours=2))
    for _ in range(2):  # strays are adopted in one round and deleted in the next
        await parts.collector.collect()
        parts.clock.jump(timedelta(minutes=5))
    await no_name_dangles(parts)
    found = await parts.catalog.list_versions(ME, Kind.MODEL, None, "", 100, None)
    named = {version.content.digest for version in found.items if version.content.digest}
    assert {str(blob.digest) async for blob in parts.blobs.blobs()} == named
    assert await parts.blobs.uploads() == []
    await the_check_is_clean(parts)


async def the_check_is_clean(parts: Parts) -> None:
    """Nothing that `ekiben admin fsck --deep` would tell."""
    report = await look({"registry": parts.database}, parts.blobs, deep=True, schema=False, clock=parts.clock)
    assert report.findings == []


def failpoint(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, before: bool) -> None:
    real = getattr(owner, name)

    async def crash(*args: Any, **kwargs: Any) -> Any:
        if not before:
            await real(*args, **kwargs)
        raise Crash(name)

    monkeypatch.setattr(owner, name, crash)


STEPS: list[tuple[Any, str]] = [
    (held, "claim"),
    (FileAssembly, "commit"),
    (held, "store"),
    (upload_rows, "leave_open"),
    (upload_rows, "set_content"),
    (Uploads, "_name"),
    (FilesystemBlobStore, "discard"),
]


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("step", STEPS, ids=[name for _, name in STEPS])
async def test_a_push_that_is_killed_at_any_step(
    database_url: str,
    tmp_path: Path,
    manual_clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    step: tuple[Any, str],
    before: bool,
    pieces: int,
) -> None:
    if "postgresql" in database_url and pieces == 3:
        pytest.skip("the rows go the same way as for one piece")
    async with opened(database_url, tmp_path, manual_clock) as parts:
        await parts.catalog.create_version(ME, Kind.MODEL, "m", "v1", Draft())
        await send(parts, "v1", ONE)
        failpoint(monkeypatch, *step, before=before)
        with pytest.raises(Crash):
            await send(parts, "v1", TWO, pieces=pieces)
    monkeypatch.undo()
    async with opened(database_url, tmp_path, manual_clock) as parts:
        await no_name_dangles(parts)
        now = (await read(parts, "v1")).content
        assert now.state is ContentState.READY
        assert now.digest in {f"sha256:{hashlib.sha256(archive).hexdigest()}" for archive in (ONE, TWO)}
        await parts.collector.collect()
        await no_name_dangles(parts)
        await send(parts, "v1", TWO)
        assert (await read(parts, "v1")).content.digest == f"sha256:{hashlib.sha256(TWO).hexdigest()}"
        await only_named_blobs_are_left(parts)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "step",
    [(held, "condemn"), (held, "lock_condemned"), (FilesystemBlobStore, "delete"), (held, "delete")],
    ids=lambda step: step[1],
)
async def test_a_collector_that_is_killed_at_any_step(
    database_url: str,
    tmp_path: Path,
    manual_clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    step: tuple[Any, str],
    before: bool,
) -> None:
    async with opened(database_url, tmp_path, manual_clock) as parts:
        for version in ("v1", "v2"):
            await parts.catalog.create_version(ME, Kind.MODEL, "m", version, Draft())
        await send(parts, "v1", ONE)
        await send(parts, "v2", TWO)
        await parts.catalog.delete_version(ME, Kind.MODEL, "m", "v1", "")
        manual_clock.jump(timedelta(minutes=5))
        failpoint(monkeypatch, *step, before=before)
        with pytest.raises(Crash):
            await parts.collector.collect()
    monkeypatch.undo()
    async with opened(database_url, tmp_path, manual_clock) as parts:
        await no_name_dangles(parts)
        await parts.collector.collect()
        await parts.catalog.create_version(ME, Kind.MODEL, "m", "v1", Draft())
        await send(parts, "v1", ONE)
        await only_named_blobs_are_left(parts)
        assert (await read(parts, "v1")).content.state is ContentState.READY


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("step", STEPS[:6], ids=[name for _, name in STEPS[:6]])
async def test_a_collector_that_runs_within_a_push(
    tmp_path: Path, manual_clock: ManualClock, monkeypatch: pytest.MonkeyPatch, step: tuple[Any, str], late: bool
) -> None:
    """Also when the machine slept so long at that step that the claim has ended: then the push fails, loudly."""
    owner, name = step
    real = getattr(owner, name)
    within_transaction = owner in (held, upload_rows)
    async with opened(f"sqlite:///{tmp_path}/r.db", tmp_path, manual_clock) as parts:
        for version in ("v1", "v2"):
            await parts.catalog.create_version(ME, Kind.MODEL, "m", version, Draft())
        # The same bytes were there before, and are garbage by now.
        await send(parts, "v1", ONE)
        await parts.catalog.delete_version(ME, Kind.MODEL, "m", "v1", "")
        manual_clock.jump(timedelta(minutes=5))
        rounds: list[asyncio.Task[int]] = []

        async def interrupted(*args: Any, **kwargs: Any) -> Any:
            if late:
                manual_clock.jump(timedelta(minutes=10))
            rounds.append(asyncio.ensure_future(parts.collector.collect()))
            if not within_transaction:
                await asyncio.wait(rounds[-1:])
            return await real(*args, **kwargs)

        monkeypatch.setattr(owner, name, interrupted)
        try:
            await send(parts, "v2", ONE)
        except EkibenError as exc:
            assert exc.reason == "CLAIM_LOST"
            assert late
        monkeypatch.undo()
        await asyncio.gather(*rounds)
        await no_name_dangles(parts)
        if (await read(parts, "v2")).content.state is not ContentState.READY:
            await send(parts, "v2", ONE)
        await only_named_blobs_are_left(parts)
        assert (await read(parts, "v2")).content.state is ContentState.READY


@pytest.mark.parametrize("seed", [1, 2])
async def test_pushes_deletes_and_collectors_at_once(
    database_url: str, tmp_path: Path, manual_clock: ManualClock, seed: int
) -> None:
    chance = random.Random(seed)
    async with opened(database_url, tmp_path, manual_clock) as parts:
        for number in range(4):
            await parts.catalog.create_version(ME, Kind.MODEL, "m", f"v{number}", Draft())

        async def push() -> None:
            version, archive = f"v{chance.randrange(4)}", chance.choice([ONE, TWO])
            digest = f"sha256:{hashlib.sha256(archive).hexdigest()}"
            if chance.random() < 0.5:
                created = await parts.uploads.create(ME, NAME.format(version), digest, None)
                if created.state is UploadState.COMPLETED:
                    return
            await send(parts, version, archive, pieces=chance.choice([1, 2]))

        async def renew() -> None:
            version = f"v{chance.randrange(4)}"
            await parts.catalog.delete_version(ME, Kind.MODEL, "m", version, "")
            await parts.catalog.create_version(ME, Kind.MODEL, "m", version, Draft())

        async def collect() -> None:
            manual_clock.jump(timedelta(seconds=61))
            await parts.collector.collect()

        async def work(choices: list[Callable[[], Any]]) -> None:
            for _ in range(6):
                try:
                    await chance.choice(choices)()
                except EkibenError as exc:
                    allowed = {"CLAIM_LOST", "MODEL_NOT_FOUND", "MODEL_EXISTS", "UPLOAD_NOT_FOUND", "BLOB_NOT_FOUND"}
                    assert exc.reason in allowed | {"UPLOAD_ENDED", "UPLOAD_INCOMPLETE", "CONTENT_EXISTS"}, exc
                await asyncio.sleep(0)

        await asyncio.gather(*(work([push, push, renew]) for _ in range(3)), work([collect]), work([collect]))
        await no_name_dangles(parts)
        await only_named_blobs_are_left(parts)


async def test_files_without_rows_are_adopted_then_collected(tmp_path: Path, manual_clock: ManualClock) -> None:
    async with opened(f"sqlite:///{tmp_path}/r.db", tmp_path, manual_clock) as parts:
        stray = tmp_path / "blobs" / "content" / "sha256" / "ab" / ("ab" * 32)
        stray.parent.mkdir(parents=True)
        stray.write_bytes(b"x")
        await only_named_blobs_are_left(parts)
        assert not stray.exists()


async def test_a_blob_that_an_operator_deleted_is_sent_again(tmp_path: Path, manual_clock: ManualClock) -> None:
    async with opened(f"sqlite:///{tmp_path}/r.db", tmp_path, manual_clock) as parts:
        await parts.catalog.create_version(ME, Kind.MODEL, "m", "v1", Draft())
        await send(parts, "v1", ONE)
        digest = (await read(parts, "v1")).content.digest
        await parts.blobs.delete(Digest.parse(digest))
        created = await parts.uploads.create(ME, NAME.format("v1"), digest, None)
        assert created.state is UploadState.OPEN
        await send(parts, "v1", ONE)
        await no_name_dangles(parts)
