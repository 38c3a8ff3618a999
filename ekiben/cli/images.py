"""`ekiben images`: OCI images of bentos."""

import os
import sys
from pathlib import Path

import click


@click.group()
def images() -> None:
    """OCI images of bentos, assembled on this machine without a server.

    \b
    Examples:
      ekiben images build summarizer --base oci:python-3.11 --output oci:images
      podman run --rm -p 3000:3000 oci:images:TAG
    """


@images.command()
@click.argument("bento")
@click.option(
    "--base",
    required=True,
    envvar="EKIBEN_BASE_IMAGE",
    metavar="oci:FOLDER[:REFERENCE]",
    help="Base image with the bento's Python and bash, as an OCI layout.  [env: EKIBEN_BASE_IMAGE]",
)
@click.option(
    "--output",
    required=True,
    metavar="oci:FOLDER[:REFERENCE]",
    help="OCI layout to put the image into, made when it is not there; the version is its reference.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("~/.cache/ekiben/images"),
    show_default=True,
    help="Folder for environments and what was made of them.",
)
@click.option(
    "--compression",
    default="gzip",
    show_default=True,
    envvar="EKIBEN_IMAGES_COMPRESSION",
    metavar="METHOD | REGISTRY=METHOD,...",
    help="How layers are packed: none, gzip, or zstd, which Docker before 23 and umoci before 0.5 cannot read. "
    "Models are packed only by zstd, and only where that saves a tenth.  [env: EKIBEN_IMAGES_COMPRESSION]",
)
@click.option(
    "--refresh-commands",
    is_flag=True,
    help="Run the bento's commands again, though they ran before on the same base: for newer packages of the system.",
)
def build(bento: str, base: str, output: str, cache: Path, compression: str, refresh_commands: bool) -> None:
    """Build the image of a BENTO: a tag of the local BentoML store, or a bento's folder.

    Layers for the Python environment, for each model and for the bento itself are put on the base; nothing is
    executed. Only where the bento has commands of its own (packages of the system, scripts, a Dockerfile template),
    buildah runs those, and what they left is used again until they change. A layer that is in the output already is
    neither made nor written again, and equal bentos give equal digests. Prints the image's digest.
    `skopeo copy oci:FOLDER:TAG docker://…` brings it to a registry.

    \b
    Examples:
      ekiben images build summarizer:latest --base oci:python-3.11 --output oci:images
      skopeo copy docker://docker.io/library/python:3.11-slim oci:python-3.11
    """
    # -P: a folder named `services` where the user stands must not be taken for ours.
    command = [sys.executable, "-P", "-m", "services.builder.offline", bento]
    command += ["--base", base, "--output", output, "--cache", str(cache.expanduser().resolve())]
    command += ["--compression", compression, *(["--refresh-commands"] if refresh_commands else [])]
    sys.stdout.flush()
    os.execv(sys.executable, command)
