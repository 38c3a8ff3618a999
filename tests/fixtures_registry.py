"""A registry as others meet it: on a real gRPC server, with its bytes endpoint, both on Unix sockets."""

import asyncio
import io
import os
import tarfile
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from grpc import aio
from yarl import URL

from ekiben.channel import open_channel
from ekiben.identity.v1 import identity_pb2 as ipb
from ekiben.identity.v1 import identity_pb2_grpc as identity
from ekiben.registry.v1 import deletions_pb2_grpc, garbage_pb2_grpc, lineage_pb2_grpc
from ekiben.registry.v1 import registry_pb2 as pb
from ekiben.registry.v1 import registry_pb2_grpc as registry
from services.kernel.app import serve
from services.kernel.clock import SYSTEM, Clock
from services.kernel.settings import ServerSettings
from services.registry.app import open_registry
from services.registry.settings import Settings

SERVICE_TOKEN = "eks_for-tests"


class Stubs:
    """The stubs of one caller."""

    def __init__(self, channel: aio.Channel) -> None:
        self.models = registry.ModelsStub(channel)
        self.bentos = registry.BentosStub(channel)
        self.uploads = registry.UploadsStub(channel)
        self.deletions = deletions_pb2_grpc.DeletionsStub(channel)
        self.garbage = garbage_pb2_grpc.GarbageStub(channel)
        self.lineage = lineage_pb2_grpc.LineageStub(channel)
        self.accounts = identity.AccountsStub(channel)
        self.logins = identity.LoginsStub(channel)
        self.secrets = identity.SecretsStub(channel)
        self.audit = identity.AuditStub(channel)


@dataclass
class Registry:
    """A registry that runs. `admin` is who the first start made."""

    settings: Settings
    address: str
    stop: asyncio.Event
    stack: AsyncExitStack
    http: aiohttp.ClientSession
    admin: Stubs = field(init=False)

    def channel(self, token: str) -> aio.Channel:
        """A channel of whoever holds the token."""
        channel = open_channel(self.address, token=token, timeout_s=20)
        self.stack.push_async_callback(channel.close)
        return channel

    def stubs(self, token: str) -> Stubs:
        """Stubs of whoever holds the token."""
        return Stubs(self.channel(token))

    async def stubs_of_role(self, name: str, role: int) -> Stubs:
        """Stubs of a new user with this role."""
        await self.admin.accounts.CreateUser(ipb.CreateUserRequest(user=ipb.User(name=f"users/{name}", role=role)))
        token = ipb.ApiToken(display_name=name, user=f"users/{name}")
        created = await self.admin.accounts.CreateApiToken(ipb.CreateApiTokenRequest(api_token=token))
        return self.stubs(created.token)

    async def put(self, url: str, body: Any, **headers: str) -> tuple[int, str, str]:
        """PUT to a signed URL: status, ETag, body."""
        data = body if not isinstance(body, bytes) else io.BytesIO(body)
        sized = {"Content-Length": str(len(body))} if isinstance(body, bytes) else {}
        async with self._at(url, "PUT", data=data, headers=sized | headers) as response:
            return response.status, response.headers.get("ETag", ""), await response.text()

    async def get(self, url: str, **headers: str) -> tuple[int, bytes, Mapping[str, str]]:
        """GET a signed URL."""
        async with self._at(url, "GET", headers=headers) as response:
            return response.status, await response.read(), response.headers

    @asynccontextmanager
    async def _at(self, url: str, method: str, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer at a signed URL: the registry's own, or a whole one of a store."""
        if "://" not in url:
            async with self.http.request(method, f"http://registry{url}", **options) as response:
                yield response
            return
        async with aiohttp.ClientSession(skip_auto_headers=["Content-Type"]) as session:
            async with session.request(method, URL(url, encoded=True), **options) as response:
                yield response

    async def push(self, stubs: Stubs, resource: str, archive: bytes) -> pb.Upload:
        """Give a model or bento its content in one PUT."""
        upload = await stubs.uploads.CreateUpload(pb.CreateUploadRequest(upload=pb.Upload(resource=resource)))
        signed = await stubs.uploads.SignUpload(pb.SignUploadRequest(name=upload.name))
        status, _, body = await self.put(signed.url, archive)
        assert status == 200, body
        return await stubs.uploads.CompleteUpload(pb.CompleteUploadRequest(name=upload.name))

    async def new_model(self, stubs: Stubs, repository: str, version: str, **fields: Any) -> pb.Model:
        """A model without content."""
        return await stubs.models.CreateModel(
            pb.CreateModelRequest(parent=f"modelRepositories/{repository}", model_id=version, model=pb.Model(**fields))
        )

    async def new_bento(self, stubs: Stubs, repository: str, version: str, **fields: Any) -> pb.Bento:
        """A bento without content."""
        return await stubs.bentos.CreateBento(
            pb.CreateBentoRequest(parent=f"bentoRepositories/{repository}", bento_id=version, bento=pb.Bento(**fields))
        )


@asynccontextmanager
async def run_registry(
    folder: Path, *, database_url: str = "", clock: Clock = SYSTEM, **options: Any
) -> AsyncIterator[Registry]:
    """Serve a registry with its data below `folder` until the end of the block."""
    given: dict[str, Any] = {
        "database_url": database_url or f"sqlite:///{folder}/registry.db",
        "blobs_url": f"file://{folder}/blobs",
        "secrets_key_file": folder / "secrets-key",
        "admin_token_file": folder / "admin-token",
    }
    (folder / "service-token").write_text(SERVICE_TOKEN)
    async with AsyncExitStack() as stack:
        # Short: the path of a Unix socket has at most 107 bytes.
        run = stack.enter_context(tempfile.TemporaryDirectory(prefix="ekr-", dir="/tmp"))
        settings = Settings(**(given | {"blobs_listen": f"unix:{run}/blobs"} | options))
        server = ServerSettings(
            listen=f"unix:{run}/grpc", service_token_file=folder / "service-token", grace_s=1.0, log_level="WARNING"
        )
        stop = asyncio.Event()
        listening = asyncio.Event()

        async def started() -> None:
            listening.set()

        group = await stack.enter_async_context(asyncio.TaskGroup())
        task = group.create_task(serve([open_registry(settings, clock=clock)], server, started=started, stop=stop))
        waiting = group.create_task(listening.wait())
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if task.done():
            await task
        stack.callback(stop.set)
        connector = aiohttp.UnixConnector(f"{run}/blobs")
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        running = Registry(settings, f"unix:{run}/grpc", stop, stack, http)
        running.admin = running.stubs(settings.admin_token_file.read_text().strip())
        yield running


async def until(condition: Callable[[], Any], timeout_s: float = 10) -> None:
    """Wait until the condition (or what it awaits) is true."""
    async with asyncio.timeout(timeout_s):
        while True:
            held = condition()
            if await held if isinstance(held, Awaitable) else held:
                return
            await asyncio.sleep(0.01)


@asynccontextmanager
async def _at(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Registry]:
    places: dict[str, Any] = {}
    if "postgresql" in request.param:
        database = request.getfixturevalue("postgres").create(f"registry_{os.urandom(6).hex()}")
        places["database_url"] = f"{database}&schema=ekiben_registry"
    if "s3" in request.param:
        places["blobs_url"] = request.getfixturevalue("s3").new_url()
    async with run_registry(folder, garbage_grace_s=0.0, **places) as running:
        yield running


@pytest.fixture(name="running", params=["sqlite-files", "postgresql-s3"])
async def running_registry(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Registry]:
    """A registry, once on a file and a folder and once on servers, with the collector standing by."""
    async with _at(request, tmp_path) as running:
        yield running


@pytest.fixture(name="running", params=["sqlite-files", "postgresql-files"])
async def running_on_files(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Registry]:
    """The same for tests of what the registry itself does with bytes, which S3 would do otherwise."""
    async with _at(request, tmp_path) as running:
        yield running


@pytest.fixture(name="running")
async def running_embedded(tmp_path: Path) -> AsyncIterator[Registry]:
    """A registry on a file and a folder, for tests of who speaks to it."""
    async with run_registry(tmp_path, garbage_grace_s=0.0) as running:
        yield running


def archive_of(files: Mapping[str, bytes], *, change: Callable[[tarfile.TarInfo], None] | None = None) -> bytes:
    """A tar as BentoML's client writes it: PAX, a folder `./` first, names with a leading `./`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        root = tarfile.TarInfo("./")
        root.type, root.mode = tarfile.DIRTYPE, 0o700
        tar.addfile(root)
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            if change is not None:
                change(info)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def model_archive(content: bytes = b"weights", **files: bytes) -> bytes:
    """The archive of a model."""
    return archive_of({"model.yaml": b"name: iris\n", "weights.bin": content, **files})


def bento_archive(content: bytes = b"import bentoml\n") -> bytes:
    """The archive of a bento."""
    return archive_of({"bento.yaml": b"service: service:Iris\n", "src/service.py": content})
