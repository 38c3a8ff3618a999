"""Pulls that are written down, on SQLite and PostgreSQL alike."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from ekiben.errors import Unavailable
from services.builder.domain import Image
from services.builder.pulls import Pulls
from services.builder.store import ImageRows
from services.builder.store.images import put_image
from services.content.digest import Digest
from services.kernel.clock import ManualClock
from services.kernel.db import Database, open_database

MADE = datetime(2026, 1, 1, tzinfo=UTC)
DIGEST, OTHER = Digest("a" * 64), Digest("b" * 64)


def image(digest: Digest, place: str) -> Image:
    return Image(
        id=digest.hex[:20],
        organization="organizations/default",
        place=place,
        digest=str(digest),
        media_type="application/vnd.oci.image.manifest.v1+json",
        bento="bentoRepositories/iris/bentos/v1",
        bento_digest="sha256:" + "c" * 64,
        repository="default/iris",
        tag=digest.hex[0],
        platforms=["linux/amd64"],
        size_bytes=1,
        layers=(),
        base="",
        models=(),
        build="b1",
        create_time=MADE,
        use_time=MADE,
    )


async def used(rows: ImageRows, digest: Digest) -> datetime:
    found = await rows.get("organizations/default", digest.hex[:20])
    assert found is not None
    return found.use_time


async def test_a_pull_is_a_use_to_the_hour(database_url: str) -> None:
    async with open_database(database_url) as database:
        await database.migrate("services.builder.migrations")
        async with database.transaction() as connection:
            for each in (image(DIGEST, "here"), image(OTHER, "here"), image(DIGEST, "elsewhere")):
                await put_image(connection, database.dialect, each)
        rows, clock = ImageRows(database, "here"), ManualClock(MADE)
        pulls = Pulls(rows, clock)

        async def pulled(after: timedelta) -> datetime:
            await clock.advance(after.total_seconds())
            pulls.note("default/iris", DIGEST)
            pulls.note("default/nothing", DIGEST)
            await pulls.write()
            return await used(rows, DIGEST)

        assert await pulled(timedelta(minutes=30)) == MADE
        first = await pulled(timedelta(minutes=31))
        assert first == MADE + timedelta(minutes=61)
        assert await pulled(timedelta(minutes=1)) == first
        assert await used(rows, OTHER) == MADE
        assert await used(ImageRows(database, "elsewhere"), DIGEST) == MADE


async def test_what_could_not_be_written_is_written_later(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_database(database_url) as database:
        await database.migrate("services.builder.migrations")
        async with database.transaction() as connection:
            await put_image(connection, database.dialect, image(DIGEST, "here"))
        rows = ImageRows(database, "here")
        pulls = Pulls(rows, ManualClock(MADE + timedelta(days=1)))
        pulls.note("default/iris", DIGEST)

        def away(_database: Database) -> None:
            raise Unavailable("The database is away.", reason="DATABASE_UNAVAILABLE")

        with monkeypatch.context() as patch:
            patch.setattr(Database, "transaction", away)
            await pulls.write()
        assert await used(rows, DIGEST) == MADE
        await pulls.write()
        assert await used(rows, DIGEST) == MADE + timedelta(days=1)


async def test_they_are_written_once_a_minute(database_url: str) -> None:
    async with open_database(database_url) as database:
        await database.migrate("services.builder.migrations")
        async with database.transaction() as connection:
            await put_image(connection, database.dialect, image(DIGEST, "here"))
        rows, clock = ImageRows(database, "here"), ManualClock(MADE + timedelta(days=1))
        pulls = Pulls(rows, clock)
        writing = asyncio.create_task(pulls.run())
        pulls.note("default/iris", DIGEST)
        async with asyncio.timeout(20):
            while await used(rows, DIGEST) == MADE:
                await clock.advance(60)
        writing.cancel()
