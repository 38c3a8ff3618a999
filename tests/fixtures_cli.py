"""A small platform for the client and the command: fakes behind the kernel's real chain, and a real HTTP server for bytes.

The fakes keep dictionaries; what a test wants to see go wrong it sets on them. The command runs in a subprocess.
"""

import asyncio
import hashlib
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from ekiben.builder.v1 import builder_pb2, builder_pb2_grpc
from ekiben.deployer.v1 import deployer_pb2, deployer_pb2_grpc
from ekiben.errors import AlreadyExists, FailedPrecondition, NotFound, Unavailable
from ekiben.identity.v1 import identity_pb2, identity_pb2_grpc
from ekiben.recorder.v1 import recorder_pb2, recorder_pb2_grpc
from ekiben.registry.v1 import registry_pb2, registry_pb2_grpc
from services.kernel.app import Component, Servicer
from services.kernel.identity import current_principal
from tests.fixtures_kernel import Running, run_server


def now() -> Timestamp:
    """The time as a message."""
    stamp = Timestamp()
    stamp.GetCurrentTime()
    return stamp


class Bytes:
    """The bytes of uploads and downloads, and the faults that they meet."""

    def __init__(self) -> None:
        self.parts: dict[tuple[str, int], bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.puts = 0
        self.gets = 0
        self.break_puts = 0
        """So many PUTs are cut after half of their bytes."""
        self.break_gets = 0
        """So many GETs are cut after half of what they should give."""
        self.refuse: tuple[int, bytes] | None = None
        """Status and body with which every PUT is refused."""
        self.url = ""

    @contextmanager
    def served(self) -> Iterator[None]:
        """Serve on a free port of loopback until the end of the block."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self) -> None:
                store.puts += 1
                _, _, upload, part = self.path.partition("?")[0].split("/")
                length = int(self.headers["Content-Length"])
                if store.refuse:
                    self._answer(*store.refuse)
                    self.close_connection = True
                    return
                if store.break_puts:
                    store.break_puts -= 1
                    self.rfile.read(length // 2)
                    self.close_connection = True
                    self.connection.close()
                    return
                data = self.rfile.read(length)
                store.parts[upload, int(part)] = data
                self._answer(200, b"", ETag=f'"{hashlib.sha256(data).hexdigest()[:16]}"')

            def do_GET(self) -> None:
                store.gets += 1
                data = store.blobs[self.path.rpartition("/")[2]]
                wanted = self.headers.get("Range")
                start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
                data = data[start:]
                self.send_response(206 if wanted else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if store.break_gets:
                    store.break_gets -= 1
                    data = data[: len(data) // 2]
                    self.close_connection = True
                self.wfile.write(data)

            def _answer(self, status: int, body: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


class Versions:
    """Models or bentos, in the order in which they were made."""

    def __init__(self) -> None:
        self.items: dict[str, Any] = {}

    def get(self, name: str) -> Any:
        """One by its name, or the newest of `…/latest`."""
        if name.endswith("/latest"):
            found = [item for key, item in self.items.items() if key.startswith(name.removesuffix("latest"))]
            if found:
                return found[-1]
        if name not in self.items:
            kind = "Model" if name.startswith("model") else "Bento"
            raise NotFound(f"{kind} {name!r} does not exist.", reason=f"{kind.upper()}_NOT_FOUND", name=name)
        return self.items[name]

    def create(self, name: str, item: Any) -> Any:
        """Add one."""
        if name in self.items:
            raise AlreadyExists(f"{name} exists.", reason="MODEL_EXISTS", name=name)
        item.name = name
        item.creator = current_principal().user
        item.create_time.CopyFrom(now())
        item.content.state = registry_pb2.Content.PENDING
        self.items[name] = item
        return item

    def update(self, item: Any, mask: Any) -> Any:
        """Change one."""
        found = self.get(item.name)
        for path in mask.paths or ["labels", "manifest", "description"]:
            if path in ("labels", "annotations"):
                found.ClearField(path)
                getattr(found, path).update(getattr(item, path))
            else:
                setattr(found, path, getattr(item, path))
        return found

    def page(self, request: Any, response: Any, field_name: str) -> Any:
        """Two a page, whatever is asked for, so that clients must follow page tokens."""
        repository = request.parent.partition("/")[2]
        found = [i for i in reversed(self.items.values()) if repository in ("-", i.name.split("/")[1])]
        start = int(request.page_token or 0)
        end = start + min(2, request.page_size or 2)
        getattr(response, field_name).extend(found[start:end])
        response.next_page_token = str(end) if end < len(found) else ""
        return response


class Models(registry_pb2_grpc.ModelsServicer):
    def __init__(self) -> None:
        self.versions = Versions()

    async def GetModel(self, request: Any, context: Any) -> Any:
        return self.versions.get(request.name)

    async def ListModels(self, request: Any, context: Any) -> Any:
        return self.versions.page(request, registry_pb2.ListModelsResponse(), "models")

    async def CreateModel(self, request: Any, context: Any) -> Any:
        return self.versions.create(f"{request.parent}/models/{request.model_id}", request.model)

    async def UpdateModel(self, request: Any, context: Any) -> Any:
        return self.versions.update(request.model, request.update_mask)

    async def DeleteModel(self, request: Any, context: Any) -> Any:
        self.versions.get(request.name)
        del self.versions.items[request.name]
        return Empty()


class Bentos(registry_pb2_grpc.BentosServicer):
    def __init__(self) -> None:
        self.versions = Versions()

    async def GetBento(self, request: Any, context: Any) -> Any:
        return self.versions.get(request.name)

    async def ListBentos(self, request: Any, context: Any) -> Any:
        return self.versions.page(request, registry_pb2.ListBentosResponse(), "bentos")

    async def CreateBento(self, request: Any, context: Any) -> Any:
        return self.versions.create(f"{request.parent}/bentos/{request.bento_id}", request.bento)

    async def UpdateBento(self, request: Any, context: Any) -> Any:
        return self.versions.update(request.bento, request.update_mask)


class Uploads(registry_pb2_grpc.UploadsServicer):
    def __init__(self, models: Models, bentos: Bentos) -> None:
        self.bytes, self.models, self.bentos = Bytes(), models, bentos
        self.uploads: dict[str, Any] = {}

    def _resource(self, name: str) -> Any:
        return (self.models if name.startswith("model") else self.bentos).versions.get(name)

    async def CreateUpload(self, request: Any, context: Any) -> Any:
        upload = request.upload
        upload.name, upload.state = f"uploads/u{len(self.uploads)}", registry_pb2.Upload.OPEN
        self.uploads[upload.name] = upload
        if upload.digest in self.bytes.blobs:
            self._ready(upload, upload.digest)
        return upload

    async def GetUpload(self, request: Any, context: Any) -> Any:
        return self.uploads[request.name]

    async def SignUpload(self, request: Any, context: Any) -> Any:
        upload = request.name.rpartition("/")[2]
        return registry_pb2.SignedUrl(url=f"{self.bytes.url}/up/{upload}/{request.part_number}")

    async def CompleteUpload(self, request: Any, context: Any) -> Any:
        upload = self.uploads[request.name]
        number = request.name.rpartition("/")[2]
        parts = [part.part_number for part in request.parts] or [0]
        data = b"".join(self.bytes.parts[number, part] for part in parts)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if upload.digest and upload.digest != digest:
            raise FailedPrecondition("The digest differs.", reason="DIGEST_MISMATCH")
        self.bytes.blobs[digest] = data
        self._ready(upload, digest)
        return upload

    async def AbortUpload(self, request: Any, context: Any) -> Any:
        self.uploads[request.name].state = registry_pb2.Upload.ABORTED
        self.uploads[request.name].failure = request.failure
        return self.uploads[request.name]

    async def SignDownload(self, request: Any, context: Any) -> Any:
        digest = self._resource(request.resource).content.digest
        return registry_pb2.SignedUrl(url=f"{self.bytes.url}/content/{digest}")

    def _ready(self, upload: Any, digest: str) -> None:
        upload.state = registry_pb2.Upload.COMPLETED
        content = self._resource(upload.resource).content
        content.state, content.digest = registry_pb2.Content.READY, digest
        content.size_bytes = len(self.bytes.blobs[digest])


class Accounts(identity_pb2_grpc.AccountsServicer):
    def __init__(self) -> None:
        self.tokens: list[identity_pb2.ApiToken] = []

    async def GetCaller(self, request: Any, context: Any) -> Any:
        principal = current_principal()
        role: Any = principal.role
        return identity_pb2.Principal(user=principal.user, organization=principal.organization, role=role)

    async def CreateApiToken(self, request: Any, context: Any) -> Any:
        token = request.api_token
        token.name, token.token = f"apiTokens/t{len(self.tokens)}", "ekb_new"
        self.tokens.append(token)
        return token

    async def ListApiTokens(self, request: Any, context: Any) -> Any:
        return identity_pb2.ListApiTokensResponse(api_tokens=self.tokens)


class Secrets(identity_pb2_grpc.SecretsServicer):
    def __init__(self) -> None:
        self.secrets: dict[str, Any] = {}

    async def CreateSecret(self, request: Any, context: Any) -> Any:
        self.secrets[request.secret.name] = request.secret
        return request.secret


class Builds(builder_pb2_grpc.BuildsServicer):
    def __init__(self) -> None:
        self.states: list[builder_pb2.Build] = []
        """What a watch gives, in order; the last is what there is."""
        self.log = ["Resolving requirements", "error: no version of nonsense==9 was found"]

    async def GetBuild(self, request: Any, context: Any) -> Any:
        return self.states[-1]

    async def WatchBuild(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for build in self.states:
            yield build

    async def ReadBuildLog(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for index, text in enumerate(self.log):
            yield builder_pb2.BuildLogLine(index=index, text=text)


class Deployments(deployer_pb2_grpc.DeploymentsServicer):
    def __init__(self) -> None:
        self.deployments: dict[str, deployer_pb2.Deployment] = {}
        self.states: list[deployer_pb2.Deployment] = []
        """What a watch adds to the deployment, in order."""
        self.breaks = 0
        """So many watches break before their last state."""
        self.watches = 0
        self.requests: list[Any] = []
        self.traceparents: list[str] = []
        self.log: list[deployer_pb2.LogLine] = []

    def _found(self, name: str) -> deployer_pb2.Deployment:
        if name not in self.deployments:
            raise NotFound(f"Deployment {name!r} does not exist.", reason="DEPLOYMENT_NOT_FOUND", deployment=name)
        return self.deployments[name]

    async def GetDeployment(self, request: Any, context: Any) -> Any:
        self.traceparents += [value for key, value in context.invocation_metadata() if key == "traceparent"]
        return self._found(request.name)

    async def ListDeployments(self, request: Any, context: Any) -> Any:
        return deployer_pb2.ListDeploymentsResponse(deployments=self.deployments.values())

    async def CreateDeployment(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        deployment = request.deployment
        deployment.name = deployment.name or "deployments/made-up"
        deployment.generation = 1
        self.deployments[deployment.name] = deployment
        return deployment

    async def UpdateDeployment(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        self.deployments[request.deployment.name] = request.deployment
        return request.deployment

    async def DeleteDeployment(self, request: Any, context: Any) -> Any:
        found = self._found(request.name)
        del self.deployments[request.name]
        return found

    async def ReadLogs(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.requests.append(request)
        if self.breaks:
            self.breaks -= 1
            raise Unavailable("The deployer restarts.", reason="RESTARTING")
        for line in self.log:
            yield line

    async def WatchDeployment(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.watches += 1
        found = self._found(request.name)
        for index, state in enumerate(self.states):
            if self.breaks and index == len(self.states) - 1:
                self.breaks -= 1
                return
            seen = deployer_pb2.Deployment()
            seen.CopyFrom(found)
            seen.MergeFrom(state)
            yield seen


class Predictions(recorder_pb2_grpc.PredictionsServicer):
    def __init__(self) -> None:
        self.predictions: list[recorder_pb2.Prediction] = []
        self.asked: list[Any] = []

    async def ListPredictions(self, request: Any, context: Any) -> Any:
        self.asked.append(request)
        return recorder_pb2.ListPredictionsResponse(predictions=self.predictions)

    async def GetPrediction(self, request: Any, context: Any) -> Any:
        return next(found for found in self.predictions if found.name == request.name)

    async def TailPredictions(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for prediction in self.predictions:
            yield prediction


class Traces(recorder_pb2_grpc.TracesServicer):
    def __init__(self) -> None:
        self.trace = recorder_pb2.Trace()

    async def GetTrace(self, request: Any, context: Any) -> Any:
        return self.trace


@dataclass
class Platform:
    """The fakes, and where they answer."""

    models: Models = field(default_factory=Models)
    bentos: Bentos = field(default_factory=Bentos)
    accounts: Accounts = field(default_factory=Accounts)
    secrets: Secrets = field(default_factory=Secrets)
    builds: Builds = field(default_factory=Builds)
    deployments: Deployments = field(default_factory=Deployments)
    predictions: Predictions = field(default_factory=Predictions)
    traces: Traces = field(default_factory=Traces)
    endpoint: str = ""
    running: Running | None = None

    def __post_init__(self) -> None:
        self.uploads = Uploads(self.models, self.bentos)

    def component(self) -> Component:
        """All of them as one component."""
        served = (
            ("registry.v1.Models", registry_pb2_grpc.add_ModelsServicer_to_server, self.models),
            ("registry.v1.Bentos", registry_pb2_grpc.add_BentosServicer_to_server, self.bentos),
            ("registry.v1.Uploads", registry_pb2_grpc.add_UploadsServicer_to_server, self.uploads),
            ("identity.v1.Accounts", identity_pb2_grpc.add_AccountsServicer_to_server, self.accounts),
            ("identity.v1.Secrets", identity_pb2_grpc.add_SecretsServicer_to_server, self.secrets),
            ("builder.v1.Builds", builder_pb2_grpc.add_BuildsServicer_to_server, self.builds),
            ("deployer.v1.Deployments", deployer_pb2_grpc.add_DeploymentsServicer_to_server, self.deployments),
            ("recorder.v1.Predictions", recorder_pb2_grpc.add_PredictionsServicer_to_server, self.predictions),
            ("recorder.v1.Traces", recorder_pb2_grpc.add_TracesServicer_to_server, self.traces),
        )
        adders: list[tuple[str, Any, Any]] = list(served)
        return Component("registry", [Servicer(f"ekiben.{name}", add, fake) for name, add, fake in adders])


@asynccontextmanager
async def platform_in(folder: Path) -> AsyncIterator[Platform]:
    """Serve the fakes on a free port of loopback until the end of the block."""
    platform = Platform()
    with platform.uploads.bytes.served():
        async with run_server(folder, platform.component(), listen="127.0.0.1:0") as running:
            platform.endpoint, platform.running = f"http://{running.address}", running
            yield platform


@pytest.fixture
async def platform(tmp_path: Path) -> AsyncIterator[Platform]:
    """A small platform with users viewer, dev and admin, whose tokens are `ekb_viewer` and so on."""
    async with platform_in(tmp_path) as running:
        yield running


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str


async def ekiben(platform: Platform | None, *arguments: str, home: Path, **env: str) -> Ran:
    """Run the real command in a subprocess, as user dev unless the environment says otherwise."""
    full = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "BENTOML_HOME": str(home / "bentoml"),
        "EKIBEN_API_TOKEN": "ekb_dev",
        "COLUMNS": "80",
        **({"EKIBEN_ENDPOINT": platform.endpoint} if platform else {}),
        **env,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "ekiben.cli",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={key: value for key, value in full.items() if value},
        cwd=Path(__file__).resolve().parent.parent,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


def model_folder(home: Path, name: str = "iris", version: str = "v1", weights: bytes = b"weights") -> Path:
    """A model in the store below `home`."""
    folder = home / "bentoml" / "models" / name / version
    (folder / "sub").mkdir(parents=True)
    (folder / "model.yaml").write_text(
        f"name: {name}\nversion: {version}\nmodule: sklearn\napi_version: v1\nlabels: {{stage: test}}\n"
        "options: {}\nmetadata: {}\ncontext: {framework_name: '', framework_versions: {}, bentoml_version: 1.4.39, "
        "python_version: 3.11.7}\ncreation_time: '2026-01-02T03:04:05+00:00'\n"
    )
    (folder / "weights.bin").write_bytes(weights)
    (folder / "sub" / "empty").touch()
    (folder.parent / "latest").write_text(version)
    return folder


def bento_folder(home: Path, name: str = "summarizer", version: str = "v1", models: str = "[]") -> Path:
    """A bento in the store below `home`."""
    folder = home / "bentoml" / "bentos" / name / version
    (folder / "src").mkdir(parents=True)
    (folder / "models" / "iris").mkdir(parents=True)
    (folder / "models" / "iris" / "weights").write_text("not sent")
    (folder / "bento.yaml").write_text(
        f"service: service:Summarizer\nname: {name}\nversion: {version}\nbentoml_version: 1.4.39\n"
        f"creation_time: '2026-01-02T03:04:05+00:00'\nlabels: {{}}\nmodels: {models}\nentry_service: Summarizer\n"
        "services:\n- {name: Summarizer, service: '', models: [], dependencies: [{service: Words}], config: {}}\n"
        "- {name: Words, service: '', models: [], dependencies: [], config: {}}\n"
        "envs: []\nschema: {name: Summarizer}\nspec: 2\nimage: {base_image: 'python:3.11-slim', python_version: '3.11'}\n"
    )
    (folder / "README.md").write_text("# Summaries\n")
    (folder / "src" / "service.py").write_text("x = 1\n")
    (folder.parent / "latest").write_text(version)
    return folder
