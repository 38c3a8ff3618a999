"""Under which names a deployment is reached, and which exposures are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from ekiben.deployer.v1 import exposure_pb2
from ekiben.errors import FailedPrecondition, InvalidArgument
from services.deployer import messages
from services.deployer.addresses import Addresses
from services.deployer.domain import Condition, Deployment, Status
from services.deployer.runtimes.exposures import Exposed, Tls
from services.deployer.settings import Settings
from services.kernel.settings import SettingsError
from tests.deployment_rows import a_deployment

WHERE = {"database_url": "sqlite+aiosqlite:///x", "data_dir": Path("/d"), "run_dir": Path("/r")}


def settings(**more: Any) -> Settings:
    there = {"runtime": "kubernetes", "kubernetes_gateway_service": "ekiben:80"}
    return Settings(**{**WHERE, **there, **more})


def exposure(**fields: Any) -> exposure_pb2.Exposure:
    return json_format.ParseDict(fields, exposure_pb2.Exposure())


def deployment(*, led: bool | None = True, port: int = 7500, **fields: Any) -> Deployment:
    conditions = (Condition("Exposed", led, "X"),)
    text = messages.exposure_json(exposure(**fields)) if fields else ""
    return a_deployment(port=port, status=Status("RUNNING", conditions), exposure=text)


def test_urls_are_https_where_it_is_and_lead_once_the_cluster_says_so() -> None:
    addresses = Addresses(settings(domain="models.example.com", public_url="https://models.example.com"))
    by_name = "https://iris-default.models.example.com"
    assert addresses.urls(deployment()) == ["http://127.0.0.1:7500", by_name]
    assert addresses.urls(deployment(port=0)) == [by_name]
    outside = {"kind": "INGRESS", "host": "iris.example.com", "tls": {}}
    assert addresses.urls(deployment(**outside))[0] == "https://iris.example.com"
    assert addresses.urls(deployment(led=None, **outside))[-1] == "https://iris.example.com"
    plain = deployment(kind="INGRESS", host="iris.example.com", path="/v1/")
    assert addresses.urls(plain)[0] == "http://iris.example.com/v1"
    assert addresses.hosts(plain) == ["iris-default.models.example.com", "iris.example.com"]
    assert Addresses(settings()).urls(deployment()) == ["http://127.0.0.1:7500"]
    assert Addresses(settings(host="::1")).urls(deployment()) == ["http://[::1]:7500"]


def test_a_name_is_short_enough_for_the_host_by_which_alone_it_is_reached() -> None:
    addresses = Addresses(settings(domain="models.example.com"))
    long, short = "n" * 56, "n" * 55  # With `-default` that is one more than 63, and 63.
    for fields in ({"port": 0}, {"kind": "INGRESS"}, {"port": 0, "kind": "INGRESS"}, {"port": 0, "kind": "NONE"}):
        addresses.check_name(replace(deployment(**fields), name=short))  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="a name of at most 55") as caught:
            addresses.check_name(replace(deployment(**fields), name=long))  # type: ignore[arg-type]
        assert caught.value.reason == "NAME_TOO_LONG"
    # By a port, or a host of its own, it is reached whatever its name.
    addresses.check_name(replace(deployment(), name=long))
    for port in (7500, 0):
        addresses.check_name(replace(deployment(port=port, kind="INGRESS", host="n.example.com"), name=long))
    route: dict[str, Any] = {"kind": "HTTP_ROUTE", "host": "n.example.com", "gateways": [{"name": "g"}]}
    addresses.check_name(replace(deployment(port=0, **route), name=long))


def test_what_the_settings_expose_a_deployment_may_leave() -> None:
    addresses = Addresses(settings(exposure='{"kind": "INGRESS", "tls": {"clusterIssuer": "acme"}}', domain="m.org"))
    exposed = addresses.exposed(deployment())
    assert exposed == Exposed(
        "deployments/iris", "uid-iris", "INGRESS", "iris-default.m.org", tls=Tls(cluster_issuer="acme")
    )
    assert addresses.exposed(deployment(kind="NONE")) is None
    own = addresses.exposed(deployment(kind="INGRESS", host="iris.org"))
    assert own is not None and (own.host, own.tls) == ("iris.org", None)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"kind": "INGRESS", "host": "Iris.example.com"}, "host"),
        ({"kind": "INGRESS", "host": "iris_.example.com"}, "host"),
        ({"kind": "INGRESS", "host": "*.example.com"}, "host"),
        ({"kind": "INGRESS", "host": "m.org"}, "host"),
        ({"kind": "INGRESS", "host": "api.example.com"}, "host"),
        ({"kind": "INGRESS", "host": "other-default.m.org"}, "host"),
        ({"kind": "INGRESS", "host": "iris.elsewhere.com"}, "host"),
        ({"kind": "INGRESS", "path": "v1"}, "path"),
        ({"kind": "INGRESS", "path": "/a/../b"}, "path"),
        ({"kind": "INGRESS", "path": '/"'}, "path"),
        ({"kind": "INGRESS", "annotations": {"a b": "c"}}, "annotations[a b]"),
        ({"kind": "INGRESS", "annotations": {"ekiben.dev/applied": "c"}}, "annotations[ekiben.dev/applied]"),
        ({"kind": "INGRESS", "gateways": [{"name": "g"}]}, "gateways"),
        ({"kind": "INGRESS", "className": "A B"}, "class_name"),
        ({"kind": "INGRESS", "tls": {"issuer": "a", "clusterIssuer": "b"}}, "tls"),
        ({"kind": "HTTP_ROUTE"}, "gateways"),
        ({"kind": "HTTP_ROUTE", "gateways": [{}]}, "gateways[0].name"),
        ({"kind": "HTTP_ROUTE", "gateways": [{"name": "g"}], "tls": {"secret": "s"}}, "tls"),
        ({"kind": "HTTP_ROUTE", "gateways": [{"name": "g"}], "className": "c"}, "class_name"),
        ({"host": "iris.example.com"}, "kind"),
    ],
)
def test_a_bad_exposure_is_refused_field_by_field(fields: dict[str, Any], field: str) -> None:
    public = {"public_url": "https://api.example.com", "domain": "m.org", "exposure_domains": ("example.com",)}
    found = Addresses(settings(**public)).violations(exposure(**fields), "iris")
    assert [path for path, _ in found] == [f"deployment.exposure.{field}"], found


@pytest.mark.parametrize("host", ["iris-default.m.org", "example.com", "a.b.example.com", ""])
def test_a_good_host_is_taken(host: str) -> None:
    addresses = Addresses(settings(domain="m.org", exposure_domains=("example.com",)))
    assert not addresses.violations(exposure(kind="INGRESS", host=host), "iris")


def test_where_nothing_can_be_exposed_it_is_said_in_words() -> None:
    wanted = exposure(kind="INGRESS")
    with pytest.raises(FailedPrecondition, match="runtime process"):
        Addresses(settings(runtime="process")).check(wanted)
    with pytest.raises(FailedPrecondition, match="KUBERNETES_GATEWAY_SERVICE"):
        Addresses(settings(kubernetes_gateway_service="")).check(wanted)
    Addresses(settings(runtime="process")).check(exposure(kind="NONE"))
    for bad in ("{", '{"kind": "INGRESS", "host": "a"}', '{"kind": "HTTP_ROUTE"}'):
        with pytest.raises(SettingsError):
            Addresses(settings(exposure=bad))
    with pytest.raises(SettingsError):
        Addresses(replace(settings(exposure='{"kind": "INGRESS"}'), runtime="process"))
