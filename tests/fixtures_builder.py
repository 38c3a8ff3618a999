"""What the builder's tests share: a package index of their own, bentos that ask it for packages, a running builder.

The index is a real HTTP server with the simple API, hashes included; the wheels are a few hundred bytes. `bentoml` in it
is a stand-in that can be imported, so an environment is made in half a second and without the internet.
"""

import base64
import contextlib
import hashlib
import http.server
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml


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
                body = index.page(name.strip("/")).encode() or None
            elif kind == "files":
                _ = self.command == "GET" and index.held.wait(30)
                body = index.files.get(name)
            return self._answer(404, b"nothing") if body is None else self._answer(200, body)

        do_HEAD = do_GET

        def _answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if self.path.startswith("/simple") else "application/zip")
            self.send_header("Content-Length", str(len(body)))
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
