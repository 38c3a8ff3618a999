"""What the deployer says of a replica set to Kubernetes, and what it makes of a pod."""

import json
from dataclasses import replace
from typing import Any

import pytest

from ekiben.errors import FailedPrecondition, InvalidArgument
from services.deployer.runtimes import Phase, SecretFile, SetSpec
from services.deployer.runtimes.kubernetes import objects
from services.deployer.runtimes.kubernetes.names import UID, Where
from services.deployer.runtimes.kubernetes.pod import command, pod_of
from services.deployer.runtimes.kubernetes.pods import replica_of
from services.deployer.runtimes.kubernetes.sameness import digest_of
from services.deployer.runtimes.kubernetes.telemetry import PodTelemetry
from tests.kubernetes_sets import DIGEST, SPEC

WHERE = Where("installation", "models", pull_secret="pull")


def made(spec: SetSpec, kind: str, replicas: int = 2) -> dict[str, Any]:
    (found,) = [each for each in objects.objects(spec, replicas, WHERE, "uid") if each["kind"] == kind]
    return found


def test_a_pod_may_do_nothing_but_serve() -> None:
    pod = made(SPEC, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1034
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"] == {"cpu": "500m", "memory": str(1 << 30)}


def test_values_are_in_a_secret_and_nowhere_else() -> None:
    spec = replace(SPEC, envs={"TOKEN": "not-to-be-seen"}, files=(SecretFile("~/key", "nor-this"),))
    for each in (objects.anchor(spec, WHERE), *objects.objects(spec, 1, WHERE, "uid")):
        text = json.dumps(each)
        assert "not-to-be-seen" not in text and "nor-this" not in text
    (container,) = made(spec, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/tmp", "/tmp/home/key"}
    assert container["env"][0]["valueFrom"]["secretKeyRef"] == {"name": "ekiben-abcdefgh23456789", "key": "env.TOKEN"}


def test_a_variable_that_is_ours_too_is_there_once() -> None:
    envs = dict.fromkeys(("HOME", "PYTHONUNBUFFERED", "TMPDIR", "BENTO_PATH", "EKIBEN_REPLICA"), "user")
    telling = replace(WHERE, telemetry=PodTelemetry("http://recorder:4318"))
    for where in (WHERE, telling):
        listed = pod_of(replace(SPEC, envs=envs), where)["containers"][0]["env"]
        env = {each["name"]: each for each in listed}
        assert len(env) == len(listed)
        # A user may have another home, and not another folder of temporary files: there is no other to write to.
        assert "valueFrom" in env["HOME"] and "valueFrom" in env["PYTHONUNBUFFERED"]
        assert env["TMPDIR"]["value"] == "/tmp" and env["BENTO_PATH"]["value"] == "/home/bentoml/bento"
    assert "fieldRef" in env["EKIBEN_REPLICA"]["valueFrom"]


def test_two_secret_files_of_one_path_are_one_mount() -> None:
    files = (SecretFile("~/key", "first"), SecretFile("/etc/other", "o"), SecretFile("/tmp/home/key", "last"))
    pod = pod_of(replace(SPEC, files=files), WHERE)
    mounts = {each["mountPath"]: each.get("subPath") for each in pod["containers"][0]["volumeMounts"]}
    assert len(mounts) == len(pod["containers"][0]["volumeMounts"])
    assert mounts["/tmp/home/key"] == "2"
    (volume,) = [each for each in pod["volumes"] if each["name"] == "files"]
    assert {each["key"] for each in volume["secret"]["items"]} == {"file.1", "file.2"}


@pytest.mark.parametrize("path", ["../../etc/passwd", "/a/../b", "a:b"])
def test_a_secret_file_that_would_leave_its_place_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        objects.objects(replace(SPEC, files=(SecretFile(path, "x"),)), 1, WHERE, "uid")
    assert caught.value.reason == "SECRET_PATH_INVALID"


def test_services_call_one_another_by_name_and_only_their_own_deployment_may() -> None:
    assert "Scorer=http://ekiben-zyxwvuts76543210:3000" in command(SPEC)
    called = replace(SPEC, entry=False)
    (rule,) = made(called, "NetworkPolicy")["spec"]["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {UID: "3f0a"}}}]
    assert not [each for each in objects.objects(SPEC, 1, WHERE, "uid") if each["kind"] == "NetworkPolicy"]


def test_all_objects_are_owned_and_equal_input_gives_equal_objects() -> None:
    found = objects.objects(SPEC, 2, WHERE, "uid")
    assert all(each["metadata"]["ownerReferences"][0]["uid"] == "uid" for each in found)
    assert digest_of(found) == digest_of(objects.objects(SPEC, 2, WHERE, "uid"))
    assert digest_of(found) != digest_of(objects.objects(SPEC, 3, WHERE, "uid"))


def test_an_image_is_named_by_its_digest_where_nodes_find_it() -> None:
    assert objects.image_of(SPEC, "") == f"registry.example.com/default/iris@{DIGEST}"
    ported = replace(SPEC, image="docker://registry.example.com:5000/default/iris:v1")
    assert objects.image_of(ported, "") == f"registry.example.com:5000/default/iris@{DIGEST}"
    local = replace(SPEC, image="oci:/data/images:default/iris:v1")
    assert objects.image_of(local, "127.0.0.1:5000") == f"127.0.0.1:5000/default/iris@{DIGEST}"
    with pytest.raises(FailedPrecondition) as caught:
        objects.image_of(local, "")
    assert caught.value.reason == "IMAGE_NOT_SERVED"


def pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p"}, "status": {"podIP": "10.0.0.7", **status}}


def container(state: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    return [{"name": "bento", "state": state, **more}]


@pytest.mark.parametrize(
    ("found", "phase", "message"),
    [
        (pod(conditions=[{"type": "Ready", "status": "True"}]), Phase.READY, ""),
        (
            pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "0/2 nodes are available: cpu."}]),
            Phase.STARTING,
            "No node takes the pod: 0/2 nodes are available: cpu.",
        ),
        (
            pod(containerStatuses=container({"waiting": {"reason": "ErrImagePull", "message": "no such image"}})),
            Phase.STARTING,
            "Image not found: no such image",
        ),
        (
            pod(
                containerStatuses=container(
                    {"waiting": {"reason": "CrashLoopBackOff"}},
                    restartCount=2,
                    lastState={"terminated": {"exitCode": 3, "message": "Traceback"}},
                )
            ),
            Phase.CRASHED,
            "It ended with status 3.",
        ),
        (
            pod(containerStatuses=container({"running": {}}, started=True)),
            Phase.UNREADY,
            "It does not answer its readiness probe.",
        ),
        (
            pod(phase="Failed", reason="Evicted", message="low on memory"),
            Phase.CRASHED,
            "Its node put it out: low on memory",
        ),
    ],
)
def test_a_pod_is_a_replica_with_what_is_wrong_in_words(found: dict[str, Any], phase: Phase, message: str) -> None:
    seen = replica_of(found)
    assert (seen.phase, seen.message) == (phase, message)
    assert seen.address == "10.0.0.7:3000"


def test_a_pod_that_leaves_is_draining_and_a_crash_tells_its_last_lines() -> None:
    leaving = pod(conditions=[{"type": "Ready", "status": "True"}])
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert replica_of(leaving).phase is Phase.DRAINING
    crashed = replica_of(
        pod(
            containerStatuses=container(
                {"waiting": {"reason": "CrashLoopBackOff"}},
                restartCount=2,
                lastState={"terminated": {"exitCode": 1, "message": "no module named x"}},
            )
        )
    )
    assert (crashed.failed_starts, crashed.last_lines) == (2, "no module named x")
