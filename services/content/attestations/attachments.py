"""Attestations as OCI referrers of an image: written, listed, read.

Each is a manifest with a subject, an empty configuration and one layer that holds the content, as cosign and oras
write them. Equal content gives an equal manifest (no times in it), so that attaching twice is attaching once.
"""

import hashlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from ekiben.errors import DataLoss, InvalidArgument, NotFound
from services.content.attestations.envelopes import (
    BUNDLE,
    COSIGN_SIGNATURE,
    IN_TOTO,
    SIMPLE_SIGNING,
    simple_signing,
    statement,
)
from services.content.digest import Digest
from services.content.images import CONFIG, EMPTY, MANIFEST, Descriptor, ImageStore, canonical

MOST_BYTES = 32 << 20
"""Of one attachment's content; a bill of material with thousands of packages has a few MiB."""
MOST_MANIFEST_BYTES = 4 << 20
MOST_ATTACHMENTS = 256
"""That are looked at for one image: whoever may write to a registry may attach, and reading takes time."""


@dataclass(frozen=True)
class Attachment:
    """One thing that is attached to an image."""

    descriptor: Descriptor
    """Of its manifest; what it says of itself is not to be believed."""
    layers: tuple[Descriptor, ...]


async def attach(
    store: ImageStore,
    subject: Descriptor,
    artifact_type: str,
    content: bytes,
    annotations: Mapping[str, str] | None = None,
) -> Descriptor:
    """Attach content to the manifest that `subject` names, which need not be there yet.

    A crash leaves blobs that nothing names; the next time finds them.
    """
    config = await _blob(store, EMPTY, b"{}")
    layer = await _blob(store, artifact_type, content)
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": artifact_type,
        "config": config.to_json(),
        "layers": [layer.to_json()],
        "subject": Descriptor(subject.media_type, subject.digest, subject.size_bytes).to_json(),
        "annotations": dict(annotations or {}),
    }
    return await store.attach(canonical(manifest), MANIFEST)


async def attach_bundle(store: ImageStore, subject: Descriptor, bundle: bytes, predicate_type: str) -> Descriptor:
    """Attach a signed statement, annotated as cosign finds it."""
    annotations = {"dev.sigstore.bundle.content": "dsse-envelope", "dev.sigstore.bundle.predicateType": predicate_type}
    return await attach(store, subject, BUNDLE, bundle, annotations)


async def attach_statement(
    store: ImageStore, subject: Descriptor, predicate_type: str, predicate: Mapping[str, object], *, name: str = ""
) -> Descriptor:
    """Attach a statement that nobody signed, annotated as BuildKit's are."""
    content = statement(subject.digest, predicate_type, predicate, name=name)
    return await attach(store, subject, IN_TOTO, content, {"in-toto.io/predicate-type": predicate_type})


async def attachments(store: ImageStore, subject: Digest) -> list[Attachment]:
    """What is attached to a manifest. Those that are damaged or gone are left out: they prove nothing."""
    found = []
    for descriptor in (await store.referrers(subject))[:MOST_ATTACHMENTS]:
        try:
            manifest = json.loads(await read(store, descriptor, MOST_MANIFEST_BYTES))
            if Descriptor.from_json(manifest["subject"]).digest != subject:
                continue
            layers = tuple(Descriptor.from_json(each) for each in manifest.get("layers") or ())
        except (NotFound, DataLoss, InvalidArgument, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        found.append(Attachment(descriptor, layers))
    return found


async def read(store: ImageStore, descriptor: Descriptor, most_bytes: int = MOST_BYTES) -> bytes:
    """A small blob or manifest, whole. Raises InvalidArgument (ATTESTATION_INVALID) for one that is too large."""
    too_large = InvalidArgument(
        f"{descriptor.digest} has more than {most_bytes >> 20} MiB, which no attestation has.",
        reason="ATTESTATION_INVALID",
    )
    if descriptor.size_bytes > most_bytes:
        raise too_large
    parts, size = [], 0
    async for chunk in store.read(descriptor):
        size += len(chunk)
        if size > most_bytes:
            raise too_large
        parts.append(chunk)
    return b"".join(parts)


def cosign_reference(reference: str, subject: Digest) -> str:
    """Where cosign before version 3 keeps the signatures of an image: the tag `sha256-….sig` of its repository."""
    repository, colon, _ = reference.rpartition(":") if not reference.startswith("sha256:") else ("", "", "")
    return f"{repository}{colon}sha256-{subject.hex}.sig"


async def attach_simple_signing(
    store: ImageStore, reference: str, subject: Digest, name: str, signature: str
) -> Descriptor:
    """Keep a signature over `simple_signing(subject, name)` where older clients look for it, in place of the former
    ones. `signature` is base64."""
    layer = await _blob(store, SIMPLE_SIGNING, simple_signing(subject, name))
    signed = Descriptor(layer.media_type, layer.digest, layer.size_bytes, {COSIGN_SIGNATURE: signature})
    layers = {"type": "layers", "diff_ids": [str(layer.digest)]}
    config = await _blob(store, CONFIG, canonical({"architecture": "", "config": {}, "os": "", "rootfs": layers}))
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config.to_json(), "layers": [signed.to_json()]}
    return await store.tag(cosign_reference(reference, subject), canonical(manifest), MANIFEST, None)


async def simple_signatures(store: ImageStore, reference: str, subject: Digest) -> Sequence[Descriptor]:
    """The layers of the tag `sha256-….sig`; none where there is no such tag."""
    try:
        descriptor = await store.find(cosign_reference(reference, subject))
        manifest = json.loads(await read(store, descriptor, MOST_MANIFEST_BYTES))
        layers = [Descriptor.from_json(each) for each in manifest.get("layers") or ()]
    except (NotFound, DataLoss, InvalidArgument, ValueError, TypeError, AttributeError, RecursionError):
        return ()
    return [each for each in layers if each.media_type == SIMPLE_SIGNING][:MOST_ATTACHMENTS]


async def _blob(store: ImageStore, media_type: str, content: bytes) -> Descriptor:
    async def once() -> AsyncIterator[bytes]:
        yield content

    expected = Descriptor(media_type, Digest(hashlib.sha256(content).hexdigest()), len(content))
    if await store.size(expected.digest) != len(content):
        await store.write(once(), expected)
    return expected
