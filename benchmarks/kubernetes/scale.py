"""Many replica sets on a real control plane without nodes: calls and bytes, time to converge, memory, silence.

Beside it, the same Deployments by `kubectl apply --server-side`. The deployer's runtime is a process of its own, which
comes to the API through a proxy that counts; pods stay pending, so that the numbers are the API's and the deployer's.
EKIBEN_BENCH_SETS and EKIBEN_BENCH_REPLICAS say how many; 1,000 and 10 by default.
"""

import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.measure import Table
from services.deployer.runtimes import SetSpec
from services.deployer.runtimes.kubernetes import objects
from services.deployer.runtimes.kubernetes.names import Where
from services.deployer.runtimes.kubernetes.runtime import open_kubernetes_runtime
from tests.api_proxy import ApiProxy, api_proxy
from tests.control_plane import ControlPlane, control_plane
from tests.kubernetes_sets import a_set

SETS = int(os.environ.get("EKIBEN_BENCH_SETS", "1000"))
REPLICAS = int(os.environ.get("EKIBEN_BENCH_REPLICAS", "10"))
SILENCE_S = 60
WHERE = Where("bench", "ekiben")


def specs() -> list[SetSpec]:
    """The sets, the same at each call."""
    names = [f"deployments/d{number}" for number in range(SETS)]
    return [
        a_set(key=f"scale{number:08d}", deployment=name, deployment_uid=f"u{number}", service="Entry", entry=True)
        for number, name in enumerate(names)
    ]


# The deployer's part: a process of its own


async def deployer(kubeconfig: Path) -> None:
    """Do what the lines of standard input say, and answer each with a line of what it cost."""
    began, cpu = time.monotonic(), time.process_time()
    async with open_kubernetes_runtime(kubeconfig, "", WHERE) as runtime:
        await runtime.filled()
        for spec in specs():
            await runtime.apply(spec, REPLICAS)
        await runtime.settled()
        _told("settled", began, cpu)
        while word := (await asyncio.to_thread(sys.stdin.readline)).strip():
            began, cpu = time.monotonic(), time.process_time()
            if word == "change":
                await runtime.apply(replace(specs()[0], envs={"GREETING": str(began)}), REPLICAS)
                await runtime.settled()
            elif word == "scale":
                await runtime.scale(specs()[0].key, REPLICAS + 1)
                await runtime.settled()
            elif word == "observe":
                await runtime.observe()
            elif word == "pods":
                while sum(len(one.replicas) for one in await runtime.observe()) < SETS * REPLICAS:
                    await runtime.changed()
            _told(word, began, cpu)


def _told(what: str, began: float, cpu: float) -> None:
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    said = {"what": what, "s": time.monotonic() - began, "cpu_s": time.process_time() - cpu, "memory": memory}
    print(json.dumps(said), flush=True)


# The other side


@contextmanager
def proxied(plane: ControlPlane, folder: Path) -> Iterator[ApiProxy]:
    """The counting proxy, on a loop in a thread of its own."""
    ready, end = threading.Event(), asyncio.Event()
    found: list[Any] = []

    async def main() -> None:
        async with api_proxy(plane.kubeconfig, folder) as proxy:
            found.extend([proxy, asyncio.get_running_loop()])
            ready.set()
            await end.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    ready.wait()
    try:
        yield found[0]
    finally:
        found[1].call_soon_threadsafe(end.set)
        thread.join()


class Deployer:
    """The other process."""

    def __init__(self, proxy: ApiProxy) -> None:
        self._proxy = proxy
        self._before = (proxy.calls(), proxy.sent_bytes, proxy.received_bytes)
        command = [sys.executable, "-m", "benchmarks.kubernetes.scale", str(proxy.kubeconfig)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self, word: str = "") -> dict[str, Any]:
        """What the process says next, with the calls and bytes since the last time."""
        assert self._process.stdin is not None and self._process.stdout is not None
        if word:
            self._before = (self._proxy.calls(), self._proxy.sent_bytes, self._proxy.received_bytes)
            print(word, file=self._process.stdin, flush=True)
        said: dict[str, Any] = json.loads(self._process.stdout.readline())
        return said | self.calls()

    def calls(self) -> dict[str, Any]:
        """Calls and bytes since the last word."""
        calls, sent, received = self._before
        made = self._proxy.calls() - calls
        return {
            "calls": sum(made.values()),
            "writes": sum(count for name, count in made.items() if not name.startswith(("list", "get"))),
            "sent": self._proxy.sent_bytes - sent,
            "received": self._proxy.received_bytes - received,
        }

    def end(self) -> None:
        """End it, as a crash does."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> "Deployer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()


def run(rounds: int) -> None:
    """Once: it takes minutes."""
    table = Table(f"Kubernetes: {SETS:,} replica sets of {REPLICAS} pods")

    def row(what: str, told: dict[str, Any]) -> None:
        calls = f"{told['calls']:,} calls, {told['sent'] / 1024:,.0f} KiB out, {told['received'] / 1024:,.0f} KiB in"
        table.note(what, f"{told['s']:.1f} s, CPU {told['cpu_s']:.2f} s, {calls}")

    with tempfile.TemporaryDirectory() as name, control_plane(controllers=20) as plane:
        folder = Path(name)
        plane.cluster.kubectl("create", "namespace", WHERE.namespace)
        with proxied(plane, folder) as proxy:
            with Deployer(proxy) as first:
                row("all made", first.answer())
                row("all pods seen", first.answer("pods"))
                row("a variable changes", first.answer("change"))
                row("one replica more", first.answer("scale"))
                row("one look at all", first.answer("observe"))
                first.answer("observe")
                time.sleep(SILENCE_S)
                row(f"silence of {SILENCE_S} s", {"s": SILENCE_S, "cpu_s": 0.0} | first.calls())
            with Deployer(proxy) as second:
                row("another deployer takes over", second.answer())
                told = second.answer("observe")
            server, etcd = plane.memory_bytes("kube-apiserver") >> 20, plane.memory_bytes("etcd") >> 20
            table.note("memory of the deployer", f"{told['memory'] >> 20} MiB; kube-apiserver {server}, etcd {etcd}")
            row("kubectl apply of the Deployments alone", by_kubectl(plane, proxy, folder, specs()))
    table.print()


def by_kubectl(plane: ControlPlane, proxy: ApiProxy, folder: Path, specs: list[SetSpec]) -> dict[str, Any]:
    """What `kubectl apply --server-side` costs for the Deployments of these sets, which get no pods."""
    made = folder / "made"
    made.mkdir()
    for number in range(0, len(specs), 100):
        whole = {"apiVersion": "v1", "kind": "List", "items": [_by_hand(spec) for spec in specs[number : number + 100]]}
        (made / f"{number:05d}.json").write_text(json.dumps(whole))
    plane.cluster.kubectl("create", "namespace", "byhand")
    before = (proxy.calls(), proxy.sent_bytes, proxy.received_bytes)
    words = ["kubectl", "--kubeconfig", str(proxy.kubeconfig), "apply", "--server-side", "-f", str(made)]
    began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "s": time.monotonic() - began,
        "cpu_s": after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime,
        "calls": sum((proxy.calls() - before[0]).values()),
        "sent": proxy.sent_bytes - before[1],
        "received": proxy.received_bytes - before[2],
    }


def _by_hand(spec: SetSpec) -> dict[str, Any]:
    (made,) = [each for each in objects.objects(spec, 0, WHERE, "") if each["kind"] == "Deployment"]
    made["metadata"] = {"name": made["metadata"]["name"], "namespace": "byhand"}
    return made


if __name__ == "__main__":
    asyncio.run(deployer(Path(sys.argv[1])))
