"""The HTTP front before a real registry, on real sockets, with small stand-ins for the builder and the deployer.

`/blobs/` is served beside the front, as Envoy does on the public port.
"""

import asyncio
import contextlib
import itertools
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from ekiben.builder.v1 import builder_pb2 as builder
from ekiben.builder.v1 import builder_pb2_grpc
from ekiben.deployer.v1 import deployer_pb2 as deployer
from ekiben.deployer.v1 import deployer_pb2_grpc
from ekiben.errors import AlreadyExists, NotFound
from services.gateway.http import RUNNER, build_http_app
from services.gateway.settings import Settings
from services.kernel.app import Component, Servicer, serve
from services.kernel.peers import open_peers
from services.kernel.settings import PeerSettings, ServerSettings
from services.kernel.sites import serve_app
from services.registry.app import open_registry
from services.registry.settings import Settings as RegistrySettings


class Deployments(deployer_pb2_grpc.DeploymentsServicer):
    """Keeps deployments in memory; nothing runs. A test moves their states."""

    def __init__(self) -> None:
        self.kept: dict[str, deployer.Deployment] = {}
        self.replicas: list[deployer.Replica] = []
        self.log: asyncio.Queue[str | None] = asyncio.Queue()
        self.log_ended = asyncio.Event()
        self._names = itertools.count(1)

    def _get(self, name: str) -> deployer.Deployment:
        if name not in self.kept:
            raise NotFound(f"{name} does not exist.", reason="DEPLOYMENT_NOT_FOUND", deployment=name)
        return self.kept[name]

    async def GetDeployment(self, request: Any, context: Any) -> deployer.Deployment:
        return self._get(request.name)

    async def ListDeployments(self, request: Any, context: Any) -> deployer.ListDeploymentsResponse:
        words = request.filter.split()
        found = [
            d for d in reversed(self.kept.values()) if all(w in d.name or (w == "is:dev" and d.dev) for w in words)
        ]
        return deployer.ListDeploymentsResponse(deployments=found, total_size=len(found))

    async def CreateDeployment(self, request: Any, context: Any) -> deployer.Deployment:
        made = request.deployment
        made.name = made.name or f"deployments/made-up-{next(self._names)}"
        if made.name in self.kept:
            raise AlreadyExists(f"{made.name} exists.", reason="DEPLOYMENT_EXISTS", deployment=made.name)
        made.uid, made.creator, made.cluster = secrets.token_hex(8), "users/admin", "clusters/default"
        made.create_time.GetCurrentTime()
        made.update_time.GetCurrentTime()
        made.state = deployer.Deployment.RUNNING
        made.latest_revision = f"{made.name}/revisions/1"
        made.urls.append("http://127.0.0.1:1/")
        self.kept[made.name] = made
        return made

    async def UpdateDeployment(self, request: Any, context: Any) -> deployer.Deployment:
        kept = self._get(request.deployment.name)
        for path in request.update_mask.paths:
            kept.ClearField(path)
        request.update_mask.MergeMessage(request.deployment, kept, True, True)
        kept.state = deployer.Deployment.RUNNING
        return kept

    async def TerminateDeployment(self, request: Any, context: Any) -> deployer.Deployment:
        self._get(request.name).state = deployer.Deployment.TERMINATED
        return self.kept[request.name]

    async def DeleteDeployment(self, request: Any, context: Any) -> deployer.Deployment:
        self._get(request.name)
        return self.kept.pop(request.name)

    async def WatchDeployment(self, request: Any, context: Any) -> AsyncIterator[deployer.Deployment]:
        yield self._get(request.name)
        await asyncio.Event().wait()

    async def ListReplicas(self, request: Any, context: Any) -> deployer.ListReplicasResponse:
        self._get(request.parent)
        return deployer.ListReplicasResponse(replicas=self.replicas)

    async def ReadLogs(self, request: Any, context: Any) -> AsyncIterator[deployer.LogLine]:
        self._get(request.name)
        try:
            while (text := await self.log.get()) is not None:
                yield deployer.LogLine(replica=request.replica, text=text)
        finally:
            self.log_ended.set()

    GetRevision = ListRevisions = RollbackDeployment = ScaleDeployment = None  # type: ignore[assignment]


class InstanceTypes(deployer_pb2_grpc.InstanceTypesServicer):
    """One size, one cluster."""

    async def ListInstanceTypes(self, request: Any, context: Any) -> deployer.ListInstanceTypesResponse:
        size = deployer.InstanceType(
            name="instanceTypes/small", display_name="cpu.small", cpu_millicores=500, memory_bytes=1 << 30
        )
        return deployer.ListInstanceTypesResponse(instance_types=[size])

    async def GetCluster(self, request: Any, context: Any) -> deployer.Cluster:
        if request.name != "clusters/default":
            raise NotFound(f"{request.name} does not exist.", reason="CLUSTER_NOT_FOUND", cluster=request.name)
        return deployer.Cluster(name=request.name, uid="c1")

    async def ListClusters(self, request: Any, context: Any) -> deployer.ListClustersResponse:
        return deployer.ListClustersResponse(clusters=[deployer.Cluster(name="clusters/default", uid="c1")])


class Builds(builder_pb2_grpc.BuildsServicer):
    """Builds that a test puts in, and their log."""

    def __init__(self) -> None:
        self.kept: list[builder.Build] = []
        self.lines: list[str] = []

    async def ListBuilds(self, request: Any, context: Any) -> builder.ListBuildsResponse:
        return builder.ListBuildsResponse(builds=[b for b in self.kept if b.bento == request.bento])

    async def ReadBuildLog(self, request: Any, context: Any) -> AsyncIterator[builder.BuildLogLine]:
        if request.name not in [build.name for build in self.kept]:
            raise NotFound(f"{request.name} does not exist.", reason="BUILD_NOT_FOUND", build=request.name)
        for index, text in enumerate(self.lines):
            yield builder.BuildLogLine(index=index, text=text)

    GetBuild = CreateBuild = CancelBuild = WatchBuild = None  # type: ignore[assignment]


@dataclass
class Front:
    """The front under test."""

    url: str
    token: str
    data: Path
    deployments: Deployments = field(default_factory=Deployments)
    builds: Builds = field(default_factory=Builds)
    unready: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """The admin's token, as an API client sends it."""
        return {"Authorization": f"Bearer {self.token}"}


@contextlib.asynccontextmanager
async def running_front(data: Path, *, upload_strategy: str = "auto", blobs_url: str = "") -> AsyncIterator[Front]:
    """Registry, stand-ins and front, on sockets of their own; all of it ends with the context."""
    run = Path(tempfile.mkdtemp(prefix="ekh-", dir="/tmp"))
    data.mkdir(parents=True, exist_ok=True)
    (data / "service-token").write_text("eks_" + secrets.token_hex(16))
    address, blobs = f"unix:{run}/grpc", f"unix:{run}/blobs"
    registry = RegistrySettings(
        database_url=f"sqlite:///{data}/registry.db",
        blobs_url=blobs_url or f"file://{data}/blobs",
        blobs_listen=blobs,
        secrets_key_file=data / "secrets-key",
        admin_token_file=data / "admin-token",
    )
    front = Front("", "", data)
    stand_ins = [
        _component("builder", Servicer("ekiben.builder.v1.Builds", builder_pb2_grpc.add_BuildsServicer_to_server, front.builds)),
        _component(
            "deployer",
            Servicer("ekiben.deployer.v1.Deployments", deployer_pb2_grpc.add_DeploymentsServicer_to_server, front.deployments),
            Servicer("ekiben.deployer.v1.InstanceTypes", deployer_pb2_grpc.add_InstanceTypesServicer_to_server, InstanceTypes()),
        ),
        _component("recorder"),
    ]  # fmt: skip
    stop, started = asyncio.Event(), asyncio.Event()

    async def listening() -> None:
        started.set()

    server = ServerSettings(service_token_file=data / "service-token", listen=address, grace_s=0.2)
    peers = PeerSettings(
        service_token_file=data / "service-token", registry=address, builder=address, deployer=address,
        recorder=address, blobs=blobs,
    )  # fmt: skip
    try:
        async with open_peers(peers, caller="gateway") as opened, asyncio.TaskGroup() as group:
            running = group.create_task(
                serve([open_registry(registry), *stand_ins], server, started=listening, stop=stop)
            )
            async with asyncio.timeout(30):
                waiting = group.create_task(started.wait())
                await asyncio.wait([waiting, running], return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    waiting.cancel()
                    await running
            front.token = (data / "admin-token").read_text().strip()
            try:
                async with _listening(front, opened, run, blobs, upload_strategy) as front.url:
                    yield front
            finally:
                stop.set()
    finally:
        shutil.rmtree(run, ignore_errors=True)


@contextlib.asynccontextmanager
async def _listening(front: Front, peers: Any, run: Path, blobs: str, upload_strategy: str) -> AsyncIterator[str]:
    async def readiness() -> dict[str, str]:
        return {"envoy": front.unready}

    settings = Settings(data_dir=front.data / "gateway", run_dir=run, upload_strategy=upload_strategy)
    app = build_http_app(settings, peers, metrics=lambda: b"# nothing\n", readiness=readiness)
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(blobs.removeprefix("unix:"))) as session:

        async def blobs_route(request: web.Request) -> web.StreamResponse:
            return await _pass_on(session, request)

        app.router.add_route("*", "/blobs/{path:.*}", blobs_route)
        async with serve_app(app, "127.0.0.1:0", setting="http_listen", **RUNNER) as where:
            yield f"http://{where}"


async def _pass_on(session: aiohttp.ClientSession, request: web.Request) -> web.StreamResponse:
    """What Envoy does with the registry's endpoint for bytes."""
    headers = {key: value for key, value in request.headers.items() if key.lower() not in ("host", "connection")}
    body = request.content if request.body_exists else None
    url = URL(f"http://blobs{request.raw_path}", encoded=True)
    async with session.request(
        request.method, url, data=body, headers=headers, skip_auto_headers=["Content-Type"]
    ) as got:
        response = web.StreamResponse(status=got.status, headers=got.headers.copy())
        await response.prepare(request)
        async for chunk in got.content.iter_any():
            await response.write(chunk)
        return response


def _component(name: str, *servicers: Servicer) -> Any:
    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[Component]:
        yield Component(name, servicers)

    return opened()


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[Front]:
    """A front of this test's own."""
    async with running_front(tmp_path / "data") as running:
        yield running
