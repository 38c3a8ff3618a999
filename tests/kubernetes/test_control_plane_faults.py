"""What a cluster's control plane may suffer, on one of this module's own: killed, without history, set back in time.

There are no nodes, so pods stay pending: all here is between the deployer and the API.
"""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from services.deployer.runtimes import SetStatus
from services.deployer.runtimes.kubernetes.names import INSTALLATION, Where, name_of
from services.deployer.runtimes.kubernetes.runtime import KubernetesRuntime, open_kubernetes_runtime
from tests.cluster import Cluster
from tests.control_plane import ControlPlane, control_plane
from tests.fixtures_kernel import until
from tests.kubernetes_sets import a_set

KINDS = "serviceaccounts,secrets,services,networkpolicies,poddisruptionbudgets,deployments"


@pytest.fixture(scope="module")
def plane() -> Iterator[ControlPlane]:
    """A control plane that may be broken."""
    if not (os.environ.get("EKIBEN_TEST_KUBERNETES") or os.environ.get("EKIBEN_TEST_CLUSTER")):
        pytest.skip("a control plane is started only where EKIBEN_TEST_KUBERNETES=1 says so: `make test-kubernetes`")
    with control_plane() as found:
        found.cluster.kubectl("create", "namespace", "ekiben")
        yield found


@pytest.fixture
def where() -> Where:
    """An installation of each test's own."""
    return Where(os.urandom(4).hex(), "ekiben")


@asynccontextmanager
async def running(plane: ControlPlane, where: Where) -> AsyncIterator[KubernetesRuntime]:
    async with open_kubernetes_runtime(plane.kubeconfig, "", where) as runtime:
        await asyncio.wait_for(runtime.filled(), 30)
        yield runtime


async def status_of(runtime: KubernetesRuntime, key: str) -> SetStatus:
    (found,) = [one for one in await runtime.observe() if one.key == key]
    return found


async def number(cluster: Cluster, where: Where, kinds: str) -> int:
    words = ("-n", where.namespace, "-l", f"{INSTALLATION}={where.installation}")
    return len((await asyncio.to_thread(cluster.get, kinds, *words))["items"])


async def pods(cluster: Cluster, where: Where, count: int) -> None:
    async def there() -> bool:
        return await number(cluster, where, "pods") == count

    await until(there, f"{count} pods", 60)


async def quiet(runtime: KubernetesRuntime, key: str) -> None:
    async def nothing_said() -> bool:
        return (await status_of(runtime, key)).note == ""

    await until(nothing_said, "nothing is wrong any more", 60)


async def test_an_api_server_that_is_killed_within_a_change_and_its_history_with_it(
    plane: ControlPlane, where: Where
) -> None:
    spec = a_set()
    async with running(plane, where) as runtime:
        await runtime.apply(spec, 1)
        await pods(plane.cluster, where, 1)
        await runtime.apply(replace(spec, envs={"GREETING": "goodbye"}), 2)
        plane.stop("kube-apiserver")

        async def told() -> bool:
            return "does not answer" in (await status_of(runtime, spec.key)).note

        await until(told, "it is said", 30)
        assert (await status_of(runtime, spec.key)).asked == 2
        await asyncio.to_thread(plane.compact)
        await asyncio.to_thread(plane.start)
        await pods(plane.cluster, where, 2)
        await quiet(runtime, spec.key)
        # It hears of what comes after, too.
        name = name_of(spec.key)
        await asyncio.to_thread(plane.cluster.kubectl, "delete", "service", name, "-n", where.namespace)

        async def back() -> bool:
            return await number(plane.cluster, where, KINDS) == len(KINDS.split(","))

        await until(back, "the Service is back", 30)


async def test_etcd_that_is_set_back_gets_what_it_forgot(plane: ControlPlane, where: Where, tmp_path: Path) -> None:
    old, new, gone = a_set(), a_set(), a_set()
    async with running(plane, where) as runtime:
        await runtime.apply(old, 1)
        await runtime.apply(gone, 1)
        await pods(plane.cluster, where, 2)
        with plane.stopped() as data:
            shutil.copytree(data, tmp_path / "before")
        await quiet(runtime, old.key)
        await runtime.apply(replace(old, envs={"GREETING": "goodbye"}), 3)
        await runtime.apply(new, 1)
        await runtime.scale(gone.key, 0)
        await pods(plane.cluster, where, 4)
        with plane.stopped() as data:
            shutil.rmtree(data)
            shutil.copytree(tmp_path / "before", data)

        async def as_asked() -> bool:
            for one in await runtime.observe():  # As the reconciler does with what no deployment wants.
                if one.key == gone.key:
                    await runtime.scale(one.key, 0)
            return await number(plane.cluster, where, "deployments") == 2 and (
                await number(plane.cluster, where, "pods") == 4
            )

        await until(as_asked, "all is as it was asked", 90)
        await quiet(runtime, old.key)
        secret = await asyncio.to_thread(plane.cluster.get, "secret", name_of(old.key), "-n", where.namespace)
        assert secret["data"]["env.GREETING"] == "Z29vZGJ5ZQ=="
