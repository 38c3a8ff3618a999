"""A registry with its blobs on S3, killed before each of its requests that write: as with files, and the bucket is clean."""

import contextlib
import hashlib
import itertools
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from services.content.blobs.s3 import S3BlobStore
from services.content.blobs.s3.bucket import open_bucket
from services.content.blobs.s3.location import Location
from services.kernel.clock import ManualClock
from services.kernel.db import open_database
from services.registry.app import MIGRATIONS
from services.registry.domain import ContentState, Draft, Kind
from tests.registry_crashes import (
    ME,
    ONE,
    TWO,
    Crash,
    Parts,
    die_before,
    no_name_dangles,
    only_named_blobs_are_left,
    parts_of,
    read,
    send,
)
from tests.s3 import S3Server


def no_orphans(client: Any, blobs_url: str) -> None:
    """Each object belongs to a blob, and each blob has its three."""
    bucket = urlsplit(blobs_url).netloc
    keys = {item["Key"] for item in client.list_objects_v2(Bucket=bucket)["Contents"]} - {"ekiben-blobs"}
    contents = {key.removeprefix("content/") for key in keys if key.startswith("content/")}
    names = {key.rpartition("/")[2].partition(".")[0] for key in keys if key.startswith("sha256/")}
    ends = {key.removeprefix("ends/") for key in keys if key.startswith("ends/")}
    assert contents == names == ends
    assert len(keys) == 3 * len(names), keys
    assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")


async def through_all_kills(
    s3: S3Server,
    folder: Path,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    work: Callable[[Parts], Awaitable[None]],
    recover: Callable[[Parts], Awaitable[None]],
) -> int:
    """Kill `work` before each request, and `recover` after each time; how often it was killed."""
    blobs_url, client = s3.new_url(), s3.client()
    location = Location.parse(blobs_url)
    async with open_database(f"sqlite:///{folder}/r.db") as database, open_bucket(location) as bucket:
        await database.migrate(MIGRATIONS)

        def started() -> Parts:
            return parts_of(database, S3BlobStore(bucket, location), clock)

        await started().catalog.create_version(ME, Kind.MODEL, "m", "v1", Draft())
        await send(started(), "v1", ONE)
        for count in itertools.count(1):
            with monkeypatch.context() as patch:
                killed = die_before(patch, count)
                with contextlib.suppress(Crash):
                    await work(started())
                if not killed():
                    return count - 1
            parts = started()
            await no_name_dangles(parts)
            await recover(parts)
            await only_named_blobs_are_left(parts)
            no_orphans(client, blobs_url)
    raise AssertionError("unreachable")


@pytest.mark.parametrize("pieces", [1, 2])
async def test_a_push_that_is_killed_before_any_request(
    s3: S3Server, tmp_path: Path, manual_clock: ManualClock, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    async def push(parts: Parts) -> None:
        await send(parts, "v1", TWO, pieces=pieces)

    async def recover(parts: Parts) -> None:
        now = (await read(parts, "v1")).content
        assert now.state is ContentState.READY
        assert now.digest in {f"sha256:{hashlib.sha256(archive).hexdigest()}" for archive in (ONE, TWO)}
        await send(parts, "v1", ONE)

    assert await through_all_kills(s3, tmp_path, manual_clock, monkeypatch, push, recover) > 8


async def test_a_collector_that_is_killed_before_any_request(
    s3: S3Server, tmp_path: Path, manual_clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def collect(parts: Parts) -> None:
        if (await read(parts, "v1")).content.state is ContentState.READY:
            await parts.catalog.delete_version(ME, Kind.MODEL, "m", "v1", "")
            await parts.catalog.create_version(ME, Kind.MODEL, "m", "v1", Draft())
        parts.clock.jump(timedelta(minutes=5))
        await parts.collector.collect()

    async def recover(parts: Parts) -> None:
        await parts.collector.collect()
        await send(parts, "v1", ONE)

    assert await through_all_kills(s3, tmp_path, manual_clock, monkeypatch, collect, recover) >= 4


async def test_equal_content_that_is_pushed_again_and_killed(
    s3: S3Server, tmp_path: Path, manual_clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content that is replaced by its equal is never without one."""

    async def push(parts: Parts) -> None:
        await send(parts, "v1", ONE)

    assert await through_all_kills(s3, tmp_path, manual_clock, monkeypatch, push, no_name_dangles) > 8
