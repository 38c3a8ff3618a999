"""Images that somebody else made, and models that are no part of an image: what a runtime can do of it.

A tag is looked up once, when a template is written, and kept with the digest that it stood for, so that a revision runs
the same for ever. A reference that has a digest is taken at its word: the platform need not reach that registry.
"""

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployer.v1 import images_pb2
from ekiben.errors import FailedPrecondition, InvalidArgument
from services.content import open_images
from services.content.images.registry.names import parse
from services.deployer import domain

MOUNTED = "image-volume"


async def settle(template: pb.Template, runtime: str, delivery: str = "layers") -> None:
    """Refuse what replicas of this runtime cannot have, and give each image the digest of what its tag stands for now.

    A template that does not say how models come gets the `delivery` of the settings, for good: where another is set
    later, what runs stays as it is.

    Raises:
        FailedPrecondition: RUNTIME_WITHOUT_IMAGES, MODEL_DELIVERY_UNSUPPORTED, PULL_SECRETS_UNSUPPORTED.
        InvalidArgument: no reference of an image (IMAGE_NAME_INVALID), or FIELDS_INVALID.
        EkibenError: the registry cannot be asked, or has no such image (IMAGE_NOT_FOUND).
    """
    given = [("deployment.template.image", template.image)] if template.HasField("image") else []
    for target, version in sorted(template.canary.versions.items()):
        if version.HasField("image"):
            given.append((f"deployment.template.canary.versions[{target}].image", version.image))
    silent = not template.model_delivery and not template.HasField("image")
    if delivery == MOUNTED and runtime == "kubernetes" and silent:
        template.model_delivery = images_pb2.IMAGE_VOLUME
    _check_delivery(template, runtime)
    for path, image in given:
        _check(path, image, runtime)
        image.reference = await pinned(image.reference)


def _check_delivery(template: pb.Template, runtime: str) -> None:
    if template.model_delivery != images_pb2.IMAGE_VOLUME:
        return
    if runtime != "kubernetes":
        raise FailedPrecondition(
            f"Models are mounted as images on Kubernetes only, and replicas here are run by {runtime}. Leave "
            "model_delivery out.",
            reason="MODEL_DELIVERY_UNSUPPORTED",
            runtime=runtime,
        )
    if template.HasField("image"):
        domain.refuse([("deployment.template.model_delivery", "is not for an image that has its models: leave it out")])


def _check(path: str, image: images_pb2.PrebuiltImage, runtime: str) -> None:
    if not image.reference:
        domain.refuse([(f"{path}.reference", "is required")])
    if runtime == "process":
        raise FailedPrecondition(
            "Replicas here are processes in an environment that the builder makes, and run no image. Leave the image "
            "out, or run the platform with EKIBEN_DEPLOYER_RUNTIME=podman or kubernetes.",
            reason="RUNTIME_WITHOUT_IMAGES",
            runtime=runtime,
        )
    if image.pull_secrets and runtime != "kubernetes":
        raise FailedPrecondition(
            f"Pull secrets are Secrets of a Kubernetes namespace, and replicas here are run by {runtime}. Log in to "
            "the registry on that machine (`podman login`), and leave them out.",
            reason="PULL_SECRETS_UNSUPPORTED",
            runtime=runtime,
        )
    wrong = [name for name in image.pull_secrets if domain.SECRET_NAME.fullmatch(name) is None]
    domain.refuse([(f"{path}.pull_secrets", f"{name!r} cannot be the name of a Secret") for name in wrong])


async def pinned(reference: str) -> str:
    """`docker://HOST/REPOSITORY[:TAG]@DIGEST`.

    Raises:
        InvalidArgument: no reference of an image in a registry (IMAGE_NAME_INVALID).
        EkibenError: the registry cannot be asked, or has no such image (IMAGE_NOT_FOUND).
    """
    name = reference.removeprefix("docker://")
    if name.partition(":")[0] in ("oci", "docker-archive"):
        raise InvalidArgument(
            f"{reference!r} is no image in a registry. Push it to one that the cluster's nodes reach.",
            reason="IMAGE_NAME_INVALID",
            image=reference,
        )
    where = parse(name)
    plain, _, digest = name.partition("@")
    tag = plain.rpartition("/")[2].partition(":")[2]
    named = f"{where}:{tag}" if tag else str(where)
    if not digest:
        async with open_images(f"{where}:{tag or 'latest'}") as (store, found):
            digest = str((await store.find(found)).digest)
    return f"{named}@{digest}"
