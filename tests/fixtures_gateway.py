"""A real Envoy programmed by the gateway's own code, a route table that the test writes, and stand-ins for replicas."""

import asyncio
import contextlib
import hashlib
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from ekiben.deployer.v1 import deployer_pb2 as pb
from services.gateway import listeners, messages
from services.gateway.envoy import Envoy, capture_module
from services.gateway.settings import Settings
from services.gateway.watcher import Watcher
from services.gateway.xds import Files
from services.kernel.clock import SYSTEM


class Call:
    """A stream of route tables, as the deployer gives it."""

    def __init__(self, deployer: "Deployer") -> None:
        self._deployer = deployer
        self._sent = -1

    def __aiter__(self) -> "Call":
        return self

    async def __anext__(self) -> pb.RouteTable:
        async with self._deployer.changed:
            await self._deployer.changed.wait_for(lambda: self._deployer.table.version != self._sent)
            self._sent = self._deployer.table.version
            return self._deployer.table

    def cancel(self) -> None:
        """Nothing to do."""


class Deployer:
    """Publishes route tables and waits until they are acknowledged."""

    def __init__(self) -> None:
        self.table = pb.RouteTable()
        self.changed = asyncio.Condition()
        self.acknowledged = -1
        self.refused_ports: list[int] = []

    def WatchRoutes(self, request: pb.WatchRoutesRequest) -> Call:
        return Call(self)

    async def AcknowledgeRoutes(self, request: pb.AcknowledgeRoutesRequest) -> None:
        async with self.changed:
            self.acknowledged = request.version
            self.refused_ports = list(request.refused_ports)
            self.changed.notify_all()

    async def publish(self, *routes: pb.Route) -> None:
        """Give a new table and wait until Envoy uses it."""
        async with self.changed:
            self.table = pb.RouteTable(version=self.table.version + 1, routes=routes)
            self.changed.notify_all()
            async with asyncio.timeout(20):
                await self.changed.wait_for(lambda: self.acknowledged == self.table.version)


class Plane:
    """The data plane under test."""

    def __init__(self, settings: Settings, deployer: Deployer, envoy: Envoy, watcher: Watcher, files: Files) -> None:
        self.settings = settings
        self.deployer = deployer
        self.envoy = envoy
        self.watcher = watcher
        self.files = files
        self.url = f"http://127.0.0.1:{settings.port}"

    def host(self, name: str) -> dict[str, str]:
        """The header that reaches a deployment on the public port."""
        return {"Host": f"{name}-default.localhost:{self.settings.port}"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def serve(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]], address: str = ""
) -> AsyncIterator[str]:
    """Serve every path by one handler, on a free port or a Unix socket. Gives the address."""
    app = web.Application(client_max_size=0)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        if address:
            await web.UnixSite(runner, address.removeprefix("unix:")).start()
        else:
            port = free_port()
            await web.TCPSite(runner, "127.0.0.1", port).start()
            address = f"127.0.0.1:{port}"
        yield address
    finally:
        await runner.cleanup()


def route(name: str, *addresses: str, **fields: Any) -> pb.Route:
    """A route of one target."""
    target = pb.Target(
        target="main",
        revision=f"deployments/{name}/revisions/1",
        bento=f"bentoRepositories/{name}/bentos/v1",
        models=["modelRepositories/m/models/v1"],
        weight=100,
        service="Svc",
        endpoints=[pb.Endpoint(replica=f"{name}-{i}", address=address) for i, address in enumerate(addresses)],
    )
    values: dict[str, Any] = {
        "deployment": f"deployments/{name}",
        "organization": "organizations/default",
        "hosts": [f"{name}-default.localhost"],
        "targets": [target],
        **fields,
    }
    return pb.Route(**values)


@pytest.fixture
def gateway_settings(tmp_path: Path) -> Iterator[Settings]:
    """Settings of a gateway of this test's own."""
    with settings_of(tmp_path) as settings:
        yield settings


@contextlib.contextmanager
def settings_of(tmp_path: Path, **more: Any) -> Iterator[Settings]:
    """Settings of a gateway; sockets in a folder with a short path."""
    run_dir = Path(tempfile.mkdtemp(prefix="gw", dir="/tmp"))
    yield Settings(
        data_dir=tmp_path / "gateway",
        run_dir=run_dir,
        port=free_port(),
        envoy_concurrency=1,
        orphan_grace_s=5,
        drain_grace_s=5,
        **more,
    )
    shutil.rmtree(run_dir, ignore_errors=True)


@contextlib.asynccontextmanager
async def open_plane(settings: Settings, *peers: messages.Peer, **plan: Any) -> AsyncIterator[Plane]:
    """Envoy and the watcher, without the rest of the gateway."""
    settings.captures_dir.mkdir(parents=True, exist_ok=True)
    deployer, files = Deployer(), Files(settings.envoy_dir)
    boot = listeners.bootstrap(
        admin_socket=settings.admin_socket, listeners_file=files.listeners, clusters_file=files.clusters
    )
    envoy = Envoy(settings, files, boot, SYSTEM, lambda: None)
    shared = listeners.Plan(
        host=settings.host,
        port=settings.port,
        capture_log=settings.captures_dir / "current.jsonl",
        capture_module=capture_module(settings.capture_with) is not None,
        **plan,
    )
    watcher = Watcher(settings, shared, peers, files, envoy, deployer, SYSTEM)  # type: ignore[arg-type]
    await envoy.adopt()
    await watcher.restore()
    await envoy.start()
    tasks = [asyncio.create_task(envoy.run()), asyncio.create_task(watcher.run())]
    try:
        yield Plane(settings, deployer, envoy, watcher, files)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await envoy.stop()


@pytest.fixture
async def plane(gateway_settings: Settings) -> AsyncIterator[Plane]:
    """A data plane whose suite is one HTTP front that says what it got."""

    async def front(request: web.Request) -> web.Response:
        return web.json_response({"front": request.path_qs, "headers": dict(request.headers)})

    gateway_settings.run_dir.mkdir(exist_ok=True)
    address = gateway_settings.http_address
    async with serve(front, address):
        async with open_plane(gateway_settings, messages.Peer("http", address, http2=False)) as plane:
            yield plane


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client that unpacks nothing."""
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield session


async def echo(request: web.Request) -> web.Response:
    """Gives what it got, as JSON."""
    body = await request.read()
    return web.json_response(
        {
            "method": request.method,
            "path": request.path_qs,
            "headers": {name.lower(): value for name, value in request.headers.items()},
            "size": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
        }
    )


async def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(timeout_s):
        while True:
            if condition():
                return
            await asyncio.sleep(0.02)
