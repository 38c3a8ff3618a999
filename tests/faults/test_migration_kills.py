"""Migrations that are killed in the middle, or started twice, leave tables of one revision or of the other."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

from services.kernel.db import open_database
from services.kernel.migrations import history_of
from services.registry.store.tables import metadata
from tests.platform import ROOT, wait_for

FIRST = """
import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

def upgrade() -> None:
    op.create_table("things", sa.Column("name", sa.String, primary_key=True))
    op.execute("INSERT INTO things VALUES ('a')")
"""
SECOND = """
import os, pathlib, time
import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

def upgrade() -> None:
    with op.batch_alter_table("things") as batch:
        batch.add_column(sa.Column("size", sa.Integer, nullable=False, server_default="7"))
    op.create_table("more", sa.Column("name", sa.String, primary_key=True))
    if "STOP" in os.environ:
        pathlib.Path(os.environ["STOP"]).write_text("in the middle")
        while True:
            time.sleep(1)
    op.execute("INSERT INTO more SELECT name FROM things")
"""
PROGRAM = """
import asyncio, os, pathlib, sys
from services.kernel.db import open_database

async def main() -> None:
    async with open_database(sys.argv[1]) as database:
        pathlib.Path(sys.argv[2], str(os.getpid())).touch()
        await database.migrate("killed.migrations")

asyncio.run(main())
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A service's package with one revision; `_second` adds the other."""
    versions = tmp_path / "src" / "killed" / "migrations" / "versions"
    versions.mkdir(parents=True)
    for folder in (versions.parent, versions.parent.parent):
        (folder / "__init__.py").write_text('"""For the test."""\n')
    (versions.parent / "env.py").write_text(
        "import sqlalchemy as sa\nfrom services.kernel.migrations import run\nrun(sa.MetaData())\n"
    )
    (versions / "0001_first.py").write_text(FIRST)
    return tmp_path / "src"


def _second(source: Path) -> None:
    (source / "killed" / "migrations" / "versions" / "0002_second.py").write_text(SECOND)


def _start(url: str, source: Path, **env: str) -> "subprocess.Popen[bytes]":
    """A process that brings the tables up to date, and ends."""
    env = os.environ | {"PYTHONPATH": f"{source}:{ROOT}"} | env
    return subprocess.Popen([sys.executable, "-c", PROGRAM, url, str(source.parent)], env=env)


@contextmanager
def _ended(*processes: "subprocess.Popen[bytes]") -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def _state(url: str) -> tuple[list[str], list[str]]:
    """The revision, and what is in the tables of it."""
    async with open_database(url) as database, database.read() as connection:
        revision = (await connection.execute(sa.text("SELECT version_num FROM alembic_version_killed"))).scalars().all()
        tables = await connection.run_sync(lambda c: sorted(sa.inspect(c).get_table_names()))
        rows = [tuple(row) for row in await connection.execute(sa.text("SELECT * FROM things"))]
        return list(revision), [*(table for table in tables if table != "alembic_version_killed"), *map(str, rows)]


async def test_a_migration_killed_in_its_middle_is_not_there_and_the_next_start_makes_it(
    database_url: str, source: Path, tmp_path: Path
) -> None:
    with _ended(first := _start(database_url, source)):
        assert first.wait(60) == 0
    before = await _state(database_url)
    assert before == (["0001"], ["things", "('a',)"])
    _second(source)
    marker = tmp_path / "marker"
    with _ended(killed := _start(database_url, source, STOP=str(marker))):
        await asyncio.to_thread(wait_for, "the middle of the migration", marker.exists, 60)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert await _state(database_url) == before
    with _ended(again := _start(database_url, source)):
        assert again.wait(60) == 0
    assert await _state(database_url) == (["0002"], ["more", "things", "('a', 7)"])


async def test_who_starts_during_a_migration_waits_and_goes_on_when_it_is_killed(
    database_url: str, source: Path, tmp_path: Path
) -> None:
    _second(source)
    marker = tmp_path / "marker"
    with _ended(first := _start(database_url, source, STOP=str(marker))):
        await asyncio.to_thread(wait_for, "the middle of the migration", marker.exists, 60)
        with _ended(*(waiting := [_start(database_url, source) for _ in range(2)])):
            for process in waiting:
                await asyncio.to_thread(wait_for, "it began", (tmp_path / str(process.pid)).exists, 60)
            assert [process.poll() for process in waiting] == [None, None]
            first.kill()
            assert [process.wait(60) for process in waiting] == [0, 0]
    assert await _state(database_url) == (["0002"], ["more", "things", "('a', 7)"])


SERVICES = {name: f"services.{name}.migrations" for name in ("registry", "builder", "deployer", "recorder")}
DIGEST = f"sha256:{1:064x}"
# What a registry of the first schema holds after one push, as the columns were then.
FIRST_ROWS = (
    "INSERT INTO organizations VALUES ('default', 'o-1', '', 1)",
    "INSERT INTO users VALUES ('default', 'ann', 'u-1', 'a@b', '', '', 40, false, 1, 1, 1)",
    "INSERT INTO repositories (organization, kind, repository, uid, description, labels, creator, updater, create_time,"
    " update_time, revision) VALUES ('default', 'model', 'iris', 'r-1', '', '{\"a\":\"b\"}', 'users/ann', 'users/ann', 1, 1, 1)",
    "INSERT INTO versions (repository_id, organization, kind, repository, version, uid, description, labels, creator,"
    " updater, create_time, update_time, revision, manifest, module, bentoml_version, development, models, state, digest,"
    " size_bytes, failure) VALUES (1, 'default', 'model', 'iris', 'v1', 'v-1', 'about', '{\"team\":\"x\"}', 'users/ann',"
    " 'users/ann', 2, 2, 1, '{}', 'sklearn', '1.4', false, '[]', 'READY', 'DIGEST', 12, '')",
    "INSERT INTO labels VALUES ('model', 1, 'team', 'x')",
    "INSERT INTO blobs VALUES ('DIGEST', 'STORED', 3)",
    "INSERT INTO uploads VALUES ('u1', 'default', 1, 'modelRepositories/iris/models/v1', '', NULL, 'COMPLETED', '',"
    " 'users/ann', 1, 2)",
)


@pytest.mark.parametrize("service", SERVICES)
async def test_each_revision_leads_to_the_newest_tables(database_url: str, service: str) -> None:
    package = SERVICES[service]
    head, known = history_of(ROOT / "services" / service / "migrations")
    async with open_database(database_url) as database:
        for revision in sorted(known):
            async with database.transaction() as connection:
                await database.upgrade(connection, package, revision)
            if service == "registry" and revision == "0001":
                async with database.transaction() as connection:
                    for statement in FIRST_ROWS:
                        await connection.exec_driver_sql(statement.replace("DIGEST", DIGEST))
        assert (await database.revision(package))[0] == head
        if service == "registry":
            assert await database.schema_differences(package, metadata) == []
            async with database.read() as connection:
                row = (
                    await connection.execute(sa.text("SELECT repository, version, digest, labels FROM versions"))
                ).one()
                assert tuple(row) == ("iris", "v1", DIGEST, '{"team":"x"}')
