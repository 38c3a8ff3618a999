"""From a revision to the replica sets that run it."""

import json
from pathlib import Path

import pytest

from ekiben.deployer.v1 import deployer_pb2 as pb
from services.deployer import specs
from services.deployer.builds import Made
from services.deployer.domain import MAIN, Bento
from services.deployer.runtimes import SetSpec, serving
from services.deployer.runtimes.kubernetes.names import Where
from services.deployer.runtimes.kubernetes.pod import pod_of
from tests.deployment_rows import a_bento, a_deployment, a_revision

IRIS = a_deployment()


def spec(template: pb.Template, bento: Bento) -> SetSpec:
    (version,) = specs.versions_of(a_revision(IRIS, template, bento=bento))
    return specs.spec_of(
        IRIS,
        1,
        version,
        "Iris",
        made=Made("sha256:0", environment="/env"),
        secrets=[],
        instance_types={},
        drain_s=1.0,
    )


def test_canary_has_the_replicas_that_it_asks_for_and_main_those_of_the_deployment() -> None:
    template = pb.Template(bento="bentoRepositories/iris/bentos/v1")
    template.canary.versions["next"].scaling["Iris"].min_replicas = 3
    template.canary.versions["small"].weight_percent = 10
    asked = a_deployment(scaling={"Iris": pb.Scaling(min_replicas=2)})
    versions = specs.versions_of(a_revision(IRIS, template))
    found = {version.target: specs.desired_of(asked, version, "Iris") for version in versions}
    assert found == {MAIN: 2, "next": 3, "small": 1}


def test_readiness_is_asked_where_the_service_answers_it() -> None:
    template = pb.Template(bento="bentoRepositories/iris/bentos/v1")
    assert spec(template, a_bento()).readiness_path == "/readyz"
    moved = a_bento(endpoints={"readyz": "/api/v9/readyz", "livez": "/api/v9/livez"})
    assert spec(template, moved).readiness_path == "/api/v9/readyz"
    assert spec(template, a_bento(endpoints=None)).readiness_path == "/readyz"
    template.services["Iris"].config_overrides.update({"endpoints": {"readyz": "up"}})
    assert spec(template, moved).readiness_path == "/up"


def test_liveness_is_asked_where_the_service_answers_it() -> None:
    template = pb.Template(bento="bentoRepositories/iris/bentos/v1")
    assert spec(template, a_bento()).liveness_path == "/livez"
    moved = spec(template, a_bento(endpoints={"readyz": "/v1/readyz", "livez": "/v1/livez"}))
    assert moved.liveness_path == "/v1/livez"
    (container,) = pod_of(moved, Where("installation", "models"))["containers"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/v1/livez"


@pytest.mark.parametrize("exports", [[], ["traces"], ["traces", "monitors"]])
def test_replica_exports_only_what_the_builder_saw_working(tmp_path: Path, exports: list[str]) -> None:
    exporter = "lib/python3.11/site-packages/opentelemetry/exporter/otlp/proto/http/trace_exporter"
    (tmp_path / exporter).mkdir(parents=True)
    (tmp_path / "complete.json").write_text(json.dumps({"exports": exports}))
    asked = spec(pb.Template(bento="bentoRepositories/iris/bentos/v1"), a_bento())
    places = serving.Places(*(tmp_path for _ in range(7)))
    telemetry = serving.Telemetry("http://127.0.0.1:1")
    told = serving.service_config(asked, places, telemetry, serving.exports_of(tmp_path))
    assert ("tracing" in told) is ("traces" in exports)
    assert told["monitoring"]["type"] == ("otlp" if "monitors" in exports else "default")
