"""Attachments of images (signatures, bills of material, provenance), whatever the store."""

import json
from collections.abc import AsyncIterator

import pytest

from ekiben.errors import InvalidArgument, NotFound
from services.content.digest import Digest
from services.content.images import CONFIG, EMPTY, MANIFEST, Descriptor, ImageStore, Platform, canonical

LINUX = Platform("linux", "amd64")


@pytest.fixture
def store(image_store: ImageStore) -> ImageStore:
    return image_store


async def bytes_of(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def image(store: ImageStore, reference: str, text: str) -> Descriptor:
    config = canonical(
        {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": []}, "text": text}
    )
    digest, size = await store.write(bytes_of(config))
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": Descriptor(CONFIG, digest, size).to_json(),
        "layers": [],
    }
    return await store.tag(reference, canonical(manifest), MANIFEST, LINUX)


async def attachment(store: ImageStore, subject: Descriptor, text: str) -> bytes:
    config, config_size = await store.write(bytes_of(b"{}"))
    digest, size = await store.write(bytes_of(text.encode()))
    return canonical(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": "application/x-note",
            "config": Descriptor(EMPTY, config, config_size).to_json(),
            "layers": [Descriptor("text/plain", digest, size).to_json()],
            "subject": Descriptor(subject.media_type, subject.digest, subject.size_bytes).to_json(),
            "annotations": {"note": text},
        }
    )


async def test_what_is_attached_is_found_by_its_subject_with_type_and_annotations(store: ImageStore) -> None:
    one, other = await image(store, "one", "1"), await image(store, "other", "2")
    first = await store.attach(await attachment(store, one, "a"), MANIFEST)
    await store.attach(await attachment(store, one, "b"), MANIFEST)
    await store.attach(await attachment(store, one, "a"), MANIFEST)  # twice is once
    found = await store.referrers(one.digest)
    assert sorted((each.artifact_type, each.annotations["note"]) for each in found) == [
        ("application/x-note", "a"),
        ("application/x-note", "b"),
    ]
    assert first.digest in {each.digest for each in found}
    assert await store.referrers(other.digest) == []
    content = json.loads(b"".join([chunk async for chunk in store.read(first)]))
    assert content["subject"]["digest"] == str(one.digest)


async def test_an_attachment_may_come_before_its_subject_and_takes_nobodys_name(store: ImageStore) -> None:
    later = Descriptor(MANIFEST, Digest("ab" * 32), 7)
    await store.attach(await attachment(store, later, "early"), MANIFEST)
    assert [each.annotations["note"] for each in await store.referrers(later.digest)] == ["early"]
    only = await image(store, "", "1")
    await store.attach(await attachment(store, only, "late"), MANIFEST)
    assert (await store.resolve("", LINUX))[0].digest == only.digest
    newer = await image(store, "", "2")
    assert (await store.resolve("", LINUX))[0].digest == newer.digest
    assert len(await store.referrers(only.digest)) == 1


async def test_a_reference_and_a_digest_are_found_as_they_stand(store: ImageStore) -> None:
    made = await image(store, "one", "1")
    assert (await store.find("one")).digest == made.digest
    found = await store.find(str(made.digest))
    assert (found.digest, found.size_bytes, found.media_type) == (made.digest, made.size_bytes, MANIFEST)
    with pytest.raises(NotFound) as caught:
        await store.find("another")
    assert caught.value.reason == "IMAGE_NOT_FOUND"


async def test_a_manifest_without_subject_cannot_be_attached(store: ImageStore) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await store.attach(canonical({"schemaVersion": 2, "mediaType": MANIFEST}), MANIFEST)
    assert caught.value.reason == "MANIFEST_INVALID"
