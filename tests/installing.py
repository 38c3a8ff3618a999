"""What tests of the chart need around it: the platform's image, volumes, packages for pods that reach no index."""

import contextlib
import fcntl
import http.client
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from uv import find_uv_bin

from tests.base_image import base_image
from tests.bentoml_clients import cache_dir
from tests.cluster import Cluster
from tests.platform import ROOT, run, wait_for

USER = 10001
_WHEELS = ("bentoml==1.4.39", "opentelemetry-exporter-otlp", "opentelemetry-exporter-otlp-proto-http")
"""What the builder puts into the environment of a bento that asks for nothing more."""


def platform_image(output: str, insecure: str = "") -> str:
    """Make the platform's own image there; its digest. What was made before is not made again."""
    command = [sys.executable, str(ROOT / "tools" / "platform_image.py"), "--base", base_image(), "--output", output]
    env = os.environ | {"EKIBEN_REGISTRY_INSECURE": insecure}
    done = run([*command, "--cache", str(cache_dir() / "platform-image")], env=env, timeout_s=600)
    return done.stdout.strip().splitlines()[-1]


def wheels() -> Path:
    """A folder with what bentos of the tests need, for the base image."""
    folder = cache_dir() / "wheels-bentoml-1.4.39"
    with open(f"{folder}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache_dir()) as work:
                made, wanted = Path(work) / "wheels", Path(work) / "wanted.txt"
                wanted.write_text("\n".join(_WHEELS) + "\n")
                target = ["--python-version", "3.11.2", "--python-platform", "x86_64-manylinux_2_36"]
                lock_file = Path(work) / "lock.txt"
                command = [find_uv_bin(), "pip", "compile", "-q", str(wanted), *target, "--only-binary", ":all:"]
                run([*command, "-o", str(lock_file)], env=os.environ, timeout_s=300)
                newest = [word for minor in range(36, 4, -1) for word in ("--platform", f"manylinux_2_{minor}_x86_64")]
                older = [
                    word
                    for name in ("2014_x86_64", "2010_x86_64", "1_x86_64")
                    for word in ("--platform", f"manylinux{name}")
                ]
                command = ["pip", "download", "-q", "--only-binary", ":all:", "--no-deps", "--python-version", "3.11"]
                pip = [sys.executable, "-m", *command, *newest, *older, "--platform", "any"]
                run([*pip, "-r", str(lock_file), "-d", str(made)], env=os.environ, timeout_s=600)
                made.rename(folder)
    return folder


@contextlib.contextmanager
def volume(cluster: Cluster, namespace: str, claim: str) -> Iterator[Path]:
    """A folder of this machine as the volume of a claim, where the cluster has no storage of its own."""
    name = f"{namespace}-{claim}"
    folder = Path(tempfile.mkdtemp(prefix="ekv", dir="/tmp"))
    os.chown(folder, USER, USER)
    made = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "hostPath": {"path": str(folder)},
            "claimRef": {"namespace": namespace, "name": claim},
        },
    }
    cluster.kubectl("apply", "-f", "-", input=yaml.safe_dump(made))
    try:
        yield folder
    finally:
        cluster.kubectl("delete", "pv", name, "--ignore-not-found", "--wait=false", check=False)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def told(cluster: Cluster, namespace: str) -> Iterator[None]:
    """A failure inside shows what the pods of the namespace say."""
    try:
        yield
    except BaseException:
        print(cluster.kubectl("get", "pods,pvc", "-n", namespace, "-o", "wide", check=False))
        print(cluster.kubectl("get", "events", "-n", namespace, "--sort-by=.lastTimestamp", check=False)[-6000:])
        for pod in cluster.get("pods", "-n", namespace)["items"]:
            name = pod["metadata"]["name"]
            print(f"--- {name}\n", cluster.kubectl("logs", "-n", namespace, name, "--tail=60", check=False))
        raise


def free_node_port(cluster: Cluster) -> int:
    """A node port that no Service has."""
    services = cluster.get("services", "-A")["items"]
    taken = {port.get("nodePort") for each in services for port in each["spec"].get("ports") or ()}
    return random.choice([port for port in range(30000, 32768) if port not in taken])


def written(path: Path, values: Mapping[str, Any]) -> Path:
    """The file with these values."""
    path.write_text(yaml.safe_dump(dict(values)))
    return path


@contextlib.contextmanager
def way(cluster: Cluster, target: str) -> Iterator[str]:
    """`HOST:PORT` under which pods reach a server of this machine while inside; `target` is a Unix socket's path, or
    `HOST:PORT` on loopback.

    A node listens for it, and a Unix socket leads out of the node's network: nothing here listens for strangers.
    """
    if cluster.folder is None:
        pytest.skip("pods of another cluster reach no server of this machine")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ekw", dir="/tmp")))
        socket = Path(target)
        if not target.startswith("/"):
            socket = folder / "way.sock"
            stack.enter_context(_socat(f"UNIX-LISTEN:{socket},fork,mode=600", f"TCP:{target}"))
            wait_for("the way's socket", socket.exists)
        (node,) = [
            each["address"]
            for each in cluster.get("node", "node-1")["status"]["addresses"]
            if each["type"] == "InternalIP"
        ]
        port = random.randrange(20000, 29000)
        listen = f"TCP-LISTEN:{port},bind={node},fork,reuseaddr"
        inside = ("nsenter", "--net=/run/netns/ek-node-1")
        stack.enter_context(_socat(listen, f"UNIX-CONNECT:{socket}", before=inside))
        yield f"{node}:{port}"


@contextlib.contextmanager
def _socat(source: str, target: str, before: Sequence[str] = ()) -> Iterator[None]:
    command = [*before, "socat", source, target]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Load:
    """Callers of one URL while inside, each again and again, on a connection that it keeps while the other side does."""

    def __init__(self, url: str, headers: Mapping[str, str], callers: int = 3) -> None:
        self.answered = 0
        self.failed: list[str] = []
        self._stop = threading.Event()
        self._url, self._headers = urlsplit(url), dict(headers)
        self._threads = [threading.Thread(target=self._call) for _ in range(callers)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _call(self) -> None:
        connection: http.client.HTTPConnection | None = None
        while not self._stop.is_set():
            try:
                if connection is None:
                    connection = http.client.HTTPConnection(str(self._url.hostname), self._url.port or 80, timeout=60)
                connection.request("POST", self._url.path, b"{}", self._headers)
                answer = connection.getresponse()
                body = answer.read()
                self.answered += 1
                if answer.status != 200:
                    self.failed.append(f"{answer.status} {body!r}")
                if answer.will_close:
                    connection.close()
                    connection = None
            except (OSError, http.client.HTTPException) as exc:
                self.failed.append(repr(exc))
                connection = None
