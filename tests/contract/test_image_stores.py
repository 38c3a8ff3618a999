"""What every image store promises: a layout on disk and a registry alike."""

import os
from collections.abc import AsyncIterator

import pytest

from ekiben.errors import DataLoss, InvalidArgument, NotFound
from services.content.digest import Digest
from services.content.images import INDEX, LAYER, MANIFEST, Again, Descriptor, ImageStore, Platform, canonical
from services.content.images.doubting import DoubtingImageStore
from services.content.images.resolving import DOCKER_LIST, DOCKER_MANIFEST
from tests.image_stores import AMD64, ARM64, described, manifest, of, put, read


@pytest.fixture
def store(image_store: ImageStore) -> ImageStore:
    return image_store


async def test_blobs_are_kept_by_digest_whole_or_not_at_all(store: ImageStore) -> None:
    large = [os.urandom(1 << 20) for _ in range(3)]
    for chunks in ([], [b"small"], large):
        content = b"".join(chunks)
        expected = described(content)
        assert await store.size(expected.digest) is None
        assert await store.write(of(*chunks)) == (expected.digest, len(content))
        assert await store.write(Again(lambda chunks=chunks: of(*chunks)), expected) == (expected.digest, len(content))
        assert await store.size(expected.digest) == len(content)
        assert await read(store, expected) == content


async def test_what_is_not_as_announced_is_not_kept(store: ImageStore) -> None:
    announced = described(b"announced")
    for content in (b"something", b"longer than it", b"short"):
        with pytest.raises(DataLoss, match="announced"):
            await store.write(Again(lambda content=content: of(content)), announced)
    assert await store.size(announced.digest) is None
    with pytest.raises(DataLoss):
        await read(store, Descriptor(LAYER, (await store.write(of(b"12345")))[0], 4))


async def test_a_source_that_fails_fails_as_it_did(store: ImageStore) -> None:
    error: Exception = NotFound("The file is gone.", reason="FILE_NOT_FOUND")

    async def broken() -> AsyncIterator[bytes]:
        yield bytes(2 << 20)
        raise error

    for each in (error, LookupError("gone")):
        error = each
        for chunks in (broken(), Again(broken)):
            with pytest.raises(type(error), match="gone"):
                await store.write(chunks)


async def test_a_reference_names_the_image_that_was_tagged_last(store: ImageStore) -> None:
    assert await store.references() == []
    first = await put(store, "v1", b"one")
    assert (await store.find("v1")).digest == first.digest
    second = await put(store, "v1", b"two")
    await put(store, "v2", b"three")
    descriptor, image = await store.resolve("v1", AMD64)
    assert descriptor.digest == second.digest
    assert await read(store, image.layers[0]) == b"two"
    assert await store.references() == ["v1", "v2"]
    for reference in ("v3", str(Digest("ab" * 32))):
        with pytest.raises(NotFound) as caught:
            await store.find(reference)
        assert caught.value.reason == "IMAGE_NOT_FOUND"
    with pytest.raises(NotFound, match="linux/amd64"):
        await store.resolve("v1", ARM64)


@pytest.mark.parametrize(("index_type", "image_type"), [(INDEX, MANIFEST), (DOCKER_LIST, DOCKER_MANIFEST)])
async def test_an_index_gives_each_platform_its_image(store: ImageStore, index_type: str, image_type: str) -> None:
    entries = []
    for platform, content in ((AMD64, b"amd"), (ARM64, b"arm")):
        made, _ = await manifest(store, of(content), platform, mediaType=image_type)
        kept = await store.keep(made, image_type)
        entries.append(Descriptor(kept.media_type, kept.digest, kept.size_bytes, platform=platform))
    index = {"schemaVersion": 2, "mediaType": index_type, "manifests": [each.to_json() for each in entries]}
    tagged = await store.tag("both", canonical(index), index_type, None)
    assert await store.references() == ["both"]
    found = await store.find("both")
    assert (found.digest, found.media_type) == (tagged.digest, index_type)
    for platform, entry, content in ((AMD64, entries[0], b"amd"), (ARM64, entries[1], b"arm")):
        descriptor, image = await store.resolve("both", platform)
        assert descriptor.digest == entry.digest
        assert await read(store, image.layers[0]) == content
    with pytest.raises(NotFound, match=r"linux/amd64, linux/arm64"):
        await store.resolve("both", Platform("linux", "s390x"))


async def test_nothing_is_found_where_nothing_is(store: ImageStore) -> None:
    assert await store.size(Digest("ab" * 32)) is None
    with pytest.raises(NotFound):
        await read(store, Descriptor(LAYER, Digest("ab" * 32), 5))
    with pytest.raises(NotFound):
        await store.resolve("", AMD64)
    with pytest.raises(InvalidArgument):
        await store.attach(b"{}", "application/vnd.oci.image.manifest.v1+json")


async def test_a_doubted_store_has_only_what_it_is_given_anew(store: ImageStore) -> None:
    one, other = described(b"one"), described(b"other")
    for content in (b"one", b"other"):
        await store.write(of(content))
    some, all_of_it = DoubtingImageStore(store, [one.digest]), DoubtingImageStore(store, [])
    assert (await some.size(one.digest), await some.size(other.digest)) == (None, 5)
    assert (await all_of_it.size(one.digest), await all_of_it.size(other.digest)) == (None, None)
    for doubted in (some, all_of_it):
        assert not await doubted.mount(one, store.name)
        assert await doubted.write(of(b"one"), one) == (one.digest, 3)
        assert await doubted.size(one.digest) == 3
        assert await read(doubted, other) == b"other"
    tagged = await put(some, "v1", b"one")
    assert (await store.find("v1")).digest == tagged.digest
    assert await all_of_it.references() == ["v1"] and await all_of_it.referrers(tagged.digest) == []
    assert (await all_of_it.resolve("v1", AMD64))[0].digest == (await all_of_it.find("v1")).digest
