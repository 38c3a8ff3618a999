"""A real Kubernetes for tests: two nodes on this machine, those that `EKIBEN_TEST_CLUSTER` names (the folder of a cluster
which `make cluster` started), or another cluster that `EKIBEN_TEST_KUBECONFIG` names.

python -m tests.cluster up|down [DIR]       # what `make cluster` and `make cluster-down` do
python -m tests.cluster build               # only the programs
"""

import contextlib
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.bentoml_clients import cache_dir

VERSION = "v1.36.3"
NODES = 2
_SCRIPTS = Path(__file__).parent / "kubernetes" / "cluster"
_PROGRAMS = ("runc", "iptables", "conntrack", "socat", "ip", "openssl", "gcc", "kubectl", "go")
_DEFAULT = Path("/tmp/ekiben-cluster")
_REGISTRY_PORTS = range(5000, 5010)
ANOTHER = f"node-{NODES + 1}"
"""The node that `Cluster.another_node` adds, and the taint that it has."""


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs."""

    kubeconfig: Path
    folder: Path | None = None
    """Of one that was started here: state, logs, sockets."""
    registry: str = ""
    """Of another cluster: what its nodes call the registry that the tests' images are in."""

    def kubectl(self, *words: str, input: str | None = None, check: bool = True) -> str:
        """What kubectl prints."""
        done = subprocess.run(
            ["kubectl", "--kubeconfig", str(self.kubeconfig), *words],
            input=input,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert not check or done.returncode == 0, f"kubectl {' '.join(words)}: {done.stderr}"
        return done.stdout

    def get(self, *words: str) -> Any:
        """What `kubectl get … -o json` says."""
        return json.loads(self.kubectl("get", *words, "-o", "json"))

    @contextlib.contextmanager
    def passage(self) -> Iterator["Passage"]:
        """A name of this test's own under which nodes reach a registry on loopback, once it leads to one."""
        assert self.folder is not None, "another cluster's nodes do not reach this machine"
        with contextlib.ExitStack() as stack:
            for port in _REGISTRY_PORTS:
                lock = stack.enter_context(open(self.folder / f"registry-{port}.lock", "wb"))
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    yield Passage(f"127.0.0.1:{port}", self.folder / f"registry-{port}.sock")
                    return
            raise AssertionError("all names of registries are in use")

    @contextlib.contextmanager
    def serve_registry(self, host: str) -> Iterator[str]:
        """Let nodes pull from a registry on loopback; gives what they call it."""
        with self.passage() as passage, passage.to(host):
            yield passage.name

    @contextlib.contextmanager
    def serve_pods(self, host: str) -> Iterator[str]:
        """Let pods reach a server on loopback; gives the `HOST:PORT` at which they do."""
        assert self.folder is not None, "another cluster's pods do not reach this machine"
        with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory(prefix="ekp", dir="/tmp") as folder:
            passage = Passage(f"10.85.0.11:{random.randrange(20000, 30000)}", Path(folder) / "s")
            stack.enter_context(passage.to(host))
            address, _, port = passage.name.partition(":")
            listen = f"TCP-LISTEN:{port},bind={address},fork,reuseaddr"
            inside = ["nsenter", "--net=/run/netns/ek-node-1", "socat", listen, f"UNIX-CONNECT:{passage.socket}"]
            passing = subprocess.Popen(inside, stdin=subprocess.DEVNULL, start_new_session=True)
            stack.callback(passing.wait)
            stack.callback(passing.kill)
            yield passage.name

    @contextlib.contextmanager
    def another_node(self) -> Iterator["Node"]:
        """A node more while inside, `ANOTHER`. Only pods that tolerate its taint come to it, so that it may be hurt."""
        if self.folder is None:
            pytest.skip("another cluster takes no node of this machine")
        with open(self.folder / f"{ANOTHER}.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            node = Node(self.folder)
            try:
                node.script("network")
                node.script("start", ANOTHER)
                self.kubectl("wait", "--for=create", f"node/{ANOTHER}", "--timeout=60s")
                self.kubectl("wait", "--for=condition=Ready", f"node/{ANOTHER}", "--timeout=60s")
                yield node
            finally:
                node.script("stop")
                self.kubectl("delete", "node", ANOTHER, "--ignore-not-found", "--wait=false", check=False)


@dataclass(frozen=True)
class Node:
    """A node of a test's own."""

    folder: Path

    def script(self, what: str, *words: str) -> None:
        """See cluster/node.sh."""
        command = [_SCRIPTS / "node.sh", what, programs(), self.folder, str(NODES + 1), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"node.sh {what}: {done.stdout[-500:]} {done.stderr[-1000:]}"

    def kill(self) -> None:
        """SIGKILL to its kubelet, its containerd and all its containers at once."""
        self.script("kill")


@dataclass(frozen=True)
class Passage:
    """A way from the nodes to a registry."""

    name: str
    """What nodes call it."""
    socket: Path

    @contextlib.contextmanager
    def to(self, host: str) -> Iterator[None]:
        """Lead to this `HOST:PORT` while inside."""
        self.socket.unlink(missing_ok=True)
        command = ["socat", f"UNIX-LISTEN:{self.socket},fork,mode=600", f"TCP:{host}"]
        passing = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            while not self.socket.exists():
                assert passing.poll() is None, "socat ended"
                time.sleep(0.05)
            yield
        finally:
            passing.kill()
            passing.wait()
            self.socket.unlink(missing_ok=True)


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    if os.getuid() != 0:
        return "a cluster needs root"
    lacking = [name for name in _PROGRAMS if shutil.which(name) is None]
    if not Path("/usr/lib/cni/bridge").exists():
        lacking.append("containernetworking-plugins")
    if lacking:
        return f"a cluster needs {', '.join(lacking)} (see tests/kubernetes/cluster/README.md)"
    name = f"ek-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"a cluster needs network namespaces: {tried.stderr.strip()}" if tried.returncode else ""


def programs() -> Path:
    """The folder of the built programs; built here when they are not there."""
    folder = cache_dir() / f"kubernetes-{VERSION}"
    with open(f"{folder}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            subprocess.run([_SCRIPTS / "build.sh", folder], check=True, stdout=sys.stderr, timeout=3600)
            (folder / "complete").touch()
    return folder


def up(folder: Path, nodes: int = NODES) -> Cluster:
    """Start one."""
    done = subprocess.run(
        [_SCRIPTS / "up.sh", programs(), folder, str(nodes)], capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        down(folder)
        raise AssertionError(f"the cluster did not start: {done.stdout[-1000:]} {done.stderr[-2000:]}")
    return Cluster(folder / "admin.kubeconfig", folder)


def down(folder: Path) -> None:
    """Take one away."""
    subprocess.run([_SCRIPTS / "down.sh", programs(), folder], capture_output=True, timeout=300)


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster while inside; skipped where there can be none."""
    if given := os.environ.get("EKIBEN_TEST_KUBECONFIG"):
        yield Cluster(Path(given), registry=os.environ.get("EKIBEN_TEST_REGISTRY", ""))
        return
    if there := os.environ.get("EKIBEN_TEST_CLUSTER"):
        yield Cluster(Path(there) / "admin.kubeconfig", Path(there))
        return
    if reason := missing():
        pytest.skip(reason)
    if not os.environ.get("EKIBEN_TEST_KUBERNETES"):
        pytest.skip("a cluster is started only where EKIBEN_TEST_KUBERNETES=1 says so: `make test-kubernetes`")
    folder = Path(tempfile.mkdtemp(prefix="ekc", dir="/tmp"))
    # Names and addresses of a cluster are fixed: another test run waits for its turn.
    with open(cache_dir() / "cluster.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield up(folder)
        finally:
            down(folder)


if __name__ == "__main__":
    chosen = Path(sys.argv[2]) if len(sys.argv) > 2 else _DEFAULT
    if sys.argv[1:2] == ["down"]:
        down(chosen)
    elif sys.argv[1:2] == ["build"]:
        programs()
    elif reason := missing():
        sys.exit(f"There can be no cluster here: {reason}.")
    else:
        print(f"export KUBECONFIG={up(chosen).kubeconfig}")
