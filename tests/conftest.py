"""Fixtures that several parts of the suite use: databases and stores of both kinds, a clock that tests move."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.kernel.clock import ManualClock
from tests.s3 import MISSING, S3Server, run_s3, versitygw

_POSTGRES_BIN = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))


def _as_postgres(*command: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run a program of PostgreSQL's, which refuses root, as the user `postgres` where we are root."""
    drop = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"] if os.getuid() == 0 else []
    return subprocess.run([*drop, *command], check=check, capture_output=True, text=True, timeout=60, cwd="/tmp")


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a real PostgreSQL server of this session's own, without a database name: `postgresql://…?host=…`.

    It listens on a Unix socket in a folder with a short name, so there is no port to clash.
    """
    if not _POSTGRES_BIN or shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL's server programs are not installed (Debian: apt-get install postgresql)")
    programs = _POSTGRES_BIN[-1]
    folder = Path(tempfile.mkdtemp(prefix="ekpg-", dir="/tmp"))
    try:
        if os.getuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        folder.chmod(0o755)
        data = folder / "data"
        _as_postgres(f"{programs}/initdb", "-D", f"{data}", "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off -c max_connections=200"
        pg_ctl = (f"{programs}/pg_ctl", "-D", f"{data}")
        _as_postgres(*pg_ctl, "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql://postgres@/{{}}?host={folder}"
        finally:
            _as_postgres(*pg_ctl, "-m", "immediate", "stop", check=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def _fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: SQLite waits for the disk at each commit, which no ordinary test needs."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="ek-", dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """URL of an empty database, once of each kind."""
    if request.param == "sqlite":
        folder = request.getfixturevalue("_fast_folder")
        return f"sqlite:///{folder / 'test.db'}"
    url: str = request.getfixturevalue("postgres")
    name = f"test_{os.urandom(6).hex()}"
    host = url.rpartition("host=")[2]
    _as_postgres(f"{_POSTGRES_BIN[-1]}/createdb", "-h", host, "-U", "postgres", name)
    return url.format(name)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """A real S3 server of this session's own, with credentials for it in the environment; see tests/s3.py."""
    if versitygw() is None:
        pytest.skip(MISSING)
    with run_s3() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(params=["files", "s3"])
def blobs_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty store of blobs, once of each kind."""
    if request.param == "files":
        return f"file://{tmp_path}/blobs"
    server: S3Server = request.getfixturevalue("s3")
    return server.new_url()


@pytest.fixture
def manual_clock() -> ManualClock:
    """A clock that stands still until the test moves it."""
    return ManualClock()
