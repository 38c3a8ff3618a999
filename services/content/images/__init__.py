"""The port for OCI images: blobs and manifests by digest, and references that name manifests.

A store that has taken everything an image is made of can be told its manifest; a reference is moved last, so that
whoever reads by reference finds a whole image or the one before.

Source: OCI image-spec 1.1: descriptor.md, manifest.md, image-index.md, config.md.
"""

import json
import platform as machine
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ekiben.errors import FailedPrecondition, InvalidArgument
from services.content.digest import Digest

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
EMPTY = "application/vnd.oci.empty.v1+json"
REF_NAME = "org.opencontainers.image.ref.name"

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
"""The kernel's names → OCI's, which are Go's."""


@dataclass(frozen=True)
class Platform:
    """`linux/amd64`, `linux/arm64/v8`."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> "Platform":
        """Read `os/architecture[/variant]`. Raises InvalidArgument (PLATFORM_INVALID)."""
        parts = text.split("/")
        if not 2 <= len(parts) <= 3 or not all(parts):
            raise InvalidArgument(
                f"Platform {text!r} is not of the form linux/amd64 or linux/arm64/v8.",
                reason="PLATFORM_INVALID",
                platform=text,
            )
        return cls(*parts)

    @classmethod
    def here(cls) -> "Platform":
        """That of this machine. Images are Linux's, whatever this is."""
        name = machine.machine()
        return cls("linux", _ARCHITECTURES.get(name, name))

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


@dataclass(frozen=True)
class Descriptor:
    """What names content in a manifest."""

    media_type: str
    digest: Digest
    size_bytes: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Platform | None = None
    artifact_type: str = ""
    """What an attached manifest is; empty for images."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest; members in a fixed order, empty ones left out."""
        found: dict[str, Any] = {
            "mediaType": self.media_type,
            "digest": str(self.digest),
            "size": self.size_bytes,
        }
        if self.annotations:
            found["annotations"] = dict(sorted(self.annotations.items()))
        if self.artifact_type:
            found["artifactType"] = self.artifact_type
        if self.platform is not None:
            named = {"os": self.platform.os, "architecture": self.platform.architecture}
            found["platform"] = {**named, **({"variant": self.platform.variant} if self.platform.variant else {})}
        return found

    @classmethod
    def from_json(cls, value: Any) -> "Descriptor":
        """Read one. Raises InvalidArgument (MANIFEST_INVALID)."""
        try:
            platform = value.get("platform")
            return cls(
                str(value.get("mediaType") or ""),
                Digest.parse(value["digest"]),
                int(value["size"]),
                dict(value.get("annotations") or {}),
                Platform(platform["os"], platform["architecture"], platform.get("variant") or "") if platform else None,
                str(value.get("artifactType") or ""),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as exc:
            raise InvalidArgument(f"A descriptor is not readable: {exc}.", reason="MANIFEST_INVALID") from exc


def attached(descriptor: Descriptor, manifest: Any) -> Descriptor:
    """What names an attached manifest in an answer of `referrers`: with its type and its annotations.

    Source: OCI distribution-spec 1.1, "Listing Referrers".
    """
    try:
        kind = str(manifest.get("artifactType") or (manifest.get("config") or {}).get("mediaType") or "")
        annotations = {str(key): str(value) for key, value in (manifest.get("annotations") or {}).items()}
    except AttributeError as exc:
        raise InvalidArgument(f"Manifest {descriptor.digest} is not readable.", reason="MANIFEST_INVALID") from exc
    return Descriptor(descriptor.media_type, descriptor.digest, descriptor.size_bytes, annotations, None, kind)


@dataclass(frozen=True)
class Image:
    """One image for one platform: its configuration and its layers, lowest first."""

    config: Mapping[str, Any]
    layers: Sequence[Descriptor]
    annotations: Mapping[str, str] = field(default_factory=dict)


class Again:
    """Bytes that can be had again from their beginning: whoever sends them over a network may have to."""

    def __init__(self, make: Callable[[], AsyncIterator[bytes]]) -> None:
        self._make = make

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._make()


class BlobsMissing(FailedPrecondition):
    """A store refused a manifest because it has not the blobs `digests`, whatever it said when it was asked before."""

    def __init__(self, where: str, digests: Sequence[Digest]) -> None:
        super().__init__(
            f"{where} lost {', '.join(map(str, digests)) or 'a blob'} which it had said to have. Nothing was tagged: "
            "do it again; if that does not help, clear that registry's cache of blobs (a restart, often).",
            reason="IMAGE_BLOBS_MISSING",
            image=where,
        )
        self.digests = tuple(digests)


def canonical(value: Any) -> bytes:
    """JSON whose bytes depend on the value only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


class Readable(Protocol):
    """What layers are read from: an ImageStore, or several."""

    @property
    def name(self) -> str:
        """See ImageStore."""
        ...

    def read(self, descriptor: Descriptor) -> AsyncIterator[bytes]:
        """See ImageStore."""
        ...


class ImageStore(Protocol):
    """Where images are kept. Every reader checks what it reads against its digest."""

    @property
    def name(self) -> str:
        """The store without a reference, as `open_images` reads it."""
        ...

    async def size(self, digest: Digest) -> int | None:
        """The size of a blob in bytes, or None where it is not there."""
        ...

    async def write(self, chunks: AsyncIterable[bytes], expected: Descriptor | None = None) -> tuple[Digest, int]:
        """Keep a blob, whole or not at all; its digest and size. One that is there already is kept.

        Args:
            chunks: its bytes. Where they can be had again (`Again`, not a generator), a store that lost the connection
                goes on where it stopped.
            expected: the digest and the size that they will have, if these are known.

        Raises:
            ResourceExhausted: no space left (STORAGE_FULL).
            DataLoss: they are not what was expected (BLOB_DAMAGED); nothing was kept.
        """
        ...

    async def mount(self, descriptor: Descriptor, origin: str) -> bool:
        """Have a blob of another store, by its name, without its bytes passing here; False where that cannot be."""
        ...

    def read(self, descriptor: Descriptor) -> AsyncIterator[bytes]:
        """A blob or a manifest. Raises NotFound (BLOB_NOT_FOUND), or DataLoss at its end (BLOB_DAMAGED)."""
        ...

    async def find(self, reference: str) -> Descriptor:
        """What a reference or a digest names, as it stands there: an index of several platforms, or one manifest.

        Raises:
            NotFound: there is no such thing (IMAGE_NOT_FOUND).
        """
        ...

    async def attach(self, manifest: bytes, media_type: str) -> Descriptor:
        """Keep a manifest that has a `subject`, all of whose content is here, so that `referrers` finds it.

        The subject itself may come later: signatures are there before a tag names what they sign. Twice is once.

        Raises:
            InvalidArgument: it has no subject (MANIFEST_INVALID).
        """
        ...

    async def referrers(self, subject: Digest) -> Sequence[Descriptor]:
        """What is attached to a manifest, with types and annotations, by digest; nothing where it is not known."""
        ...

    async def resolve(self, reference: str, platform: Platform) -> tuple[Descriptor, Image]:
        """The image that a reference names, for a platform.

        Raises:
            NotFound: no such reference, or none for the platform (IMAGE_NOT_FOUND); the message says which there are.
        """
        ...

    async def keep(self, manifest: bytes, media_type: str) -> Descriptor:
        """Keep a manifest all of whose content is here under its digest only, as those that an index lists."""
        ...

    async def tag(self, reference: str, manifest: bytes, media_type: str, platform: Platform | None) -> Descriptor:
        """Keep a manifest or an index, all of whose content is here, and have the reference name it.

        Raises:
            BlobsMissing: content is not here after all; the reference names what it named before.
        """
        ...

    async def references(self) -> Sequence[str]:
        """Every reference there is, in order."""
        ...
