"""S3 that goes wrong: what can be tried again is, nothing is lost, and what cannot is told as what it is."""

import hashlib
import os
from collections import defaultdict
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import pytest

from ekiben.errors import EkibenError, FailedPrecondition, ResourceExhausted, Unavailable
from ekiben.registry.v1 import registry_pb2 as pb
from services.content import open_blobs
from services.content.archives import fetch_content
from services.content.blobs import WHOLE, Blob, BlobStore
from services.content.blobs.checked import read_verified
from services.content.blobs.s3 import bucket
from services.content.blobs.source import Chunks
from tests.api.test_registry_uploads import MODEL, complete, model, open_upload, refused, url_of
from tests.fixtures_registry import model_archive, run_registry
from tests.s3 import S3Server
from tests.s3_proxy import FaultyS3, faulty_s3

DATA = os.urandom(1 << 20) * 11


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for seconds between two attempts, with jitter, waits for less."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda self, context: 0.01)


@pytest.fixture
async def proxy(s3: S3Server) -> AsyncIterator[FaultyS3]:
    async with faulty_s3(s3) as proxy:
        yield proxy


@pytest.fixture
async def store(s3: S3Server, proxy: FaultyS3) -> AsyncIterator[BlobStore]:
    async with open_blobs(s3.url(s3.new_bucket(), endpoint=proxy.endpoint)) as store:
        yield store


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 1 << 20):
        yield data[start : start + (1 << 20)]


async def push(store: BlobStore, upload: str, data: bytes, *, pieces: int) -> Blob:
    """Send content whole or in pieces, each again where it is refused for now, as clients do."""
    size = -(-len(data) // pieces)
    parts = []
    for number in range(1, pieces + 1):
        piece = data[(number - 1) * size : number * size]
        part = None
        while part is None:
            try:
                part = await store.write(upload, WHOLE if pieces == 1 else number, Chunks(chunks(piece)), len(piece))
            except Unavailable as exc:
                assert exc.reason == "BLOBS_UNAVAILABLE"
        parts.append((number, part.etag))
    async with store.assemble(upload, [] if pieces == 1 else parts) as assembly:
        blob = await assembly.commit()
    await store.discard(upload)
    return blob


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("fault", ["500", "503", "cut", "after:500", "after:503", "after:cut", "after:hang", "half"])
async def test_each_request_that_fails_once(
    store: BlobStore, proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch, fault: str, pieces: int
) -> None:
    hanging = fault == "after:hang"
    if hanging:
        monkeypatch.setattr(bucket, "_READ_S", 0.5)
    counts: defaultdict[str, int] = defaultdict(int)

    def every_other(operation: str, _: int) -> str:
        counts[operation] += 1
        # Each is waited for: once for each operation is enough.
        return fault if (counts[operation] == 1 if hanging else counts[operation] % 2) else ""

    async with open_blobs(proxy.server.url(proxy.server.new_bucket(), endpoint=proxy.endpoint)) as store:
        proxy.choose = every_other
        blob = await push(store, "u1", DATA, pieces=pieces)
        assert blob.digest.hex == hashlib.sha256(DATA).hexdigest()
        assert b"".join([chunk async for chunk in read_verified(store, blob.digest)]) == DATA
        assert [found async for found in store.blobs()] == [blob]
        assert await store.uploads() == []
        await store.delete(blob.digest)
        proxy.choose = lambda operation, count: ""
        assert [found async for found in store.blobs()] == []
        assert len(proxy.faults) >= 6, proxy.faults


async def test_a_server_that_stays_away_is_told_and_nothing_is_lost(
    store: BlobStore, proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "_ATTEMPTS", 2)
    async with open_blobs(proxy.server.url(proxy.server.new_bucket(), endpoint=proxy.endpoint)) as store:
        part = await store.write("u1", 1, Chunks(chunks(DATA)), len(DATA))
        for away in ("503", "cut"):
            proxy.choose = lambda operation, count: away

            async def assembled() -> None:
                async with store.assemble("u1", [(1, part.etag)]):
                    pass

            for call in (store.write("u1", 1, Chunks(chunks(DATA)), len(DATA)), store.parts("u1"), assembled()):
                error = await refused(call, Unavailable, "BLOBS_UNAVAILABLE")
                assert "Try again" in error.message or "again" in error.message
        proxy.choose = lambda operation, count: ""
        assert await store.parts("u1") == [part]
        async with store.assemble("u1", [(1, part.etag)]) as assembly:
            await assembly.commit()


async def test_a_full_bucket_is_told_and_has_room_again(store: BlobStore, proxy: FaultyS3) -> None:
    proxy.choose = lambda operation, count: "507" if operation in ("Put", "UploadPart") else ""
    for number, data in ((WHOLE, DATA), (1, DATA), (1, b"small")):
        call = store.write("u1", number, Chunks(chunks(data)), len(data))
        await refused(call, ResourceExhausted, "STORAGE_FULL")
    proxy.choose = lambda operation, count: ""
    assert (await push(store, "u1", DATA, pieces=1)).digest.hex == hashlib.sha256(DATA).hexdigest()
    assert await store.uploads() == []


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_clock_that_is_off_is_told(
    store: BlobStore, s3: S3Server, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    def off(remove_tzinfo: bool = True) -> datetime:
        now = datetime.now(UTC) + timedelta(hours=hours)
        return now.replace(tzinfo=None) if remove_tzinfo else now

    url = s3.new_url()
    monkeypatch.setattr("botocore.auth.get_current_datetime", off)

    async def opened() -> None:
        async with open_blobs(url):
            pass

    error = await refused(opened(), Unavailable, "CLOCK_SKEWED")
    assert "clock" in error.message
    await refused(store.write("u1", WHOLE, Chunks(chunks(DATA)), len(DATA)), Unavailable, "CLOCK_SKEWED")
    monkeypatch.undo()


async def test_a_put_that_is_cut_off_is_not_taken_for_whole(s3: S3Server, proxy: FaultyS3, tmp_path: Path) -> None:
    """versitygw keeps it, under the size that was announced: reading it back tells."""
    url = s3.url(s3.new_bucket(), endpoint=proxy.endpoint)
    async with run_registry(tmp_path, blobs_url=url) as running:
        await running.new_model(running.admin, "iris", "v1")
        archive = model_archive(os.urandom(6 << 20))
        await running.push(running.admin, MODEL, model_archive())
        before = (await model(running)).content.digest
        upload = await open_upload(running, digest=f"sha256:{hashlib.sha256(archive).hexdigest()}")
        proxy.choose = lambda operation, count: "half:request" if operation == "UploadPart" else ""
        with pytest.raises(aiohttp.ClientError):
            await running.put(await url_of(running, upload), archive)
        proxy.choose = lambda operation, count: ""
        with pytest.raises(EkibenError) as caught:
            await complete(running, upload)
        assert caught.value.reason in ("UPLOAD_INCOMPLETE", "ARCHIVE_INVALID", "SIZE_MISMATCH", "DIGEST_MISMATCH")
        content = (await model(running)).content
        assert (content.state, content.digest) == (pb.Content.READY, before)


async def test_a_download_that_is_cut_off_goes_on(s3: S3Server, proxy: FaultyS3, tmp_path: Path) -> None:
    url = s3.url(s3.new_bucket(), endpoint=proxy.endpoint)
    for direct in (True, False):
        folder = tmp_path / str(direct)
        folder.mkdir()
        async with run_registry(folder, blobs_url=url, blobs_direct=direct) as running:
            await running.new_model(running.admin, "iris", "v1")
            weights = os.urandom(9_000_000)
            await running.push(running.admin, MODEL, model_archive(weights))
            before = sum(proxy.faults.values())
            proxy.choose = lambda operation, count: "half" if operation == "Get" and count % 3 else ""
            await fetch_content(running.admin.uploads, running.settings.blobs_listen, MODEL, folder / "into")
            proxy.choose = lambda operation, count: ""
            assert (folder / "into" / "weights.bin").read_bytes() == weights
            assert sum(proxy.faults.values()) > before


async def test_an_upload_that_s3_did_not_complete_can_be_completed_again(
    s3: S3Server, proxy: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "_ATTEMPTS", 2)
    async with run_registry(tmp_path, blobs_url=s3.url(s3.new_bucket(), endpoint=proxy.endpoint)) as running:
        await running.new_model(running.admin, "iris", "v1")
        archive = model_archive(os.urandom(6 << 20))
        upload = await open_upload(running)
        _, etag, _ = await running.put(await url_of(running, upload, 1), archive)
        for fault in ("503", "after:cut"):
            proxy.choose = lambda operation, count: fault if operation in ("Complete", "Head") else ""
            await refused(complete(running, upload, [(1, etag)]), Unavailable, "BLOBS_UNAVAILABLE")
            shown = await running.admin.uploads.GetUpload(pb.GetUploadRequest(name=upload))
            assert shown.state == pb.Upload.OPEN
        proxy.choose = lambda operation, count: ""
        assert (await complete(running, upload, [(1, etag)])).state == pb.Upload.COMPLETED
        assert (await model(running)).content.digest == f"sha256:{hashlib.sha256(archive).hexdigest()}"


async def test_a_server_that_writes_twice_what_should_be_written_once_is_refused(
    s3: S3Server, proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = proxy._ask

    async def without_condition(request, body):  # type: ignore[no-untyped-def]
        answer = await real(request, body)
        return (200, answer[1] | {"ETag": '"x"'}, b"") if answer[0] == 412 else answer

    monkeypatch.setattr(proxy, "_ask", without_condition)

    async def opened() -> None:
        async with open_blobs(s3.url(s3.new_bucket(), endpoint=proxy.endpoint)):
            pass

    await refused(opened(), FailedPrecondition, "BLOBS_UNSUITABLE")
