"""What a deployment's exposure is in Kubernetes, and what its controllers say of it."""

from dataclasses import replace
from typing import Any

import pytest

from services.deployer.runtimes.exposures import HTTP_ROUTE, INGRESS, Exposed, Parent, Tls
from services.deployer.runtimes.kubernetes.exposure import exposure_name, exposure_object, same, status_of
from services.deployer.runtimes.kubernetes.names import Where

WHERE = Where("installation", "models")
PLAIN = Exposed("deployments/iris", "u", INGRESS, "iris.example.com")
ROUTE = replace(PLAIN, kind=HTTP_ROUTE, gateways=(Parent("edge", "infra", "https"),))


def test_an_ingress_leads_to_the_gateway_and_has_nothing_of_a_controllers() -> None:
    made = exposure_object(replace(PLAIN, path="/v1", class_name="nginx"), WHERE, "ekiben:8080")
    backend = {"service": {"name": "ekiben", "port": {"number": 8080}}}
    assert made["spec"] == {
        "ingressClassName": "nginx",
        "rules": [{"host": PLAIN.host, "http": {"paths": [{"path": "/v1", "pathType": "Prefix", "backend": backend}]}}],
    }
    assert list(made["metadata"]["annotations"]) == ["ekiben.dev/applied"]
    named = exposure_object(PLAIN, WHERE, "ekiben:http")["spec"]["rules"][0]["http"]["paths"][0]["backend"]
    assert named == {"service": {"name": "ekiben", "port": {"name": "http"}}}


@pytest.mark.parametrize(
    ("tls", "spec", "annotations"),
    [
        (Tls(), {"hosts": [PLAIN.host]}, {}),
        (Tls(secret="cert"), {"hosts": [PLAIN.host], "secretName": "cert"}, {}),
        (
            Tls(issuer="acme"),
            {"hosts": [PLAIN.host], "secretName": f"{exposure_name('u')}-tls"},
            {"cert-manager.io/issuer": "acme"},
        ),
        (
            Tls("cert", cluster_issuer="acme"),
            {"hosts": [PLAIN.host], "secretName": "cert"},
            {"cert-manager.io/cluster-issuer": "acme"},
        ),
    ],
)
def test_tls_is_the_controllers_a_static_secret_or_cert_managers(
    tls: Tls, spec: dict[str, Any], annotations: dict[str, str]
) -> None:
    made = exposure_object(replace(PLAIN, tls=tls, annotations={"a/b": "c"}), WHERE, "ekiben:80")
    assert made["spec"]["tls"] == [spec]
    del made["metadata"]["annotations"]["ekiben.dev/applied"]
    assert made["metadata"]["annotations"] == {"a/b": "c", **annotations}


def test_a_route_is_attached_to_its_gateways() -> None:
    made = exposure_object(ROUTE, WHERE, "ekiben:80")
    assert made["apiVersion"] == "gateway.networking.k8s.io/v1" and made["kind"] == "HTTPRoute"
    assert made["spec"] == {
        "parentRefs": [{"name": "edge", "namespace": "infra", "sectionName": "https"}],
        "hostnames": [PLAIN.host],
        "rules": [
            {
                "matches": [{"path": {"type": "PathPrefix", "value": "/"}}],
                "backendRefs": [{"name": "ekiben", "port": 80}],
            }
        ],
    }
    assert same(made, made) and not same(exposure_object(replace(ROUTE, host="x.y"), WHERE, "ekiben:80"), made)


def live(exposed: Exposed, **status: Any) -> dict[str, Any]:
    made = exposure_object(exposed, WHERE, "ekiben:80")
    made["metadata"]["generation"] = 2
    return {**made, "status": status}


def parent(*conditions: tuple[str, str, int], name: str = "edge", listener: str = "https") -> dict[str, Any]:
    return {
        "parentRef": {"name": name, "namespace": "infra", "sectionName": listener},
        "conditions": [
            {"type": kind, "status": status, "observedGeneration": generation, "message": f"{kind} is {status}"}
            for kind, status, generation in conditions
        ],
    }


@pytest.mark.parametrize(
    ("exposed", "status", "done", "reason"),
    [
        (PLAIN, {}, None, "INGRESS_WITHOUT_ADDRESS"),
        (PLAIN, {"loadBalancer": {}}, None, "INGRESS_WITHOUT_ADDRESS"),
        (PLAIN, {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}, True, "EXPOSED"),
        (ROUTE, {}, None, "HTTP_ROUTE_PENDING"),
        (ROUTE, {"parents": [parent(("Accepted", "True", 2), ("ResolvedRefs", "True", 2))]}, True, "EXPOSED"),
        (ROUTE, {"parents": [parent(("Accepted", "True", 1))]}, None, "HTTP_ROUTE_PENDING"),
        (ROUTE, {"parents": [parent(("Accepted", "True", 2), name="other")]}, None, "HTTP_ROUTE_PENDING"),
        (ROUTE, {"parents": [parent(("Accepted", "False", 2))]}, False, "HTTP_ROUTE_NOT_ACCEPTED"),
        (
            ROUTE,
            {"parents": [parent(("Accepted", "True", 2), ("ResolvedRefs", "False", 2))]},
            False,
            "HTTP_ROUTE_NOT_ACCEPTED",
        ),
    ],
)
def test_what_controllers_say_is_told(exposed: Exposed, status: dict[str, Any], done: bool | None, reason: str) -> None:
    found = status_of(exposed, live(exposed, **status))
    assert (found.done, found.reason) == (done, reason)
    assert done is not False or "False" in found.message
