"""The whole deployer with many deployments on a real control plane: each made by the API, their pods said to be ready.

The deployer is a process of its own with its database, registry and a gateway that follows its routes; it comes to the
API through a proxy that counts. `tests/simulated_node.py` says that pods run, so that rollouts go on and the routes
have all of them. EKIBEN_BENCH_SETS and EKIBEN_BENCH_REPLICAS say how many; 1,000 and 10 by default.
"""

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from benchmarks.kubernetes.scale import by_kubectl, specs
from benchmarks.measure import Table, cpu_s, rss_mib
from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployer.v1 import images_pb2
from tests.api_proxy import ApiProxy, api_proxy
from tests.control_plane import control_plane
from tests.fixtures_builder import running_registry
from tests.fixtures_deployer import Built, DeployerProcess, Suite, calling, running_builds

DEPLOYMENTS = int(os.environ.get("EKIBEN_BENCH_SETS", "1000"))
REPLICAS = int(os.environ.get("EKIBEN_BENCH_REPLICAS", "10"))
SILENCE_S = 60
AT_ONCE = 8
NAMESPACE = "ekiben"
IMAGE = f"docker://registry.test/entry@sha256:{'ab' * 32}"
DESCRIBED = """\
service: service:Entry
name: entry
version: v1
bentoml_version: 1.4.0
creation_time: '2026-01-01T00:00:00+00:00'
entry_service: Entry
services:
- {name: Entry, service: '', models: [], dependencies: [], config: {}}
models: []
envs: []
schema: {}
"""


class Meter:
    """What the deployer does: its CPU, calls of the cluster's API, bytes of routes."""

    def __init__(self, table: Table, deployer: DeployerProcess, proxy: ApiProxy, suite: Suite) -> None:
        self._table, self._deployer, self._proxy, self._suite = table, deployer, proxy, suite

    @asynccontextmanager
    async def of(self, what: str) -> AsyncIterator[None]:
        """A row for what is done inside."""
        before, began = self._so_far(), time.monotonic()
        yield
        wall = time.monotonic() - began
        cpu, calls, sent, received, routes = (after - was for after, was in zip(self._so_far(), before, strict=True))
        said = (
            f"{wall:.1f} s, CPU {cpu:.2f} s, {calls:,} calls, {sent / 1024:,.0f} KiB out, {received / 1024:,.0f} KiB in"
        )
        memory = rss_mib([self._pid])
        self._table.note(what, f"{said}, routes {routes}, {memory:.0f} MiB")
        print(f"{what}: {said}, routes {routes}, {memory:.0f} MiB", file=sys.stderr, flush=True)

    @property
    def _pid(self) -> int:
        assert self._deployer.process is not None
        return self._deployer.process.pid

    def _so_far(self) -> tuple[float, int, int, int, int]:
        calls, proxy = sum(self._proxy.calls().values()), self._proxy
        return cpu_s([self._pid]), calls, proxy.sent_bytes, proxy.received_bytes, self._suite.table.version


async def until(condition: Callable[[], bool], timeout_s: float = 3600.0) -> None:
    """Return once it is so."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.2)


async def measure(table: Table) -> None:
    """One round."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ekd-", dir="/tmp")))
        plane = stack.enter_context(control_plane(controllers=20, without=("node-lifecycle-controller",)))
        plane.cluster.kubectl("create", "namespace", NAMESPACE)
        command = [sys.executable, "-m", "tests.simulated_node", str(plane.kubeconfig)]
        node = subprocess.Popen(command)  # noqa: ASYNC220
        stack.callback(node.wait)
        stack.callback(node.kill)
        proxy = await stack.enter_async_context(api_proxy(plane.kubeconfig, folder))
        registry = await stack.enter_async_context(running_registry(folder / "registry"))
        builds, peer = await stack.enter_async_context(running_builds(registry))
        deployer = DeployerProcess(
            registry,
            peer,
            folder / "deployer",
            run_dir,
            runtime="kubernetes",
            kubeconfig=proxy.kubeconfig,
            kubernetes_namespace=NAMESPACE,
            port_range="none",
        )
        stack.callback(deployer.kill)
        await deployer.start()
        suite = await stack.enter_async_context(calling(registry, deployer.address, deployer.settings, builds))
        bento = await suite.push(_bento(folder))
        meter = Meter(table, deployer, proxy, suite)
        rows = folder / "deployer" / "deployer.db"
        async with meter.of(f"{DEPLOYMENTS:,} deployments made by the API"):
            await _each(lambda number: _create(suite, bento, number))
        async with meter.of("until all run"):
            await until(lambda: _running(rows) == DEPLOYMENTS)
        async with meter.of("until it is quiet"):
            await asyncio.sleep(15)
        async with meter.of(f"silence of {SILENCE_S} s"):
            await asyncio.sleep(SILENCE_S)
        async with meter.of("one replica more"):
            scale = pb.ScaleDeploymentRequest(name="deployments/d0", replicas=REPLICAS + 1)
            await suite.deployments.ScaleDeployment(scale)
            await suite.until("d0", lambda one: one.replica_counts["Entry"].ready == REPLICAS + 1, 600)
            await suite.running("d0", 2)
        async with meter.of(f"a variable changes: {REPLICAS} pods anew, one by one"):
            found = await suite.get("d1")
            found.template.envs.add(name="GREETING", value="hello")
            await suite.deployments.UpdateDeployment(pb.UpdateDeploymentRequest(deployment=found))
            await suite.running("d1", 2, timeout_s=600)
        deployer.kill()
        suite.table.Clear()
        async with meter.of("another start, until the routes are there"):
            await deployer.start()
            await until(lambda: _endpoints(suite) == DEPLOYMENTS * REPLICAS + 1)
        async with meter.of("the 30 s after that"):
            await asyncio.sleep(30)
        async with meter.of(f"silence of {SILENCE_S} s again"):
            await asyncio.sleep(SILENCE_S)
        table.note("the route table", f"{suite.table.ByteSize() >> 10} KiB")
        told = await asyncio.to_thread(by_kubectl, plane, proxy, folder, specs())
        said = (
            f"{told['s']:.1f} s, CPU {told['cpu_s']:.2f} s, {told['calls']:,} calls, {told['sent'] / 1024:,.0f} KiB out"
        )
        table.note("kubectl apply of the Deployments alone", f"{said}, {told['received'] / 1024:,.0f} KiB in")
        table.note(
            "memory of kube-apiserver, etcd",
            f"{plane.memory_bytes('kube-apiserver') >> 20}, {plane.memory_bytes('etcd') >> 20} MiB",
        )


async def _each(make: Callable[[int], Awaitable[None]]) -> None:
    numbers = iter(range(DEPLOYMENTS))

    async def work() -> None:
        for number in numbers:
            await make(number)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(AT_ONCE):
            tasks.create_task(work())


async def _create(suite: Suite, bento: str, number: int) -> None:
    template = pb.Template(image=images_pb2.PrebuiltImage(reference=IMAGE))
    scaling = {"Entry": pb.Scaling(min_replicas=REPLICAS, max_replicas=REPLICAS)}
    await suite.create(f"d{number}", bento, template=template, scaling=scaling)


def _running(rows: Path) -> int:
    query = "SELECT count(*) FROM deployments WHERE json_extract(status, '$.state') = 'RUNNING'"
    with contextlib.closing(sqlite3.connect(f"file:{rows}?mode=ro", uri=True)) as connection:
        return int(connection.execute(query).fetchone()[0])


def _endpoints(suite: Suite) -> int:
    return sum(len(target.endpoints) for route in suite.table.routes for target in route.targets)


def _bento(folder: Path) -> Built:
    made = folder / "entry" / "v1"
    made.mkdir(parents=True)
    (made / "bento.yaml").write_text(DESCRIBED)
    return Built(made)


def run(rounds: int) -> None:
    """Once: it takes minutes."""
    table = Table(f"Kubernetes: {DEPLOYMENTS:,} deployments of {REPLICAS} replicas, the whole deployer")
    asyncio.run(measure(table))
    table.print()
