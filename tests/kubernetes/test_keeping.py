"""What the Kubernetes runtime keeps, against the API of a real cluster behind a proxy that counts, cuts and goes away.

The pods are too large for any node, so that they stay pending: all here is between the deployer and the API.
"""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from services.deployer.runtimes import Phase, SetStatus
from services.deployer.runtimes.kubernetes.keeping import MADE
from services.deployer.runtimes.kubernetes.names import INSTALLATION, Where, name_of
from services.deployer.runtimes.kubernetes.pulling import Login, Logins
from services.deployer.runtimes.kubernetes.runtime import KubernetesRuntime, open_kubernetes_runtime
from services.kernel.clock import SystemClock
from tests.api_proxy import ApiProxy, api_proxy
from tests.cluster import Cluster
from tests.cluster_platform import new_namespace
from tests.fixtures_kernel import until
from tests.kubernetes_sets import a_set

EACH = ("serviceaccount", "secret", "service", "networkpolicy", "poddisruptionbudget", "deployment")


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of this module's own."""
    with new_namespace(cluster, "keeping") as name:
        yield name


@pytest.fixture
def where(namespace: str) -> Where:
    """An installation of each test's own."""
    return Where(os.urandom(4).hex(), namespace)


@asynccontextmanager
async def running(proxy: ApiProxy, where: Where) -> AsyncIterator[KubernetesRuntime]:
    async with open_kubernetes_runtime(proxy.kubeconfig, "", where) as runtime:
        await asyncio.wait_for(runtime.filled(), 30)
        yield runtime


async def status_of(runtime: KubernetesRuntime, key: str) -> SetStatus:
    (found,) = [one for one in await runtime.observe() if one.key == key]
    return found


def objects_of(cluster: Cluster, where: Where, kinds: tuple[str, ...] = EACH) -> dict[str, str]:
    """uid by kind and name of all that is there."""
    listed = cluster.get(",".join(kinds), "-n", where.namespace, "-l", f"{INSTALLATION}={where.installation}")
    return {f"{one['kind']}/{one['metadata']['name']}": one["metadata"]["uid"] for one in listed["items"]}


async def pods(cluster: Cluster, where: Where, count: int) -> None:
    async def there() -> bool:
        return len(await asyncio.to_thread(objects_of, cluster, where, ("pod",))) == count

    await until(there, f"{count} pods", 60)


async def test_nothing_is_called_while_nothing_changes_and_a_change_costs_one_call(
    cluster: Cluster, where: Where, tmp_path: Path
) -> None:
    specs = [a_set() for _ in range(3)]
    async with api_proxy(cluster.kubeconfig, tmp_path) as proxy:
        async with running(proxy, where) as runtime:
            for spec in specs:
                await runtime.apply(spec, 1)
            await asyncio.wait_for(runtime.settled(), 30)
            assert {name: count for name, count in proxy.calls().items() if name.startswith("apply")} == {
                f"apply {kind}": 3
                for kind in (
                    "serviceaccounts",
                    "secrets",
                    "services",
                    "networkpolicies",
                    "poddisruptionbudgets",
                    "deployments",
                )
            }
            await pods(cluster, where, 3)
            before = proxy.calls()
            for spec in specs:
                await runtime.apply(spec, 1)  # As after each start of the reconciler.
            await asyncio.wait_for(runtime.settled(), 30)
            await runtime.scale(specs[0].key, 2)
            await pods(cluster, where, 4)
            assert proxy.calls() - before == {"apply deployments": 1}
        before = proxy.calls()
        async with running(proxy, where) as runtime:
            for spec in specs:
                await runtime.apply(spec, 2 if spec is specs[0] else 1)
            await asyncio.wait_for(runtime.settled(), 30)
            assert {name.partition(" ")[0] for name in proxy.calls() - before} == {"list"}


async def test_what_somebody_deletes_or_empties_comes_back(cluster: Cluster, where: Where, tmp_path: Path) -> None:
    spec = a_set()
    at = ("-n", where.namespace)
    async with api_proxy(cluster.kubeconfig, tmp_path) as proxy, running(proxy, where) as runtime:
        await runtime.apply(spec, 1)
        await asyncio.wait_for(runtime.settled(), 30)
        before = objects_of(cluster, where)
        assert len(before) == len(EACH)
        for kind in ("secret", "service", "networkpolicy", "poddisruptionbudget", "deployment"):
            await asyncio.to_thread(cluster.kubectl, "delete", kind, name_of(spec.key), *at)

        async def back() -> bool:
            now = await asyncio.to_thread(objects_of, cluster, where)
            changed = {name for name in before if now.get(name) not in (None, before[name])}
            return len(changed) == len(EACH) - 1

        await until(back, "all is back", 60)
        # What was taken out has no owner now, so it is ours again.
        empty = '[{"op": "remove", "path": "/data/env.GREETING"}]'
        cluster.kubectl("patch", "secret", name_of(spec.key), *at, "--type=json", f"--patch={empty}")

        async def filled() -> bool:
            secret = await asyncio.to_thread(cluster.get, "secret", name_of(spec.key), *at)
            return "env.GREETING" in (secret.get("data") or {})

        await until(filled, "the variable is back", 60)


class Still(SystemClock):
    """No pause ends."""

    def monotonic(self) -> float:
        return 1000.0


class Later(SystemClock):
    """An hour later."""

    def now(self) -> datetime:
        return super().now() + timedelta(hours=1)


async def test_a_pod_whose_node_does_not_say_that_it_ended_is_lost(
    cluster: Cluster, where: Where, tmp_path: Path
) -> None:
    """A finalizer stands for the node: the pod is told to end, and stays."""
    spec, at = a_set(), ("-n", where.namespace)
    async with api_proxy(cluster.kubeconfig, tmp_path) as proxy:
        async with running(proxy, where) as runtime:
            await runtime.apply(spec, 1)
            await pods(cluster, where, 1)
            selector = ("pods", *at, "-l", f"{INSTALLATION}={where.installation}")
            ((pod,)) = [each["metadata"]["name"] for each in cluster.get(*selector)["items"]]
            cluster.kubectl("patch", "pod", pod, *at, "-p", '{"metadata": {"finalizers": ["ekiben.test/node"]}}')
            cluster.kubectl("delete", "pod", pod, *at, "--wait=false")

            async def leaving() -> bool:
                return (await status_of(runtime, spec.key)).count(Phase.DRAINING) == 1

            await until(leaving, "it leaves", 60)
            assert not any(one.lost for one in (await status_of(runtime, spec.key)).replicas)
        async with open_kubernetes_runtime(proxy.kubeconfig, "", where, clock=Later()) as runtime:
            await asyncio.wait_for(runtime.filled(), 30)
            (lost,) = [one for one in (await status_of(runtime, spec.key)).replicas if one.lost]
            assert (lost.replica, "kubectl delete node" in lost.message) == (pod, True)
    cluster.kubectl("patch", "pod", pod, *at, "-p", '{"metadata": {"finalizers": null}}')


async def test_whoever_owns_a_field_keeps_it_and_is_named(cluster: Cluster, where: Where, tmp_path: Path) -> None:
    spec = a_set()
    edit = '{"spec": {"ports": [{"name": "http", "port": 3000, "targetPort": 8080}]}}'
    async with api_proxy(cluster.kubeconfig, tmp_path) as proxy, running(proxy, where) as runtime:
        await runtime.apply(spec, 1)
        await asyncio.wait_for(runtime.settled(), 30)
        cluster.kubectl("patch", "service", name_of(spec.key), "-n", where.namespace, "--type=strategic", "-p", edit)

        async def told() -> bool:
            seen = await status_of(runtime, spec.key)
            return seen.reason == "FIELD_OWNED" and "kubectl-patch" in seen.note and "targetPort" in seen.note

        await until(told, "the owner is named", 60)
        service = cluster.get("service", name_of(spec.key), "-n", where.namespace)
        assert service["spec"]["ports"][0]["targetPort"] == 8080
        # What comes after that object is brought up to date none the less.
        await runtime.scale(spec.key, 3)

        async def scaled() -> bool:
            found = await asyncio.to_thread(cluster.get, "deployment", name_of(spec.key), "-n", where.namespace)
            return bool(found["spec"]["replicas"] == 3)

        await until(scaled, "it is scaled", 60)
        await until(told, "the owner is still named", 60)


async def test_an_object_whose_owner_deletes_it_comes_back_at_once(
    cluster: Cluster, where: Where, tmp_path: Path
) -> None:
    clock = Still()
    spec = a_set()
    edit = '{"spec": {"ports": [{"name": "http", "port": 3000, "targetPort": 8080}]}}'
    at = ("-n", where.namespace)
    async with open_kubernetes_runtime(cluster.kubeconfig, "", where, clock=clock) as runtime:
        await asyncio.wait_for(runtime.filled(), 30)
        await runtime.apply(spec, 1)
        await asyncio.wait_for(runtime.settled(), 30)
        cluster.kubectl("patch", "service", name_of(spec.key), *at, "--type=strategic", "-p", edit)

        async def told() -> bool:
            return "kubectl-patch" in (await status_of(runtime, spec.key)).note

        await until(told, "the owner is named", 60)
        cluster.kubectl("delete", "service", name_of(spec.key), *at)

        async def back() -> bool:
            found = await asyncio.to_thread(objects_of, cluster, where, ("service",))
            return bool(found) and not (await status_of(runtime, spec.key)).note

        await until(back, "it is there without a pause, and as it was", 60)


async def test_an_api_that_goes_away_within_a_change_is_waited_for(
    cluster: Cluster, where: Where, tmp_path: Path
) -> None:
    spec = a_set()
    async with api_proxy(cluster.kubeconfig, tmp_path) as proxy, running(proxy, where) as runtime:
        await runtime.apply(spec, 1)
        await pods(cluster, where, 1)

        def leave(operation: str, count: int) -> str:
            if operation == "apply secrets":
                proxy.away(True)
                return "after:cut"
            return ""

        proxy.choose = leave
        await runtime.apply(replace(spec, envs={"GREETING": "goodbye"}), 2)

        async def told() -> bool:
            seen = await status_of(runtime, spec.key)
            return seen.reason == "KUBERNETES_AWAY" and "does not answer" in seen.note

        await until(told, "it is said", 60)
        cluster.kubectl("delete", "service", name_of(spec.key), "-n", where.namespace)
        proxy.choose = lambda operation, count: ""
        proxy.away(False)
        await pods(cluster, where, 2)

        async def whole() -> bool:
            return len(await asyncio.to_thread(objects_of, cluster, where)) == len(EACH)

        await until(whole, "what was deleted meanwhile is back", 60)

        async def forgotten() -> bool:
            seen = await status_of(runtime, spec.key)
            return (seen.note, seen.reason) == ("", "")

        await until(forgotten, "nothing is said any more", 60)


class Kill:
    """The end of a deployer right after so many writes were carried out: it hears of no answer, and writes no more."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.dead = asyncio.Event()

    def __call__(self, operation: str, count: int) -> str:
        if not operation.startswith(("apply", "delete")):
            return ""
        if self.dead.is_set():
            return "cut"
        self.left -= 1
        if self.left:
            return ""
        self.dead.set()
        return "after:cut"


async def test_a_deployer_killed_after_any_write_is_taken_over(cluster: Cluster, where: Where, tmp_path: Path) -> None:
    async with api_proxy(cluster.kubeconfig, tmp_path) as proxy:
        for after in range(1, len(EACH) + 1):
            spec = a_set()
            proxy.choose = kill = Kill(after)
            async with running(proxy, where) as runtime:
                await runtime.apply(spec, 1)
                await asyncio.wait_for(kill.dead.wait(), 30)
            proxy.choose = lambda operation, count: ""
            async with running(proxy, where) as runtime:
                await runtime.apply(spec, 1)
                await asyncio.wait_for(runtime.settled(), 30)
                assert len(await asyncio.to_thread(objects_of, cluster, where)) == len(EACH)
                proxy.choose = kill = Kill(1 + after % 2)
                await runtime.scale(spec.key, 0)
                await asyncio.wait_for(kill.dead.wait(), 30)
            proxy.choose = lambda operation, count: ""
            async with running(proxy, where) as runtime:
                for one in await runtime.observe():  # As the reconciler does with what no deployment wants.
                    await runtime.scale(one.key, 0)

                async def nothing(runtime: KubernetesRuntime = runtime) -> bool:
                    return not await runtime.observe() and not await asyncio.to_thread(objects_of, cluster, where)

                await until(nothing, "it is gone", 60)


async def test_one_that_stands_by_writes_nothing_and_one_that_had_it_all_lets_go_of_it(
    cluster: Cluster, where: Where, tmp_path: Path
) -> None:
    """Two deployers in one namespace, as two pods of the chart's: each knows of all that the other one makes."""
    host = "images.example.com:5000"
    spec = a_set(image=f"{host}/default/iris:1", organization="default")

    async def issue(organization: str, lifetime: timedelta) -> Login:
        return Login(organization, datetime.now(UTC) + lifetime)

    async with AsyncExitStack() as stack:
        proxies, runtimes = [], []
        for name in ("one", "two"):
            (folder := tmp_path / name).mkdir()
            proxies.append(await stack.enter_async_context(api_proxy(cluster.kubeconfig, folder)))
            opening = open_kubernetes_runtime(proxies[-1].kubeconfig, "", where, pull_host=host, logins=Logins(issue))
            runtimes.append(await stack.enter_async_context(opening))
            await asyncio.wait_for(runtimes[-1].filled(), 30)
        (one, two), (ones, twos) = runtimes, proxies

        def written(proxy: ApiProxy, since: Counter[str]) -> set[str]:
            return {name for name in proxy.calls() - since if not name.startswith(("list ", "get "))}

        async def sees_pod() -> bool:
            return [len(each.replicas) for each in await two.observe()] == [1]

        await two.stand_by()
        await one.apply(spec, 1)
        await until(sees_pod, "the other one sees what is made", 60)
        assert {"apply secrets", "apply deployments"} <= written(ones, Counter())
        assert not written(twos, Counter())

        await one.stand_by()
        before = ones.calls()
        await two.apply(spec, 1)
        await asyncio.wait_for(two.settled(), 30)
        uid = objects_of(cluster, where, ("service",))
        await asyncio.to_thread(cluster.kubectl, "delete", "service", name_of(spec.key), "-n", where.namespace)

        async def back() -> bool:
            now = await asyncio.to_thread(objects_of, cluster, where, ("service",))
            return bool(now) and now != uid

        await until(back, "it is back", 60)
        await two.scale(spec.key, 0)

        async def swept() -> bool:
            return not await asyncio.to_thread(objects_of, cluster, where, ("deployment", "secret"))

        await until(swept, "all is gone, the login too", 60)
        assert {"apply services", "delete deployments", "delete secrets"} <= written(twos, Counter())
        assert not written(ones, before)


async def test_a_namespace_that_somebody_deleted_is_filled_once_it_is_there_again(
    cluster: Cluster, tmp_path: Path
) -> None:
    spec = a_set()
    with new_namespace(cluster, "gone") as name:
        where = Where(os.urandom(4).hex(), name)
        async with api_proxy(cluster.kubeconfig, tmp_path) as proxy, running(proxy, where) as runtime:
            await runtime.apply(spec, 1)
            await pods(cluster, where, 1)
            await asyncio.to_thread(cluster.kubectl, "delete", "namespace", name)

            async def told() -> bool:
                return name in (await status_of(runtime, spec.key)).note

            await until(told, "it is said", 60)
            cluster.kubectl("create", "namespace", name)
            await pods(cluster, where, 1)
            assert len(objects_of(cluster, where)) == len(EACH)


def test_every_kind_that_is_made_is_watched() -> None:
    assert {kind.lower() for kind in MADE} == {*EACH, "horizontalpodautoscaler"}
