"""Small images and what refers to them, written into an OCI layout as builds write theirs."""

import hashlib
import io
import os
import tarfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from services.builder.offline import here
from services.content.digest import Digest
from services.content.images import CONFIG, EMPTY, INDEX, LAYER, MANIFEST, Descriptor, Platform, canonical
from services.content.images.layout import LayoutImageStore


async def _once(content: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(content), 1 << 20):
        yield content[at : at + (1 << 20)]


async def put_blob(layout: Path, content: bytes, media_type: str) -> Descriptor:
    """A blob of the layout."""
    digest, size = await LayoutImageStore(layout).write(_once(content))
    return Descriptor(media_type, digest, size)


def layer_of(files: Mapping[str, bytes]) -> bytes:
    """A plain tar with these files, executable."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


async def put_image(
    layout: Path,
    reference: str,
    files: Mapping[str, bytes] | None = None,
    *,
    platform: Platform | None = None,
    config: Mapping[str, Any] | None = None,
) -> Descriptor:
    """An image of one layer under a reference; an empty one leaves it without. Random content unless `files` say."""
    platform = platform or here()
    content = layer_of(files if files is not None else {"data": os.urandom(64)})
    layer = await put_blob(layout, content, LAYER)
    described = {
        "os": platform.os,
        "architecture": platform.architecture,
        "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": [str(layer.digest)]},
    }
    made = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": (await put_blob(layout, canonical(described), CONFIG)).to_json(),
        "layers": [layer.to_json()],
    }
    if not reference:
        return await put_blob(layout, canonical(made), MANIFEST)
    return await LayoutImageStore(layout).tag(reference, canonical(made), MANIFEST, platform)


async def put_index(layout: Path, reference: str, images: Mapping[str, Descriptor]) -> Descriptor:
    """An index of images by platform, under a reference."""
    listed = [
        Descriptor(each.media_type, each.digest, each.size_bytes, platform=Platform.parse(platform)).to_json()
        for platform, each in images.items()
    ]
    made = {"schemaVersion": 2, "mediaType": INDEX, "manifests": listed}
    return await LayoutImageStore(layout).tag(reference, canonical(made), INDEX, None)


async def put_referrer(layout: Path, subject: Descriptor, artifact_type: str, content: bytes) -> Descriptor:
    """An artifact whose subject is another manifest, as the platform attaches one."""
    made = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": artifact_type,
        "config": (await put_blob(layout, b"{}", EMPTY)).to_json(),
        "layers": [(await put_blob(layout, content, artifact_type)).to_json()],
        "subject": Descriptor(subject.media_type, subject.digest, subject.size_bytes).to_json(),
        "annotations": {"dev.ekiben.test": artifact_type},
    }
    return await LayoutImageStore(layout).attach(canonical(made), MANIFEST)


def add_entries(layout: Path, entries: list[dict[str, Any]]) -> None:
    """Entries of `index.json`, added under the layout's lock."""
    store = LayoutImageStore(layout)
    with store.locked():
        index = store.index()
        store.put_index({**index, "manifests": [*index["manifests"], *entries]})


def digest_of(content: bytes) -> Digest:
    """The digest of bytes."""
    return Digest(hashlib.sha256(content).hexdigest())
