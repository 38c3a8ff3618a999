"""A real API server, etcd and controller manager on loopback: a cluster without nodes, which may be broken at will.

It needs neither root nor a network of its own, and stands beside any other cluster.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.cluster import Cluster, programs

TOKEN = "of-these-tests-alone"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class ControlPlane:
    """See the module. Made by `control_plane`."""

    def __init__(
        self, folder: Path, *, controllers: int = 5, calls_per_s: int = 500, without: Sequence[str] = ()
    ) -> None:
        """`without`: controllers that are left out."""
        self._folder, self._programs, self._without = folder, programs(), without
        self._controllers, self._calls_per_s = controllers, calls_per_s
        self._api, self._etcd, self._peer = _free_port(), _free_port(), _free_port()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        encoding, clear = serialization.Encoding.PEM, serialization.NoEncryption()
        self._write("sa.key", key.private_bytes(encoding, serialization.PrivateFormat.TraditionalOpenSSL, clear))
        public = key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
        self._write("sa.pub", public)
        self._write("tokens.csv", f'{TOKEN},admin,admin,"system:masters"\n'.encode())
        self.kubeconfig = self._write("admin.kubeconfig", yaml.safe_dump(self._access()).encode())
        self.cluster = Cluster(self.kubeconfig)

    def start(self) -> None:
        """Start what does not run, and wait until the API answers."""
        if "etcd" not in self._running:
            url, peer = f"http://127.0.0.1:{self._etcd}", f"http://127.0.0.1:{self._peer}"
            words = ["--name=etcd", f"--data-dir={self._folder / 'etcd'}", "--unsafe-no-fsync", "--log-level=error"]
            words += [f"--listen-client-urls={url}", f"--advertise-client-urls={url}", f"--listen-peer-urls={peer}"]
            words += [f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=etcd={peer}"]
            self._run("etcd", words)
        if "kube-apiserver" not in self._running:
            words = [f"--etcd-servers=http://127.0.0.1:{self._etcd}", "--bind-address=127.0.0.1"]
            words += [f"--secure-port={self._api}", f"--cert-dir={self._folder}", "--authorization-mode=RBAC"]
            words += [f"--token-auth-file={self._folder / 'tokens.csv'}", "--service-cluster-ip-range=10.97.0.0/16"]
            words += ["--service-account-issuer=https://kubernetes.default.svc"]
            words += [f"--service-account-key-file={self._folder / 'sa.pub'}"]
            words += [f"--service-account-signing-key-file={self._folder / 'sa.key'}", "--watch-cache=true"]
            self._run("kube-apiserver", words)
        self._until_ready()
        if "kube-controller-manager" not in self._running:
            words = [f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", f"--secure-port={_free_port()}"]
            words += [f"--service-account-private-key-file={self._folder / 'sa.key'}", f"--cert-dir={self._folder}"]
            words += [f"--kube-api-qps={self._calls_per_s}", f"--kube-api-burst={2 * self._calls_per_s}"]
            words += [f"--concurrent-deployment-syncs={self._controllers}", "--bind-address=127.0.0.1"]
            words += [f"--concurrent-replicaset-syncs={self._controllers}"]
            words += [f"--controllers={','.join(['*', *(f'-{name}' for name in self._without)])}"]
            self._run("kube-controller-manager", words)

    def stop(self, *names: str) -> None:
        """End programs at once, as a machine does that loses its power."""
        for name in names or tuple(self._running):
            if (process := self._running.pop(name, None)) is not None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def memory_bytes(self, name: str) -> int:
        """What a program of it uses."""
        return int(Path(f"/proc/{self._running[name].pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def compact(self) -> None:
        """Forget all history up to now."""
        base = f"http://127.0.0.1:{self._etcd}/v3/kv"
        revision = _post(f"{base}/range", {"key": "AA=="})["header"]["revision"]
        _post(f"{base}/compaction", {"revision": revision, "physical": True})

    @contextlib.contextmanager
    def stopped(self) -> Iterator[Path]:
        """Everything stopped, with the folder of etcd's data; started again at the end."""
        self.stop()
        try:
            yield self._folder / "etcd"
        finally:
            self.start()

    def _run(self, name: str, words: list[str]) -> None:
        with open(self._folder / f"{name}.log", "ab") as log:
            command = [self._programs / name, *words]
            self._running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _until_ready(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if "ok" in self.cluster.kubectl("get", "--raw", "/readyz", check=False):
                return
            for name, process in self._running.items():
                assert process.poll() is None, f"{name}: {(self._folder / f'{name}.log').read_text()[-2000:]}"
            time.sleep(0.2)
        raise AssertionError(f"no API: {(self._folder / 'kube-apiserver.log').read_text()[-2000:]}")

    def _write(self, name: str, content: bytes) -> Path:
        path = self._folder / name
        path.write_bytes(content)
        path.chmod(0o600)
        return path

    def _access(self) -> dict[str, object]:
        server = {"server": f"https://127.0.0.1:{self._api}", "insecure-skip-tls-verify": True}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": server}],
            "users": [{"name": "u", "user": {"token": TOKEN}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "c",
        }


def _post(url: str, body: dict[str, object]) -> dict[str, dict[str, str]]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return dict(json.loads(answer.read()))


@contextlib.contextmanager
def control_plane(*, controllers: int = 5, without: Sequence[str] = ()) -> Iterator[ControlPlane]:
    """One while inside, with all its state in a folder that goes at the end."""
    folder = Path(tempfile.mkdtemp(prefix="ekplane", dir="/tmp"))
    plane = ControlPlane(folder, controllers=controllers, without=without)
    try:
        plane.start()
        yield plane
    finally:
        plane.stop()
        shutil.rmtree(folder, ignore_errors=True)
