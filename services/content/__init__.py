"""Bytes by digest: what every service that moves archives shares.

- `digest.py`: the name of bytes.
- `blobs/`: the port BlobStore with its adapters; the registry writes through it.
- `archives.py`: tar archives of models and bentos: checked, fetched, unpacked.

- `images/`: the port ImageStore: OCI images, in a layout on disk or in a registry.
- `attestations/`: who signed an image, and what is said of it.

`open_blobs` and `open_images` are the only places where a URL scheme becomes a class.
"""

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ekiben.errors import InvalidArgument
from services.content.blobs import BlobReader, BlobStore
from services.content.blobs.filesystem import open_filesystem, read_filesystem
from services.content.images import ImageStore
from services.content.images.archive import open_archive
from services.content.images.layout import LayoutImageStore

_ARCHIVED = re.compile(r"(?:(?:[a-z0-9.-]+(?::\d+)?/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*:)?\w[\w.-]{0,127}", re.ASCII)
"""`NAME:TAG`, or a tag alone."""


@asynccontextmanager
async def open_blobs(url: str) -> AsyncIterator[BlobStore]:
    """Open the blob store that `url` names: `file:///absolute/folder`, made when absent, or `s3://bucket/prefix?…`.

    Raises:
        InvalidArgument: an unknown scheme, or not of its form (BLOBS_URL_INVALID).
        FailedPrecondition: another process has the folder open (BLOBS_IN_USE); or the bucket cannot be used: see
            `open_s3`, also for Unavailable.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3":
        from services.content.blobs.s3 import open_s3  # here: its library costs half a second, and files need none

        async with open_s3(url) as bucket:
            yield bucket
        return
    if parts.scheme != "file" or parts.netloc or not parts.path.startswith("/"):
        raise InvalidArgument(
            f"The blobs' URL is refused: it begins with {parts.scheme[:20]!r}. Its form is file:///absolute/folder or "
            "s3://bucket/prefix?endpoint=….",
            reason="BLOBS_URL_INVALID",
        )
    async with open_filesystem(Path(unquote(parts.path))) as blobs:
        yield blobs


@asynccontextmanager
async def open_images(
    name: str, say: Callable[[str], None] = lambda text: None
) -> AsyncIterator[tuple[ImageStore, str]]:
    """The store that a name in skopeo's manner stands for, and the reference in it; empty for none.

        oci:FOLDER[:REFERENCE]
        docker://HOST/REPOSITORY[:TAG|@DIGEST]
        docker-archive:FILE[:NAME:TAG]          only to be written

    Nothing is asked and nothing is made yet.

    Args:
        say: takes lines for people: what a registry is waited for.

    Raises:
        InvalidArgument: another form (IMAGE_NAME_INVALID).
        FailedPrecondition: a certificate for the registry cannot be used (REGISTRY_CERTIFICATE_INVALID), or the file
            cannot be written (OUTPUT_NOT_WRITABLE).
    """
    transport, _, rest = name.partition(":")
    if transport == "oci" and rest.partition(":")[0]:
        folder, _, reference = rest.partition(":")
        yield LayoutImageStore(Path(folder)), reference
        return
    if transport == "docker" and rest.startswith("//"):
        # Here: layouts need no HTTP library.
        from services.content.images.registry.options import RegistryOptions
        from services.content.images.registry.store import open_registry

        options = replace(RegistryOptions.from_environment(), say=say)
        async with open_registry(rest.removeprefix("//"), options) as (store, reference):
            yield store, reference
        return
    if transport == "docker-archive" and rest.partition(":")[0]:
        file, _, reference = rest.partition(":")
        if reference and _ARCHIVED.fullmatch(reference) is None:
            raise InvalidArgument(
                f"{reference!r} is no name that docker load and podman load take: it is NAME:TAG, NAME in lower case.",
                reason="IMAGE_NAME_INVALID",
                image=name,
            )
        async with open_archive(Path(file)) as archive:
            yield archive, reference
        return
    raise InvalidArgument(
        f"The image {name!r} is refused: its form is oci:FOLDER[:REFERENCE], docker://HOST/REPOSITORY[:TAG] or, to be "
        "written, docker-archive:FILE[:NAME:TAG].",
        reason="IMAGE_NAME_INVALID",
        image=name,
    )


@asynccontextmanager
async def open_blobs_to_read(url: str) -> AsyncIterator[BlobReader]:
    """Open the blob store that `url` names beside the process that owns it; see `open_blobs`.

    Raises:
        InvalidArgument: an unknown scheme (BLOBS_URL_INVALID).
        NotFound: no such folder (BLOBS_NOT_FOUND).
    """
    parts = urlsplit(url)
    if parts.scheme != "file":
        async with open_blobs(url) as blobs:
            yield blobs
        return
    async with read_filesystem(Path(unquote(parts.path))) as files:
        yield files
