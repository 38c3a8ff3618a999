"""Models that are images of their own, as read-only volumes of a pod. Pure.

Each is mounted where an image with models has it, by its path in its own image.
Source: kubernetes.io/docs/tasks/configure-pod-container/image-volumes.
"""

from ekiben.errors import EkibenError, FailedPrecondition
from services.deployer.runtimes import SetSpec
from services.deployer.runtimes.kubernetes.names import Object
from services.deployer.runtimes.serving import BENTO


def model_volumes(spec: SetSpec) -> tuple[list[Object], list[Object]]:
    """The volumes and their mounts; none where models are layers of the bento's image."""
    volumes, mounts = [], []
    repository = spec.image.partition("@")[0]
    for number, (model, digest) in enumerate(spec.model_images):
        _, name, _, version = model.split("/")
        path = f"{BENTO}/models/{name}/{version}"
        image = {"reference": f"{repository}@{digest}", "pullPolicy": "IfNotPresent"}
        volumes.append({"name": f"model-{number}", "image": image})
        mounts.append(
            {"name": f"model-{number}", "mountPath": path, "subPath": path.removeprefix("/"), "readOnly": True}
        )
    return volumes, mounts


def explained(error: EkibenError, spec: SetSpec) -> EkibenError:
    """What the cluster refused, with what to do where it does not know such volumes."""
    if not spec.model_images or error.reason != "KUBERNETES_REFUSED":
        return error
    unknown = ".image" in error.message and "volumes[" in error.message
    if not unknown and "must specify a volume type" not in error.message:
        return error
    return FailedPrecondition(
        "The cluster mounts no images as volumes, which model_delivery IMAGE_VOLUME needs: that is Kubernetes 1.36, or "
        f"1.33 with the feature gate ImageVolume. Set model_delivery to LAYERS. It said: {error.message}",
        reason="IMAGE_VOLUMES_UNKNOWN",
    )
