"""A real ingress controller for tests: Contour, which has an Envoy (the gateway's own program) route by Ingresses and HTTPRoutes.

It is built once, by Go, below `$EKIBEN_TEST_CACHE` or `~/.cache/ekiben-tests`; tests that want it are skipped until then:

    python -m tests.ingress_controller        # build it (some minutes), and print where it is
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from services.gateway.envoy import envoy_path
from tests.bentoml_clients import cache_dir
from tests.cluster import Cluster
from tests.platform import free_port, wait_for

VERSION = "v1.33.8"
GATEWAY_API = "v1.4.0"
CLASS = "ekiben-test"
ADDRESS = "192.0.2.7"
"""What it says that clients reach it by: of no network."""
_MODULE = "github.com/projectcontour/contour"
MISSING = "Contour, the ingress controller, is not built: it needs Go 1.26, then `python -m tests.ingress_controller`"


@dataclass(frozen=True)
class Controller:
    """A controller that runs, and its Envoy on loopback."""

    http: int
    https: int
    log: Path


def contour(*, build: bool = True) -> Path | None:
    """The program; None where it is not there and may not or cannot be built."""
    home = cache_dir() / f"contour-{VERSION}"
    program = home / "contour"
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
                subprocess.run(
                    [go, "install", "-trimpath", "-ldflags=-s -w", f"{_MODULE}/cmd/contour@{VERSION}"],
                    env=os.environ | {"GOBIN": folder, "GOFLAGS": "-p=2", "CGO_ENABLED": "0"},
                    check=True,
                )
                (Path(folder) / "contour").rename(program)
    return program


def module(path: str, version: str) -> Path | None:
    """The folder of a Go module; None where there is no Go, or the module is not to be had."""
    with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError, subprocess.TimeoutExpired):
        command = ["go", "mod", "download", "-json", f"{path}@{version}"]
        done = subprocess.run(command, capture_output=True, check=True, timeout=120, cwd="/")
        return Path(json.loads(done.stdout)["Dir"])
    return None


def gateway_api() -> Path | None:
    """The folder with the definitions of the Gateway API."""
    found = module("sigs.k8s.io/gateway-api", GATEWAY_API)
    return found / "config" / "crd" / "standard" if found else None


@contextlib.contextmanager
def definitions_lock(cluster: Cluster) -> Iterator[None]:
    """Names of definitions are fixed: of test runs on one cluster one at a time."""
    with open((cluster.folder or Path("/tmp")) / "definitions.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def installed(cluster: Cluster, *files: Path) -> Iterator[None]:
    """Definitions of resources, while inside."""
    words = [word for file in files for word in ("-f", str(file))]
    try:
        cluster.kubectl("apply", *words)
        cluster.kubectl("wait", "--for=condition=Established", "--timeout=60s", *words)
        yield
    finally:
        cluster.kubectl("delete", "--ignore-not-found", *words, check=False)


@contextlib.contextmanager
def run_controller(cluster: Cluster, namespace: str, gateway: str, folder: Path) -> Iterator[Controller]:
    """Contour for one namespace and the Gateway `gateway` of it, with an Envoy on loopback.

    Raises:
        FileNotFoundError: the program, or the definitions that it needs, cannot be had here.
    """
    # Where a cluster is asked for, a build that goes on is waited for.
    asked = bool(os.environ.get("EKIBEN_TEST_KUBERNETES"))
    program, own, definitions = contour(build=asked), module(_MODULE, VERSION), gateway_api()
    if program is None or own is None or definitions is None:
        raise FileNotFoundError(MISSING)
    http, https, xds, health, metrics, stats, debug = (free_port() for _ in range(7))
    config = {
        "gateway": {"gatewayRef": {"name": gateway, "namespace": namespace}},
        "policy": {"request-headers": {"set": {}}},
    }
    (folder / "contour.yaml").write_text(json.dumps(config))
    serve = [
        *(
            str(program),
            "serve",
            "--kubeconfig",
            str(cluster.kubeconfig),
            "--config-path",
            str(folder / "contour.yaml"),
        ),
        *("--insecure", "--disable-leader-election", f"--watch-namespaces={namespace}", "--xds-address=127.0.0.1"),
        *(f"--ingress-class-name={CLASS}", f"--ingress-status-address={ADDRESS}", f"--xds-port={xds}"),
        *("--envoy-service-http-address=127.0.0.1", f"--envoy-service-http-port={http}"),
        *("--envoy-service-https-address=127.0.0.1", f"--envoy-service-https-port={https}"),
        *(
            "--health-address=127.0.0.1",
            f"--health-port={health}",
            "--http-address=127.0.0.1",
            f"--http-port={metrics}",
        ),
        *("--stats-address=127.0.0.1", f"--stats-port={stats}", "--debug-http-address=127.0.0.1"),
        f"--debug-http-port={debug}",
        *(f"--disable-feature={name}" for name in ("extensionservices", "tlsroutes", "grpcroutes", "tcproutes")),
        "--disable-feature=backendtlspolicies",
    ]
    boot = ["bootstrap", str(folder / "envoy.json"), "--xds-address=127.0.0.1", f"--xds-port={xds}"]
    subprocess.run(
        [str(program), *boot, f"--admin-address={folder / 'admin.sock'}", f"--namespace={namespace}"], check=True
    )
    envoy = [envoy_path(), "--config-path", str(folder / "envoy.json"), "--disable-hot-restart", "--concurrency", "1"]
    envoy += ["--service-node", "test", "--service-cluster", "test", "--log-level", "warning"]
    log = folder / "log"
    with definitions_lock(cluster), contextlib.ExitStack() as stack:
        crds = [own / "examples" / "contour" / "01-crds.yaml", *sorted(definitions.glob("gateway.*.yaml"))]
        stack.enter_context(installed(cluster, *crds))
        output = stack.enter_context(log.open("wb"))
        for command in (serve, envoy):
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
        wait_for("the controller", lambda: b"started xDS server" in log.read_bytes(), 60)
        yield Controller(http, https, log)


if __name__ == "__main__":
    found = contour()
    print(found) if found else sys.exit(MISSING)
