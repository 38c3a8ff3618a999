"""Models as image volumes of a pod, and logins for images."""

from dataclasses import replace
from typing import Any

from ekiben.errors import InvalidArgument, Unavailable
from services.deployer.runtimes import SetSpec
from services.deployer.runtimes.kubernetes.names import Where
from services.deployer.runtimes.kubernetes.pod import pod_of
from services.deployer.runtimes.kubernetes.pulling import Logins, PullSecret
from services.deployer.runtimes.kubernetes.volumes import explained
from services.kernel.clock import ManualClock
from tests.kubernetes_sets import DIGEST, SPEC

WHERE = Where("installation", "models")
MODELS = (("modelRepositories/weights/models/m1", "sha256:one"), ("modelRepositories/weights/models/m2", "sha256:two"))
MOUNTED = replace(SPEC, image=f"images.example.com/default/iris@{DIGEST}", model_images=MODELS)


def pod(spec: SetSpec) -> dict[str, Any]:
    return pod_of(spec, WHERE)


def test_each_model_is_mounted_where_an_image_with_models_has_it() -> None:
    made = pod(MOUNTED)
    volumes = {each["name"]: each["image"]["reference"] for each in made["volumes"] if "image" in each}
    assert volumes == {
        "model-0": "images.example.com/default/iris@sha256:one",
        "model-1": "images.example.com/default/iris@sha256:two",
    }
    mounts = [each for each in made["containers"][0]["volumeMounts"] if each["name"] in volumes]
    assert [each["mountPath"] for each in mounts] == [
        f"/home/bentoml/bento/models/weights/{version}" for version in ("m1", "m2")
    ]
    assert all(each["subPath"] == each["mountPath"][1:] and each["readOnly"] for each in mounts)


def test_a_set_without_any_of_it_has_the_pod_that_it_had() -> None:
    made = pod(SPEC)
    assert "imagePullSecrets" not in made and [each["name"] for each in made["volumes"]] == ["temporary"]
    assert pod(replace(SPEC, pull_secrets=("own", "own")))["imagePullSecrets"] == [{"name": "own"}]
    both = pod_of(replace(SPEC, pull_secrets=("own",)), replace(WHERE, pull_secret="all"))
    assert both["imagePullSecrets"] == [{"name": "all"}, {"name": "own"}]


def test_a_cluster_that_mounts_no_images_is_told_from_what_else_it_refuses() -> None:
    # As Kubernetes 1.36 says of a field that it does not know, and of a volume whose source it left out.
    undeclared = '.spec.template.spec.volumes[name="model-0"].image: field not declared in schema'
    for message in (undeclared, "spec.template.spec.volumes[1]: Required value: must specify a volume type"):
        told = explained(InvalidArgument(message, reason="KUBERNETES_REFUSED"), MOUNTED)
        assert told.reason == "IMAGE_VOLUMES_UNKNOWN" and "Set model_delivery to LAYERS" in told.message
        assert message in told.message
    other = InvalidArgument("spec.replicas: Invalid value", reason="KUBERNETES_REFUSED")
    away = Unavailable(undeclared, reason="KUBERNETES_AWAY")
    assert explained(other, MOUNTED) is other and explained(away, MOUNTED) is away
    assert explained(InvalidArgument(undeclared, reason="KUBERNETES_REFUSED"), SPEC).reason == "KUBERNETES_REFUSED"


def test_the_platforms_own_login_is_lent_for_images_of_the_same_organization_only() -> None:
    nobody: Any = None
    secret = PullSecret(nobody, WHERE, "images.example.com", Logins(nobody), nobody, ManualClock())
    own = replace(MOUNTED, organization="default", pull_secrets=("given",))
    assert secret.lend(own).pull_secrets == ("given", secret.name) and secret.lent(secret.lend(own))
    others = ("images.example.com/other/iris@sha256:0", "registry.example.com/default/iris@sha256:0")
    for image in others:
        assert secret.lend(replace(own, image=image)).pull_secrets == ("given",)
    assert not secret.lent(secret.lend(replace(own, organization="")))
