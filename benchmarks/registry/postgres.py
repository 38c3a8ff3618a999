"""A PostgreSQL server as an operator runs one: durable, in a folder that may be kept for the next run."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


def _as_postgres(*command: str | Path) -> None:
    """Run one of PostgreSQL's programs, which refuse root."""
    drop = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"] if os.getuid() == 0 else []
    subprocess.run([*drop, *command], check=True, stdout=subprocess.DEVNULL, cwd="/")


@contextlib.contextmanager
def postgres_server(data: Path) -> Iterator[tuple[str, int]]:
    """Folder of its socket, and its process id. `data` is made when missing, and is for PostgreSQL's user alone."""
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    run = Path(tempfile.mkdtemp(prefix="ekbench-", dir="/tmp"))
    run.chmod(0o755)
    if not data.exists():
        data.mkdir(parents=True)
        if os.getuid() == 0:
            shutil.chown(data, "postgres", "postgres")
        _as_postgres(programs / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8")
    if os.getuid() == 0:
        shutil.chown(run, "postgres", "postgres")
    options = (
        f"-c listen_addresses='' -c unix_socket_directories={run} -c shared_buffers=1GB -c max_wal_size=8GB "
        "-c maintenance_work_mem=512MB -c checkpoint_timeout=30min"
    )
    _as_postgres(programs / "pg_ctl", "-D", data, "-w", "-l", run / "log", "-o", options, "start")
    try:
        yield str(run), int((data / "postmaster.pid").read_text().split()[0])
    finally:
        _as_postgres(programs / "pg_ctl", "-D", data, "-m", "fast", "-w", "stop")
        shutil.rmtree(run, ignore_errors=True)
