"""The deployer's Kubernetes runtime, on a real cluster with images that the builder assembled."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from services.deployer.runtimes import Phase, SetSpec, SetStatus
from services.deployer.runtimes.kubernetes.names import INSTALLATION, Where, name_of
from services.deployer.runtimes.kubernetes.runtime import KubernetesRuntime, open_kubernetes_runtime
from tests.base_image import base_image
from tests.bentoml_clients import client
from tests.cluster import Cluster
from tests.cluster_platform import new_namespace
from tests.fixtures_kernel import until
from tests.oci_registry import OciRegistry
from tests.platform import BIN, BentoMl, run


@pytest.fixture(scope="module")
def image(
    tmp_path_factory: pytest.TempPathFactory, bentos: Path, oci_registry: OciRegistry, pull_host: str
) -> tuple[str, str]:
    """Name and digest of the image of a bento with two services, in the registry."""
    base = base_image()
    folder = tmp_path_factory.mktemp("kubernetes")
    bentoml = BentoMl(client("1.4"), folder / "home")
    bentoml("build", ".", cwd=shutil.copytree(bentos / "chain", folder / "project"))
    (tag,) = [each["tag"] for each in json.loads(bentoml("list", "-o", "json").stdout)]
    repository = oci_registry.new_repository()
    command = [str(BIN / "ekiben"), "images", "build", tag, "--base", base, "--cache", str(folder / "cache")]
    insecure = {"EKIBEN_REGISTRY_INSECURE": oci_registry.host}
    env = {**bentoml.env, **insecure, "EKIBEN_BUILDER_PYTHON_PREFERENCE": "system"}
    done = run([*command, "--output", f"docker://{oci_registry.host}/{repository}:v1"], env=env, timeout_s=600)
    return f"docker://{pull_host}/{repository}:v1", done.stdout.strip().splitlines()[-1]


@pytest.fixture
def where(cluster: Cluster) -> Iterator[Where]:
    """A namespace of this test's own, with the restricted pod security standard enforced."""
    with new_namespace(cluster, "test") as name:
        yield Where(os.urandom(4).hex(), name)


@asynccontextmanager
async def running(cluster: Cluster, where: Where) -> AsyncIterator[KubernetesRuntime]:
    async with open_kubernetes_runtime(cluster.kubeconfig, "", where) as runtime:
        await asyncio.wait_for(runtime.filled(), 30)
        yield runtime


def sets(image: tuple[str, str], revision: int = 1) -> tuple[SetSpec, SetSpec]:
    """The entry and the service that it calls."""
    called = SetSpec(
        key=f"words{os.urandom(5).hex()}",
        deployment="deployments/chain",
        deployment_uid=os.urandom(4).hex(),
        revision=revision,
        target="main",
        service="Words",
        entry=False,
        legacy=False,
        bento="bentoRepositories/chain/bentos/v1",
        bento_digest=image[1],
        models=(),
        environment="",
        image=image[0],
        image_digest=image[1],
        memory_bytes=512 << 20,
        drain_s=5,
    )
    entry = replace(
        called,
        key=f"chain{os.urandom(5).hex()}",
        service="Chain",
        entry=True,
        envs={"GREETING": "it's $HOME"},
        dependencies=(("Words", called.key),),
    )
    return entry, called


async def seen(runtime: KubernetesRuntime, key: str) -> SetStatus | None:
    return next((one for one in await runtime.observe() if one.key == key), None)


def ready(runtime: KubernetesRuntime, spec: SetSpec, replicas: int) -> Callable[[], Awaitable[bool]]:
    async def probe() -> bool:
        one = await seen(runtime, spec.key)
        return one is not None and one.count(Phase.READY) == replicas == len(one.replicas)

    return probe


async def ask(runtime: KubernetesRuntime, spec: SetSpec, path: str, body: Any) -> Any:
    one = await seen(runtime, spec.key)
    assert one is not None
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://{one.replicas[0].address}{path}", json=body) as response,
    ):
        assert response.status == 200, await response.text()
        return await response.json()


async def test_two_services_run_scale_and_leave(cluster: Cluster, where: Where, image: tuple[str, str]) -> None:
    entry, called = sets(image)
    async with running(cluster, where) as runtime:
        await runtime.apply(called, 1)
        await runtime.apply(entry, 1)
        await until(ready(runtime, called, 1), "the called service is ready", 180)
        await until(ready(runtime, entry, 1), "the entry is ready", 180)

        async def answers() -> bool:
            """Nodes hear of a Service's pods a moment after these are ready."""
            try:
                return await ask(runtime, entry, "/describe", {"text": "two words"}) == {"words": 2, "letters": 9}
            except AssertionError:
                return False

        await until(answers, "the called service is called", 60)
        await runtime.scale(entry.key, 2)
        await until(ready(runtime, entry, 2), "two replicas are ready", 120)
        status = await seen(runtime, entry.key)
        assert status is not None and (status.asked, status.service, status.deployment) == (
            2,
            "Chain",
            "deployments/chain",
        )
        lines = [line.text async for line in runtime.logs(entry.deployment_uid, service="Words", tail=-1)]
        assert any("Words" in line for line in lines)
        await runtime.scale(entry.key, 0)
        await runtime.scale(called.key, 0)

        async def nothing() -> bool:
            return not await runtime.observe()

        await until(nothing, "everything has left", 120)
    kinds = "deployments,replicasets,pods,services,secrets,serviceaccounts,poddisruptionbudgets,networkpolicies"

    async def collected() -> bool:
        found = cluster.get(kinds, "-n", where.namespace, "-l", f"{INSTALLATION}={where.installation}")
        return not found["items"]

    await until(collected, "Kubernetes has collected the rest", 60)


async def test_a_deployer_that_starts_anew_adopts_and_makes_no_call(
    cluster: Cluster, where: Where, image: tuple[str, str]
) -> None:
    _, spec = sets(image)
    async with running(cluster, where) as runtime:
        await runtime.apply(spec, 1)
        await until(ready(runtime, spec, 1), "it is ready", 180)
        before = await seen(runtime, spec.key)
    live = ("deployment", name_of(spec.key), "-n", where.namespace)
    version = cluster.get(*live)["metadata"]["resourceVersion"]
    async with running(cluster, where) as runtime:
        after = await seen(runtime, spec.key)
        assert before is not None and after is not None
        assert (after.asked, after.deployment_uid, after.revision) == (1, spec.deployment_uid, 1)
        assert [each.replica for each in after.replicas] == [each.replica for each in before.replicas]
        await runtime.apply(spec, 1)  # As the reconciler does after each start.
        await asyncio.wait_for(runtime.settled(), 30)
        assert cluster.get(*live)["metadata"]["resourceVersion"] == version


async def test_what_somebody_deletes_comes_back_and_what_he_owns_is_said(
    cluster: Cluster, where: Where, image: tuple[str, str]
) -> None:
    _, spec = sets(image)
    name = name_of(spec.key)
    async with running(cluster, where) as runtime:
        await runtime.apply(spec, 1)
        await until(ready(runtime, spec, 1), "it is ready", 180)
        before = await seen(runtime, spec.key)
        assert before is not None
        cluster.kubectl("delete", "deployment", name, "-n", where.namespace)

        async def back() -> bool:
            one = await seen(runtime, spec.key)
            ids = {each.replica for each in one.replicas if each.phase is Phase.READY} if one else set()
            return bool(ids - {each.replica for each in before.replicas})

        await until(back, "it is back", 180)
        cluster.kubectl("scale", "deployment", name, "--replicas=3", "-n", where.namespace)

        async def told() -> bool:
            one = await seen(runtime, spec.key)
            said = ("somebody else's", "replicas", "scale policy external")
            return one is not None and all(words in one.note for words in said)

        await until(told, "the owner of the field is named", 60)


async def test_an_image_that_is_not_there_and_a_pod_no_node_takes_are_said_in_words(
    cluster: Cluster, where: Where, image: tuple[str, str]
) -> None:
    lost, huge = sets((image[0], f"sha256:{'0' * 64}"))[1], replace(sets(image)[1], memory_bytes=1 << 50)
    async with running(cluster, where) as runtime:
        await runtime.apply(lost, 1)
        await runtime.apply(huge, 1)

        def says(spec: SetSpec, text: str) -> Callable[[], Awaitable[bool]]:
            async def probe() -> bool:
                one = await seen(runtime, spec.key)
                return one is not None and any(text in each.message for each in one.replicas)

            return probe

        await until(says(lost, "Image not found"), "the image is missed", 60)
        await until(says(huge, "nodes are available: "), "no node is large enough", 60)
