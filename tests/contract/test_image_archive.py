"""An archive for docker load is one tar, whole or not there, whatever happens while it is written."""

import errno
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ekiben.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from services.content import open_images
from services.content.images import INDEX, MANIFEST, Again, canonical
from services.content.images.archive import open_archive
from tests.image_stores import AMD64, described, manifest, of, put, read


def content_of(file: Path) -> dict[str, bytes]:
    with tarfile.open(file) as archive:
        members = archive.getmembers()
        assert len({member.name for member in members}) == len(members)
        found = {member.name: archive.extractfile(member) for member in members}
        return {name: member.read() for name, member in found.items() if isinstance(member, io.BufferedReader)}


async def test_it_holds_each_blob_once_and_both_tables_of_contents(tmp_path: Path) -> None:
    large = os.urandom((2 << 20) + 7)
    async with open_images(f"docker-archive:{tmp_path}/image.tar:team/app:v1") as (store, reference):
        assert reference == "team/app:v1" and await store.references() == []
        await store.write(of(large[: 1 << 20], large[1 << 20 :]))
        await store.write(of(large[: 1 << 20], large[1 << 20 :]))
        assert await store.size(described(large).digest) == len(large)
        assert await read(store, described(large)) == large
        image = await put(store, reference, large[: 1 << 20], large[1 << 20 :])
    files = content_of(tmp_path / "image.tar")
    assert files[f"blobs/sha256/{described(large).digest.hex}"] == large
    (entry,) = json.loads(files["manifest.json"])
    assert entry["RepoTags"] == ["team/app:v1"]
    assert entry["Layers"] == [f"blobs/sha256/{described(large).digest.hex}"] and entry["Config"] in files
    assert [each["digest"] for each in json.loads(files["index.json"])["manifests"]] == [str(image.digest)]


async def test_what_others_that_were_killed_left_goes_and_what_is_written_stays(tmp_path: Path) -> None:
    left, other = tmp_path / ".image.tar.0123456789ab.part", tmp_path / ".image.tar.mine.part"
    for path in (left, other):
        path.write_bytes(b"part")
    async with open_archive(tmp_path / "image.tar") as first:
        assert not left.exists() and other.exists()
        async with open_archive(tmp_path / "image.tar") as second:
            await put(second, "v2", b"second")
        await put(first, "v1", b"first")
    assert sorted(each.name for each in tmp_path.iterdir()) == [other.name, "image.tar"]
    assert json.loads(content_of(tmp_path / "image.tar")["manifest.json"])


@pytest.mark.parametrize("where", ["docker-archive:{}/image.tar", "oci:{}/layout"])
async def test_a_full_disk_is_named_by_what_was_to_be_written_there(tmp_path: Path, where: str) -> None:
    async def full() -> AsyncIterator[bytes]:
        yield b"begun"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with open_images(where.format(tmp_path)) as (store, _):
        with pytest.raises(ResourceExhausted, match=str(tmp_path)) as caught:
            await store.write(full())
    assert caught.value.reason == "STORAGE_FULL" and "registry" not in caught.value.message


async def test_what_breaks_off_within_leaves_no_trace_in_it(tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield bytes(3 << 20)
        raise NotFound("The file is gone.", reason="FILE_NOT_FOUND")

    async with open_archive(tmp_path / "image.tar") as store:
        await store.write(of(b"first"))
        for chunks in (broken(), Again(broken)):
            with pytest.raises(NotFound, match="gone"):
                await store.write(chunks)
        with pytest.raises(DataLoss, match="announced"):
            await store.write(of(b"other"), described(b"announced"))
        await put(store, "v1", b"layer", annotations={"org.opencontainers.image.title": "Summarizer:v1"})
    files = content_of(tmp_path / "image.tar")
    assert len(files) == 7  # two layers, configuration, manifest, and three that say what is where
    assert json.loads(files["manifest.json"])[0]["RepoTags"] == ["summarizer:v1"]


async def test_what_is_attached_is_in_it_and_an_index_is_refused(tmp_path: Path) -> None:
    async with open_archive(tmp_path / "image.tar") as store:
        made, _ = await manifest(store, of(b"layer"))
        kept = await store.keep(made, MANIFEST)
        note, _ = await manifest(store, of(b"note"), subject=kept.to_json(), artifactType="application/x-note")
        attached = await store.attach(note, MANIFEST)
        assert [each.digest for each in await store.referrers(kept.digest)] == [attached.digest]
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [kept.to_json()]}
        with pytest.raises(FailedPrecondition, match="one platform"):
            await store.tag("v1", canonical(index), INDEX, None)
        await store.tag("app:v1", made, MANIFEST, AMD64)
    entries = json.loads(content_of(tmp_path / "image.tar")["index.json"])["manifests"]
    assert [each["digest"] for each in entries] == [str(kept.digest), str(attached.digest)]


async def test_what_does_not_come_to_a_tag_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "image.tar"
    file.write_text("before")
    with pytest.raises(NotFound):
        async with open_archive(file) as store:
            await store.write(of(b"something"))
            await store.find("v1")
    assert [each.name for each in tmp_path.iterdir()] == ["image.tar"] and file.read_text() == "before"


async def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(FailedPrecondition, match="no regular file") as refused:
            async with open_archive(tmp_path / name):
                pass
        assert refused.value.reason == "OUTPUT_NOT_WRITABLE"
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()


async def test_what_a_link_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.tar").symlink_to("there/image.tar")
    async with open_archive(tmp_path / "link.tar") as store:
        await put(store, "app:v1", b"content")
    assert (tmp_path / "link.tar").is_symlink() and (tmp_path / "there" / "image.tar").is_file()


@pytest.mark.parametrize(
    ("reference", "taken"),
    [
        *[("v1", True), ("team/app:v1", True), ("host.example.com:5000/team/app_x:V1.2", True)],
        *[("UPPER/Case:tag", False), ("a b:c", False), ("../../etc:v1", False), ("name:", False), ("name:ü", False)],
    ],
)
async def test_a_name_that_no_engine_loads_is_refused(tmp_path: Path, reference: str, taken: bool) -> None:
    try:
        async with open_images(f"docker-archive:{tmp_path}/image.tar:{reference}"):
            assert taken
    except InvalidArgument as refused:
        assert not taken and refused.reason == "IMAGE_NAME_INVALID"
