"""An OCI layout holds whole blobs or none, and says what is wrong with one that somebody damaged."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ekiben.errors import DataLoss, InvalidArgument, NotFound
from services.builder.repositories import Repositories
from services.content.images import CONFIG, INDEX, LAYER, MANIFEST, Descriptor, Platform, canonical
from services.content.images.copying import copy_image
from services.content.images.layout import LayoutImageStore

AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64")


async def of(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def put(store: LayoutImageStore, reference: str, content: bytes, platform: Platform = AMD64) -> Descriptor:
    layer = Descriptor(LAYER, *await store.write(of(content)))
    config = {"os": "linux", "architecture": platform.architecture, "rootfs": {"diff_ids": [str(layer.digest)]}}
    described = Descriptor(CONFIG, *await store.write(of(canonical(config))))
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described.to_json(), "layers": [layer.to_json()]}
    return await store.tag(reference, canonical(manifest), MANIFEST, platform)


async def read(store: LayoutImageStore, descriptor: Descriptor) -> bytes:
    return b"".join([chunk async for chunk in store.read(descriptor)])


async def test_an_image_is_found_by_reference_and_platform(tmp_path: Path) -> None:
    store = LayoutImageStore(tmp_path / "layout")
    await put(store, "v1", b"one")
    await put(store, "v1", b"arm", ARM64)
    await put(store, "v2", b"two")
    for reference, platform, content in (("v1", AMD64, b"one"), ("v1", ARM64, b"arm"), ("v2", AMD64, b"two")):
        _, image = await store.resolve(reference, platform)
        assert await read(store, image.layers[0]) == content
    with pytest.raises(NotFound, match="v1, v1, v2"):
        await store.resolve("v3", AMD64)
    with pytest.raises(NotFound, match="linux/amd64"):
        await store.resolve("v2", ARM64)
    with pytest.raises(NotFound, match="several"):
        await store.resolve("", AMD64)


async def test_images_of_several_platforms_under_one_name_are_found_and_copied_as_one(tmp_path: Path) -> None:
    store, other = LayoutImageStore(tmp_path / "layout"), LayoutImageStore(tmp_path / "other")
    made = [await put(store, "a/b:v1", content, platform) for content, platform in ((b"1", AMD64), (b"2", ARM64))]
    found = await store.find("a/b:v1")
    assert found.media_type == INDEX
    repository = await Repositories(tmp_path / "layout").get("a/b")
    assert repository is not None and repository.tags["v1"].digest == found.digest, "as it is served"
    await copy_image(store, "a/b:v1", other, "v1")
    assert (await other.find("v1")).digest == found.digest
    for each, platform in zip(made, (AMD64, ARM64), strict=True):
        for asked, reference in ((store, "a/b:v1"), (store, str(found.digest)), (other, "v1")):
            assert (await asked.resolve(reference, platform))[0].digest == each.digest


async def test_an_image_for_one_variant_or_system_leaves_those_for_others(tmp_path: Path) -> None:
    store = LayoutImageStore(tmp_path / "layout")

    async def after(*platforms: str) -> list[str]:
        for platform in platforms:
            await put(store, "v1", platform.encode(), Platform.parse(platform))
        return sorted(str(each.platform) for each in await store.entries())

    assert await after("linux/arm/v6", "linux/arm/v7") == ["linux/arm/v6", "linux/arm/v7"]
    assert await after("windows/arm", "linux/arm/v7") == ["linux/arm/v6", "linux/arm/v7", "windows/arm"]
    assert await after("linux/arm") == ["linux/arm", "windows/arm"]
    assert await after("linux/arm/v7") == ["linux/arm/v7", "windows/arm"]


async def test_a_reference_moves_and_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    stores = [LayoutImageStore(tmp_path / "layout") for _ in range(8)]
    await asyncio.gather(*(put(store, f"v{i}", bytes([i])) for i, store in enumerate(stores)))
    await put(stores[0], "v3", b"moved")
    index = json.loads((tmp_path / "layout" / "index.json").read_text())
    assert len(index["manifests"]) == 8
    _, image = await stores[1].resolve("v3", AMD64)
    assert await read(stores[1], image.layers[0]) == b"moved"


async def test_a_write_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    store = LayoutImageStore(tmp_path / "layout")

    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        await store.write(broken())
    assert list((tmp_path / "layout" / "blobs" / "sha256").iterdir()) == []


async def test_damage_is_told(tmp_path: Path) -> None:
    store = LayoutImageStore(tmp_path / "layout")
    await put(store, "v1", b"whole")
    _, image = await store.resolve("v1", AMD64)
    path = tmp_path / "layout" / "blobs" / "sha256" / image.layers[0].digest.hex
    path.write_bytes(b"other")
    with pytest.raises(DataLoss, match="damaged"):
        await read(store, image.layers[0])
    path.unlink()
    with pytest.raises(NotFound, match="not whole"):
        await read(store, image.layers[0])
    (tmp_path / "layout" / "index.json").write_text("[]")
    with pytest.raises(InvalidArgument, match=r"index\.json"):
        await store.resolve("v1", AMD64)
