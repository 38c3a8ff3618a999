"""How requests come to pods: by EndpointSlices, under the deployment's own names, from outside by an Ingress or a route."""

import contextlib
import json
import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.bentoml_clients import client
from tests.certificates import certificates
from tests.cluster import Cluster
from tests.cluster_platform import new_namespace, platform_on
from tests.ingress_controller import CLASS, run_controller
from tests.platform import Answer, BentoMl, Platform, free_port, http, wait_for

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of this module's own."""
    with new_namespace(cluster, "routing") as name:
        yield name


@pytest.fixture(scope="module")
def platform(cluster: Cluster, namespace: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A platform whose gateway stands behind an ingress, and whose recorder pods reach."""
    receiver = f"127.0.0.1:{free_port()}"
    with cluster.serve_pods(receiver) as receiver_of_pods:
        env = {
            "EKIBEN_DEPLOYER_KUBERNETES_GATEWAY_SERVICE": "gateway:80",
            "EKIBEN_RECORDER_OTLP_HTTP_LISTEN": receiver,
            "EKIBEN_DEPLOYER_OTLP_HTTP_ENDPOINT": f"http://{receiver_of_pods}",
            "EKIBEN_GATEWAY_TRUSTED_HOPS": "1",
        }
        with platform_on(cluster, namespace, tmp_path_factory.mktemp("routing"), env) as up:
            yield up


@pytest.fixture(scope="module")
def contained(platform: Platform, bentos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The deployment `contained`, of two services, by the unmodified client."""
    home = tmp_path_factory.mktemp("client")
    bentoml = BentoMl(client("1.4"), home).login(platform)
    project = shutil.copytree(bentos / "contained", home / "project")
    bentoml("deploy", ".", "-n", "contained", cwd=project, timeout_s=500)
    found: dict[str, Any] = platform.ekiben_json("deployments", "get", "contained")
    return found


def shown(platform: Platform) -> dict[str, Any]:
    found: dict[str, Any] = platform.api("GET", "/v1/deployments/contained").json()
    return found


def describe(url: str, **headers: str) -> Answer:
    return http("POST", f"{url}/describe", b'{"text": "two words"}', JSON | headers)


def pods(cluster: Cluster, namespace: str, service: str) -> list[Any]:
    selector = f"app.kubernetes.io/name=contained,app.kubernetes.io/component={service}"
    found = cluster.get("pods", "-n", namespace, "-l", selector)["items"]
    return [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]


def states(platform: Platform) -> dict[str, str]:
    """The state of each replica of the entry service."""
    replicas = platform.api("GET", "/v1/deployments/contained/replicas").json().get("replicas", [])
    return {each["replica"]: each["state"] for each in replicas if each["service"] == "Contained"}


def one_ready(platform: Platform) -> None:
    wait_for("one replica that is ready", lambda: list(states(platform).values()) == ["READY"], 120)


def test_the_last_pod_answers_while_it_leaves(
    cluster: Cluster, namespace: str, platform: Platform, contained: dict[str, Any]
) -> None:
    one_ready(platform)
    assert describe(contained["urls"][0]).status == 200

    def answered_while_leaving() -> bool:
        """It has five seconds to: on a busy machine a look may come too late."""
        (pod,) = pods(cluster, namespace, "Contained")
        cluster.kubectl("delete", "pod", pod["metadata"]["name"], "-n", namespace, "--wait=false")

        def nobody_else() -> bool:
            found = states(platform)
            return "DRAINING" in found.values() and "READY" not in found.values()

        wait_for("it is known to leave", nobody_else, 30)
        status = describe(contained["urls"][0]).status
        answered = status == 200 and nobody_else()
        one_ready(platform)
        return answered

    assert any(answered_while_leaving() for _ in range(3))


def test_requests_follow_what_the_service_selects(
    cluster: Cluster, namespace: str, platform: Platform, contained: dict[str, Any]
) -> None:
    one_ready(platform)
    (pod,) = pods(cluster, namespace, "Contained")
    service = ("service", pod["spec"]["serviceAccountName"], "-n", namespace)
    selector = cluster.get(*service)["spec"]["selector"]

    def select(more: dict[str, str | None]) -> None:
        cluster.kubectl("patch", *service, "-p", json.dumps({"spec": {"selector": selector | more}}))

    select({"nobody": "has-it"})
    try:
        wait_for("no endpoint", lambda: describe(contained["urls"][0]).status == 503, 30)
        replicas = platform.api("GET", "/v1/deployments/contained/replicas").json()["replicas"]
        (replica,) = [each for each in replicas if each["replica"] == pod["metadata"]["name"]]
        assert "its Service does not list it" in replica["message"]
    finally:
        select({"nobody": None})
    wait_for("it answers again", lambda: describe(contained["urls"][0]).status == 200, 30)


def test_behind_an_ingress_a_deployment_has_an_https_url_of_its_own_that_is_true(
    cluster: Cluster, namespace: str, platform: Platform, contained: dict[str, Any]
) -> None:
    own_port = contained["urls"][0]

    def exposed() -> dict[str, Any]:
        found = shown(platform)
        (condition,) = [each for each in found["conditions"] if each["type"] == "Exposed"]
        return {"reason": condition["reason"], "urls": found["urls"]}

    flags = ("--expose", "ingress", "--expose-host", "contained.example.com", "--expose-tls-secret", "certificate")
    platform.ekiben("deployments", "update", "contained", *flags)
    wait_for("the Ingress", lambda: exposed()["reason"] == "INGRESS_WITHOUT_ADDRESS", 30)
    assert exposed()["urls"] == [own_port, "https://contained.example.com"], "nobody leads there yet"
    (ingress,) = cluster.get("ingress", "-n", namespace)["items"]
    assert ingress["spec"]["tls"] == [{"hosts": ["contained.example.com"], "secretName": "certificate"}]
    url = f"/apis/networking.k8s.io/v1/namespaces/{namespace}/ingresses/{ingress['metadata']['name']}/status"
    status = ingress | {"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}}
    cluster.kubectl("replace", "--raw", url, "-f", "-", input=json.dumps(status))
    wait_for("the address", lambda: exposed()["urls"][0] == "https://contained.example.com", 30)

    # What a controller sends on: the host as it is, and how its client came.
    trace = "5" * 31 + "a"
    from_ingress = {
        "host": "contained.example.com",
        "x-forwarded-proto": "https",
        "x-forwarded-for": "203.0.113.9",
        "traceparent": f"00-{trace}-00f067aa0ba902b7-01",
    }
    answer = describe(platform.url, **from_ingress)
    assert (answer.status, answer.json()) == (200, {"words": 2, "letters": 9})

    def captured() -> list[Any]:
        found: list[Any] = platform.ekiben_json("predictions", "list", "--trace", trace)
        return found

    (row,) = wait_for("the capture", captured, 30)
    assert row["deployment"] == "deployments/contained"

    def told_as_https() -> bool:
        return "https://contained.example.com/describe" in json.dumps(platform.ekiben_json("traces", "show", trace))

    wait_for("the span of the gateway", told_as_https, 30)  # those of the pods may come before it

    taken = platform.api(
        "POST",
        "/v1/deployments",
        {"template": {"bento": contained["template"]["bento"]}}
        | {"exposure": {"kind": "INGRESS", "host": "contained.example.com"}},
    )
    assert (taken.status, taken.json()["reason"]) == (409, "HOST_TAKEN")
    refused = platform.ekiben("deployments", "update", "contained", "--expose-class", "a..b", check=False)
    assert refused.returncode and "ingressClassName: Invalid value" in refused.stderr
    platform.ekiben("deployments", "update", "contained", "--expose", "none")
    wait_for("no Ingress", lambda: not cluster.get("ingress", "-n", namespace)["items"], 30)
    assert describe(platform.url, host="contained.example.com").status == 404, "the host means the API again"


def test_a_prediction_is_one_trace_over_gateway_and_pods_and_what_it_monitors_is_beside_it(
    cluster: Cluster, namespace: str, platform: Platform, contained: dict[str, Any]
) -> None:
    trace = "6" * 31 + "b"
    answer = describe(contained["urls"][0], traceparent=f"00-{trace}-00f067aa0ba902b7-01")
    assert (answer.status, answer.json()) == (200, {"words": 2, "letters": 9})

    def one_trace() -> Any:
        spans = platform.ekiben_json("traces", "show", trace)["spans"]
        return spans if {"gateway", "Contained", "Words"} <= {span["service"] for span in spans} else None

    spans = wait_for("one trace over gateway and pods", one_trace, 60)
    for service in ("Contained", "Words"):
        (pod,) = pods(cluster, namespace, service)
        own = [span for span in spans if span["service"] == service]
        assert all(pod["metadata"]["name"] in json.dumps(span) for span in own), (pod["metadata"]["name"], own)
    (row,) = platform.ekiben_json("predictions", "list", "--trace", trace)

    def monitored() -> bool:
        shown = platform.ekiben_json("predictions", "show", row["name"].removeprefix("predictions/"))
        return any(json.loads(entry["data"]).get("letters") == 9 for entry in shown.get("monitorEntries", []))

    wait_for("the monitored value", monitored, 60)
    # The token is in a Secret, not in what describes a pod.
    token = (platform.data / "otlp-token").read_text().strip()
    assert token not in json.dumps(cluster.get("pods,deployments", "-n", namespace))


def test_a_real_controller_leads_clients_by_https_and_by_a_route_to_the_deployment(
    cluster: Cluster, namespace: str, platform: Platform, contained: dict[str, Any], tmp_path: Path
) -> None:
    host = "contained.example.org"
    certificates(tmp_path, host)

    def apply(*objects: dict[str, Any]) -> None:
        for one in objects:
            cluster.kubectl("apply", "-n", namespace, "-f", "-", input=json.dumps(one))

    def told(*flags: str) -> str:
        """Expose it so, wait until the controller took it, and give the first URL."""
        platform.ekiben("deployments", "update", "contained", "--no-wait", *flags)

        def exposed() -> str:
            found = shown(platform)
            return found["urls"][0] if any(each["reason"] == "EXPOSED" for each in found["conditions"]) else ""

        return wait_for("the controller took it", exposed, 120)

    def ask(url: str, port: int) -> Any:
        """As a client does whose DNS has the host; here it is an Envoy on loopback."""
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        scheme, _, name = url.partition("://")
        sni = {"sni_hostname": name}
        with httpx.Client(verify=context, headers={"host": name}) as session:
            try:
                answer = session.post(f"{scheme}://127.0.0.1:{port}/describe", json={"text": "a b c"}, extensions=sni)
            except httpx.HTTPError as exc:  # its Envoy does not listen yet
                raise AssertionError(f"{url}: {exc!r}") from exc
            assert answer.status_code == 200, answer.text
            return answer.json()

    with contextlib.ExitStack() as stack:
        address, _, port = stack.enter_context(cluster.serve_pods(f"127.0.0.1:{platform.port}")).partition(":")
        # The gateway stands outside of the cluster: a Service without a selector, and whom it leads to.
        ports = [{"name": "http", "port": 80, "targetPort": int(port)}]
        service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "gateway"}, "spec": {"ports": ports}}
        endpoints = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": "gateway-1", "labels": {"kubernetes.io/service-name": "gateway"}},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": int(port)}],
            "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
        }
        apply(service, endpoints)
        pair = [f"--cert={tmp_path / 'cert.pem'}", f"--key={tmp_path / 'key.pem'}"]
        cluster.kubectl("create", "secret", "tls", "pair", "-n", namespace, *pair)
        try:
            controller = stack.enter_context(run_controller(cluster, namespace, "edge", tmp_path))
        except FileNotFoundError as exc:
            pytest.skip(str(exc))
        flags = ("--expose-class", CLASS, "--expose-host", host, "--expose-tls-secret", "pair")
        url = told("--expose", "ingress", *flags)
        assert url == f"https://{host}"
        try:
            answer = wait_for("an answer", lambda: ask(url, controller.https), 90)
            assert answer == {"words": 3, "letters": 5}
            # This controller has its Envoy listen at 8000 beyond a listener's port.
            listener = {"name": "http", "port": controller.http - 8000, "protocol": "HTTP"}
            version = "gateway.networking.k8s.io/v1"
            of_cluster = {"apiVersion": version, "kind": "GatewayClass", "metadata": {"name": namespace}}
            gateway = {"apiVersion": version, "kind": "Gateway", "metadata": {"name": "edge"}}
            apply(of_cluster | {"spec": {"controllerName": "projectcontour.io/gateway-controller"}})
            stack.callback(cluster.kubectl, "delete", "gatewayclass", namespace, check=False)
            apply(gateway | {"spec": {"gatewayClassName": namespace, "listeners": [listener]}})
            url = told("--expose", "http-route", "--expose-gateway", "edge:http", "--expose-host", host)
            assert url == f"http://{host}"
            assert wait_for("an answer by the route", lambda: ask(url, controller.http), 90)["words"] == 3
        except AssertionError:
            print(controller.log.read_text()[-8000:])
            raise
        finally:
            platform.ekiben("deployments", "update", "contained", "--no-wait", "--expose", "none")
