"""Transactions, snapshots, errors and migrations on both databases."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from ekiben import errors
from services.kernel import migrations
from services.kernel.db import Database, UtcDateTime, open_database

metadata = sa.MetaData()
things = sa.Table(
    "things",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("count", sa.Integer, nullable=False, server_default="0"),
    sa.Column("create_time", UtcDateTime, nullable=False),
)
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with open_database(database_url) as opened:
        async with opened.transaction() as connection:
            await connection.run_sync(metadata.create_all)
        yield opened


async def _insert(database: Database, name: str) -> None:
    async with database.transaction() as connection:
        await connection.execute(things.insert().values(name=name, create_time=NOW))


async def _names(database: Database) -> list[str]:
    async with database.read() as connection:
        return list((await connection.execute(sa.select(things.c.name).order_by(things.c.name))).scalars())


async def test_a_transaction_commits_or_leaves_nothing(database: Database) -> None:
    await _insert(database, "a")
    with pytest.raises(RuntimeError):
        async with database.transaction() as connection:
            await connection.execute(things.insert().values(name="b", create_time=NOW))
            raise RuntimeError
    assert await _names(database) == ["a"]


async def test_a_cancelled_transaction_leaves_nothing_and_frees_the_next(database: Database) -> None:
    inside = asyncio.Event()

    async def write() -> None:
        async with database.transaction() as connection:
            await connection.execute(things.insert().values(name="b", create_time=NOW))
            inside.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(write())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(_insert(database, "c"), 5)
    assert await _names(database) == ["c"]


async def test_many_read_and_increment_at_once_without_losing_one(database: Database) -> None:
    await _insert(database, "a")
    lock = sa.select(things.c.count).where(things.c.name == "a").with_for_update()

    async def increment() -> None:
        async with database.transaction() as connection:
            count = (await connection.execute(lock)).scalar_one()
            await asyncio.sleep(0)
            await connection.execute(things.update().where(things.c.name == "a").values(count=count + 1))

    async with asyncio.TaskGroup() as group:
        for _ in range(60):
            group.create_task(increment())
            group.create_task(_names(database))
    async with database.read() as connection:
        assert (await connection.execute(sa.select(things.c.count))).scalar_one() == 60


async def test_two_processes_may_write_one_sqlite_file(tmp_path: Path) -> None:
    # Two Database objects share nothing but the file, as two processes would.
    url = f"sqlite:///{tmp_path / 'x.db'}"
    async with open_database(url) as one, open_database(url) as two:
        async with one.transaction() as connection:
            await connection.run_sync(metadata.create_all)
        async with asyncio.TaskGroup() as group:
            for i in range(40):
                group.create_task(_insert(one if i % 2 else two, f"n{i:02}"))
        assert len(await _names(one)) == 40


async def test_a_reader_sees_one_snapshot_while_a_writer_works_and_cannot_write(database: Database) -> None:
    count = sa.select(sa.func.count()).select_from(things)
    async with database.read() as reader:
        assert (await reader.execute(count)).scalar_one() == 0
        await _insert(database, "a")
        assert (await reader.execute(count)).scalar_one() == 0
    async with database.read() as reader:
        assert (await reader.execute(count)).scalar_one() == 1
        with pytest.raises(sa.exc.DBAPIError, match=r"read-?only"):
            await reader.execute(things.delete())
    await _insert(database, "b")  # the connection that read may write again
    assert await _names(database) == ["a", "b"]


async def test_times_come_back_exact_ordered_and_in_utc(database: Database) -> None:
    east = NOW.astimezone(tz=None) + timedelta(microseconds=1)
    async with database.transaction() as connection:
        await connection.execute(
            things.insert(), [{"name": "b", "create_time": east}, {"name": "a", "create_time": NOW}]
        )
    async with database.read() as connection:
        rows = (await connection.execute(sa.select(things).order_by(things.c.create_time))).all()
    assert [(row.name, row.create_time - NOW) for row in rows] == [
        ("a", timedelta(0)),
        ("b", timedelta(microseconds=1)),
    ]
    assert rows[0].create_time.tzinfo is UTC


async def test_a_naive_time_is_refused(database: Database) -> None:
    with pytest.raises(sa.exc.StatementError):
        async with database.transaction() as connection:
            await connection.execute(things.insert().values(name="a", create_time=datetime(2026, 1, 1)))


async def test_constraint_errors_stay_the_stores_to_translate(database: Database) -> None:
    await _insert(database, "a")
    with pytest.raises(sa.exc.IntegrityError):
        await _insert(database, "a")
    assert await _names(database) == ["a"]


async def test_a_database_that_is_away_is_unavailable() -> None:
    async with open_database("postgresql://postgres@/x?host=/tmp/ek-no-such-folder") as database:
        with pytest.raises(errors.Unavailable) as caught:
            await database.ping()
        assert caught.value.reason == "DATABASE_UNAVAILABLE"


async def test_an_error_of_the_callers_own_passes_as_it_is(database: Database) -> None:
    with pytest.raises(ConnectionRefusedError):
        async with database.transaction():
            raise ConnectionRefusedError("of a peer")
    await database.ping()


async def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    async with open_database(f"sqlite:///{tmp_path / 'x.db'}") as database:
        async with database.transaction() as connection:
            await connection.run_sync(metadata.create_all)
            await connection.exec_driver_sql("PRAGMA max_page_count = 8")
        with pytest.raises(errors.ResourceExhausted) as caught:
            for i in range(100):
                await _insert(database, f"{i}" * 1000)
        assert caught.value.reason == "DISK_FULL"
        assert await _names(database)


@pytest.mark.parametrize("url", ["mysql://x/y", "sqlite://", "sqlite:///:memory:"])
async def test_another_kind_of_database_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        async with open_database(url):
            pass


ENV = "from services.kernel.migrations import run\nimport sqlalchemy as sa\nrun(sa.MetaData())\n"
FIRST = """
import sqlalchemy as sa
from alembic import op
from services.kernel.db import UtcDateTime

revision = "0001"
down_revision = None

def upgrade() -> None:
    op.create_table(
        "things",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("create_time", UtcDateTime, nullable=False),
    )
"""
SECOND = """
import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"

def upgrade() -> None:
    with op.batch_alter_table("things") as batch:
        batch.add_column(sa.Column("count", sa.Integer, nullable=False, server_default="0"))
"""
BROKEN = """
from alembic import op

revision = "0003"
down_revision = "0002"

def upgrade() -> None:
    op.execute("CREATE TABLE half (x INTEGER)")
    raise RuntimeError("in the middle")
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A service's migrations package of one revision, importable as `<name>.migrations`."""
    name = f"svc_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / "src" / name / "migrations"
    (folder / "versions").mkdir(parents=True)
    for path in (folder, folder.parent):
        (path / "__init__.py").write_text('"""For the test."""\n')
    (folder / "env.py").write_text(ENV)
    (folder / "versions" / "0001_first.py").write_text(FIRST)
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    return f"{name}.migrations"


def _versions(package: str) -> Path:
    module = sys.modules[package.partition(".")[0]]
    assert module.__file__ is not None
    return Path(module.__file__).parent / "migrations" / "versions"


async def test_migrations_bring_an_empty_database_to_the_tables_of_the_store(database_url: str, package: str) -> None:
    async with open_database(database_url) as database:
        await database.migrate(package)
        assert await database.schema_differences(package, metadata) != []
        (_versions(package) / "0002_count.py").write_text(SECOND)
        await database.migrate(package)
        assert await database.schema_differences(package, metadata) == []
        await _insert(database, "a")
        await database.migrate(package)
        assert await _names(database) == ["a"]


async def test_services_that_start_together_migrate_once(database_url: str, package: str) -> None:
    async with open_database(database_url) as one, open_database(database_url) as two:
        await asyncio.gather(*(database.migrate(package) for database in (one, two, one, two)))
        async with one.read() as connection:
            table = migrations.version_table(package)
            assert (await connection.execute(sa.text(f"SELECT version_num FROM {table}"))).scalars().all() == ["0001"]


async def test_a_migration_that_fails_leaves_the_database_as_it_was(database_url: str, package: str) -> None:
    async with open_database(database_url) as database:
        await database.migrate(package)
        (_versions(package) / "0002_count.py").write_text(SECOND)
        (_versions(package) / "0003_broken.py").write_text(BROKEN)
        with pytest.raises(RuntimeError, match="in the middle"):
            await database.migrate(package)
        async with database.read() as connection:
            columns = await connection.run_sync(
                lambda c: {column["name"] for column in sa.inspect(c).get_columns("things")}
            )
            assert columns == {"name", "create_time"}
            assert not await connection.run_sync(lambda c: sa.inspect(c).has_table("half"))


async def test_a_database_at_head_is_left_alone_quickly(tmp_path: Path, package: str) -> None:
    async with open_database(f"sqlite:///{tmp_path / 'x.db'}") as database:
        await database.migrate(package)
        before = time.perf_counter()
        await database.migrate(package)
        assert time.perf_counter() - before < 0.1


async def test_the_database_of_a_newer_release_is_refused_and_left_as_it_is(database_url: str, package: str) -> None:
    async with open_database(database_url) as database:
        await database.migrate(package)
        async with database.transaction() as connection:
            await connection.execute(sa.text(f"UPDATE {migrations.version_table(package)} SET version_num = '0099'"))
        with pytest.raises(errors.FailedPrecondition, match=r"newer release.* revision 0099") as caught:
            await database.migrate(package)
        assert caught.value.reason == "DATABASE_NEWER"
        async with database.read() as connection:
            assert await connection.run_sync(migrations.current, migrations.version_table(package)) == "0099"


@pytest.mark.parametrize("whole", [True, False])
async def test_a_damaged_file_is_named(tmp_path: Path, package: str, whole: bool) -> None:
    file = tmp_path / "x.db"
    async with open_database(f"sqlite:///{file}") as database:
        await database.migrate(package)
    kept = file.read_bytes()
    file.write_bytes(b"nonsense" * 1000 if whole else kept[:100] + b"\xff" * (len(kept) - 100))
    async with open_database(f"sqlite:///{file}") as database:
        with pytest.raises(errors.DataLoss, match=r"x\.db is damaged") as caught:
            await database.migrate(package)
    assert caught.value.reason == "DATABASE_DAMAGED"


def test_a_history_with_two_ends_is_refused(tmp_path: Path) -> None:
    (tmp_path / "versions").mkdir()
    (tmp_path / "versions" / "a.py").write_text('revision = "a"\ndown_revision = None\n')
    (tmp_path / "versions" / "b.py").write_text("revision = 'b'\ndown_revision = None\n")
    with pytest.raises(ValueError, match="2 newest"):
        migrations.head_of(tmp_path)
