"""`ekiben images`: OCI images of bentos."""

from pathlib import Path

import click

from ekiben.cli import attestations, platform_images
from ekiben.cli.becoming import become
from ekiben.cli.groups import NounGroup


@click.group(cls=NounGroup)
def images() -> None:
    """OCI images of bentos: those of the platform, and those that are assembled on this machine without a server.

    \b
    Examples:
      ekiben images build summarizer --base oci:python-3.11 --output oci:images
      podman run --rm -p 3000:3000 oci:images:TAG
    """


@images.command()
@click.argument("bento")
@click.option(
    "--base",
    default="docker://docker.io/library/python:{python}-slim",
    show_default=True,
    envvar="EKIBEN_BASE_IMAGE",
    metavar="IMAGE",
    help="Base image with the bento's Python and bash: docker://HOST/REPOSITORY[:TAG|@DIGEST], or "
    "oci:FOLDER[:REFERENCE]. With {python} in the place of 3.11 it is for bentos that name no base of their own.  "
    "[env: EKIBEN_BASE_IMAGE]",
)
@click.option(
    "--refresh-base",
    is_flag=True,
    help="Ask what the base's name stands for now. Otherwise what it stood for the first time is taken.",
)
@click.option(
    "--from-source",
    multiple=True,
    metavar="PACKAGE",
    help="Build this package in the base image, by buildah, instead of taking a wheel. Several times for several.",
)
@click.option(
    "--output",
    default="",
    metavar="IMAGE",
    help="Where to put the image: oci:FOLDER[:REFERENCE], a layout that is made when it is not there; "
    "docker://HOST/REPOSITORY[:TAG]; or docker-archive:FILE[:NAME:TAG], for docker load. Without a tag it is the "
    "bento's version.",
)
@click.option("--push", default="", metavar="HOST/REPOSITORY[:TAG]", help="The registry to put the image into.")
@click.option(
    "--platform",
    default="",
    metavar="OS/ARCHITECTURE[,…]",
    help="What the image is for, linux/amd64,linux/arm64 for instance; this machine's platform by default.",
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
    help="How layers are packed: none, gzip, zstd (not for Docker before 23, nor umoci 0.4), or for nodes that pull "
    "lazily estargz or zstd:chunked. Models stay as they are unless zstd saves a tenth of them, or for the last two.  "
    "[env: EKIBEN_IMAGES_COMPRESSION]",
)
@attestations.of_build
@click.option(
    "--refresh-commands",
    is_flag=True,
    help="Run the bento's commands again, though they ran before on the same base: for newer packages of the system.",
)
def build(
    bento: str,
    base: str,
    refresh_base: bool,
    from_source: tuple[str, ...],
    output: str,
    push: str,
    platform: str,
    cache: Path,
    compression: str,
    sign_key: Path | None,
    password_file: Path | None,
    no_attestations: bool,
    refresh_commands: bool,
) -> None:
    """Build the image of a BENTO: a tag of the local BentoML store, or a bento's folder.

    Layers for the Python environment, for each model and for the bento itself are put on the base; nothing is
    executed. Only where the bento has commands of its own (packages of the system, scripts, a Dockerfile template),
    buildah runs those, and what they left is used again until they change. A layer that is in the output already is
    neither made nor written again, and equal bentos give equal digests. A bill of material and the provenance are
    attached, and signed where there is a key. Prints the image's digest. Logins and certificates for registries are
    those of docker and podman.

    \b
    Examples:
      ekiben images build summarizer:latest --base oci:python-3.11 --output oci:images
      ekiben images build summarizer --base docker://python:3.11-slim --push registry.example.com/team/summarizer
    """
    if output and push:
        raise click.UsageError(
            "An image goes to one place: give --output or --push. `ekiben images copy` brings it to another."
        )
    if not output and not push:
        raise click.UsageError("Say where the image goes: --output IMAGE, or --push HOST/REPOSITORY[:TAG].")
    if (transport := push.partition(":")[0]) in ("oci", "docker-archive", "oci-archive", "dir") and transport != push:
        raise click.UsageError(f"--push sends to a registry. For a folder or a file give --output {push}.")
    if push:
        output = f"docker://{push.removeprefix('docker://')}"
    command = [bento, "--base", base, "--output", output, "--cache", str(cache.expanduser().resolve())]
    command += ["--compression", compression]
    command += ["--refresh-base"] if refresh_base else []
    command += [part for name in from_source for part in ("--from-source", name)]
    command += ["--platform", platform] if platform else []
    command += ["--sign-key", str(sign_key)] if sign_key else []
    command += ["--password-file", str(password_file)] if password_file else []
    command += ["--no-attestations"] * no_attestations
    command += ["--refresh-commands"] if refresh_commands else []
    become("services.builder.offline", *command)


@images.command()
@click.argument("source")
@click.argument("target")
@click.option("--platform", default="", metavar="OS/ARCH", help="Of an image for several platforms: only this one.")
@click.option("--no-attachments", is_flag=True, help="Leave out signatures, bills of material and provenance.")
def copy(source: str, target: str, platform: str, no_attachments: bool) -> None:
    """Copy the image SOURCE to TARGET, byte for byte, with every platform and with what is attached to it.

    Both are docker://HOST/REPOSITORY[:TAG|@DIGEST] or oci:FOLDER[:REFERENCE]; the target may be
    docker-archive:FILE[:NAME:TAG]. What the target has is not sent; within one registry nothing is. Prints the image's
    digest. Logins and certificates for registries are those of docker and podman.

    \b
    Examples:
      ekiben images copy docker://python:3.11-slim oci:python-3.11
      ekiben images copy oci:images:1.0 docker://registry.example.com/team/summarizer:1.0
      ekiben images copy oci:images:1.0 docker-archive:summarizer.tar && docker load -i summarizer.tar
    """
    given = ["--platform", platform] if platform else []
    become("services.builder.image_copying", source, target, *given, *["--no-attachments"] * no_attachments)


@images.command()
@click.argument("where")
@click.option("--whole", is_flag=True, help="Read every layer too, and check it against its digest.")
def fsck(where: str, whole: bool) -> None:
    """Say whether images are whole: oci:FOLDER or docker://HOST/REPOSITORY for all of them there, or one by its name.

    Everything that a tag leads to is asked for, what is attached too. Ends with 1 where something is missing or
    damaged.

    \b
    Examples:
      ekiben images fsck oci:data/builder/images
      ekiben images fsck docker://registry.example.com/team/summarizer:1.0 --whole
    """
    become("services.builder.image_checking", where, *["--whole"] * whole)


for command in (
    platform_images.list_,
    platform_images.get,
    platform_images.delete,
    platform_images.stats,
    platform_images.gc,
    *attestations.COMMANDS,
):
    images.add_command(command)
