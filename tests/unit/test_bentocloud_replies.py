"""What BentoML's clients are told, and how their words are read: the pure half of the wire protocol."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.builder.v1 import builder_pb2 as builder
from ekiben.deployer.v1 import deployer_pb2 as deployer
from ekiben.errors import InvalidArgument
from ekiben.identity.v1 import identity_pb2 as identity
from ekiben.registry.v1 import registry_pb2 as registry
from services.gateway.bentocloud import api_tokens, clusters, old_deployments, pods, secrets, wire
from services.gateway.bentocloud.deployment_replies import deployment_reply, status_of
from services.gateway.bentocloud.deployment_requests import bento_name, deployment_of, keep
from services.gateway.bentocloud.manifests import bento_manifest, raw_member
from services.gateway.bentocloud.repositories import BENTOS, MODELS
from services.gateway.bentocloud.versions import transmission_strategy, version_reply, with_repository

USER = {"name": "admin", "email": "", "first_name": "", "last_name": ""}
NULLABLE = {
    "updated_at", "deleted_at", "transmission_strategy", "upload_started_at", "upload_finished_at", "latest_bento",
    "latest_model", "labels", "canary", "policy", "routing", "expired_at", "last_used_at", "token", "value", "path",
    "sub_path", "extras", "instance_type", "deployment_strategy", "cold_start_timeout", "min_replicas", "route_type",
    "route_by", "gpu", "custom", "gpu_config", "latest_revision", "runners", "canary_rules", "resource_instance",
}  # fmt: skip


def nulls(value: Any, path: str = "") -> list[str]:
    """Every null of a reply that a client would take for the text "None" or crash over."""
    if isinstance(value, dict):
        return [found for key, each in value.items() for found in nulls(each, f"{path}.{key}")]
    if isinstance(value, list):
        return [found for i, each in enumerate(value) for found in nulls(each, f"{path}[{i}]")]
    return [path] if value is None and path.rpartition(".")[2] not in NULLABLE else []


def bento(manifest: str = "{}", state: Any = registry.Content.READY) -> registry.Bento:
    name = "bentoRepositories/iris/bentos/v1"
    return registry.Bento(name=name, uid="u", manifest=manifest, content=registry.Content(state=state))


@pytest.mark.parametrize("kind", [MODELS, BENTOS])
def test_an_empty_version_has_every_key_and_no_null_text(kind: Any) -> None:
    version: Any = bento() if kind is BENTOS else registry.Model(name="modelRepositories/iris/models/v1")
    reply = version_reply(kind, version)
    assert nulls(reply) == []
    assert reply["name"] == reply["version"] == "v1"
    assert reply["presigned_upload_url"] == reply["presigned_download_url"] == reply["upload_id"] == ""
    assert reply["created_at"].endswith("Z")
    assert {"uid", "resource_type", "image_build_status", "upload_finished_reason", "build_at"} <= set(reply)


@pytest.mark.parametrize(
    ("state", "word"),
    [("PENDING", "pending"), ("UPLOADING", "uploading"), ("READY", "success"), ("FAILED", "failed"),
     ("EXTERNAL", "success")],
)  # fmt: skip
def test_upload_status_uses_words_that_strict_readers_know(state: str, word: str) -> None:
    assert version_reply(BENTOS, bento(state=registry.Content.State.Value(state)))["upload_status"] == word


def test_big_archives_go_in_parts_unless_a_setting_says_otherwise() -> None:
    big = json.dumps({"size_bytes": 100 << 20})
    assert transmission_strategy('{"size_bytes": 5}', "auto") is None
    assert transmission_strategy("", "auto") is None
    assert transmission_strategy(big, "auto") == "presigned_url"
    assert transmission_strategy(big, "presigned") is None
    assert transmission_strategy("{}", "multipart") == "presigned_url"
    assert transmission_strategy(big, "proxy") == "proxy"


def test_manifests_of_old_clients_are_completed_in_replies() -> None:
    old = {"service": "s:svc", "bentoml_version": "1.1.11", "size_bytes": 3, "apis": {}, "models": [], "runners": None}
    manifest = bento_manifest(json.dumps(old), "iris", "v1")
    assert (manifest["name"], manifest["version"], manifest["entry_service"]) == ("iris", "v1", "iris")
    assert {key: manifest[key] for key in old} == old


def test_manifests_of_new_clients_come_back_as_they_were() -> None:
    new = {"service": "s:Svc", "bentoml_version": "1.4.39", "size_bytes": 3, "entry_service": "Svc", "name": "iris",
           "version": "v1", "schema": {"a": [1, None]}, "image": None, "envs": [], "unknown": {"x": None}}  # fmt: skip
    assert bento_manifest(json.dumps(new), "iris", "v1") == new
    assert bento_manifest('{"envs": null, "schema": null}', "iris", "v1")["envs"] == []


@pytest.mark.parametrize("stored", ["", "null", "[]", "{", '"x"'])
def test_an_unreadable_manifest_still_gives_a_readable_reply(stored: str) -> None:
    assert nulls(version_reply(BENTOS, bento(stored))) == []


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ('{"manifest": {"a":1.0e5,  "b" :"\\u00e9"}, "x": 1}', '{"a":1.0e5,  "b" :"\\u00e9"}'),
        ('  { "x" : [ {"manifest": 1} ], "manifest":\n{"z": {}}}', '{"z": {}}'),
        ('{"manifest": {"a": 1}, "manifest": {"b": 2}}', '{"b": 2}'),
        ('{"manifest": null}', ""),
        ("{}", ""),
    ],
)
def test_a_manifest_is_kept_to_the_letter(body: str, text: str) -> None:
    assert raw_member(body, "manifest") == text


def test_times_are_read_as_clients_write_them() -> None:
    assert wire.read_time("2026-03-04 05:06:07.000008").ToJsonString() == "2026-03-04T05:06:07.000008Z"
    assert wire.read_time("2026-03-04T05:06:07+02:00").ToJsonString() == "2026-03-04T03:06:07Z"
    local = datetime(2026, 3, 4, 5, 6, 7).astimezone().astimezone(UTC)
    assert wire.read_time("2026-03-04 05:06:07", local=True).ToDatetime(UTC) == local
    for bad in ("soon", "", "9999-12-31 23:59:59-12:00"):
        with pytest.raises(InvalidArgument):
            wire.read_time(bad)


def test_empty_query_parameters_count_as_absent() -> None:
    assert wire.number({"count": ""}, "count", 7) == 7
    assert wire.number({}, "count", 7) == 7
    assert wire.number({"count": "10"}, "count", 7) == 10
    for bad in ("-1", "ten", "1" * 30, "١"):
        with pytest.raises(InvalidArgument):
            wire.number({"count": bad}, "count", 7)


def test_secrets_show_keys_and_no_values() -> None:
    secret = identity.Secret(
        name="secrets/hf", kind=identity.Secret.ENV, items=[identity.Secret.Item(key="TOKEN", value="never")]
    )
    reply = secrets.secret_reply(secret, USER)
    assert reply["content"]["items"] == [{"key": "TOKEN", "sub_path": None, "value": None}]
    assert (reply["content"]["type"], reply["content"]["stage"]) == ("env", "all")
    assert "never" not in json.dumps(reply)
    assert nulls(reply) == []


def test_secrets_are_read_with_their_words() -> None:
    content = {"type": "mountfile", "stage": "runtime", "path": "/x", "items": [{"key": "k", "value": "v"}]}
    secret = secrets.secret_of("secrets/s", {"content": content})
    assert (secret.kind, secret.stage, secret.path) == (identity.Secret.MOUNT_FILE, identity.Secret.RUNTIME, "/x")
    for broken in ({"type": "file"}, {"stage": "never"}, {"items": [1]}, {"items": [{"value": "v"}]}):
        with pytest.raises(InvalidArgument):
            secrets.secret_of("secrets/s", {"content": content | broken})


def test_tokens_that_only_read_are_viewers() -> None:
    assert api_tokens.role_of(["read_organization", "read_cluster"]) == Role.ROLE_VIEWER
    assert api_tokens.role_of(["api", "read_cluster"]) == Role.ROLE_UNSPECIFIED
    assert api_tokens.role_of([]) == Role.ROLE_UNSPECIFIED
    reply = api_tokens.token_reply(
        identity.ApiToken(name="apiTokens/7", display_name="ci"), USER, {}, datetime.now(UTC)
    )
    assert (reply["uid"], reply["name"], reply["is_expired"], reply["scopes"]) == ("7", "ci", False, [])
    assert nulls(reply) == []


def test_instance_types_say_quantities_as_kubernetes_does() -> None:
    size = deployer.InstanceType(
        name="instanceTypes/small", display_name="cpu.small", cpu_millicores=500, memory_bytes=512 << 20
    )
    reply = clusters.instance_type_reply(size)
    assert reply["config"]["resources"]["requests"] == {"cpu": "500m", "memory": "512Mi", "gpu": None, "custom": None}
    assert reply["config"]["price"] == "0"
    assert reply["display_name"] == "cpu.small"


def test_instance_types_name_what_a_cluster_has() -> None:
    size = deployer.InstanceType(name="instanceTypes/mig", cpu_millicores=4000, memory_bytes=8 << 30, group="a100")
    size.pod.resources.requests.update({"cpu": "2"})
    size.pod.resources.limits.update({"cpu": "4", "nvidia.com/mig-1g.5gb": "1"})
    size.pod.node_selector["pool"] = "gpu"
    config = clusters.instance_type_reply(size)["config"]
    custom = {"nvidia.com/mig-1g.5gb": "1"}
    assert config["resources"]["requests"] == {"cpu": "2", "memory": "8Gi", "gpu": None, "custom": custom}
    assert config["resources"]["limits"] == {"cpu": "4", "memory": "8Gi", "gpu": None, "custom": custom}
    assert (config["group"], config["node_selectors"]) == ("a100", {"pool": "gpu"})


def test_an_update_keeps_what_the_client_has_no_words_for() -> None:
    current = deployment_of(CREATE, "web")
    current.template.services["Svc"].pod.edge = True
    current.template.canary.versions["blue"].services["Svc"].pod.edge = True
    current.scaling["Svc"].autoscaling.SetInParent()
    current.template.services["Gone"].pod.edge = True
    wanted = deployment_of(CREATE, "web")
    keep(current, wanted)
    assert wanted.template.services["Svc"].pod.edge and wanted.template.canary.versions["blue"].services["Svc"].pod.edge
    assert wanted.scaling["Svc"].HasField("autoscaling") and "Gone" not in wanted.template.services
    current.template.image.SetInParent()
    keep(current, wanted)
    assert wanted.template.HasField("image")
    moved = deployment_of({**CREATE, "bento": "iris:v2"}, "web")
    keep(current, moved)
    assert not moved.template.HasField("image")  # It is of the former bento.


CREATE: dict[str, Any] = {
    "bento": "iris:v1",
    "name": "web",
    "access_authorization": True,
    "envs": [{"name": "A", "value": "1"}],
    "labels": [{"key": "team", "value": "x"}],
    "secrets": ["hf"],
    "dev": False,
    "services": {
        "Svc": {
            "instance_type": "cpu.small",
            "scaling": {"min_replicas": 2, "max_replicas": 4, "policy": {"scale_up_stabilization_window": 60}},
            "envs": [{"name": "B", "value": "2"}],
            "deployment_strategy": "Recreate",
            "extras": {"bento_request_overrides": {"imageBuildTimeout": 9}},
            "cold_start_timeout": 30,
            "config_overrides": {"traffic": {"timeout": 15}, "workers": 2, "ratio": 0.5},
        }
    },
    "canary": {
        "route_type": "header",
        "route_by": "X-V",
        "versions": {
            "blue": {
                "bento": "iris:v2",
                "weight": 25,
                "envs": [],
                "secrets": [],
                "services": {"Svc": {"scaling": {"min_replicas": 1, "max_replicas": 3}}},
            }
        },
    },
}


def read_back(deployment: deployer.Deployment) -> dict[str, Any]:
    deployment.latest_revision = "deployments/web/revisions/1"
    repository = registry.BentoRepository(name="bentoRepositories/iris")
    bentos = {
        f"bentoRepositories/iris/bentos/{version}": with_repository(
            BENTOS, registry.Bento(name=f"bentoRepositories/iris/bentos/{version}"), repository, strategy="auto"
        )
        for version in ("v1", "v2")
    }
    cluster = clusters.cluster_reply(deployer.Cluster(name="clusters/default"))
    return deployment_reply(deployment, creator=USER, cluster=cluster, bentos=bentos)


def test_a_deployment_comes_back_as_it_was_sent() -> None:
    reply = read_back(deployment_of(CREATE, "web"))
    main, blue = reply["latest_revision"]["targets"]
    assert main["name"] == "main"
    assert main["bento"]["repository"]["name"] + ":" + main["bento"]["name"] == "iris:v1"
    sent: Any = CREATE["services"]
    assert main["config"]["services"] == {"Svc": {**sent["Svc"]}}
    assert main["config"]["envs"] == CREATE["envs"]
    assert main["config"]["secrets"] == ["hf"]
    assert main["config"]["access_authorization"] is True
    assert blue["name"] == "blue"
    assert blue["bento"]["version"] == "v2"
    assert blue["config"]["services"]["Svc"]["scaling"] == {"min_replicas": 1, "max_replicas": 3, "policy": None}
    routing = {"route_type": "header", "route_by": "X-V", "weights": {"blue": 25}}
    assert reply["manifest"] == {"dev": False, "routing": routing}
    assert nulls(reply) == []


def test_whole_numbers_stay_whole() -> None:
    config = read_back(deployment_of(CREATE, "web"))["latest_revision"]["targets"][0]["config"]
    overrides = config["services"]["Svc"]["config_overrides"]
    assert isinstance(overrides["workers"], int)
    assert overrides["ratio"] == 0.5


def test_a_reply_has_at_most_one_url_and_needs_no_revision() -> None:
    deployment = deployer.Deployment(name="deployments/web", urls=["http://a", "http://b"])
    cluster = clusters.cluster_reply(deployer.Cluster(name="clusters/default"))
    reply = deployment_reply(deployment, creator=USER, cluster=cluster, bentos={})
    assert reply["urls"] == ["http://a"]
    assert reply["latest_revision"] is None
    assert nulls(reply) == []


def test_tags_are_resolved_by_the_registry() -> None:
    assert bento_name("iris") == "bentoRepositories/iris/bentos/latest"
    assert bento_name("iris:latest") == "bentoRepositories/iris/bentos/latest"
    assert bento_name("iris:v1") == "bentoRepositories/iris/bentos/v1"
    with pytest.raises(InvalidArgument):
        bento_name("no such name")


@pytest.mark.parametrize(
    "body",
    [
        {}, {"bento": ""}, {"bento": 5}, {"bento": "a:b", "services": []}, {"bento": "a:b", "services": {"S": 1}},
        {"bento": "a:b", "services": {"S": {"scaling": {"min_replicas": "x"}}}}, {"bento": "a:b", "labels": ["x"]},
        {"bento": "a:b", "services": {"S": {"scaling": {"min_replicas": -1}}}}, {"bento": "a:b", "envs": [{}]},
        {"bento": "a:b", "secrets": ["NO!"]}, {"bento": "a:b", "canary": {"versions": {"x": {}}}},
        {"bento": "a:b", "services": {"S": {"cold_start_timeout": "soon"}}},
    ],
)  # fmt: skip
def test_nonsense_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        deployment_of(body)


@pytest.mark.parametrize(
    ("state", "word"),
    [("DEPLOYING", "deploying"), ("BUILDING", "image-building"), ("RUNNING", "running"), ("UNHEALTHY", "unhealthy"),
     ("FAILED", "failed"), ("TERMINATING", "terminating"), ("TERMINATED", "terminated"),
     ("SCALED_TO_ZERO", "scaled-to-zero"), ("STATE_UNSPECIFIED", "unknown")],
)  # fmt: skip
def test_each_state_has_the_clients_word(state: str, word: str) -> None:
    assert status_of(deployer.Deployment(state=deployer.Deployment.State.Value(state))) == word


def test_a_failed_build_is_told_apart() -> None:
    built = deployer.Condition(type="Built", status=deployer.Condition.FALSE)
    failed = deployer.Deployment(state=deployer.Deployment.FAILED, conditions=[built])
    assert status_of(failed) == "image-build-failed"


def test_old_clients_get_the_same_deployment_in_their_words() -> None:
    reply = old_deployments.old_reply(read_back(deployment_of(CREATE, "web")))
    (target,) = reply["latest_revision"]["targets"]
    assert (reply["mode"], reply["latest_revision"]["status"], target["type"]) == ("deployment", "inactive", "stable")
    assert target["config"]["runners"]["Svc"]["hpa_conf"] == {"min_replicas": 2, "max_replicas": 4}
    assert nulls({key: value for key, value in target.items() if key != "config"}) == []


def test_old_requests_name_the_api_server_like_the_repository() -> None:
    config = {
        "hpa_conf": {"min_replicas": 1, "max_replicas": 2, "cpu": None},
        "envs": [{"key": "A", "value": "1"}],
        "runners": {"r1": {"hpa_conf": {"min_replicas": 3, "max_replicas": 3}}, "r2": {}},
    }
    body = {"name": "old", "targets": [{"bento_repository": "iris", "bento": "v1", "config": config}]}
    deployment = deployment_of(old_deployments.new_body(body), "old")
    assert deployment.template.bento == "bentoRepositories/iris/bentos/v1"
    assert deployment.scaling["r1"].min_replicas == 3
    assert deployment.scaling["iris"].max_replicas == 2
    assert deployment.template.services["iris"].envs[0].name == "A"
    assert "r2" not in deployment.template.services
    with pytest.raises(InvalidArgument):
        old_deployments.new_body({"targets": []})


def test_a_build_is_the_pod_that_builds_an_image() -> None:
    build = builder.Build(name="builds/b1", bento="bentoRepositories/iris/bentos/v1", state=builder.Build.RUNNING)
    pod = pods.build_pod(build)
    assert pod["labels"]["yatai.ai/is-bento-image-builder"] == "true"
    assert (pod["name"], pod["pod_status"]["status"]) == ("build-b1", "Running")
    assert nulls(pod) == []


def test_a_replica_of_the_entry_service_is_the_api_server() -> None:
    replica = deployer.Replica(replica="r-1", service="Svc", state=deployer.Replica.READY)
    pod = pods.replica_pod(deployer.Deployment(name="deployments/web"), replica, "Svc")
    assert pod["labels"]["yatai.ai/bento-function-component-type"] == "api-server"
    assert (pod["name"], pod["runner_name"], pod["status"]) == ("web.r-1", "Svc", {"phase": "Running", "ready": True})
