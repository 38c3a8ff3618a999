"""The lister killed between any two steps, and two of them at once: every file is listed once, with its digest."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ekiben.errors import Unavailable
from services.content.blobs import WHOLE
from services.content.blobs.source import Chunks
from services.kernel.clock import ManualClock
from services.registry import lister as lister_module
from services.registry.domain import Draft, Kind
from services.registry.files import Files
from services.registry.lister import Lister
from services.registry.store import files as rows
from tests.fixtures_registry import model_archive
from tests.registry_crashes import ME, NAME, Crash, Parts, failpoint, opened

COUNT = 20


@asynccontextmanager
async def pushed(database_url: str, folder: Path, clock: ManualClock) -> AsyncIterator[tuple[Parts, Lister, Files]]:
    async with opened(database_url, folder, clock) as parts:
        yield parts, Lister(parts.database, parts.blobs, clock), Files(parts.database, parts.uploads)


async def push(parts: Parts) -> None:
    archive = model_archive(**{f"f{number:03}": b"%d" % number for number in range(COUNT)})

    async def chunks() -> AsyncIterator[bytes]:
        yield archive

    await parts.catalog.create_version(ME, Kind.MODEL, "m", "v1", Draft())
    upload = (await parts.uploads.create(ME, NAME.format("v1"), "", None)).upload
    await parts.uploads.receive(upload, WHOLE, Chunks(chunks()), len(archive), None)
    await parts.uploads.complete(ME, upload, [])


async def all_are_listed(files: Files) -> None:
    page = await files.list(ME, NAME.format("v1"), 100, None)
    assert page.total == COUNT + 2 and page.next is None
    digests = {file.path: file.digest for file in page.items}
    for number in range(COUNT):
        assert digests[f"f{number:03}"] == f"sha256:{hashlib.sha256(b'%d' % number).hexdigest()}"


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("step", ["take", "add", "end"])
async def test_a_lister_that_is_killed_at_any_step(
    database_url: str,
    tmp_path: Path,
    manual_clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    before: bool,
) -> None:
    monkeypatch.setattr(lister_module, "BATCH", 7)
    async with pushed(database_url, tmp_path, manual_clock) as (parts, lister, files):
        await push(parts)
        failpoint(monkeypatch, rows, step, before=before)
        with pytest.raises(Crash):
            await lister.list_one()
        monkeypatch.undo()
    async with pushed(database_url, tmp_path, manual_clock) as (parts, lister, files):
        with pytest.raises(Unavailable):
            await files.list(ME, NAME.format("v1"), 100, None)
        manual_clock.jump(timedelta(minutes=2))
        assert await lister.list_one()
        assert not await lister.list_one()
        await all_are_listed(files)


async def test_two_listers_of_one_content_agree(
    database_url: str, tmp_path: Path, manual_clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a pause that was longer than the lease."""
    monkeypatch.setattr(lister_module, "BATCH", 7)
    second: list[asyncio.Task[bool]] = []
    taken = asyncio.Event()

    class Slow(Lister):
        async def _keep(self, digest: str, first: int, files: Any) -> None:
            if self is other:
                taken.set()
            elif not second:
                # Outside of a transaction: PostgreSQL gives no content out for which rows are being written.
                manual_clock.jump(timedelta(minutes=2))
                second.append(asyncio.ensure_future(other.list_one()))
                await asyncio.wait_for(taken.wait(), 60)
            await super()._keep(digest, first, files)

    async with pushed(database_url, tmp_path, manual_clock) as (parts, _, files):
        lister, other = (Slow(parts.database, parts.blobs, manual_clock) for _ in range(2))
        await push(parts)
        assert await lister.list_one() and await second[0]
        await all_are_listed(files)


async def test_the_files_go_with_their_blob(database_url: str, tmp_path: Path, manual_clock: ManualClock) -> None:
    async with pushed(database_url, tmp_path, manual_clock) as (parts, lister, _):
        await push(parts)
        digest = (await parts.catalog.get_version(ME, Kind.MODEL, "m", "v1")).content.digest
        await lister.list_one()
        await parts.catalog.delete_version(ME, Kind.MODEL, "m", "v1", "")
        for _ in range(3):
            manual_clock.jump(timedelta(days=30))
            await parts.collector.collect()
        async with parts.database.read() as connection:
            assert await rows.state_of(connection, digest) is None
            assert await rows.page(connection, digest, 10, -1) == []
