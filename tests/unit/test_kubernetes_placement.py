"""What a deployment says of its pods, and its patch, in the pod template."""

import json
from dataclasses import replace
from typing import Any

import pytest
from google.protobuf import json_format

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployer.v1.pods_pb2 import PodSettings
from ekiben.errors import InvalidArgument
from services.deployer import pods
from services.deployer.domain import InstanceType
from services.deployer.runtimes import Pod, SetSpec, podless
from services.deployer.runtimes.kubernetes.checking import check
from services.deployer.runtimes.kubernetes.names import Where, name_of
from services.deployer.runtimes.kubernetes.objects import template_of
from services.deployer.runtimes.kubernetes.placement import borrowed, images, login_names, used
from services.deployer.runtimes.kubernetes.strategic import merged

CLAIM = {"kind": "PersistentVolumeClaim", "name": "theirs"}
WHERE = Where("installation", "models")
SPEC = SetSpec(
    key="abcdefgh23456789",
    deployment="deployments/iris",
    deployment_uid="3f0a",
    revision=3,
    target="main",
    service="Iris",
    entry=True,
    legacy=False,
    bento="bentoRepositories/iris/bentos/v1",
    bento_digest="sha256:0",
    models=(),
    environment="",
    image="registry/iris@sha256:0",
    envs={"TOKEN": "x"},
    memory_bytes=1 << 30,
)


def settings(text: str) -> PodSettings:
    return json_format.ParseDict(json.loads(text), PodSettings())


def template(pod: Pod) -> dict[str, Any]:
    return template_of(replace(SPEC, pod=pod), WHERE)


def of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = template(Pod(settings(text)))["spec"]
    return found


def test_nodes_are_chosen_as_kubernetes_says_it() -> None:
    pod = of(
        """{"node_selector": {"disk": "ssd"}, "tolerations": [{"key": "gpu", "operator": "Exists", "toleration_seconds": 5}],
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 10}]}},
        "topology_spread": [{"topology_key": "zone"}], "priority_class": "high", "runtime_class": "gvisor"}"""
    )
    assert pod["nodeSelector"] == {"disk": "ssd"}
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists", "tolerationSeconds": 5}]
    weight = pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"][0]["weight"]
    assert isinstance(weight, int) and weight == 10
    (spread,) = pod["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"]["ekiben.dev/set"] == SPEC.key and spread["maxSkew"] == 1
    assert (pod["priorityClassName"], pod["runtimeClassName"]) == ("high", "gvisor")


def test_an_edge_node_may_be_away_for_long() -> None:
    pod = of('{"edge": true}')
    assert pod["nodeSelector"] == {"node-role.kubernetes.io/edge": ""}
    staying = {each["key"] for each in pod["tolerations"] if "tolerationSeconds" not in each}
    assert "node.kubernetes.io/unreachable" in staying and "node.kubernetes.io/not-ready" in staying


def test_resources_by_name_come_to_the_instance_type_s() -> None:
    pod = of(
        """{"resources": {"requests": {"cpu": "100m"}, "limits": {"nvidia.com/mig-1g.5gb": "1", "cpu": "2"},
        "claims": [{"template": "gpus"}, {"name": "shared", "claim": "pool", "request": "one"}]}}"""
    )
    (container,) = pod["containers"]
    memory = str(1 << 30)
    assert container["resources"] == {
        "limits": {"memory": memory, "nvidia.com/mig-1g.5gb": "1", "cpu": "2"},
        "requests": {"memory": memory, "nvidia.com/mig-1g.5gb": "1", "cpu": "100m"},
        "claims": [{"name": "gpus"}, {"name": "shared", "request": "one"}],
    }
    assert pod["resourceClaims"] == [
        {"name": "gpus", "resourceClaimTemplateName": "gpus"},
        {"name": "shared", "resourceClaimName": "pool"},
    ]


def test_environment_and_folders_of_the_cluster() -> None:
    pod = of(
        """{"env_from": [{"secret": "hub", "prefix": "HUB_"}, {"config_map": "conf"}],
        "envs": [{"name": "NODE", "field": "spec.nodeName"}, {"name": "KEY", "secret": "hub"}, {"name": "TOKEN", "secret": "hub"}],
        "mounts": [{"path": "/dev/shm", "empty": {"in_memory": true, "size_limit": "1Gi"}}, {"path": "/data", "claim": "data"},
                   {"path": "/etc/hub", "secret": "hub", "items": {"a": "b"}}]}"""
    )
    (container,) = pod["containers"]
    assert container["envFrom"] == [
        {"prefix": "HUB_", "secretRef": {"name": "hub"}},
        {"configMapRef": {"name": "conf"}},
    ]
    env = {each["name"]: each for each in container["env"]}
    assert env["NODE"]["valueFrom"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}
    assert env["KEY"]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "KEY"}
    # What the deployment gives a value itself stays.
    assert env["TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "ekiben-abcdefgh23456789"
    volumes = {each["name"]: each for each in pod["volumes"]}
    mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert volumes[mounts["/data"]["name"]]["persistentVolumeClaim"] == {"claimName": "data"}
    assert mounts["/etc/hub"]["readOnly"] is True
    assert set(used({"spec": pod}, "ekiben-abcdefgh23456789")) == {
        ("Secret", "hub"),
        ("ConfigMap", "conf"),
        ("PersistentVolumeClaim", "data"),
    }


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ({"serviceAccountName": "boss"}, ("ServiceAccount", "boss")),
        # The API server takes the old name where there is no new one, and `default` where there is neither.
        ({"serviceAccountName": None, "serviceAccount": "boss"}, ("ServiceAccount", "boss")),
        ({"serviceAccountName": "", "serviceAccount": "boss"}, ("ServiceAccount", "boss")),
        ({"serviceAccountName": None}, ("ServiceAccount", "default")),
        ({"imagePullSecrets": [{"name": "theirs"}]}, ("Secret", "theirs")),
        (
            {"volumes": [{"name": "copy", "ephemeral": {"volumeClaimTemplate": {"spec": {"dataSource": CLAIM}}}}]},
            ("PersistentVolumeClaim", "theirs"),
        ),
    ],
)
def test_what_a_patch_uses_is_seen_by_whatever_name(spec: dict[str, Any], found: tuple[str, str]) -> None:
    made = template(Pod(patch={"spec": spec}))
    assert list(used(made, name_of(SPEC.key), ["ours"])) == [found]


def ephemeral(**claim: Any) -> dict[str, Any]:
    return {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}


@pytest.mark.parametrize(
    ("volume", "words"),
    [
        (
            ephemeral(dataSource={"apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot", "name": "s"}),
            "dataSource",
        ),
        (ephemeral(dataSourceRef={"kind": "VolumeSnapshot", "name": "s"}), "dataSourceRef"),
        (ephemeral(dataSourceRef={**CLAIM, "namespace": "another"}), "dataSourceRef"),
        (ephemeral(dataSource={**CLAIM, "apiGroup": "populators.example.com"}), "dataSource"),
        (ephemeral(dataSource="theirs"), "dataSource"),
        (ephemeral(volumeName="pv-1"), "volumeName"),
        (ephemeral(selector={"matchLabels": {"of": "them"}}), "selector"),
        ({"csi": {"driver": "secrets-store.csi.k8s.io", "volumeAttributes": {"secretProviderClass": "theirs"}}}, "csi"),
        ({"csi": {}}, "csi"),
    ],
)
async def test_a_patch_brings_no_data_that_nobody_can_say_is_usable(volume: dict[str, Any], words: str) -> None:
    api: Any = None  # It is not asked.
    patched = replace(SPEC, pod=Pod(patch={"spec": {"volumes": [{"name": "v", **volume}]}}))
    for level in ("restricted", "baseline"):
        with pytest.raises(InvalidArgument, match=f"volume v .*{words}") as caught:
            await check(api, patched, replace(WHERE, pod_security=level), "")
        assert caught.value.reason == "OBJECT_NOT_USABLE"


def test_data_of_a_claim_is_asked_about_and_drivers_are_for_those_who_trust_all() -> None:
    copies = [ephemeral(dataSource=CLAIM), ephemeral(dataSourceRef=CLAIM, storageClassName="fast"), {"emptyDir": {}}]
    made = template(Pod(patch={"spec": {"volumes": [{"name": f"v{n}", **each} for n, each in enumerate(copies)]}}))
    assert list(borrowed(made, "restricted")) == []
    assert ("PersistentVolumeClaim", "theirs") in used(made, name_of(SPEC.key))
    driven = template(Pod(patch={"spec": {"volumes": [{"name": "v", "csi": {"driver": "x"}}]}}))
    assert list(borrowed(driven, "privileged")) == [] and list(borrowed(driven, "restricted"))
    with_models = replace(SPEC, image="r/iris@sha256:0", model_images=(("models/m/versions/v1", "sha256:1"),))
    assert list(borrowed(template_of(with_models, WHERE), "restricted")) == []


def test_what_a_pod_has_anyhow_is_no_use_of_another_s() -> None:
    pulling = replace(SPEC, pull_secrets=("named",))
    made = template_of(pulling, replace(WHERE, pull_secret="ours"))
    assert login_names(made["spec"]) == ["ours", "named"]
    assert list(used(made, name_of(SPEC.key), login_names(made["spec"]))) == []


def test_the_patch_wins_over_all_of_ours() -> None:
    patch = {
        "metadata": {"labels": {"app.kubernetes.io/name": "iris", "team": "a"}},
        "spec": {
            "terminationGracePeriodSeconds": 5,
            "nodeSelector": {"disk": None, "zone": "b"},
            "containers": [
                {"name": "bento", "resources": {"limits": None}, "env": [{"name": "HOME", "value": "/data"}]},
                {"name": "beside", "image": "beside:1"},
            ],
            "volumes": [{"name": "temporary", "emptyDir": {"medium": "Memory"}}],
        },
    }
    found = template(Pod(settings('{"node_selector": {"disk": "ssd"}}'), {"spec": {"hostname": "x"}}, patch))
    pod = found["spec"]
    assert found["metadata"]["labels"] == {**template(Pod())["metadata"]["labels"], "team": "a"}
    assert (pod["terminationGracePeriodSeconds"], pod["hostname"], pod["nodeSelector"]) == (5, "x", {"zone": "b"})
    ours, beside = pod["containers"]
    assert beside == {"name": "beside", "image": "beside:1"}
    assert "limits" not in ours["resources"] and ours["readinessProbe"]
    assert {"name": "HOME", "value": "/data"} in ours["env"] and len(ours["env"]) == len(
        of("{}")["containers"][0]["env"]
    )
    assert pod["volumes"] == [{"name": "temporary", "emptyDir": {"medium": "Memory"}}]


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        ({"containers": []}, "PATCH_INVALID"),
        ({"spec": {"containers": [{"image": "x"}]}}, "PATCH_INVALID"),
        ({"spec": {"$patch": "remove"}}, "PATCH_INVALID"),
        ({"spec": {"$setElementOrder/containers": []}}, "PATCH_INVALID"),
        ({"spec": {"containers": [{"name": "bento", "$patch": "delete"}]}}, "PATCH_REFUSED"),
        ({"metadata": {"labels": {"ekiben.dev/set": "another"}}}, "PATCH_REFUSED"),
        ({"metadata": {"labels": None}}, "PATCH_REFUSED"),
        ({"metadata": {"annotations": {"ekiben.dev/mine": "x"}}}, "PATCH_REFUSED"),
        # Of whoever has the labels of the platform's own pods, its Services would take requests to him.
        ({"metadata": {"labels": {"ekiben.dev/platform": "ekiben"}}}, "PATCH_REFUSED"),
        ({"metadata": {"labels": {"app.kubernetes.io/instance": "ekiben"}}}, "PATCH_REFUSED"),
        ({"metadata": {"labels": {"app.kubernetes.io/component": "platform"}}}, "PATCH_REFUSED"),
        ({"metadata": {"labels": {"app.kubernetes.io/name": None}}}, "PATCH_REFUSED"),
        ({"metadata": {"labels": {"helm.sh/chart": "ekiben-0.1.0"}}}, "PATCH_REFUSED"),
        ({"spec": None}, "PATCH_REFUSED"),
        ({"spec": {"containers": 3}}, "PATCH_REFUSED"),
        ({"spec": {"containers": [{"name": "bento", "ports": None}]}}, "PATCH_REFUSED"),
        (
            {"spec": {"containers": [{"name": "bento", "ports": [{"containerPort": 3000, "name": "x"}]}]}},
            "PATCH_REFUSED",
        ),
    ],
)
def test_a_patch_that_cannot_be_is_refused(patch: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        template(Pod(patch=patch))
    assert caught.value.reason == reason


@pytest.mark.parametrize("key", ["ekiben.dev/platform", "app.kubernetes.io/instance", "helm.sh/chart"])
def test_settings_and_extras_set_no_label_by_which_pods_are_found(key: str) -> None:
    labels = {"metadata": {"labels": {key: "ekiben"}}}
    # The settings' are refused by field before; those of a revision from before that, here.
    for pod in (Pod(PodSettings(labels={key: "ekiben"})), Pod(extra=labels), Pod(patch=labels)):
        with pytest.raises(InvalidArgument, match=key) as caught:
            template(pod)
        assert caught.value.reason == "PATCH_REFUSED"


def test_all_images_of_a_pod_are_seen() -> None:
    patch = {
        "spec": {
            "containers": [{"name": "beside", "image": "a:1"}],
            "initContainers": [{"name": "first", "image": "b:1"}],
            "volumes": [{"name": "v", "image": {"reference": "c:1"}}],
        }
    }
    assert images(template(Pod(patch=patch))) == {SPEC.image, "a:1", "b:1", "c:1"}


def test_merging_is_as_kubernetes_says() -> None:
    original = {
        "spec": {
            "containers": [{"name": "a", "args": ["1"], "ports": [{"containerPort": 80}]}, {"name": "b"}],
            "tolerations": [{"key": "old"}],
            "securityContext": {"runAsUser": 1, "fsGroup": 2},
        }
    }
    patch = {
        "spec": {
            "containers": [
                {"name": "a", "args": ["2"], "ports": [{"containerPort": 90}]},
                {"name": "b", "$patch": "delete"},
                {"name": "c", "stdin": None},
            ],
            "tolerations": [{"key": "new"}],
            "securityContext": {"runAsUser": 3, "$retainKeys": ["runAsUser"]},
        }
    }
    assert merged(original, patch) == {
        "spec": {
            "containers": [
                {"name": "a", "args": ["2"], "ports": [{"containerPort": 80}, {"containerPort": 90}]},
                {"name": "c"},
            ],
            "tolerations": [{"key": "new"}],
            "securityContext": {"runAsUser": 3},
        }
    }
    assert original["spec"]["tolerations"] == [{"key": "old"}]
    replaced = {
        "spec": {"containers": [{"$patch": "replace"}, {"name": "d"}], "securityContext": {"$patch": "replace"}}
    }
    assert merged(original, replaced)["spec"]["containers"] == [{"name": "d"}]
    assert merged(original, replaced)["spec"]["securityContext"] == {}


def test_a_service_says_more_than_its_instance_type_and_a_client_s_extras_come_first() -> None:
    size = InstanceType("gpu", 1000, 1 << 30, pod=settings('{"resources": {"limits": {"nvidia.com/gpu": "1"}}}'))
    service = pb.ServiceTemplate(
        pod=settings('{"resources": {"limits": {"cpu": "2"}}, "patch": {"spec": {"hostname": "h"}}}')
    )
    service.extras.update(
        {
            "bento_function_overrides": {
                "annotations": {"a": "1"},
                "extraPodMetadata": {"labels": {"l": "2"}},
                "extraPodSpec": {"terminationGracePeriodSeconds": 40},
            }
        }
    )
    found = pods.pod_of(service, size)
    assert dict(found.settings.resources.limits) == {"nvidia.com/gpu": "1", "cpu": "2"}
    assert found.extra == {
        "metadata": {"labels": {"l": "2"}, "annotations": {"a": "1"}},
        "spec": {"terminationGracePeriodSeconds": 40},
    }
    assert found.patch == {"spec": {"hostname": "h"}}
    assert pods.limits_of(found.settings, size) == (2000, 1 << 30)
    service.extras.update({"bento_function_overrides": "nonsense"})
    assert pods.pod_of(service, size).extra == {}


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"mounts": [{"path": "data", "claim": "x"}]}', "mounts[0].path"),
        ('{"mounts": [{"path": "/data"}]}', "mounts[0]"),
        ('{"mounts": [{"path": "/data", "claim": "x", "secret": "y"}]}', "mounts[0]"),
        ('{"env_from": [{}]}', "env_from[0]"),
        ('{"envs": [{"name": "BENTOML_HOME", "field": "f"}]}', "envs[0].name"),
        ('{"resources": {"limits": {"cpu": "many"}}}', "resources.limits[cpu]"),
        ('{"resources": {"claims": [{}]}}', "resources.claims[0]"),
        ('{"termination_grace": "0s"}', "termination_grace"),
        ('{"labels": {"team": "a", "ekiben.dev/platform": "ekiben"}}', "labels[ekiben.dev/platform]"),
        ('{"labels": {"app.kubernetes.io/name": "ekiben"}}', "labels[app.kubernetes.io/name]"),
        ('{"labels": {"helm.sh/chart": "ekiben"}}', "labels[helm.sh/chart]"),
        ('{"annotations": {"ekiben.dev/about": "x", "helm.sh/hook": "x"}}', "annotations[ekiben.dev/about]"),
    ],
)
def test_what_is_wrong_whatever_the_cluster_is_said_by_field(text: str, field: str) -> None:
    (found,) = pods.violations("pod", settings(text))
    assert found[0] == f"pod.{field}"


def test_a_runtime_without_pods_refuses_what_only_they_have() -> None:
    podless.refuse(SPEC, "process")
    anywhere = settings('{"termination_grace": "9s", "resources": {"limits": {"cpu": "1", "nvidia.com/gpu": "1"}}}')
    podless.refuse(replace(SPEC, pod=Pod(anywhere, {"spec": {}})), "process")
    for pod in (
        Pod(settings('{"edge": true}')),
        Pod(patch={"spec": {}}),
        Pod(settings('{"resources": {"limits": {"x/y": "1"}}}')),
    ):
        with pytest.raises(InvalidArgument) as caught:
            podless.refuse(replace(SPEC, pod=pod), "process")
        assert caught.value.reason == "POD_SETTINGS_UNSUPPORTED" and "process" in caught.value.message
