"""From a revision to the replica sets that run it."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ekiben.deployer.v1 import deployer_pb2 as pb
from services.deployer import messages, specs
from services.deployer.builds import Made
from services.deployer.domain import MAIN, Bento, Deployment, Revision, Status
from services.deployer.runtimes import SetSpec, serving
from services.deployer.runtimes.kubernetes.names import Where
from services.deployer.runtimes.kubernetes.pod import pod_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def manifest(**config: Any) -> str:
    return json.dumps({"entry_service": "Iris", "services": [{"name": "Iris", "config": config}]})


def revision(template: pb.Template, text: str) -> Revision:
    bento = Bento("bentoRepositories/iris/bentos/v1", "sha256:0", text)
    bentos = dict.fromkeys((MAIN, *template.canary.versions), bento)
    return Revision("u", 1, "r", messages.template_json(template), bentos, "users/admin", NOW)


def deployment(**scaling: pb.Scaling) -> Deployment:
    return Deployment(
        name="iris",
        uid="u",
        organization="default",
        labels={},
        cluster="default",
        scaling=messages.scaling_json(scaling),
        capture="",
        access_authorization=False,
        dev=False,
        generation=1,
        latest_revision=1,
        terminated=False,
        deleting=False,
        port=0,
        build="",
        traceparent="",
        creator="users/admin",
        create_time=NOW,
        update_time=NOW,
        status=Status("DEPLOYING"),
    )


def spec(template: pb.Template, text: str) -> SetSpec:
    (version,) = specs.versions_of(revision(template, text))
    return specs.spec_of(
        deployment(),
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
    asked = deployment(Iris=pb.Scaling(min_replicas=2))
    versions = specs.versions_of(revision(template, manifest()))
    found = {version.target: specs.desired_of(asked, version, "Iris") for version in versions}
    assert found == {MAIN: 2, "next": 3, "small": 1}


def test_readiness_is_asked_where_the_service_answers_it() -> None:
    template = pb.Template(bento="bentoRepositories/iris/bentos/v1")
    assert spec(template, manifest()).readiness_path == "/readyz"
    moved = manifest(endpoints={"readyz": "/api/v9/readyz", "livez": "/api/v9/livez"})
    assert spec(template, moved).readiness_path == "/api/v9/readyz"
    assert spec(template, manifest(endpoints=None)).readiness_path == "/readyz"
    template.services["Iris"].config_overrides.update({"endpoints": {"readyz": "up"}})
    assert spec(template, moved).readiness_path == "/up"


def test_liveness_is_asked_where_the_service_answers_it() -> None:
    template = pb.Template(bento="bentoRepositories/iris/bentos/v1")
    assert spec(template, manifest()).liveness_path == "/livez"
    moved = spec(template, manifest(endpoints={"readyz": "/v1/readyz", "livez": "/v1/livez"}))
    assert moved.liveness_path == "/v1/livez"
    (container,) = pod_of(moved, Where("installation", "models"))["containers"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/v1/livez"


@pytest.mark.parametrize("exports", [[], ["traces"], ["traces", "monitors"]])
def test_replica_exports_only_what_the_builder_saw_working(tmp_path: Path, exports: list[str]) -> None:
    exporter = "lib/python3.11/site-packages/opentelemetry/exporter/otlp/proto/http/trace_exporter"
    (tmp_path / exporter).mkdir(parents=True)
    (tmp_path / "complete.json").write_text(json.dumps({"exports": exports}))
    asked = spec(pb.Template(bento="bentoRepositories/iris/bentos/v1"), manifest())
    places = serving.Places(*(tmp_path for _ in range(7)))
    telemetry = serving.Telemetry("http://127.0.0.1:1")
    told = serving.service_config(asked, places, telemetry, serving.exports_of(tmp_path))
    assert ("tracing" in told) is ("traces" in exports)
    assert told["monitoring"]["type"] == ("otlp" if "monitors" in exports else "default")
