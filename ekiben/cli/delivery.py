"""The flags that say what image a deployment runs, and how models come into it."""

import click

from ekiben.cli.options import DEFAULT
from ekiben.deployer.v1 import deployer_pb2, images_pb2

_DELIVERIES = {"layers": images_pb2.LAYERS, "image-volume": images_pb2.IMAGE_VOLUME}
OPTIONS = [
    click.option("--image", metavar="HOST/NAME[:TAG]", help="Run this image of the bento and build none; '' to build."),
    click.option(
        "--image-pull-secret",
        "image_pull_secrets",
        multiple=True,
        metavar="NAME",
        help="Kubernetes Secret with which nodes pull that image; '' for none.",
    ),
    click.option(
        "--model-delivery",
        type=click.Choice([*_DELIVERIES, DEFAULT]),
        help="Whether models are in the image, or mounted by Kubernetes as images of their own.",
    ),
]


def apply(
    template: deployer_pb2.Template, image: str | None, pull_secrets: tuple[str, ...], model_delivery: str | None
) -> None:
    """Change a template as the flags say; None and empty mean not given.

    Raises:
        click.UsageError: a pull secret for no image.
    """
    if image:
        template.image.reference = image
        template.ClearField("model_delivery")  # It has its models.
    elif image is not None:
        template.ClearField("image")
    if pull_secrets:
        if not template.HasField("image"):
            raise click.UsageError("--image-pull-secret is for an image of --image.")
        template.image.pull_secrets[:] = filter(None, pull_secrets)
    if model_delivery:
        template.model_delivery = _DELIVERIES.get(model_delivery, images_pb2.MODEL_DELIVERY_UNSPECIFIED)
