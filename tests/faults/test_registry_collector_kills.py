"""Garbage collection says what it frees, and proves it: one audit entry for each blob that went, whatever was killed."""

import asyncio
import contextlib
import hashlib
import itertools
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from services.content import open_blobs
from services.content.blobs.filesystem import FilesystemBlobStore
from services.kernel.clock import ManualClock
from services.kernel.db import open_database
from services.registry.app import MIGRATIONS
from services.registry.audit import Audit, AuditFilter
from services.registry.collector import Collector
from services.registry.domain import Draft, Garbage, GarbageKind, Kind
from services.registry.store import audit as audit_rows
from services.registry.store import blobs as held
from tests.postgres import PostgresServer
from tests.registry_crashes import (
    ME,
    NAME,
    ONE,
    TWO,
    Crash,
    Parts,
    die_before,
    failpoint,
    opened,
    parts_of,
    send,
)
from tests.s3 import S3Server

WEEK = timedelta(days=7)
DIGEST = f"sha256:{hashlib.sha256(ONE).hexdigest()}"


async def planned(parts: Parts) -> list[Garbage]:
    return [one async for one in parts.collector.plan()]


async def swept(parts: Parts) -> list[Garbage]:
    return [one async for one in parts.collector.sweep()]


async def entries(parts: Parts) -> list[str]:
    found = await Audit(parts.database).list(ME, AuditFilter(resource=f"blobs/{DIGEST}"), 100, None)
    return [entry.detail for _, entry in found]


async def delete_for_good(parts: Parts) -> None:
    """v1, whose grace period is over then, too."""
    await parts.catalog.create_version(ME, Kind.MODEL, "m", "v1", Draft())
    await send(parts, "v1", ONE)
    await parts.catalog.delete_version(ME, Kind.MODEL, "m", "v1", "")
    parts.clock.jump(WEEK + timedelta(minutes=5))


async def test_a_plan_changes_nothing_and_is_what_a_round_then_frees(
    database_url: str, tmp_path: Path, manual_clock: ManualClock
) -> None:
    async with opened(database_url, tmp_path, manual_clock, delete_grace=WEEK) as parts:
        await delete_for_good(parts)
        await parts.catalog.create_version(ME, Kind.MODEL, "m", "v2", Draft())
        for archive in (TWO, ONE + b"\0" * 512):  # the second push replaces the first one's content
            await send(parts, "v2", archive)
        manual_clock.jump(timedelta(minutes=5))
        late = (await parts.uploads.create(ME, NAME.format("v2"), "", None)).upload
        manual_clock.jump(timedelta(hours=2))
        two = f"sha256:{hashlib.sha256(TWO).hexdigest()}"

        before = await planned(parts)
        assert before == await planned(parts)
        assert (GarbageKind.PARTS, f"uploads/{late}") in [(one.kind, one.name) for one in before]
        assert (GarbageKind.DELETED_VERSION, NAME.format("v1")) in [(one.kind, one.name) for one in before]
        blobs = {one.name: one for one in before if one.kind is GarbageKind.BLOB}
        assert blobs.keys() == {DIGEST, two}
        assert {name: one.size_bytes for name, one in blobs.items()} == {DIGEST: len(ONE), two: len(TWO)}
        assert blobs[two].last_holder == NAME.format("v2")
        assert len([blob async for blob in parts.blobs.blobs()]) == 3

        after = await swept(parts)
        assert {(one.kind, one.name, one.size_bytes) for one in after} == {
            (one.kind, one.name, one.size_bytes) for one in before
        }
        assert {one.last_holder for one in after if one.name == DIGEST} == {NAME.format("v1")}
        assert len([blob async for blob in parts.blobs.blobs()]) == 1
        assert await planned(parts) == []


async def test_a_plan_says_that_a_hold_keeps_everything(
    database_url: str, tmp_path: Path, manual_clock: ManualClock
) -> None:
    async with opened(database_url, tmp_path, manual_clock, delete_grace=WEEK) as parts:
        await delete_for_good(parts)
        now = manual_clock.now()
        async with parts.database.transaction() as connection:
            await held.hold(connection, "h", "a backup", now, now + timedelta(hours=1))
        first, *rest = await planned(parts)
        assert (first.kind, first.name, first.release_time) == (GarbageKind.HOLD, "a backup", now + timedelta(hours=1))
        assert GarbageKind.BLOB in {one.kind for one in rest}
        assert [one.kind for one in await swept(parts)] == [GarbageKind.DELETED_VERSION]
        manual_clock.jump(timedelta(hours=2))
        assert [one.kind for one in await swept(parts)] == [GarbageKind.BLOB]


STEPS = [
    (held, "let_go"),
    (held, "condemn"),
    (held, "lock_condemned"),
    (FilesystemBlobStore, "delete"),
    (held, "delete"),
    (audit_rows, "add"),
    (Collector, "_delete"),
]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step[1])
async def test_a_blob_that_goes_leaves_one_entry_whatever_is_killed(
    database_url: str,
    tmp_path: Path,
    manual_clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    step: tuple[Any, str],
    before: bool,
) -> None:
    async with opened(database_url, tmp_path, manual_clock, delete_grace=WEEK) as parts:
        await delete_for_good(parts)
        until = manual_clock.now()
        failpoint(monkeypatch, *step, before=before)
        with pytest.raises(Crash):
            await parts.collector.collect()
    monkeypatch.undo()
    async with opened(database_url, tmp_path, manual_clock, delete_grace=WEEK) as parts:
        there = {str(blob.digest) async for blob in parts.blobs.blobs()}
        assert len(await entries(parts)) == (1 if step == (Collector, "_delete") and not before else 0)
        for _ in range(2):
            await parts.collector.collect()
        assert {str(blob.digest) async for blob in parts.blobs.blobs()} == set() <= there
        [entry] = await entries(parts)
        assert entry == (
            f"Collected: {len(ONE)} bytes; last held by {NAME.format('v1')} until {until:%Y-%m-%dT%H:%M:%SZ}."
        )


async def test_two_rounds_at_once_leave_one_entry(database_url: str, tmp_path: Path, manual_clock: ManualClock) -> None:
    async with opened(database_url, tmp_path, manual_clock, delete_grace=WEEK) as parts:
        await delete_for_good(parts)
        counts = await asyncio.gather(*(parts.collector.collect() for _ in range(4)))
        assert sum(counts) == 1
        assert len(await entries(parts)) == 1


async def test_on_s3_and_postgresql_each_blob_leaves_one_entry_whatever_request_was_the_last(
    s3: S3Server, postgres: PostgresServer, manual_clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, blobs_url = postgres.create("collector_on_s3"), s3.new_url()
    async with open_database(url) as database, open_blobs(blobs_url) as blobs:
        await database.migrate(MIGRATIONS)
        kills = 0
        for count in itertools.count(1):
            parts = parts_of(database, blobs, manual_clock, delete_grace=WEEK)
            await delete_for_good(parts)
            [before] = [one for one in await planned(parts) if one.kind is GarbageKind.BLOB]
            assert (before.name, before.size_bytes, before.last_holder) == (DIGEST, len(ONE), "")
            with monkeypatch.context() as patch:
                killed = die_before(patch, count)
                with contextlib.suppress(Crash):
                    await parts.collector.collect()
                if not killed():
                    break
            kills += 1
            for _ in range(2):
                await parts.collector.collect()
            assert [blob async for blob in blobs.blobs()] == []
            assert len(await entries(parts)) == kills
        assert kills >= 2
        assert all(
            f"Collected: {len(ONE)} bytes; last held by {NAME.format('v1')}" in one for one in await entries(parts)
        )
