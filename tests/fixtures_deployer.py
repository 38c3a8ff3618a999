"""What the deployer's tests share: real bentos, a real registry, a builder that has built everything, a stand-in gateway."""

import asyncio
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import aiohttp
import pytest
import yaml

from ekiben.builder.v1 import builder_pb2, builder_pb2_grpc
from ekiben.channel import open_channel
from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployer.v1 import deployer_pb2_grpc
from ekiben.errors import Cancelled, DeadlineExceeded, Unavailable
from ekiben.registry.v1 import registry_pb2, registry_pb2_grpc
from services.deployer.app import open_deployer
from services.deployer.settings import Settings
from services.kernel.app import Component, Servicer, serve
from services.kernel.peers import open_peers
from services.kernel.settings import PeerSettings, ServerSettings
from tests.bentoml_clients import client, environment
from tests.fixtures_builder import Registry, running_registry

if TYPE_CHECKING:
    from ekiben.deployer.v1.deployer_pb2_grpc import DeploymentsAsyncStub, RoutesAsyncStub

ROOT = Path(__file__).resolve().parent.parent

SOURCES = {
    "front": """
import os, time
import bentoml

@bentoml.service(envs=[{"name": "FLAVOUR", "value": "plum"}])
class Scorer:
    @bentoml.api
    def score(self, text: str) -> str:
        return f"{len(text)} {os.environ.get('FLAVOUR')}"

@bentoml.service(envs=[{"name": "GREETING", "value": "hello"}], workers=1, threads=8)
class Front:
    scorer = bentoml.depends(Scorer)

    @bentoml.api
    def greet(self, text: str) -> str:
        return f"{os.environ.get('GREETING')} {self.scorer.score(text)}"
""",
    "plain": """
import os, time
import bentoml

@bentoml.service(threads=8)
class Plain:
    @bentoml.api
    def env(self) -> dict:
        return dict(os.environ)

    @bentoml.api
    def slow(self, seconds: float) -> str:
        time.sleep(seconds)
        return "done"

    @bentoml.api
    async def hang(self) -> str:
        time.sleep(600)
""",
    "needy": """
import bentoml

@bentoml.service(envs=[{"name": "LICENSE"}])
class Needy:
    def __init__(self):
        raise RuntimeError("the license server said no")

    @bentoml.api
    def f(self) -> str:
        return ""
""",
    "modelled": """
import bentoml

@bentoml.service
class Modelled:
    ref = bentoml.models.BentoModel("tiny:latest")

    @bentoml.api
    def read(self) -> str:
        return open(self.ref.path_of("data.txt")).read()
""",
    "old": """
import bentoml
from bentoml.io import Text

class Upper(bentoml.Runnable):
    SUPPORTED_RESOURCES = ("cpu",)
    SUPPORTS_CPU_MULTI_THREADING = True

    @bentoml.Runnable.method(batchable=False)
    def up(self, text):
        return text.upper()

runner = bentoml.Runner(Upper, name="upper")
svc = bentoml.Service("old", runners=[runner])

@svc.api(input=Text(), output=Text())
async def shout(text):
    return await runner.up.async_run(text)
""",
}


@dataclass(frozen=True)
class Built:
    """A bento on this machine, made by the real command."""

    folder: Path
    models: tuple[Path, ...] = ()

    @property
    def tag(self) -> tuple[str, str]:
        """Name and version."""
        return self.folder.parent.name, self.folder.name


def build(into: Path, name: str, source: str, generation: str = "1.4", model: str = "") -> Built:
    """Build a bento."""
    work, home = into / f"src-{name}", into / f"home-{generation}"
    work.mkdir(parents=True, exist_ok=True)
    (work / "service.py").write_text(source)
    service = source.rsplit("class ", 1)[1].split(":")[0].split("(")[0] if generation == "1.4" else "svc"
    (work / "bentofile.yaml").write_text(
        f"service: service:{service}\nname: {name}\npython:\n  packages: []\n  lock_packages: false\n"
    )
    bin, env = client(generation), environment(home)
    models: tuple[Path, ...] = ()
    if model:
        script = (
            "import bentoml\n"
            f"with bentoml.models.create('{model}') as m:\n    open(m.path_of('data.txt'), 'w').write('forty-two')\n"
            "print(bentoml.models.get(m.tag).path)"
        )
        done = subprocess.run([bin / "python", "-c", script], env=env, check=True, capture_output=True, text=True)
        models = (Path(done.stdout.strip().splitlines()[-1]),)
    command = [bin / "bentoml", "build", ".", "--output", "tag"]
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    version = done.stdout.strip().splitlines()[-1].split(":")[-1]
    return Built(home / "bentos" / name / version, models)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    """Builds bentos of `SOURCES`, each once."""
    into, known = tmp_path_factory.mktemp("bentos"), {}

    def get(name: str, source: str | None = None) -> Built:
        key = (name, source)
        if key not in known:
            generation, model = ("1.1" if name == "old" else "1.4"), ("tiny" if name == "modelled" else "")
            known[key] = build(into, name, source or SOURCES[name], generation, model)
        return known[key]

    return get


class FakeBuilds(builder_pb2_grpc.BuildsServicer):
    """A builder for which each environment is the client's own."""

    def __init__(self) -> None:
        self.failing: dict[str, str] = {}
        self.asked: list[str] = []

    async def CreateBuild(self, request: builder_pb2.CreateBuildRequest, context: Any) -> builder_pb2.Build:
        self.asked.append(request.bento)
        build = builder_pb2.Build(name="builds/b1", bento=request.bento, state=builder_pb2.Build.SUCCEEDED)
        if request.bento in self.failing:
            build.state = builder_pb2.Build.FAILED
            build.failure.message = self.failing[request.bento]
        generation = "1.1" if "/old/" in request.bento else "1.4"
        build.environment.path = str(client(generation).parent)
        return build


@dataclass
class Suite:
    """A deployer in this process with its neighbours, as the admin sees them."""

    registry: Registry
    run_dir: Path
    data_dir: Path
    settings: Settings
    builds: FakeBuilds
    deployments: "DeploymentsAsyncStub"
    routes: "RoutesAsyncStub"
    table: pb.RouteTable = field(default_factory=pb.RouteTable)
    """The newest route table that the stand-in gateway has acknowledged."""

    async def push(self, bento: Built) -> str:
        """Upload a bento and its models as a client does. Gives its name."""
        models = registry_pb2_grpc.ModelsStub(self.registry.channel)
        for folder in bento.models:
            parent, name = f"modelRepositories/{folder.parent.name}", folder.name
            with contextlib.suppress(Exception):
                await models.CreateModel(
                    registry_pb2.CreateModelRequest(
                        parent=parent, model_id=name, model=registry_pb2.Model(manifest='{"module": "tests"}')
                    )
                )
            await self._upload(f"{parent}/models/{name}", folder)
        repository, version = bento.tag
        described = yaml.safe_load((bento.folder / "bento.yaml").read_text())
        # As the client sends it: the models of all services together.
        every = [*described["models"], *(m for s in described.get("services") or [] for m in s["models"])]
        described["models"] = sorted({model if isinstance(model, str) else model["tag"] for model in every})
        described["creation_time"] = str(described.get("creation_time"))
        bentos = registry_pb2_grpc.BentosStub(self.registry.channel)
        parent = f"bentoRepositories/{repository}"
        with contextlib.suppress(Exception):
            await bentos.CreateBento(
                registry_pb2.CreateBentoRequest(
                    parent=parent,
                    bento_id=version,
                    bento=registry_pb2.Bento(manifest=json.dumps(described, default=str)),
                )
            )
        await self._upload(f"{parent}/bentos/{version}", bento.folder)
        return f"{parent}/bentos/{version}"

    async def _upload(self, resource: str, folder: Path) -> None:
        uploads = registry_pb2_grpc.UploadsStub(self.registry.channel)
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w:") as tar:
            tar.add(folder, arcname="./")
        wanted = registry_pb2.Upload(resource=resource)
        upload = await uploads.CreateUpload(registry_pb2.CreateUploadRequest(upload=wanted))
        signed = await uploads.SignUpload(registry_pb2.SignUploadRequest(name=upload.name))
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(f"{self.registry.run_dir}/blobs")) as session:
            async with session.put(f"http://registry{signed.url}", data=out.getvalue()) as response:
                assert response.status == 200, await response.text()
        await uploads.CompleteUpload(registry_pb2.CompleteUploadRequest(name=upload.name))

    async def create(self, name: str, bento: str, **fields: Any) -> pb.Deployment:
        """Create a deployment."""
        template = fields.pop("template", None) or pb.Template()
        template.bento = bento
        sent = pb.Deployment(name=f"deployments/{name}", template=template, **fields)
        return await self.deployments.CreateDeployment(pb.CreateDeploymentRequest(deployment=sent))

    async def get(self, name: str) -> pb.Deployment:
        """A deployment."""
        return await self.deployments.GetDeployment(pb.GetDeploymentRequest(name=f"deployments/{name}"))

    async def until(
        self, name: str, condition: Callable[[pb.Deployment], bool], timeout_s: float = 60.0
    ) -> pb.Deployment:
        """The first state of a deployment, as its watch gives it, that meets the condition."""
        call = self.deployments.WatchDeployment(pb.WatchDeploymentRequest(name=f"deployments/{name}"))
        last = None
        try:
            async with asyncio.timeout(timeout_s):
                async for last in call:
                    if condition(last):
                        return last
        except TimeoutError:
            raise AssertionError(f"not within {timeout_s} s; last: {last}") from None
        finally:
            call.cancel()
        raise AssertionError(f"the watch ended; last: {last}")

    async def running(self, name: str, generation: int = 0, timeout_s: float = 60.0) -> pb.Deployment:
        """The deployment once what runs is what is desired."""
        return await self.until(
            name,
            lambda d: d.state == pb.Deployment.RUNNING and not d.reconciling and d.generation >= generation,
            timeout_s,
        )

    async def replicas(self, name: str) -> list[pb.Replica]:
        """Its replicas."""
        answer = await self.deployments.ListReplicas(pb.ListReplicasRequest(parent=f"deployments/{name}"))
        return list(answer.replicas)

    async def call(self, name: str, path: str, body: Any, timeout_s: float = 30.0) -> tuple[int, str]:
        """A request to a deployment, by the newest route table, as a gateway does it."""
        route = next(route for route in self.table.routes if route.deployment == f"deployments/{name}")
        targets = [target for target in route.targets if target.endpoints and target.weight]
        if not targets:
            return 503, route.not_ready_detail
        address = targets[-1].endpoints[os.urandom(1)[0] % len(targets[-1].endpoints)].address
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        connector = aiohttp.UnixConnector(address.removeprefix("unix:"), force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            kind = {"json": body} if not isinstance(body, str) else {"data": body}
            async with session.post(f"http://deployment{path}", **kind) as response:
                return response.status, await response.text()

    async def keep_following(self) -> None:
        """Follow the routes; a deployer that is away comes back."""
        while True:
            with contextlib.suppress(Unavailable, Cancelled, DeadlineExceeded):
                await self.follow_routes()
            await asyncio.sleep(0.1)

    async def follow_routes(self, *, acknowledge: bool = True) -> None:
        """What a gateway does: take each table, listen for the services behind, acknowledge."""
        servers: dict[str, tuple[asyncio.Server, list[str]]] = {}
        try:
            call = self.routes.WatchRoutes(pb.WatchRoutesRequest(gateway="stand-in"))
            async for table in call:
                for route in table.routes:
                    for internal in route.internal_routes:
                        addresses = [endpoint.address.removeprefix("unix:") for endpoint in internal.endpoints]
                        if internal.socket_path in servers:
                            servers[internal.socket_path][1][:] = addresses
                        else:
                            Path(internal.socket_path).unlink(missing_ok=True)
                            server = await _pass_on(internal.socket_path, addresses)
                            servers[internal.socket_path] = (server, addresses)
                self.table = table
                if acknowledge:
                    await self.routes.AcknowledgeRoutes(
                        pb.AcknowledgeRoutesRequest(gateway="stand-in", version=table.version)
                    )
        finally:
            call.cancel()
            for server, _ in servers.values():
                server.close()


async def _pass_on(path: str, targets: list[str]) -> asyncio.Server:
    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not targets:
            writer.close()
            return
        there, back = await asyncio.open_unix_connection(targets[0])
        await asyncio.gather(pipe(reader, back), pipe(there, writer))

    targets = targets  # the caller's own list, which it changes
    return await asyncio.start_unix_server(accept, path)


@asynccontextmanager
async def running_deployer(
    registry: Registry, data_dir: Path, run_dir: Path, *, gateway: bool = True, name: str = "deployer", **changes: Any
) -> AsyncIterator[Suite]:
    """A deployer with its data in `data_dir`; at the end it drains, as at Ctrl-C. One beside another has another name."""
    settings = Settings(**settings_of(data_dir, run_dir, changes))
    data_dir.mkdir(exist_ok=True)
    address = f"unix:{registry.run_dir}/{name}"
    async with running_builds(registry, f"{name}-builds") as (builds, peer):
        server = ServerSettings(listen=address, service_token_file=peer.service_token_file, grace_s=1)
        async with open_peers(peer, caller="deployer") as peers:
            async with _served(open_deployer(settings, peers), server, peers):
                async with calling(registry, address, settings, builds, gateway=gateway) as suite:
                    yield suite


@asynccontextmanager
async def running_builds(registry: Registry, name: str = "builds") -> AsyncIterator[tuple[FakeBuilds, PeerSettings]]:
    """A builder, and how a deployer finds it and the registry."""
    builds = FakeBuilds()
    address = f"unix:{registry.run_dir}/{name}"
    token_file = registry.folder / "service-token"
    component = Component(
        "builder",
        servicers=[Servicer("ekiben.builder.v1.Builds", builder_pb2_grpc.add_BuildsServicer_to_server, builds)],
    )
    peer = PeerSettings(
        service_token_file=token_file, registry=registry.peers.registry, blobs=registry.peers.blobs, builder=address
    )
    async with open_peers(peer, caller="builder") as peers:
        server = ServerSettings(listen=address, service_token_file=token_file, grace_s=1)
        async with _served(_opened(component), server, peers):
            yield builds, peer


@asynccontextmanager
async def calling(
    registry: Registry, address: str, settings: Settings, builds: FakeBuilds, *, gateway: bool = True
) -> AsyncIterator[Suite]:
    """Channels to a deployer, and a stand-in gateway that follows its routes over restarts."""
    token = (registry.folder / "service-token").read_text().strip()
    async with (
        open_channel(address, token=registry.admin_token) as channel,
        open_channel(address, token=token) as service,
    ):
        suite = Suite(
            registry,
            settings.run_dir,
            settings.data_dir,
            settings,
            builds,
            deployer_pb2_grpc.DeploymentsStub(channel),
            deployer_pb2_grpc.RoutesStub(service),
        )
        following = asyncio.create_task(suite.keep_following()) if gateway else None
        try:
            yield suite
        finally:
            if following is not None:
                following.cancel()
                await asyncio.wait([following])


class DeployerProcess:
    """`python -m services.deployer` in a process of its own, to be killed."""

    def __init__(self, registry: Registry, peer: PeerSettings, data_dir: Path, run_dir: Path, **changes: Any) -> None:
        values = settings_of(data_dir, run_dir, changes)
        self.settings = Settings(**values)
        self.address = f"unix:{registry.run_dir}/deployer"
        token = str(peer.service_token_file)
        self.env = {
            **os.environ,
            "EKIBEN_SERVER_SERVICE_TOKEN_FILE": token,
            "EKIBEN_SERVER_LISTEN": self.address,
            "EKIBEN_SERVER_GRACE_S": "1",
            "EKIBEN_PEERS_SERVICE_TOKEN_FILE": token,
            "EKIBEN_PEERS_REGISTRY": peer.registry,
            "EKIBEN_PEERS_BUILDER": peer.builder,
            "EKIBEN_PEERS_BLOBS": peer.blobs,
            **{f"EKIBEN_DEPLOYER_{key.upper()}": str(value) for key, value in values.items()},
        }
        self.socket = Path(self.address.removeprefix("unix:"))
        self.log = data_dir.with_suffix(".log")
        data_dir.mkdir(exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start it, and wait until it serves."""
        self.socket.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = self._popen(log)
        async with asyncio.timeout(120):  # Its imports alone are seconds of CPU.
            while True:
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_unix_connection(self.socket)
                    writer.close()
                    return
                await asyncio.sleep(0.05)

    def _popen(self, log: BinaryIO) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "services.deployer"]
        return subprocess.Popen(command, env=self.env, cwd=ROOT, stdout=log, stderr=log)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """SIGTERM, and wait."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(30)


def settings_of(data_dir: Path, run_dir: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Settings for tests: short times."""
    return {
        "database_url": f"sqlite:///{data_dir}/deployer.db",
        "data_dir": data_dir,
        "run_dir": run_dir,
        "port_range": "21500-21599",
        "drain_s": 10.0,
        "shutdown_drain_s": 3.0,
        "orphan_grace_s": 10.0,
        **changes,
    }


@asynccontextmanager
async def _served(component: Any, server: ServerSettings, peers: Any) -> AsyncIterator[None]:
    stop, started = asyncio.Event(), asyncio.Event()

    async def note() -> None:
        started.set()

    task = asyncio.create_task(serve([component], server, stop=stop, started=note, peers=peers))
    waiting = asyncio.create_task(started.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()
    try:
        yield
    finally:
        stop.set()
        await task


@asynccontextmanager
async def _opened(component: Component) -> AsyncIterator[Component]:
    yield component


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    """A registry of this test's own."""
    async with running_registry(tmp_path / "registry") as running:
        yield running


@pytest.fixture
async def deployer_folders(tmp_path: Path) -> AsyncIterator[tuple[Path, Path]]:
    """Data and run directory; nothing that was started in them lives on."""
    from services.kernel import processes

    run_dir = Path(tempfile.mkdtemp(prefix="ekd-", dir="/tmp"))
    yield tmp_path / "deployer", run_dir
    for process in await processes.adopt(run_dir / "p"):
        await process.kill()
    await processes.end_strays(processes.mark_of("deployer", tmp_path / "deployer"))
    shutil.rmtree(run_dir, ignore_errors=True)


@pytest.fixture
async def suite(registry: Registry, deployer_folders: tuple[Path, Path]) -> AsyncIterator[Suite]:
    """A deployer of this test's own."""
    async with running_deployer(registry, *deployer_folders) as running:
        yield running
