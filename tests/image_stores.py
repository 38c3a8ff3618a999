"""Images for tests of image stores, small enough to be read at a glance."""

import hashlib
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

from services.content.digest import Digest
from services.content.images import CONFIG, LAYER, MANIFEST, Descriptor, ImageStore, Platform, canonical

AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64")


async def of(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def read(store: ImageStore, descriptor: Descriptor) -> bytes:
    return b"".join([chunk async for chunk in store.read(descriptor)])


def described(content: bytes, media_type: str = LAYER) -> Descriptor:
    return Descriptor(media_type, Digest(hashlib.sha256(content).hexdigest()), len(content))


async def manifest(
    store: ImageStore, content: AsyncIterable[bytes], platform: Platform = AMD64, **more: Any
) -> tuple[bytes, Descriptor]:
    """An image with one layer, written but for its manifest; that, and the layer."""
    layer = Descriptor(LAYER, *await store.write(content))
    config = {"os": platform.os, "architecture": platform.architecture, "rootfs": {"diff_ids": [str(layer.digest)]}}
    kept = Descriptor(CONFIG, *await store.write(of(canonical(config))))
    return canonical(
        {"schemaVersion": 2, "mediaType": MANIFEST, "config": kept.to_json(), "layers": [layer.to_json()], **more}
    ), layer


async def put(store: ImageStore, reference: str, *chunks: bytes, platform: Platform = AMD64, **more: Any) -> Descriptor:
    """An image with one layer under a reference; what names it."""
    made, _ = await manifest(store, of(*chunks), platform, **more)
    return await store.tag(reference, made, MANIFEST, platform)
