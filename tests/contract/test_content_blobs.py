"""The promises of BlobStore, for each adapter (one so far)."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

import pytest

from ekiben.errors import DataLoss, EkibenError, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from services.content import open_blobs
from services.content.blobs import WHOLE, BlobStore, Part
from services.content.blobs.checked import read_verified
from services.content.blobs.source import Chunks
from services.content.digest import Digest

DATA = os.urandom(1 << 20) * 33


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[BlobStore]:
    async with open_blobs(f"file://{tmp_path}/blobs") as store:
        yield store


async def chunks(data: bytes, size: int = 200_000) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        await asyncio.sleep(0)
        yield data[start : start + size]


async def write(store: BlobStore, number: int, data: bytes, upload: str = "u1", **options: object) -> Part:
    return await store.write(upload, number, Chunks(chunks(data)), len(data), **options)  # type: ignore[arg-type]


async def stored(store: BlobStore, digest: Digest) -> bytes:
    return b"".join([chunk async for chunk in store.read(digest)])


def listed(parts: list[Part]) -> list[tuple[int, str]]:
    return [(part.number, part.etag) for part in parts]


def pieces(size: int) -> dict[int, bytes]:
    return {n + 1: DATA[start : start + size] for n, start in enumerate(range(0, len(DATA), size))}


async def refused(awaitable, cls: type[EkibenError], reason: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(cls) as caught:
        await awaitable
    assert caught.value.reason == reason


# Above and below 8 MiB, where files pass the page cache; aligned to its blocks and not.
@pytest.mark.parametrize("size", [len(DATA), 16 << 20, (8 << 20) + 1, 1_000_000])
@pytest.mark.parametrize("backwards", [False, True])
async def test_parts_become_one_blob(store: BlobStore, size: int, backwards: bool) -> None:
    sent = pieces(size)
    parts = [await write(store, n, sent[n]) for n in sorted(sent, reverse=backwards)]
    assert await store.parts("u1") == sorted(parts, key=lambda part: part.number)
    async with store.assemble("u1", listed(await store.parts("u1"))) as assembly:
        assert (assembly.digest.hex, assembly.size_bytes) == (hashlib.sha256(DATA).hexdigest(), len(DATA))
        await refused(store.stat(assembly.digest), NotFound, "BLOB_NOT_FOUND")
        blob = await assembly.commit()
    assert await store.stat(blob.digest) == blob
    assert await stored(store, blob.digest) == DATA
    await store.discard("u1")
    assert await store.uploads() == []


async def test_parts_at_once_and_one_sent_thrice(store: BlobStore) -> None:
    sent = pieces(9 << 20)
    await asyncio.gather(
        *(write(store, n, piece) for n, piece in sent.items()), write(store, 2, sent[2]), write(store, 2, sent[2])
    )
    async with store.assemble("u1", listed(await store.parts("u1"))) as assembly:
        assert assembly.digest.hex == hashlib.sha256(DATA).hexdigest()


async def test_a_replaced_part_is_hashed_anew(store: BlobStore) -> None:
    sent = pieces(11 << 20)
    await write(store, 1, bytes(11 << 20))
    await write(store, 2, sent[2])
    await write(store, 1, sent[1])
    await write(store, 3, sent[3])
    async with store.assemble("u1", listed(await store.parts("u1"))) as assembly:
        blob = await assembly.commit()
    assert await stored(store, blob.digest) == DATA


async def test_an_assembly_that_is_left_changes_nothing(store: BlobStore) -> None:
    parts = [await write(store, n, piece) for n, piece in pieces(7_000_000).items()]
    for _ in range(2):
        async with store.assemble("u1", listed(parts)) as assembly:
            await refused(write(store, 1, b"x"), FailedPrecondition, "UPLOAD_BUSY")
        assert await store.parts("u1") == parts

    def refuse(_file: BinaryIO) -> None:
        raise InvalidArgument("no", reason="NO")

    with pytest.raises(InvalidArgument):
        async with store.assemble("u1", listed(parts), check=refuse):
            pass
    async with store.assemble("u1", listed(parts)) as assembly:
        assert assembly.digest.hex == hashlib.sha256(DATA).hexdigest()


async def test_parts_outlive_the_process_but_not_the_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path}/blobs"
    sent = pieces(10 << 20)
    async with open_blobs(url) as store:
        for n in (1, 2):
            await write(store, n, sent[n])
    async with open_blobs(url) as store:
        for n in (3, 4):
            await write(store, n, sent[n])
        async with store.assemble("u1", listed(await store.parts("u1"))) as assembly:
            assert assembly.digest.hex == hashlib.sha256(DATA).hexdigest()
    monkeypatch.setattr("services.content.blobs.filesystem._boot_id", lambda: "another")
    async with open_blobs(url) as store:
        assert await store.parts("u1") == []


async def test_what_is_wrong_is_not_kept(store: BlobStore, tmp_path: Path) -> None:
    wrong = Digest("0" * 64)
    await refused(write(store, 1, b"data", digest=wrong), InvalidArgument, "DIGEST_MISMATCH")
    await refused(store.write("u1", 1, Chunks(chunks(b"data")), 5), InvalidArgument, "SIZE_MISMATCH")
    await refused(store.write("u1", WHOLE, Chunks(chunks(b"data")), 3), InvalidArgument, "SIZE_MISMATCH")
    await refused(write(store, 10_001, b"x"), InvalidArgument, "PART_NUMBER_INVALID")
    await refused(write(store, 1, b"x", upload="../evil"), NotFound, "UPLOAD_NOT_FOUND")
    await refused(store.write("u1", 1, Chunks(chunks(b"")), 1 << 60), ResourceExhausted, "STORAGE_FULL")
    assert await store.parts("u1") == []
    assert not list((tmp_path / "blobs" / "uploads" / "u1").glob("own-*"))


async def test_a_full_disk_is_told_and_nothing_is_left(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    written = 0

    def full(fd: int, data: memoryview, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 4 << 20:
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr("os.pwrite", full)
    await refused(write(store, WHOLE, DATA), ResourceExhausted, "STORAGE_FULL")
    monkeypatch.setattr("os.pwrite", real)
    assert list((tmp_path / "blobs" / "uploads" / "u1").iterdir()) == []
    await write(store, WHOLE, DATA)


async def test_a_cancelled_write_leaves_nothing_and_its_place_can_be_used(store: BlobStore, tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def stuck() -> AsyncIterator[bytes]:
        yield DATA[: 5 << 20]
        gate.set()
        await asyncio.sleep(3600)

    task = asyncio.ensure_future(store.write("u1", 1, Chunks(stuck()), len(DATA)))
    await gate.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await store.parts("u1") == []
    await write(store, 1, DATA)
    async with store.assemble("u1", listed(await store.parts("u1"))) as assembly:
        assert assembly.digest.hex == hashlib.sha256(DATA).hexdigest()


async def test_discard_ends_writers(store: BlobStore) -> None:
    gate = asyncio.Event()

    async def stuck() -> AsyncIterator[bytes]:
        yield b"x"
        gate.set()
        await asyncio.sleep(3600)

    task = asyncio.ensure_future(store.write("u1", 1, Chunks(stuck()), 10))
    await gate.wait()
    await store.discard("u1")
    await refused(task, FailedPrecondition, "UPLOAD_BUSY")
    assert await store.uploads() == []


async def test_blobs_are_listed_deleted_and_verified(store: BlobStore) -> None:
    await write(store, WHOLE, b"hello")
    async with store.assemble("u1", []) as assembly:
        blob = await assembly.commit()
    assert [found.digest async for found in store.blobs()] == [blob.digest]
    assert b"".join([chunk async for chunk in read_verified(store, blob.digest)]) == b"hello"
    path = store.path(blob.digest)
    assert path is not None
    path.write_bytes(b"hellO")
    with pytest.raises(DataLoss):
        async for _ in read_verified(store, blob.digest):
            pass
    await store.delete(blob.digest)
    await store.delete(blob.digest)
    await refused(store.stat(blob.digest), NotFound, "BLOB_NOT_FOUND")


async def test_a_folder_has_one_owner(store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        async with open_blobs(f"file://{tmp_path}/blobs"):
            pass
    assert caught.value.reason == "BLOBS_IN_USE"
    with pytest.raises(InvalidArgument):
        async with open_blobs("s3://bucket"):
            pass
