"""Which image of what a reference names: through indexes, OCI's and Docker's, to the one for a platform.

Docker's manifests (schema 2) say the same in other words; layers and configurations are given back under OCI's media
types, so that an image that is put together of them is one of OCI's whatever its base was.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ekiben.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from services.content.digest import Digest
from services.content.images import (
    CONFIG,
    INDEX,
    LAYER,
    LAYER_GZIP,
    LAYER_ZSTD,
    MANIFEST,
    Descriptor,
    Image,
    Platform,
    canonical,
)

DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
INDEXES = (INDEX, DOCKER_LIST)
MANIFESTS = (*INDEXES, MANIFEST, DOCKER_MANIFEST)
"""Every media type of what a reference may name."""
MAX_MANIFEST_BYTES = 4 << 20
"""What the distribution specification asks registries to take at least."""
_MAX_CONFIG_BYTES = 16 << 20
_DEPTH = 4
_IN_OCI_WORDS = {
    "application/vnd.docker.container.image.v1+json": CONFIG,
    "application/vnd.docker.image.rootfs.diff.tar": LAYER,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": LAYER_GZIP,
    "application/vnd.docker.image.rootfs.diff.tar.zstd": LAYER_ZSTD,
}


class _Reader(Protocol):
    def read(self, descriptor: Descriptor) -> Any: ...


async def for_platform(
    store: _Reader, entries: Sequence[Descriptor], platform: Platform, name: str
) -> tuple[Descriptor, Image]:
    """The image for a platform among those that `entries` name; `name` is for the errors.

    An entry of an index says its platform; a manifest is asked for its configuration. Where several variants of an
    architecture are there and the platform asks for none, the first counts.

    Raises:
        NotFound: none for the platform (IMAGE_NOT_FOUND), or a part that the store has not (BLOB_NOT_FOUND).
        FailedPrecondition: it is no image of layers (IMAGE_UNSUPPORTED).
    """
    there: list[str] = []
    found = await _search(store, entries, platform, name, there, _DEPTH)
    if found is None:
        raise NotFound(
            f"{name} has no image for {platform}; it has: {', '.join(sorted(set(there))) or 'none'}.",
            reason="IMAGE_NOT_FOUND",
            image=name,
            platform=platform,
        )
    return found


async def _search(
    store: _Reader, entries: Sequence[Descriptor], platform: Platform, name: str, there: list[str], depth: int
) -> tuple[Descriptor, Image] | None:
    for entry in entries:
        if entry.platform is not None and not _fits(entry.platform, platform):
            there.append(str(entry.platform))
            continue
        content = await read_json(store, entry)
        if entry.media_type in INDEXES or "manifests" in content:
            inner = [Descriptor.from_json(each) for each in content.get("manifests") or ()]
            if depth and (found := await _search(store, inner, platform, name, there, depth - 1)) is not None:
                return found
            continue
        image = await _image(store, content, name)
        runs_on = _platform(image.config)
        if _fits(runs_on, platform):
            return entry, image
        there.append(str(runs_on))
    return None


async def _image(store: _Reader, manifest: dict[str, Any], name: str) -> Image:
    if not isinstance(manifest.get("config"), dict) or not isinstance(manifest.get("layers"), list):
        raise FailedPrecondition(
            f"{name} is no image that is read here: its manifest has no config and layers (Docker's schema 1?). "
            "Push it again by a newer tool, or name another.",
            reason="IMAGE_UNSUPPORTED",
            image=name,
        )
    layers = [in_oci_words(Descriptor.from_json(each)) for each in manifest["layers"]]
    config = await read_json(store, Descriptor.from_json(manifest["config"]), limit=_MAX_CONFIG_BYTES)
    return Image(config, layers, manifest.get("annotations") or {})


async def platform_of(store: _Reader, manifest: dict[str, Any]) -> Platform | None:
    """What an image's manifest runs on; None for what is no image."""
    config = Descriptor.from_json(manifest.get("config") or {})
    if in_oci_words(config).media_type != CONFIG:
        return None
    found = await read_json(store, config, limit=_MAX_CONFIG_BYTES)
    return _platform(found) if found.get("os") and found.get("architecture") else None


def _platform(config: Mapping[str, Any]) -> Platform:
    return Platform(str(config.get("os")), str(config.get("architecture")), str(config.get("variant") or ""))


def in_oci_words(descriptor: Descriptor) -> Descriptor:
    """The descriptor under OCI's media type where it has one of Docker's."""
    media_type = _IN_OCI_WORDS.get(descriptor.media_type, descriptor.media_type)
    return Descriptor(media_type, descriptor.digest, descriptor.size_bytes, descriptor.annotations, descriptor.platform)


def _fits(there: Platform, wanted: Platform) -> bool:
    same = (there.os, there.architecture) == (wanted.os, wanted.architecture)
    return same and (not wanted.variant or not there.variant or there.variant == wanted.variant)


async def read_json(store: _Reader, descriptor: Descriptor, *, limit: int = MAX_MANIFEST_BYTES) -> dict[str, Any]:
    """A manifest or a configuration. Raises InvalidArgument (MANIFEST_INVALID), and what `read` raises."""
    if descriptor.size_bytes > limit:
        raise InvalidArgument(f"Manifest {descriptor.digest} is too large.", reason="MANIFEST_INVALID")
    return object_of(b"".join([chunk async for chunk in store.read(descriptor)]), str(descriptor.digest))


def object_of(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object in `data`. Raises InvalidArgument (MANIFEST_INVALID)."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as exc:  # the latter of one that is nested deep
        raise InvalidArgument(f"{name} is not JSON: {exc}.", reason="MANIFEST_INVALID") from exc
    if not isinstance(found, dict):
        raise InvalidArgument(f"{name} is not an object.", reason="MANIFEST_INVALID")
    return found


def made_index(entries: Sequence[Descriptor]) -> bytes:
    """The index of images that one reference of a layout names, each for another platform: in no file, and the same
    whoever makes it."""
    plain = [Descriptor(each.media_type, each.digest, each.size_bytes, platform=each.platform) for each in entries]
    plain.sort(key=lambda each: (str(each.platform), each.digest))
    return canonical({"schemaVersion": 2, "mediaType": INDEX, "manifests": [each.to_json() for each in plain]})


def damaged(where: str, digest: Digest) -> DataLoss:
    """The error for bytes that do not have the digest they are kept under."""
    return DataLoss(
        f"Blob {digest} of {where} is damaged. Copy the image there again.", reason="BLOB_DAMAGED", digest=digest
    )


def unexpected(expected: Descriptor, digest: Digest) -> DataLoss:
    """The error for bytes that were announced under another digest or size."""
    return DataLoss(
        f"What was written is {digest}, not {expected.digest} as announced: it changed, or was damaged, on its way. "
        "Do it again.",
        reason="BLOB_DAMAGED",
        digest=expected.digest,
    )
