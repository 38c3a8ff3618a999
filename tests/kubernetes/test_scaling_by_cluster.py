"""Replicas that Kubernetes' own autoscaler gives: who owns their number, and that real use changes it."""

import asyncio
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from services.deployer.runtimes import SetStatus
from services.deployer.runtimes.kubernetes.autoscaling import owners_of_replicas
from services.deployer.runtimes.kubernetes.keeping import LENDER
from services.deployer.runtimes.kubernetes.names import Where, name_of
from services.deployer.runtimes.kubernetes.runtime import KubernetesRuntime, open_kubernetes_runtime
from services.deployer.runtimes.scaling import Autoscaling, Metric
from tests.api_proxy import api_proxy
from tests.cluster import Cluster
from tests.cluster_platform import new_namespace
from tests.fixtures_kernel import until
from tests.kubernetes_sets import a_set
from tests.platform import BentoMl, Platform

BY_CPU = (Metric("resource", "cpu", utilization_percent=80),)


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of this module's own."""
    with new_namespace(cluster, "scaling") as name:
        yield name


@pytest.fixture
def where(namespace: str) -> Where:
    """An installation of each test's own."""
    return Where(os.urandom(4).hex(), namespace)


async def status_of(runtime: KubernetesRuntime, key: str) -> SetStatus:
    (found,) = [one for one in await runtime.observe() if one.key == key]
    return found


def has(runtime: KubernetesRuntime, key: str, replicas: int) -> Any:
    async def probe() -> bool:
        return (await status_of(runtime, key)).asked == replicas

    return probe


async def test_replicas_are_lent_to_the_autoscaler_and_taken_back(
    cluster: Cluster, where: Where, tmp_path: Path
) -> None:
    """The pods stay pending: the autoscaler keeps to its bounds without any metric."""
    spec = a_set()
    name, at = name_of(spec.key), ("-n", where.namespace)
    scaled = replace(spec, autoscaling=Autoscaling("hpa", 3, 5, BY_CPU))

    def live() -> Any:
        return cluster.get("deployment", name, *at, "--show-managed-fields")

    async with api_proxy(cluster.kubeconfig, tmp_path) as proxy:
        async with open_kubernetes_runtime(proxy.kubeconfig, "", where) as runtime:
            await asyncio.wait_for(runtime.filled(), 30)
            await runtime.apply(spec, 2)
            await asyncio.wait_for(runtime.settled(), 30)
            # Killed between the two writes by which the number is handed over, and done anew.
            cut: list[str] = []

            def choose(operation: str, count: int) -> str:
                if operation == "apply deployments" and not cut:
                    cut.append(operation)
                    return "after:cut"
                return ""

            proxy.choose = choose
            await runtime.apply(scaled, 2)
            await until(lambda: cut, "the first write was cut off", 30)
            await until(has(runtime, spec.key, 3), "the autoscaler has raised it to its least", 90)
            owners = owners_of_replicas(await asyncio.to_thread(live))
            assert {manager for manager, _ in owners} == {"kube-controller-manager"}
            assert (await status_of(runtime, spec.key)).autoscaled
            before = proxy.calls()
            await runtime.apply(replace(scaled, envs={"GREETING": "changed"}), 2)
            await asyncio.wait_for(runtime.settled(), 30)
            assert (await asyncio.to_thread(live))["spec"]["replicas"] == 3
            assert proxy.calls()["apply deployments"] - before["apply deployments"] <= 1
            # Deleted by hand it comes back with as many, not with the one that is the default.
            await asyncio.to_thread(cluster.kubectl, "delete", "deployment", name, *at)
            await asyncio.to_thread(cluster.kubectl, "delete", "horizontalpodautoscaler", name, *at)

            async def back() -> bool:
                kinds = await asyncio.to_thread(cluster.get, "deployment,horizontalpodautoscaler", *at)
                return {each["kind"] for each in kinds["items"] if each["metadata"]["name"] == name} == {
                    "Deployment",
                    "HorizontalPodAutoscaler",
                }

            await until(back, "both are back", 60)
            assert (await asyncio.to_thread(live))["spec"]["replicas"] == 3
        # Another deployer, which takes it over and then scales it itself, as at the begin of a rollout.
        async with open_kubernetes_runtime(proxy.kubeconfig, "", where) as runtime:
            await asyncio.wait_for(runtime.filled(), 30)
            adopted = await status_of(runtime, spec.key)
            assert (adopted.asked, adopted.autoscaled) == (3, True)
            await runtime.apply(replace(scaled, envs={"GREETING": "changed"}), 3)
            await runtime.scale(spec.key, 1)
            await asyncio.wait_for(runtime.settled(), 30)
            status = await status_of(runtime, spec.key)
            assert (status.asked, status.autoscaled, status.note) == (1, False, "")
            now = await asyncio.to_thread(live)
            assert now["spec"]["replicas"] == 1
            assert {manager for manager, _ in owners_of_replicas(now)} <= {"ekiben", LENDER}
            # An autoscaler of somebody else's is no ghost: it is named, and left alone.
            kubectl = ("autoscale", "deployment", name, "--min=4", "--max=6", f"--name=theirs-{name}")
            await asyncio.to_thread(cluster.kubectl, *kubectl, *at)

            async def raised() -> bool:
                return bool((await asyncio.to_thread(live))["spec"]["replicas"] == 4)

            await until(raised, "theirs has raised it", 90)

            async def told() -> bool:
                return f"theirs-{name}" in (await status_of(runtime, spec.key)).note

            await until(told, "whose autoscaler it is is said", 60)
            await asyncio.to_thread(cluster.kubectl, "delete", "horizontalpodautoscaler", f"theirs-{name}", *at)
            await runtime.scale(spec.key, 2)
            await asyncio.wait_for(runtime.settled(), 60)

            async def ours() -> bool:
                return bool((await asyncio.to_thread(live))["spec"]["replicas"] == 2)

            await until(ours, "it is ours again once theirs is gone", 60)


async def test_what_an_outside_scaler_writes_is_never_written_over(
    cluster: Cluster, where: Where, tmp_path: Path
) -> None:
    spec = a_set()
    name, at = name_of(spec.key), ("-n", where.namespace)
    lent = replace(spec, autoscaling=Autoscaling("external", 1, 1))
    async with open_kubernetes_runtime(cluster.kubeconfig, "", where) as runtime:
        await asyncio.wait_for(runtime.filled(), 30)
        await runtime.apply(lent, 2)
        await asyncio.wait_for(runtime.settled(), 30)
        await until(has(runtime, spec.key, 2), "it begins with as many as asked", 30)
        await asyncio.to_thread(cluster.kubectl, "scale", "deployment", name, "--replicas=4", *at)
        await until(has(runtime, spec.key, 4), "his number is seen", 30)
        await runtime.apply(replace(lent, envs={"GREETING": "changed"}), 2)
        await asyncio.wait_for(runtime.settled(), 30)
        live = await asyncio.to_thread(cluster.get, "deployment", name, *at)
        assert live["spec"]["replicas"] == 4

        async def told() -> bool:
            status = await status_of(runtime, spec.key)
            return (status.note, status.autoscaled, status.asked) == ("", True, 4)

        await until(told, "his number is what is asked", 30)
        await runtime.apply(spec, 1)  # The policy is another now: whoever had it, had it from us.
        await asyncio.wait_for(runtime.settled(), 30)
        live = await asyncio.to_thread(cluster.get, "deployment", name, *at)
        assert live["spec"]["replicas"] == 1


async def test_use_brings_replicas_and_takes_them_away(
    cluster: Cluster,
    kubernetes_namespace: str,
    kubernetes_platform: Platform,
    kubernetes_bentoml: BentoMl,
    bentos: Path,
    tmp_path: Path,
) -> None:
    """On the metrics of a real metrics-server, said in the words of the client's own configuration."""
    name = f"scaled-{os.urandom(2).hex()}"
    project = shutil.copytree(bentos / "versions", tmp_path / "versions")
    wanted = {
        "name": name,
        "services": {
            "Versions": {
                "instance_type": "cpu.small",
                "scaling": {
                    "min_replicas": 1,
                    "max_replicas": 2,
                    "policy": {
                        "metrics": [{"type": "cpu", "value": 15}],
                        "scale_up_behavior": "fast",
                        "scale_down_behavior": "fast",
                    },
                },
            }
        },
    }
    (project / "deployment.yaml").write_text(yaml.safe_dump(wanted))
    await asyncio.to_thread(kubernetes_bentoml, "deploy", ".", "-f", "deployment.yaml", cwd=project, timeout_s=500)

    async def shown() -> Any:
        said = await asyncio.to_thread(kubernetes_platform.ekiben, "deployments", "get", name, "-o", "json")
        return json.loads(said.stdout)

    async def ready(count: int) -> bool:
        found = await shown()
        counts = found["replicaCounts"]["Versions"]
        return bool(found["state"] == "RUNNING" and counts["desired"] == count == counts.get("ready", 0))

    url = (await shown())["urls"][0]
    busy = True

    async def load() -> None:
        async with aiohttp.ClientSession() as session:
            while busy:
                async with session.post(f"{url}/version", json={}) as answer:
                    assert answer.status == 200, await answer.text()

    async with asyncio.TaskGroup() as callers:
        for _ in range(4):
            callers.create_task(load())
        await until(lambda: ready(2), "use has brought a replica", 240)
        busy = False
    (condition,) = [one for one in (await shown())["conditions"] if one["type"] == "Autoscaled"]
    assert (condition["status"], condition["reason"]) == ("TRUE", "AUTOSCALED"), condition
    await until(lambda: ready(1), "it is gone without use", 240)
    # The next revision begins with what the autoscaler gave, and has an autoscaler once it has all requests.
    await asyncio.to_thread(kubernetes_platform.ekiben, "deployments", "update", name, "--scale", "2-3")
    await until(lambda: ready(2), "the autoscaler keeps to the new bounds", 120)
    selector = ("-n", kubernetes_namespace, "-l", f"app.kubernetes.io/name={name}")
    least: list[int] = []

    async def rolled_out() -> bool:
        found = await shown()
        least.append(int(found["replicaCounts"]["Versions"].get("ready", 0)))
        return bool(found["latestRevision"] == found["servingRevision"] and await ready(2))

    await asyncio.to_thread(kubernetes_platform.ekiben, "deployments", "update", name, "--env", "ROUND=2")
    await until(rolled_out, "the next revision has all requests", 240)
    assert min(least) >= 2

    async def lent() -> bool:
        scalers = (await asyncio.to_thread(cluster.get, "horizontalpodautoscalers", *selector))["items"]
        targets = [one["spec"]["scaleTargetRef"]["name"] for one in scalers]
        living = (await asyncio.to_thread(cluster.get, "deployments", *selector))["items"]
        return targets == [one["metadata"]["name"] for one in living]

    await until(lent, "the new revision's set is scaled by its autoscaler, and there is no other", 60)
    await asyncio.to_thread(kubernetes_platform.ekiben, "deployments", "delete", name, "--yes")
