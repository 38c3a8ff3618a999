"""What the recorder's tests share: databases of both kinds, and predictions and spans to record."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import grpc.aio
import pytest

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.channel import open_channel
from ekiben.recorder.v1.recorder_pb2_grpc import (
    PredictionsStub,
    TracesStub,
)
from services.kernel.app import serve
from services.kernel.clock import SYSTEM, Clock
from services.kernel.db import Database, open_database
from services.kernel.identity import AuditRecord, Principal
from services.kernel.peers import Peers
from services.kernel.settings import ServerSettings
from services.recorder.app import open_recorder
from services.recorder.domain import Payload, Prediction, Span
from services.recorder.settings import Settings

if TYPE_CHECKING:
    from ekiben.recorder.v1.recorder_pb2_grpc import PredictionsAsyncStub, TracesAsyncStub

NOW_US = 1_767_225_600_000_000
"""2026-01-01T00:00:00Z."""


@pytest.fixture
async def recorder_database(database_url: str) -> AsyncIterator[Database]:
    """An empty migrated database of each kind."""
    async with open_database(database_url) as database:
        await database.migrate("services.recorder.migrations")
        yield database


def free_port() -> int:
    """A TCP port of the loopback that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Viewers:
    """Takes every token as a viewer's; `other-…` as one of another organization."""

    async def authenticate(self, token: str) -> Principal:
        organization = "other" if token.startswith("ekb_other") else "default"
        return Principal("users/somebody", f"organizations/{organization}", Role.ROLE_VIEWER)


class NoAudit:
    """Writes nothing down."""

    async def record(self, entry: AuditRecord) -> None:
        pass


@dataclass
class Recorder:
    """A recorder that runs in this process, behind real gRPC on a Unix socket."""

    address: str
    otlp_http: str
    otlp_token: str
    service: grpc.aio.Channel
    viewer: grpc.aio.Channel

    @property
    def recording(self) -> "PredictionsAsyncStub":
        """The prediction log, as a service of the suite."""
        return PredictionsStub(self.service)

    @property
    def predictions(self) -> "PredictionsAsyncStub":
        """The prediction log, as a viewer."""
        return PredictionsStub(self.viewer)

    @property
    def traces(self) -> "TracesAsyncStub":
        """The traces, as a viewer."""
        return TracesStub(self.viewer)


@asynccontextmanager
async def running_recorder(folder: Path, clock: Clock = SYSTEM, **settings: Any) -> AsyncIterator[Recorder]:
    """A recorder with its data in `folder`; `settings` replace those of its Settings."""
    token_file, otlp_token_file = folder / "service-token", folder / "otlp-token"
    token_file.write_text("eks_test")
    values = {
        "database_url": f"sqlite:///{folder}/recorder.db",
        "otlp_token_file": otlp_token_file,
        "min_free_bytes": 0,
    }
    with tempfile.TemporaryDirectory(prefix="ekr-", dir="/tmp") as run_dir:
        values["otlp_http_listen"] = f"127.0.0.1:{free_port()}"
        values |= settings
        component = open_recorder(Settings(**values), cast("Peers", None), clock=clock)
        server = ServerSettings(listen=f"unix:{run_dir}/grpc", service_token_file=token_file, grace_s=1)
        stop, started = asyncio.Event(), asyncio.Event()

        async def note() -> None:
            started.set()

        task = asyncio.create_task(
            serve([component], server, stop=stop, started=note, authenticator=Viewers(), auditor=NoAudit())
        )
        waiting = asyncio.create_task(started.wait())
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if task.done():
            task.result()
        try:
            async with (
                open_channel(server.listen, token="eks_test") as service,
                open_channel(server.listen, token="ekb_viewer") as viewer,
            ):
                http = f"http://{values['otlp_http_listen']}"
                yield Recorder(server.listen, http, otlp_token_file.read_text().strip(), service, viewer)
        finally:
            stop.set()
            await task


@pytest.fixture
async def recorder(tmp_path: Path) -> AsyncIterator[Recorder]:
    """A recorder on SQLite."""
    async with running_recorder(tmp_path) as running:
        yield running


class Process:
    """`python -m services.recorder` with its data in `folder`."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self.address = f"unix:{run_dir}/grpc"
        token_file = run_dir / "service-token"
        token_file.write_text("eks_test")
        self._log = run_dir / "log"
        self._env = {
            **os.environ,
            "EKIBEN_RECORDER_DATABASE_URL": f"sqlite:///{folder}/recorder.db",
            "EKIBEN_RECORDER_MIN_FREE_BYTES": "0",
            "EKIBEN_SERVER_LISTEN": self.address,
            "EKIBEN_SERVER_SERVICE_TOKEN_FILE": str(token_file),
            "EKIBEN_PEERS_SERVICE_TOKEN_FILE": str(token_file),
            "EKIBEN_PEERS_REGISTRY": f"unix:{run_dir}/nobody",
            "EKIBEN_SERVER_OTLP_ENDPOINT": self.address,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it may not listen yet."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([sys.executable, "-m", "services.recorder"], env=self._env, stderr=log)

    def end(self, how: signal.Signals = signal.SIGKILL) -> int:
        """Send it a signal and wait for its end; its exit code."""
        if self._process is None:
            return 0
        self._process.send_signal(how)
        code = self._process.wait(30)
        self._process = None
        return code

    @asynccontextmanager
    async def predictions(self) -> AsyncIterator["PredictionsStub"]:
        """A stub, as a service of the suite; calls wait for the process to listen."""
        async with open_channel(self.address, token="eks_test", wait_for_ready=True, timeout_s=30) as channel:
            yield PredictionsStub(channel)


@pytest.fixture
def recorder_process(tmp_path: Path) -> Iterator[Process]:
    """A recorder as a process of its own, not started yet; killed at the end."""
    with tempfile.TemporaryDirectory(prefix="ekr-", dir="/tmp") as run_dir:
        process = Process(tmp_path, Path(run_dir))
        yield process
        process.end()


def prediction(number: int = 0, **changes: Any) -> Prediction:
    """A prediction; `number` gives it a name and a start, a second later each."""
    values: dict[str, Any] = {
        "id": f"p{number}",
        "organization": "default",
        "deployment": "deployments/iris",
        "start_time_us": NOW_US + number * 1_000_000,
        "latency_us": 1500,
        "first_byte_us": 1200,
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


async def eventually(holds: Callable[[], Awaitable[bool]], *, within_s: float = 10) -> None:
    """Wait until `holds` gives true; TimeoutError when it does not in time."""
    async with asyncio.timeout(within_s):
        while not await holds():  # noqa: ASYNC110 - what is waited for happens behind a socket
            await asyncio.sleep(0.02)
