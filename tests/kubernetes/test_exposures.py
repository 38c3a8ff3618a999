"""Ingresses and HTTPRoutes of deployments on a real cluster. No controller runs there: what one would say is written by the tests."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ekiben.errors import FailedPrecondition, InvalidArgument
from services.deployer.runtimes.exposures import HTTP_ROUTE, INGRESS, Exposed, ExposureStatus, Parent, Tls
from services.deployer.runtimes.kubernetes.exposure import exposure_name
from services.deployer.runtimes.kubernetes.names import Where
from services.deployer.runtimes.kubernetes.runtime import KubernetesRuntime, open_kubernetes_runtime
from tests.cluster import Cluster
from tests.fixtures_kernel import until
from tests.ingress_controller import definitions_lock, gateway_api, installed

INGRESSES = "/apis/networking.k8s.io/v1/namespaces/{}/ingresses"
ROUTES = "/apis/gateway.networking.k8s.io/v1/namespaces/{}/httproutes"
PLAIN = Exposed("deployments/iris", "u", INGRESS, "iris.example.com", tls=Tls())


@pytest.fixture
def where(cluster: Cluster) -> Iterator[Where]:
    """A namespace of this test's own."""
    name = f"exposed-{os.urandom(4).hex()}"
    cluster.kubectl("create", "namespace", name)
    yield Where(os.urandom(4).hex(), name)
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="module")
def definition() -> Path:
    """Of an HTTPRoute, as the Go module of the Gateway API has it."""
    if (folder := gateway_api()) is None:
        pytest.skip("the Gateway API's definitions are not to be had: they come by Go, through its module proxy")
    return folder / "gateway.networking.k8s.io_httproutes.yaml"


@asynccontextmanager
async def running(cluster: Cluster, where: Where) -> AsyncIterator[KubernetesRuntime]:
    opening = open_kubernetes_runtime(cluster.kubeconfig, "", where, gateway_service="gateway:80")
    async with opening as runtime:
        await asyncio.wait_for(runtime.filled(), 30)
        yield runtime


def says(runtime: KubernetesRuntime, exposed: Exposed, reason: str) -> Callable[[], Awaitable[ExposureStatus | None]]:
    async def probe() -> ExposureStatus | None:
        found = runtime.exposure(exposed)
        return found if found.reason == reason else None

    return probe


def the(cluster: Cluster, kind: str, where: Where) -> list[Any]:
    found: list[Any] = cluster.get(kind, "-n", where.namespace)["items"]
    return found


def tell(cluster: Cluster, path: str, where: Where, live: dict[str, Any], status: dict[str, Any]) -> None:
    """Write a status, as a controller does."""
    url = f"{path.format(where.namespace)}/{live['metadata']['name']}/status"
    cluster.kubectl("replace", "--raw", url, "-f", "-", input=json.dumps(live | {"status": status}))


async def test_an_ingress_is_kept_as_it_is_wanted(cluster: Cluster, where: Where) -> None:
    other = replace(PLAIN, deployment_uid="v", host="other.example.com")
    async with running(cluster, where) as runtime:
        await runtime.expose([PLAIN, other])
        waiting = await until(says(runtime, PLAIN, "INGRESS_WITHOUT_ADDRESS"), "it is there", 30)
        assert waiting is not None and "no class" in waiting.message
        await until(says(runtime, other, "INGRESS_WITHOUT_ADDRESS"), "so is the other", 30)
        (live,) = [each for each in the(cluster, "ingress", where) if each["spec"]["rules"][0]["host"] == PLAIN.host]
        tell(cluster, INGRESSES, where, live, {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}})
        led = await until(says(runtime, PLAIN, "EXPOSED"), "it has an address", 30)
        assert led is not None and led.message.startswith("https://iris.example.com leads to 192.0.2.1")

        # Somebody edits it, which is his from then on, and deletes it, which is not.
        name = live["metadata"]["name"]
        patch = [{"op": "replace", "path": "/spec/rules/0/host", "value": "stolen.example.com"}]
        cluster.kubectl("patch", "ingress", name, "-n", where.namespace, "--type=json", "-p", json.dumps(patch))
        refused = await until(says(runtime, PLAIN, "FIELD_OWNED"), "his field is said", 30)
        assert refused is not None and "kubectl" in refused.message
        cluster.kubectl("delete", "ingress", name, "-n", where.namespace)
        await until(says(runtime, PLAIN, "INGRESS_WITHOUT_ADDRESS"), "it is back", 90)

        await runtime.expose([PLAIN])

        async def alone() -> bool:
            return [each["metadata"]["name"] for each in the(cluster, "ingress", where)] == [name]

        await until(alone, "what is not wanted is gone", 30)


async def test_a_deployer_that_starts_anew_writes_nothing_and_sweeps_what_a_killed_one_left(
    cluster: Cluster, where: Where
) -> None:
    foreign = {"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": {"name": "foreign"}}
    foreign["spec"] = {"defaultBackend": {"service": {"name": "x", "port": {"number": 1}}}}  # type: ignore[assignment]
    cluster.kubectl("apply", "-n", where.namespace, "-f", "-", input=json.dumps(foreign))
    stray = replace(PLAIN, deployment_uid="v", host="other.example.com")
    async with running(cluster, where) as runtime:
        await runtime.expose([PLAIN, stray])
        for one in (PLAIN, stray):
            await until(says(runtime, one, "INGRESS_WITHOUT_ADDRESS"), "it is there", 30)
    before = {each["metadata"]["name"]: each["metadata"]["resourceVersion"] for each in the(cluster, "ingress", where)}
    assert len(before) == 3
    async with running(cluster, where) as runtime:
        # Another deployer has the cluster, then this one.
        await runtime.stand_by()
        await until(says(runtime, PLAIN, "EXPOSING"), "the cluster is known", 30)
        await runtime.expose([PLAIN])
        await until(says(runtime, PLAIN, "INGRESS_WITHOUT_ADDRESS"), "it is taken over", 30)

        async def swept() -> bool:
            return len(the(cluster, "ingress", where)) == 2

        await until(swept, "the stray is gone", 30)
    after = {each["metadata"]["name"]: each["metadata"]["resourceVersion"] for each in the(cluster, "ingress", where)}
    assert after == {name: version for name, version in before.items() if name != exposure_name("v")}


async def test_what_somebody_changed_while_no_deployer_ran_is_found(cluster: Cluster, where: Where) -> None:
    at = ("-n", where.namespace)
    async with running(cluster, where) as runtime:
        await runtime.expose([PLAIN])
        await until(says(runtime, PLAIN, "INGRESS_WITHOUT_ADDRESS"), "it is there", 30)
    name = exposure_name(PLAIN.deployment_uid)
    patch = [{"op": "replace", "path": "/spec/rules/0/host", "value": "stolen.example.com"}]
    cluster.kubectl("patch", "ingress", name, *at, "--type=json", "-p", json.dumps(patch))
    async with running(cluster, where) as runtime:
        await runtime.expose([PLAIN])
        refused = await until(says(runtime, PLAIN, "FIELD_OWNED"), "his field is said", 30)
        assert refused is not None and "kubectl" in refused.message


async def test_what_the_cluster_would_not_take_is_refused_in_its_words(cluster: Cluster, where: Where) -> None:
    async with running(cluster, where) as runtime:
        await runtime.check_exposure(PLAIN)
        with pytest.raises(InvalidArgument, match=r"ingressClassName: Invalid value"):
            await runtime.check_exposure(replace(PLAIN, class_name="a..b"))
        assert not the(cluster, "ingress", where)
    async with running(cluster, replace(where, namespace="no-such-namespace")) as runtime:
        with pytest.raises(FailedPrecondition, match="kubectl create namespace no-such-namespace"):
            await runtime.check_exposure(PLAIN)


async def test_a_route_waits_for_the_gateway_api_and_is_taken_or_refused(
    cluster: Cluster, where: Where, definition: Path
) -> None:
    route = replace(PLAIN, kind=HTTP_ROUTE, gateways=(Parent("edge", listener="https"),))
    with definitions_lock(cluster):
        await taken_or_refused(cluster, where, definition, route)


async def taken_or_refused(cluster: Cluster, where: Where, definition: Path, route: Exposed) -> None:
    async with running(cluster, where) as runtime:
        with pytest.raises(FailedPrecondition, match="install the definitions of the Gateway API"):
            await runtime.check_exposure(route)
        await runtime.expose([route])
        await until(says(runtime, route, "GATEWAY_API_MISSING"), "it is missed", 30)
        with installed(cluster, definition):
            await until(says(runtime, route, "HTTP_ROUTE_PENDING"), "it is made once there is such a kind", 60)
            (live,) = the(cluster, "httproutes.gateway.networking.k8s.io", where)
            parent = {
                "parentRef": live["spec"]["parentRefs"][0],
                "controllerName": "example.com/controller",
                "conditions": [
                    {
                        "type": "Accepted",
                        "status": "False",
                        "reason": "NoMatchingListenerHostname",
                        "message": "no listener takes iris.example.com",
                        "observedGeneration": live["metadata"]["generation"],
                        "lastTransitionTime": "2026-01-01T00:00:00Z",
                    }
                ],
            }
            tell(cluster, ROUTES, where, live, {"parents": [parent]})
            refused = await until(says(runtime, route, "HTTP_ROUTE_NOT_ACCEPTED"), "it is refused", 30)
            assert refused is not None and "no listener takes iris.example.com" in refused.message
            parent["conditions"][0]["status"] = "True"
            (live,) = the(cluster, "httproutes.gateway.networking.k8s.io", where)
            tell(cluster, ROUTES, where, live, {"parents": [parent]})
            await until(says(runtime, route, "EXPOSED"), "it is taken", 30)
