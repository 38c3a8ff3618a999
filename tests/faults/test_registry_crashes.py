"""The registry killed between any two steps: no name dangles, nothing is lost, and garbage is collected.

A crash is an exception that nothing catches, after which everything is opened anew: what was only in memory is gone.
"""

import asyncio
import hashlib
import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ekiben.errors import EkibenError
from services.content.blobs.filesystem import FileAssembly, FilesystemBlobStore
from services.content.digest import Digest
from services.kernel.clock import ManualClock
from services.registry.domain import ContentState, Draft, Kind, UploadState
from services.registry.store import blobs as held
from services.registry.store import uploads as upload_rows
from services.registry.uploads import Uploads
from tests.registry_crashes import (
    ME,
    NAME,
    ONE,
    TWO,
    Crash,
    failpoint,
    no_name_dangles,
    only_named_blobs_are_left,
    opened,
    read,
    send,
)

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
