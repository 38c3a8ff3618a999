"""What the builder's tests share: a package index of their own, bentos that ask it for packages, a running builder.

The index is a real HTTP server with the simple API, hashes included; the wheels are a few hundred bytes. `bentoml` in it
is a stand-in that can be imported, so an environment is made in half a second and without the internet.
"""

import asyncio
import base64
import contextlib
import hashlib
import http.server
import io
import json
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import yaml
from grpc import aio

from ekiben.builder.v1 import builder_pb2 as pb
from ekiben.builder.v1.builder_pb2_grpc import BuildsStub
from ekiben.builder.v1.images_pb2_grpc import ImagesStub
from ekiben.channel import open_channel
from ekiben.errors import AlreadyExists
from ekiben.identity.v1 import identity_pb2
from ekiben.identity.v1.identity_pb2_grpc import SecretsStub
from ekiben.registry.v1 import registry_pb2
from ekiben.registry.v1.registry_pb2_grpc import BentosStub, ModelsStub, UploadsStub
from services.builder.app import open_builder
from services.builder.settings import Settings
from services.kernel.app import Component, serve
from services.kernel.clock import SYSTEM, Clock
from services.kernel.peers import Peers, open_peers
from services.kernel.settings import PeerSettings, ServerSettings
from services.registry.app import open_registry
from services.registry.settings import Settings as RegistrySettings

if TYPE_CHECKING:
    from ekiben.builder.v1.builder_pb2_grpc import BuildsAsyncStub
    from ekiben.builder.v1.images_pb2_grpc import ImagesAsyncStub


def wheel(name: str, version: str, requires: Sequence[str] = (), code: str = "") -> bytes:
    """A pure wheel with one module of that name."""
    files = {
        f"{name.replace('-', '_')}/__init__.py": f"__version__ = {version!r}\n{code}",
        f"{name.replace('-', '_')}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\n"
        f"Version: {version}\n" + "".join(f"Requires-Dist: {requirement}\n" for requirement in requires),
        f"{name.replace('-', '_')}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = f"{name.replace('-', '_')}-{version}.dist-info/RECORD"
    lines = [
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip('=')},{len(text)}"
        for path, text in files.items()
    ]
    files[record] = "\n".join([*lines, f"{record},,"]) + "\n"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for path, text in files.items():
            archive.writestr(zipfile.ZipInfo(path), text)
    return out.getvalue()


def sdist(name: str, version: str, backend: str) -> bytes:
    """A source distribution with a build backend of its own, the module `backend`."""
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": backend,
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
    }
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for path, text in files.items():
            member = tarfile.TarInfo(f"{name}-{version}/{path}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


@dataclass
class PackageIndex:
    """A simple-API index on a free port of loopback."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    credentials: str = ""
    """`user:password` that every request must carry; empty for none."""
    held: threading.Event = field(default_factory=threading.Event)
    """Cleared, downloads of files wait until it is set again."""
    forgotten: dict[str, int] = field(default_factory=dict)
    """Project → how many more times its page, once it was shown, is answered as if it had no files."""
    max_age_s: int = 0
    """How long clients may take an answer for the newest without asking again."""
    broken: bool = False
    """Whether every request is answered with 503."""

    def add(self, name: str, version: str, requires: Sequence[str] = (), code: str = "") -> None:
        """Publish a wheel."""
        self.files[f"{name.replace('-', '_')}-{version}-py3-none-any.whl"] = wheel(name, version, requires, code)

    def add_source(self, name: str, version: str, backend: str) -> None:
        """Publish a source distribution whose build backend is the given code."""
        self.files[f"{name.replace('-', '_')}-{version}.tar.gz"] = sdist(name, version, backend)

    def page(self, project: str) -> str:
        """The project's page, empty when there is none."""
        found = [name for name in self.files if name.split("-")[0].replace("_", "-").lower() == project]
        links = [f'<a href="/files/{n}#sha256={hashlib.sha256(self.files[n]).hexdigest()}">{n}</a>' for n in found]
        return "<!DOCTYPE html><html><body>" + "<br>".join(links) + "</body></html>" if links else ""


@contextlib.contextmanager
def running_index() -> Iterator[PackageIndex]:
    """An index with a bentoml, the exporter that environments get, and a few others."""
    index = PackageIndex()
    index.held.set()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            index.requests.append(self.path)
            wanted = f"Basic {base64.b64encode(index.credentials.encode()).decode()}"
            body: bytes | None = None
            if index.broken:
                return self._answer(503, b"broken")
            if index.credentials and self.headers.get("authorization") != wanted:
                return self._answer(401, b"who are you")
            kind, _, name = self.path.strip("/").partition("/")
            if kind == "simple":
                project = name.strip("/")
                body = index.page(project).encode() or None
                if index.forgotten.get(project) and index.requests.count(self.path) > 1:
                    index.forgotten[project] -= 1
                    body = b"<!DOCTYPE html><html><body></body></html>"
            elif kind == "files":
                _ = self.command == "GET" and index.held.wait(30)
                body = index.files.get(name)
            return self._answer(404, b"nothing") if body is None else self._answer(200, body)

        do_HEAD = do_GET

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if self.path.startswith("/simple") else "application/zip")
            self.send_header("Content-Length", str(len(body)))
            if index.max_age_s and status == 200:
                self.send_header("Cache-Control", f"max-age={index.max_age_s}")
            if status == 401:
                self.send_header("WWW-Authenticate", "Basic")
            self.end_headers()
            if self.command == "GET":
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    for name, version, requires in (
        ("bentoml", "1.4.39", ["attrs", "tabulate"]),
        ("bentoml", "1.1.11", ["attrs", "setuptools"]),
        ("attrs", "26.1.0", []),
        ("tabulate", "0.9.0", []),
        ("tabulate", "0.10.0", []),
        ("setuptools", "80.9.0", []),
        ("setuptools", "82.0.0", []),
        ("cattrs", "23.1.2", []),
        ("opentelemetry-exporter-otlp", "1.45.1", ["opentelemetry-exporter-otlp-proto-http"]),
        ("opentelemetry-exporter-otlp-proto-http", "1.45.1", []),
    ):
        index.add(name, version, requires)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    index.url = f"http://127.0.0.1:{server.server_address[1]}/simple"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield index
    finally:
        index.held.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageIndex]:
    """An index of this test's own, which uv asks instead of the usual one."""
    with running_index() as running:
        monkeypatch.setenv("UV_DEFAULT_INDEX", running.url)
        monkeypatch.setenv("UV_HTTP_RETRIES", "0")
        monkeypatch.setenv("UV_PYTHON_DOWNLOADS", "never")
        yield running


def bento_folder(
    into: Path,
    requirements: str = "tabulate\nbentoml==1.4.39\n",
    *,
    manifest: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """A bento as a client of 1.4 lays it out, as far as a builder looks at it."""
    content = {
        "service": "service:Hello",
        "name": "hello",
        "version": "v1",
        "bentoml_version": "1.4.39",
        "spec": 2,
        "image": {"base_image": "python:3.11-slim", "python_version": "3.11", "commands": [], "post_commands": []},
        **(manifest or {}),
    }
    for path, data in {
        "bento.yaml": yaml.safe_dump(content).encode(),
        "env/python/requirements.txt": requirements.encode(),
        "src/service.py": b"import bentoml\n",
        **(files or {}),
    }.items():
        target = into / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return into


def archive(folder: Path) -> bytes:
    """The folder as a client packs it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:") as tar:
        tar.add(folder, arcname="./")
    return out.getvalue()


@asynccontextmanager
async def served(
    component: AbstractAsyncContextManager[Component], server: ServerSettings, peers: Peers | None = None
) -> AsyncIterator[None]:
    """A component on a real server, until the block ends."""
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


@dataclass
class Registry:
    """A real registry in this process, on Unix sockets."""

    folder: Path
    run_dir: Path
    channel: aio.Channel
    """As the admin."""

    @property
    def peers(self) -> PeerSettings:
        """How the builder finds it."""
        return PeerSettings(
            service_token_file=self.folder / "service-token",
            registry=f"unix:{self.run_dir}/registry",
            blobs=f"unix:{self.run_dir}/blobs",
        )

    @property
    def admin_token(self) -> str:
        """The first admin's."""
        return (self.folder / "admin-token").read_text().strip()

    async def push(self, folder: Path, version: str = "v1", models: Sequence[str] = ()) -> str:
        """Upload a bento as a client does, which uses `models` by their tags. Gives its name."""
        parent = "bentoRepositories/hello"
        with contextlib.suppress(Exception):
            manifest = registry_pb2.Bento(manifest=json.dumps({"models": list(models)}))
            await BentosStub(self.channel).CreateBento(
                registry_pb2.CreateBentoRequest(parent=parent, bento_id=version, bento=manifest)
            )
        return await self._upload(f"{parent}/bentos/{version}", folder)

    async def digest(self, bento: str) -> str:
        """Of a bento's content, as it is now."""
        found = await BentosStub(self.channel).GetBento(registry_pb2.GetBentoRequest(name=bento))
        return found.content.digest

    async def push_model(self, tag: str, files: Mapping[str, bytes], folder: Path, content: bytes = b"") -> str:
        """Upload a model of these files, which are written to `folder`; or of an archive. Gives its name."""
        repository, _, version = tag.partition(":")
        described = {"name": repository, "version": version, "module": "test"}
        for path, data in {"model.yaml": yaml.safe_dump(described).encode(), **files}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        parent = f"modelRepositories/{repository}"
        model = registry_pb2.Model(manifest="{}")
        with contextlib.suppress(AlreadyExists):
            await ModelsStub(self.channel).CreateModel(
                registry_pb2.CreateModelRequest(parent=parent, model_id=version, model=model)
            )
        return await self._upload(f"{parent}/models/{version}", folder, content)

    async def _upload(self, name: str, folder: Path, content: bytes = b"") -> str:
        uploads = UploadsStub(self.channel)
        upload = await uploads.CreateUpload(registry_pb2.CreateUploadRequest(upload=registry_pb2.Upload(resource=name)))
        signed = await uploads.SignUpload(registry_pb2.SignUploadRequest(name=upload.name))
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(f"{self.run_dir}/blobs")) as session:
            async with session.put(f"http://registry{signed.url}", data=content or archive(folder)) as response:
                assert response.status == 200, await response.text()
        await uploads.CompleteUpload(registry_pb2.CompleteUploadRequest(name=upload.name))
        return name

    async def keep_secret(self, name: str, stage: "identity_pb2.Secret.Stage.ValueType", **values: str) -> str:
        """Create a secret of environment variables. Gives its name."""
        items = [identity_pb2.Secret.Item(key=key, value=value) for key, value in values.items()]
        secret = identity_pb2.Secret(name=f"secrets/{name}", kind=identity_pb2.Secret.ENV, stage=stage, items=items)
        await SecretsStub(self.channel).CreateSecret(identity_pb2.CreateSecretRequest(secret=secret))
        return secret.name


@asynccontextmanager
async def running_registry(folder: Path) -> AsyncIterator[Registry]:
    """A registry with its data in `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "service-token").write_text("eks_for-the-builder-s-tests")
    with tempfile.TemporaryDirectory(prefix="ekb-", dir="/tmp") as run:
        settings = RegistrySettings(
            database_url=f"sqlite:///{folder}/registry.db",
            blobs_url=f"file://{folder}/blobs",
            secrets_key_file=folder / "secrets.key",
            admin_token_file=folder / "admin-token",
            blobs_listen=f"unix:{run}/blobs",
        )
        address = f"unix:{run}/registry"
        server = ServerSettings(listen=address, service_token_file=folder / "service-token", grace_s=1)
        async with served(open_registry(settings), server):
            token = (folder / "admin-token").read_text().strip()
            async with open_channel(address, token=token) as channel:
                yield Registry(folder, Path(run), channel)


@dataclass
class Builder:
    """A builder in this process, on a Unix socket, and its API as the admin sees it."""

    data_dir: Path
    builds: "BuildsAsyncStub"
    registry: Registry
    images: "ImagesAsyncStub"

    async def ended(self, name: str) -> pb.Build:
        """The build once it has ended, as its watch gives it."""
        async with asyncio.timeout(60):
            return [build async for build in self.builds.WatchBuild(pb.WatchBuildRequest(name=name))][-1]

    async def log(self, name: str, **request: Any) -> list[str]:
        """The lines of a log."""
        lines = self.builds.ReadBuildLog(pb.ReadBuildLogRequest(name=name, **request))
        return [line.text async for line in lines]

    async def build(self, bento: str, **request: Any) -> pb.Build:
        """Ask for a build and wait for its end."""
        return await self.ended((await self.builds.CreateBuild(pb.CreateBuildRequest(bento=bento, **request))).name)


async def no_fault(_step: str) -> None:
    """Passes every failpoint."""


@asynccontextmanager
async def running_builder(
    registry: Registry,
    folder: Path,
    failpoint: Callable[[str], Awaitable[None]] = no_fault,
    token: str = "",
    name: str = "b",
    clock: Clock = SYSTEM,
    **settings: Any,
) -> AsyncIterator[Builder]:
    """A builder with its data in `folder`, beside the registry; one beside another has another `name`."""
    values: dict[str, Any] = {
        "database_url": f"sqlite:///{folder}/builder.db",
        "data_dir": folder,
        "run_dir": registry.run_dir / name,
    }
    address = f"unix:{registry.run_dir}/{name}.sock"
    server = ServerSettings(listen=address, service_token_file=registry.folder / "service-token", grace_s=1)
    async with open_peers(registry.peers, caller="builder") as peers:
        component = open_builder(Settings(**(values | settings)), peers, clock=clock, failpoint=failpoint)
        async with served(component, server, peers):
            async with open_channel(address, token=token or registry.admin_token) as channel:
                yield Builder(folder, BuildsStub(channel), registry, ImagesStub(channel))


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    """A registry of this test's own."""
    async with running_registry(tmp_path / "registry") as running:
        yield running


@pytest.fixture
async def builder(registry: Registry, index: PackageIndex, tmp_path: Path) -> AsyncIterator[Builder]:
    """A builder of this test's own, with its registry and its index."""
    async with running_builder(registry, tmp_path / "builder") as running:
        yield running
