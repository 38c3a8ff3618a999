"""A PostgreSQL server of a test's own, which may be restarted, frozen, killed, filled or asked for passwords.

Debian's programs on a private folder and a Unix socket: what operators run, and no port to clash.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))


def as_postgres(*command: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run a program of PostgreSQL's, which refuses root, as the user `postgres` where we are root."""
    drop = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"] if os.getuid() == 0 else []
    return subprocess.run([*drop, *command], check=check, capture_output=True, text=True, timeout=60, cwd="/tmp")


@dataclass
class PostgresServer:
    """One server. `folder` has a short name: its socket lies there."""

    programs: Path
    folder: Path
    options: str
    port: int = 5432
    """Names the socket; with `tcp` it is listened on too."""

    @property
    def data(self) -> Path:
        """The cluster's files."""
        return self.folder / "data"

    def url(self, database: str = "postgres", user: str = "postgres") -> str:
        """A database of it, by its socket."""
        return f"postgresql://{user}@/{database}?host={self.folder}" + (
            f"&port={self.port}" if self.port != 5432 else ""
        )

    def create(self, database: str) -> str:
        """Make an empty database; its URL."""
        as_postgres(f"{self.programs}/createdb", *self._there, database)
        return self.url(database)

    def psql(self, statement: str, database: str = "postgres") -> str:
        """Run one statement as the superuser; what it printed, without decoration."""
        done = as_postgres(f"{self.programs}/psql", *self._there, "-d", database, "-tAqc", statement)
        return done.stdout.strip()

    @property
    def _there(self) -> list[str]:
        return ["-h", f"{self.folder}", "-p", str(self.port), "-U", "postgres"]

    def start(self) -> None:
        """Start, and return once it takes connections."""
        self._control("-w", "-l", f"{self.folder}/log", "-o", self.options, "start")

    def stop(self, mode: str = "immediate") -> None:
        """`fast` ends every connection with a word, `immediate` as a crash does."""
        self._control("-m", mode, "stop")

    def restart(self, mode: str = "immediate") -> None:
        """Stop and start."""
        self.stop(mode)
        self.start()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Every process of it stopped: connections hang, and nobody says why."""
        main = int((self.data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
        pids = [main, *map(int, children)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _control(self, *arguments: str) -> None:
        as_postgres(f"{self.programs}/pg_ctl", "-D", f"{self.data}", *arguments)


@contextlib.contextmanager
def running_postgres(options: str = "", *, port: int = 0, fsync: bool = False) -> Iterator[PostgresServer]:
    """A server for the length of a block, on TCP too where a port is given; skipped where PostgreSQL is not installed."""
    if not _PROGRAMS or shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL's server programs are not installed (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="ekpg-", dir="/tmp"))
    listen = f"127.0.0.1 -c port={port}" if port else "''"
    given = f"-c listen_addresses={listen} -c unix_socket_directories={folder} -c max_connections=200 {options}"
    server = PostgresServer(_PROGRAMS[-1], folder, given if fsync else f"{given} -c fsync=off", port or 5432)
    try:
        if os.getuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        folder.chmod(0o755)
        make = f"{server.programs}/initdb"
        as_postgres(make, "-D", f"{server.data}", "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync")
        server.start()
        try:
            yield server
        finally:
            with contextlib.suppress(subprocess.CalledProcessError):
                server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
