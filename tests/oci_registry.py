"""A real OCI registry for tests and benchmarks: distribution 3, which keeps blobs as files of a folder.

It is built once, by Go, below `$EKIBEN_TEST_CACHE` or `~/.cache/ekiben-tests`:

    python -m tests.oci_registry        # build it (`make test-servers` does so), and print where it is

The fixture `oci_registry` (in tests/conftest.py) is one server for the session, open to everybody on loopback;
`oci_registry.new_repository()` gives a repository of its own to each test. A test that wants logins, TLS or a server that
it may damage starts its own by `run_registry`.
"""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bentoml_clients import cache_dir
from tests.certificates import certificates
from tests.platform import free_port

VERSION = "v3.1.2"
USER, PASSWORD = "ekiben-test", "ekiben-test-password"
_HTPASSWD = f"{USER}:$2b$04$E0C9G6VMqdIabYXwmF9jEOxpn1q15Be12GlNVeWj3VZUUAaXVesgq\n"
MISSING = "distribution, the OCI registry, is not built: it needs Go (Debian: apt-get install golang), then `make test-servers`"


@dataclass(frozen=True)
class OciRegistry:
    """A registry that runs."""

    host: str
    """`127.0.0.1:PORT`, as it stands in the name of an image."""
    endpoint: str
    """`http://HOST` or `https://HOST`."""
    folder: Path
    """What it keeps, below `docker/registry/v2`: a test may look, and damage."""
    log: Path
    pid: int
    certificates: Path | None = None
    """With TLS: the folder of ca.pem, and of cert.pem and key.pem, which a client may show too."""

    def new_repository(self, prefix: str = "test") -> str:
        """The name of a repository that nobody else uses."""
        return f"{prefix}/{os.urandom(6).hex()}"

    def blob(self, digest: str) -> Path:
        """The file that holds a blob's bytes."""
        hexed = digest.partition(":")[2]
        return self.folder / "docker/registry/v2/blobs/sha256" / hexed[:2] / hexed / "data"

    def auth(self) -> str:
        """The user and password of a registry with logins, as docker's `config.json` has them in `auth`."""
        return base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    def write_docker_config(self, folder: Path) -> Path:
        """A docker configuration with the login, for DOCKER_CONFIG (its folder) or skopeo's --authfile (the file)."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "config.json"
        file.write_text(json.dumps({"auths": {self.host: {"auth": self.auth()}}}))
        return file


def distribution(*, build: bool = True) -> Path | None:
    """The server's program; None where it is not there and there is no Go to build it with.

    Processes that ask at once wait for the one that builds.
    """
    home = cache_dir() / f"distribution-{VERSION}"
    program = home / "registry"
    if program.exists():
        return program
    go = shutil.which("go")
    if go is None or not build:
        return None
    home.mkdir(parents=True, exist_ok=True)
    with Path(f"{home}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            # Into a folder beside, then renamed: a build that is killed leaves nothing that would be taken for whole.
            with tempfile.TemporaryDirectory(dir=home) as folder:
                done = subprocess.run(
                    [go, "install", f"github.com/distribution/distribution/v3/cmd/registry@{VERSION}"],
                    env=os.environ | {"GOBIN": folder, "GOFLAGS": "-p=2", "CGO_ENABLED": "0"},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    raise RuntimeError(f"distribution could not be built:\n{done.stdout}{done.stderr}")
                (Path(folder) / "registry").rename(program)
    return program


@contextlib.contextmanager
def run_registry(
    folder: Path | None = None,
    *,
    login: bool = False,
    tls: bool = False,
    client_certificates: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[OciRegistry]:
    """Run a registry that keeps its content in `folder` (a new one, removed afterwards, by default) while inside.

    Args:
        login: Basic auth, by USER and PASSWORD.
        tls: HTTPS with a certificate of a private authority.
        client_certificates: Only who shows a certificate of that authority is let in; with `tls`.
        settings: More of distribution's configuration, by its first words: `{"auth": {"token": …}}`, say.

    Raises:
        FileNotFoundError: the program cannot be had here; the message says what is missing.
    """
    program = distribution()
    if program is None:
        raise FileNotFoundError(MISSING)
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(tempfile.mkdtemp(prefix="ek-oci-", dir="/tmp"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        data, certs = folder / "data", folder / "certificates"
        data.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "warn", "accesslog": {"disabled": True}},
            # Without the cache of descriptors: it goes on claiming blobs that a test took away.
            "storage": {"filesystem": {"rootdirectory": str(data), "maxthreads": 100}, "delete": {"enabled": True}},
            "http": {"secret": "test"},
        }
        if login:
            (folder / "htpasswd").write_text(_HTPASSWD)
            config["auth"] = {"htpasswd": {"realm": "Ekiben tests", "path": str(folder / "htpasswd")}}
        if tls and not certs.is_dir():
            certs.mkdir()
            certificates(certs)
        if tls:
            config["http"]["tls"] = {"certificate": str(certs / "cert.pem"), "key": str(certs / "key.pem")}
            if client_certificates:
                config["http"]["tls"]["clientcas"] = [str(certs / "ca.pem")]
        config |= settings or {}
        host, server = _start(program, folder, config, certs if tls else None)
        stack.callback(_stop, server)
        yield OciRegistry(host, f"http{'s' * tls}://{host}", data, folder / "log", server.pid, certs if tls else None)


def _start(
    program: Path, folder: Path, config: dict[str, Any], certs: Path | None
) -> tuple[str, "subprocess.Popen[bytes]"]:
    """A server that answers. A port that somebody else took meanwhile is given up for another."""
    for _ in range(5):
        host = f"127.0.0.1:{free_port()}"
        config["http"]["addr"] = host
        (folder / "config.yml").write_text(json.dumps(config))
        quiet = {name: value for name, value in os.environ.items() if not name.startswith(("REGISTRY_", "OTEL_"))}
        with (folder / "log").open("ab") as log:
            server = subprocess.Popen(
                [program, "serve", folder / "config.yml"],
                env=quiet | {"OTEL_TRACES_EXPORTER": "none"},
                stdout=log,
                stderr=log,
                cwd=folder,
            )
        deadline = time.monotonic() + 60
        while server.poll() is None and time.monotonic() < deadline:
            if _answers(host, certs):
                return host, server
            time.sleep(0.02)
        _stop(server)
    raise RuntimeError(f"distribution did not start:\n{(folder / 'log').read_text()[-2000:]}")


def _answers(host: str, certs: Path | None) -> bool:
    context = None
    if certs is not None:
        context = ssl.create_default_context(cafile=str(certs / "ca.pem"))
        context.load_cert_chain(certs / "cert.pem", certs / "key.pem")
    with contextlib.suppress(OSError):
        try:
            urllib.request.urlopen(f"http{'s' * bool(certs)}://{host}/v2/", timeout=2, context=context).close()
        except urllib.error.HTTPError as answer:
            return answer.code == 401
        return True
    return False


def _stop(server: "subprocess.Popen[bytes]") -> None:
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


if __name__ == "__main__":
    built = distribution()
    print(built or MISSING, file=sys.stdout if built else sys.stderr)
