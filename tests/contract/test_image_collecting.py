"""Garbage of a layout: what goes, what stays, and what a build beside it sees."""

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.content.digest import Digest
from services.content.images import CONFIG, LAYER, MANIFEST, BlobsMissing, Descriptor, Platform, canonical
from services.content.images.collecting import LayoutCollector
from services.content.images.layout import LayoutImageStore

AMD64 = Platform("linux", "amd64")
NEVER_NEW = float("inf")
OLD = 1_000_000_000


async def one(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def made(store: LayoutImageStore, *layers: bytes) -> bytes:
    """The manifest of an image whose layers are in the store: written, or there already."""
    descriptors = []
    for layer in layers:
        digest = Digest(hashlib.sha256(layer).hexdigest())
        if await store.size(digest) is None:
            await store.write(one(layer))
        descriptors.append(Descriptor(LAYER, digest, len(layer)))
    config = canonical({"os": "linux", "architecture": "amd64", "rootfs": {}, "layers": [str(d) for d in descriptors]})
    named = Descriptor(CONFIG, *await store.write(one(config)))
    return canonical({"config": named.to_json(), "layers": [each.to_json() for each in descriptors]})


def blobs(folder: Path) -> set[str]:
    return {path.name for path in (folder / "blobs" / "sha256").iterdir()}


def age(folder: Path) -> None:
    """Let everything have been written long ago."""
    for path in (folder / "blobs" / "sha256").iterdir():
        os.utime(path, (OLD, OLD))


async def test_what_nothing_names_goes_once_it_is_old(tmp_path: Path) -> None:
    store, collector = LayoutImageStore(tmp_path), LayoutCollector(tmp_path)
    first = await store.tag("one", await made(store, b"shared", b"first"), MANIFEST, AMD64)
    await store.tag("two", await made(store, b"shared", b"second"), MANIFEST, AMD64)
    (tmp_path / "blobs" / "sha256" / ".cut-off").write_bytes(b"half")
    both = blobs(tmp_path)
    assert collector.contents().garbage_blobs == 0 and collector.contents().shared_bytes == len(b"shared")
    await store.untag(["two"])
    assert collector.collect(OLD + 1) == []  # all of it is new
    age(tmp_path)
    would = collector.garbage(OLD + 1)
    assert blobs(tmp_path) == both
    removed = collector.collect(OLD + 1)
    assert {blob.digest for blob in removed} == {blob.digest for blob in would} and len(removed) == 3
    assert ".cut-off" not in blobs(tmp_path)
    assert (await store.resolve("one", AMD64))[0].digest == first.digest
    assert [
        len(b"".join([c async for c in store.read(layer)])) for layer in (await store.resolve("one", AMD64))[1].layers
    ]
    assert collector.collect(NEVER_NEW) == []


async def test_a_layout_that_nobody_wrote_to_has_no_garbage(tmp_path: Path) -> None:
    collector = LayoutCollector(tmp_path / "layout")
    assert collector.garbage(NEVER_NEW) == collector.collect(NEVER_NEW) == []
    await LayoutImageStore(tmp_path / "layout").untag(["one"])
    assert collector.contents().blobs == 0 and not (tmp_path / "layout").exists()


async def test_a_layer_that_a_build_asked_for_is_new(tmp_path: Path) -> None:
    store, collector = LayoutImageStore(tmp_path), LayoutCollector(tmp_path)
    digest, size = await store.write(one(b"a layer"))
    age(tmp_path)
    assert await store.size(digest) == size
    assert collector.collect(OLD + 1) == []
    age(tmp_path)
    assert [blob.digest for blob in collector.collect(OLD + 1)] == [digest]


async def test_attachments_go_with_what_they_are_attached_to(tmp_path: Path) -> None:
    store, collector = LayoutImageStore(tmp_path), LayoutCollector(tmp_path)
    image = await store.tag("one", await made(store, b"layer"), MANIFEST, AMD64)
    manifest = {"artifactType": "a/b", "subject": image.to_json(), **json.loads(await made(store, b"signature"))}
    await store.attach(canonical(manifest), MANIFEST)
    await store.tag(f"r:sha256-{image.digest.hex}.sig", await made(store, b"old signature"), MANIFEST, None)
    age(tmp_path)
    assert collector.collect(OLD + 1) == []
    assert len(await store.referrers(image.digest)) == 1
    await store.untag(["one"])
    collector.collect(OLD + 1)
    assert blobs(tmp_path) == set() and store.index()["manifests"] == []


@pytest.mark.parametrize(
    "more",
    ['"z": ' + "[" * 100_000 + "]" * 100_000, '"layers": [{"digest": "", "size": 1e999}]'],
    ids=["nested deep", "an endless size"],
)
async def test_an_attachment_that_cannot_be_read_keeps_nothing_else(tmp_path: Path, more: str) -> None:
    store, collector = LayoutImageStore(tmp_path), LayoutCollector(tmp_path)
    image = await store.tag("one", await made(store, b"layer"), MANIFEST, AMD64)
    junk = f'{{"subject": {json.dumps(image.to_json())}, {more}}}'.encode()
    digest, size = await store.write(one(junk))
    with store.locked():
        index = store.index()
        entry = Descriptor(MANIFEST, digest, size, artifact_type="x/y").to_json()
        store.put_index({**index, "manifests": [*index["manifests"], entry]})
    await store.write(one(b"garbage"))
    age(tmp_path)
    whole = blobs(tmp_path)
    assert [each.size_bytes for each in collector.collect(OLD + 1)] == [len(b"garbage")]
    assert len(blobs(tmp_path)) == len(whole) - 1


async def test_an_image_whose_layer_was_collected_meanwhile_is_not_named(tmp_path: Path) -> None:
    store, collector = LayoutImageStore(tmp_path), LayoutCollector(tmp_path)
    before = await store.tag("image", await made(store, b"first"), MANIFEST, AMD64)
    manifest = await made(store, b"second")
    assert len(collector.collect(NEVER_NEW)) == 2
    with pytest.raises(BlobsMissing) as caught:
        await store.tag("image", manifest, MANIFEST, AMD64)
    assert Digest(hashlib.sha256(b"second").hexdigest()) in caught.value.digests
    assert (await store.find("image")).digest == before.digest


async def test_an_image_is_named_whole_or_not_at_all_however_a_collector_comes_between(tmp_path: Path) -> None:
    """Without any grace: the builder finds layers there, and they may be gone when it names the image."""
    store, collector = LayoutImageStore(tmp_path), LayoutCollector(tmp_path)
    done = asyncio.Event()

    async def collect() -> int:
        rounds = 0
        while not done.is_set():
            await asyncio.to_thread(collector.collect, NEVER_NEW)
            rounds += 1
        return rounds

    collecting = asyncio.create_task(collect())
    named = 0
    try:
        for attempt in range(60):
            try:
                manifest = await made(store, b"shared", b"layer %d" % (attempt % 3))
                await store.tag("image", manifest, MANIFEST, AMD64)
            except BlobsMissing:
                continue
            named += 1
            _, image = await store.resolve("image", AMD64)
            for layer in image.layers:
                assert await store.size(layer.digest) == layer.size_bytes
            if attempt % 3 == 0:
                await store.untag(["image"])
    finally:
        done.set()
    assert await collecting


async def test_a_blob_that_goes_while_the_folder_is_read_hides_no_other(tmp_path: Path) -> None:
    store, collector = LayoutImageStore(tmp_path), LayoutCollector(tmp_path)
    old = Digest(hashlib.sha256(b"garbage").hexdigest())
    await store.write(one(b"garbage"))
    age(tmp_path)
    (tmp_path / "blobs" / "sha256" / ("0" * 64)).symlink_to("gone")  # listed, and not there when it is looked at
    assert [blob.digest for blob in collector.garbage(OLD + 1)] == [old]
    assert collector.contents().blobs == 1
