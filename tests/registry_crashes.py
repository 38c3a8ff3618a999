"""The parts of a registry that is killed and opened anew, and what must be so afterwards.

A crash is an exception that nothing catches, after which everything is opened anew: what was only in memory is gone.
"""

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ekiben.api.v1.annotations_pb2 import Role
from services.content import open_blobs
from services.content.blobs import WHOLE, BlobStore
from services.content.blobs.s3.bucket import Bucket
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
from services.registry.domain import ContentState, Kind, Version
from services.registry.signing import Signer
from services.registry.uploads import Uploads
from tests.fixtures_registry import model_archive

ME = Principal("users/admin", "organizations/default", Role.ROLE_ADMIN)
NAME = "modelRepositories/m/models/{}"
ONE, TWO = model_archive(b"one" * 1000), model_archive(b"two" * 1000)
WRITES = ("put", "put_once", "delete", "start", "stream_part", "complete", "abort")


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


def die_before(monkeypatch: pytest.MonkeyPatch, count: int) -> Callable[[], bool]:
    """Let the process be killed before its `count`-th request that writes; gives a function that says whether it was.

    Nothing is written afterwards either, whatever cleans up on the way out.
    """
    seen = 0

    def killed() -> bool:
        return seen >= count

    def deadly(real: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def request(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen >= count:
                raise Crash(real.__name__)
            return await real(*args, **kwargs)

        return request

    for name in WRITES:
        monkeypatch.setattr(Bucket, name, deadly(getattr(Bucket, name)))
    return killed
