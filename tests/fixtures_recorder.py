"""What the recorder's tests share: databases of both kinds, and predictions and spans to record."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.kernel.db import Database, open_database
from services.recorder.domain import Payload, Prediction, Span

NOW_US = 1_767_225_600_000_000
"""2026-01-01T00:00:00Z."""


@pytest.fixture(scope="session")
def recorder_postgres() -> Iterator[str]:
    """URL of a private PostgreSQL server; skips where none is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        pytest.skip("PostgreSQL is not installed")
    folder = Path(tempfile.mkdtemp(prefix="ekiben-pg-", dir="/tmp"))
    prefix: list[str] = []
    if os.getuid() == 0:  # initdb and postgres refuse root
        shutil.chown(folder, "postgres")
        prefix = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"]
    run = lambda *command: subprocess.run([*prefix, *map(str, command)], check=True, capture_output=True, cwd=folder)  # noqa: E731
    run(found[-1] / "initdb", "-D", folder / "data", "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync")
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
    run(found[-1] / "pg_ctl", "-D", folder / "data", "-w", "-l", folder / "log", "-o", options, "start")
    try:
        yield f"postgresql+asyncpg://postgres@/postgres?host={folder}"
    finally:
        run(found[-1] / "pg_ctl", "-D", folder / "data", "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
async def recorder_database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    """An empty migrated database of each kind."""
    url = f"sqlite+aiosqlite:///{tmp_path}/recorder.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("recorder_postgres")
    async with open_database(url) as database:
        if request.param == "postgresql":
            async with database.transaction() as connection:
                await connection.exec_driver_sql("DROP SCHEMA public CASCADE")
                await connection.exec_driver_sql("CREATE SCHEMA public")
        await database.migrate("services.recorder.migrations")
        yield database


def prediction(number: int = 0, **changes: Any) -> Prediction:
    """A prediction; `number` gives it a name and a start, a second later each."""
    values: dict[str, Any] = {
        "id": f"p{number}",
        "organization": "default",
        "deployment": "deployments/iris",
        "start_time_us": NOW_US + number * 1_000_000,
        "latency_us": 1500,
        "status": 200,
        "trace_id": f"{number + 1:032x}",
        "revision": "deployments/iris/revisions/1",
        "models": ("modelRepositories/iris/models/v1",),
        "method": "POST",
        "path": "/predict",
        "request": Payload({"content-type": "application/json"}, b'{"x": 1}', 8, False, "application/json"),
        "response": Payload({}, b"\x00\xff", 2, False, "application/octet-stream"),
    }
    return Prediction(**{**values, **changes})


def span(number: int, parent: int = 0, *, trace: int = 1, start_ms: int | None = None, **changes: Any) -> Span:
    """A span of trace `trace` that starts `start_ms` (default: its number) milliseconds in, and lasts 10 ms."""
    start_ns = NOW_US * 1000 + (number if start_ms is None else start_ms) * 1_000_000
    values: dict[str, Any] = {
        "organization": "default",
        "trace_id": f"{trace:032x}",
        "span_id": f"{number:016x}",
        "parent_span_id": f"{parent:016x}" if parent else "",
        "service": "gateway",
        "display_name": f"span {number}",
        "kind": "INTERNAL",
        "start_ns": start_ns,
        "end_ns": start_ns + 10_000_000,
    }
    return Span(**{**values, **changes})
