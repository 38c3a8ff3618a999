"""PostgreSQL that is restarted in the middle of things, hangs, fills up: what was promised is kept, the rest is told."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from ekiben.errors import Aborted, EkibenError, ResourceExhausted, Unavailable
from services.kernel.app import Component, Readiness
from services.kernel.db import AsyncConnection, Database, open_database
from services.kernel.server import Health
from tests.fixtures_kernel import until
from tests.postgres import PostgresServer, running_postgres

metadata = sa.MetaData()
things = sa.Table("things", metadata, sa.Column("name", sa.String, primary_key=True), sa.Column("body", sa.Text))


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server to hurt, which keeps what it acknowledged."""
    with running_postgres(fsync=True) as running:
        yield running


@pytest.fixture
async def database(server: PostgresServer) -> AsyncIterator[Database]:
    async with open_database(server.create(f"t{os.urandom(6).hex()}")) as opened:
        async with opened.transaction() as connection:
            await connection.run_sync(metadata.create_all)
        yield opened


async def _insert(database: Database, name: str) -> None:
    async with database.transaction() as connection:
        await connection.execute(things.insert().values(name=name, body=""))


async def _names(database: Database) -> set[str]:
    async with database.read() as connection:
        return set((await connection.execute(sa.select(things.c.name))).scalars())


async def test_a_restart_loses_nothing_that_was_promised_and_makes_nothing_that_was_refused(
    server: PostgresServer, database: Database
) -> None:
    kept, refused, unknown = set(), set(), set()
    stopped = asyncio.Event()

    async def write(writer: int) -> None:
        number = 0
        while not stopped.is_set():
            name = f"{writer}-{number}"
            number += 1
            try:
                await _insert(database, name)
                kept.add(name)
            except Unavailable as exc:
                assert exc.reason == "DATABASE_UNAVAILABLE"
                refused.add(name)
                await asyncio.sleep(0.02)
            except Aborted as exc:
                assert exc.reason == "COMMIT_UNKNOWN"
                unknown.add(name)

    async with asyncio.TaskGroup() as group:
        for writer in range(6):
            group.create_task(write(writer))
        for mode in ("immediate", "fast"):
            before = len(kept)
            await until(lambda: len(kept) > before + 20, "writers write", 30)
            await asyncio.to_thread(server.restart, mode)
        before = len(kept)
        await until(lambda: len(kept) > before + 20, "writers write again", 30)
        stopped.set()
    found = await _names(database)
    assert kept <= found
    assert not refused & found
    assert found <= kept | unknown


async def test_a_transaction_that_is_cut_off_is_told_and_the_next_one_works(
    server: PostgresServer, database: Database
) -> None:
    with pytest.raises(Unavailable) as caught:
        async with database.transaction() as connection:
            await connection.execute(things.insert().values(name="a", body=""))
            await asyncio.to_thread(server.restart)
            await connection.execute(things.insert().values(name="b", body=""))
    assert caught.value.reason == "DATABASE_UNAVAILABLE"
    await _insert(database, "c")
    assert await _names(database) == {"c"}


async def test_a_commit_that_is_cut_off_is_told_as_unknown(server: PostgresServer, database: Database) -> None:
    async with database.transaction() as connection:
        for statement in (
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(60); RETURN NULL; END'",
            "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON things DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION slow()",
        ):
            await connection.exec_driver_sql(statement)
    writing = asyncio.create_task(_insert(database, "a"))
    committing = "SELECT pid FROM pg_stat_activity WHERE query ILIKE 'COMMIT%' AND wait_event = 'PgSleep'"
    pid = await until(lambda: server.psql(committing), "it commits")
    server.psql(f"SELECT pg_terminate_backend({pid})")
    with pytest.raises(Aborted) as caught:
        await writing
    assert caught.value.reason == "COMMIT_UNKNOWN"
    assert await _names(database) == set()


async def test_a_server_that_hangs_is_told_by_readiness_and_is_forgiven(
    server: PostgresServer, database: Database
) -> None:
    await database.ping()
    component = Component("registry", ready=database.ping)
    readiness = Readiness([component], Health({"registry": []}))
    with server.frozen():
        said = await asyncio.wait_for(readiness._reason(component), 20)
        assert said, "not ready"
    await until(lambda: _answers(readiness, component), "it is ready again", 30)


async def _answers(readiness: Readiness, component: Component) -> bool:
    return not await readiness._reason(component)


@pytest.fixture
def small_space(server: PostgresServer) -> Iterator[Path]:
    """A file system of 24 MiB that the server may put tables on."""
    folder = server.folder / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        (folder / "space").mkdir(mode=0o700)
        shutil.chown(folder / "space", "postgres", "postgres")
        server.psql(f"CREATE TABLESPACE small LOCATION '{folder}/space'")
        server.psql("CREATE DATABASE crowded TABLESPACE small")
        yield folder
        server.psql("DROP DATABASE crowded")
        server.psql("DROP TABLESPACE small")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


async def test_a_full_disk_is_told_and_room_is_all_that_it_takes(server: PostgresServer, small_space: Path) -> None:
    async with open_database(server.url("crowded")) as database:
        async with database.transaction() as connection:
            await connection.run_sync(metadata.create_all)
        filler = small_space / "filler"
        free = os.statvfs(small_space)
        filler.write_bytes(bytes(free.f_bavail * free.f_frsize - (256 << 10)))
        kept: set[str] = set()
        with pytest.raises(ResourceExhausted) as caught:
            for number in range(200):
                async with database.transaction() as connection:
                    body = os.urandom(6000).hex()
                    await connection.execute(things.insert().values(name=str(number), body=body))
                kept.add(str(number))
        assert caught.value.reason == "DISK_FULL"
        assert await _names(database) == kept
        filler.unlink()
        await _insert(database, "more")
        assert await _names(database) == kept | {"more"}


async def test_whoever_lost_a_deadlock_comes_after_the_other(database: Database) -> None:
    both = asyncio.Barrier(2)
    begun = []
    for name in ("a", "b"):
        await _insert(database, name)

    async def write(first: str, second: str) -> None:
        async def work(connection: AsyncConnection) -> None:
            begun.append(first)
            for name in (first, second):
                appended = things.update().where(things.c.name == name).values(body=things.c.body + first)
                await connection.execute(appended)
                if name == first and len(begun) <= 2:
                    await both.wait()

        await database.attempt(work)

    await asyncio.gather(write("a", "b"), write("b", "a"))
    assert len(begun) == 3
    async with database.read() as connection:
        bodies = (await connection.execute(sa.select(things.c.body))).scalars().all()
    assert [sorted(body) for body in bodies] == [["a", "b"]] * 2


async def test_a_transaction_that_is_always_lost_is_an_error_in_the_end(database: Database) -> None:
    begun = []

    async def work(connection: AsyncConnection) -> None:
        begun.append(1)
        await connection.execute(sa.text("DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '40001'; END $$"))

    with pytest.raises(Aborted, match="Another transaction"):
        await database.attempt(work)
    assert len(begun) == 6


async def test_a_server_that_became_a_standby_takes_no_changes_and_is_read_meanwhile(
    server: PostgresServer, database: Database
) -> None:
    name = database.shown.partition("?")[0].rpartition("/")[2]
    await _insert(database, "a")
    server.psql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    server.psql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    with pytest.raises(Unavailable, match="standby"):
        await _insert(database, "b")
    assert await _names(database) == {"a"}
    server.psql(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    server.psql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    await _insert(database, "c")


async def test_tables_that_change_under_a_prepared_statement_are_read_again(database: Database) -> None:
    await _insert(database, "a")
    for _ in range(3):
        assert await _names(database) == {"a"}
    async with database.transaction() as connection:
        await connection.exec_driver_sql("ALTER TABLE things ALTER COLUMN name TYPE text")
    for _ in range(3):
        try:
            assert await _names(database) == {"a"}
        except Aborted as exc:
            assert exc.reason == "TRANSACTION_LOST"
    assert await _names(database) == {"a"}


async def test_no_connection_left_is_a_database_that_does_not_answer(
    server: PostgresServer, database: Database
) -> None:
    server.psql("CREATE ROLE few LOGIN CONNECTION LIMIT 1")
    name = database.shown.partition("?")[0].rpartition("/")[2]
    async with open_database(server.url(name, "few")) as other, other.read() as connection:
        await connection.execute(sa.text("SELECT 1"))
        with pytest.raises(EkibenError) as caught:
            await other.ping()
        assert caught.value.reason == "DATABASE_UNAVAILABLE"
    server.psql("DROP ROLE few")
