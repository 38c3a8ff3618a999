"""Bytes in and out, as clients send and read them."""

import asyncio
import hashlib
import io
import os
import tarfile
import threading
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ekiben.client import Client
from ekiben.errors import DeadlineExceeded, EkibenError, FailedPrecondition, InvalidArgument, NotFound
from ekiben.registry.v1 import registry_pb2 as pb
from services.content.archives import fetch_content
from services.kernel.clock import SystemClock
from services.registry import bodies, listings, sending
from tests.fixtures_cli import model_folder
from tests.fixtures_registry import (
    Registry,
    archive_of,
    bento_archive,
    model_archive,
    run_registry,
    running_on_files,  # noqa: F401
    until,
)

MODEL = "modelRepositories/iris/models/v1"


class ShiftedClock(SystemClock):
    """The system's clock, set forward by a test."""

    def __init__(self) -> None:
        self.ahead = timedelta()

    def now(self):  # type: ignore[no-untyped-def]
        return super().now() + self.ahead


async def refused(call: Awaitable[object], cls: type[EkibenError], reason: str) -> EkibenError:
    with pytest.raises(cls) as caught:
        await call
    assert caught.value.reason == reason
    return caught.value


async def open_upload(running: Registry, resource: str = MODEL, **fields: object) -> str:
    request = pb.CreateUploadRequest(upload=pb.Upload(resource=resource, **fields))
    return (await running.admin.uploads.CreateUpload(request)).name


async def url_of(running: Registry, upload: str, part: int = 0) -> str:
    signed = await running.admin.uploads.SignUpload(pb.SignUploadRequest(name=upload, part_number=part))
    return signed.url


async def complete(running: Registry, upload: str, parts: list[tuple[int, str]] = []) -> pb.Upload:  # noqa: B006
    listed = [pb.Upload.Part(part_number=number, etag=etag) for number, etag in parts]
    return await running.admin.uploads.CompleteUpload(pb.CompleteUploadRequest(name=upload, parts=listed))


async def model(running: Registry) -> pb.Model:
    return await running.admin.models.GetModel(pb.GetModelRequest(name=MODEL))


async def test_one_put_and_back_byte_for_byte(running: Registry) -> None:
    await running.new_model(running.admin, "iris", "v1")
    archive = model_archive(b"w" * 3_000_000)
    upload = await open_upload(running)
    status, etag, _ = await running.put(await url_of(running, upload), archive)
    digest = hashlib.sha256(archive).hexdigest()
    assert (status, etag) == (200, f'"{digest}"')
    assert (await model(running)).content.state == pb.Content.UPLOADING
    assert (await complete(running, upload)).state == pb.Upload.COMPLETED
    assert (await complete(running, upload)).state == pb.Upload.COMPLETED  # again: nothing changes
    content = (await model(running)).content
    assert (content.state, content.digest, content.size_bytes) == (pb.Content.READY, f"sha256:{digest}", len(archive))
    signed = await running.admin.uploads.SignDownload(pb.SignDownloadRequest(resource=MODEL))
    assert (signed.digest, signed.size_bytes) == (content.digest, len(archive))
    status, body, headers = await running.get(signed.url)
    assert status == 200
    assert body == archive
    assert headers["Content-Length"] == str(len(archive))
    status, body, _ = await running.get(signed.url, Range="bytes=100-199")
    assert (status, body) == (206, archive[100:200])
    async with running.http.head(f"http://registry{signed.url}") as response:
        assert response.status == 200
        assert response.headers["Content-Length"] == str(len(archive))
    assert not list((Path(running.settings.blobs_url.removeprefix("file://")) / "uploads").iterdir())


@pytest.mark.parametrize("order", [[1, 2, 3, 4], [4, 3, 2, 1], [2, 4, 1, 3], "at once"])
@pytest.mark.parametrize("sizes", [[1000, 1000, 1000, 700], [1000, 900, 1100, 7], [5, 5, 5, 0]])
async def test_parts_in_any_order_make_the_whole(
    running: Registry,
    order: list[int] | str,
    sizes: list[int],
) -> None:
    await running.new_model(running.admin, "iris", "v1")
    archive = model_archive()
    scale = len(archive) / sum(sizes)
    cuts = [round(sum(sizes[:place]) * scale) for place in range(5)]
    pieces = {number: archive[cuts[number - 1] : cuts[number]] for number in range(1, 5)}
    upload = await open_upload(running, digest=f"sha256:{hashlib.sha256(archive).hexdigest()}")

    async def send(number: int) -> tuple[int, str]:
        status, etag, body = await running.put(await url_of(running, upload, number), pieces[number])
        assert status == 200, body
        return number, etag

    if order == "at once":
        etags = dict(await asyncio.gather(*(send(number) for number in pieces)))
    else:
        etags = dict([await send(int(number)) for number in order])
    shown = await running.admin.uploads.GetUpload(pb.GetUploadRequest(name=upload))
    assert [(p.part_number, p.size_bytes) for p in shown.parts] == [(n, len(piece)) for n, piece in pieces.items()]
    done = await complete(running, upload, sorted(etags.items()))
    assert done.state == pb.Upload.COMPLETED
    signed = await running.admin.uploads.SignDownload(pb.SignDownloadRequest(resource=MODEL))
    assert (await running.get(signed.url))[1] == archive


async def test_a_part_sent_twice_is_replaced_at_once(running: Registry) -> None:
    await running.new_model(running.admin, "iris", "v1")
    archive = model_archive()
    first, second = archive[:5000], archive[5000:]
    upload = await open_upload(running)
    await running.put(await url_of(running, upload, 1), b"?" * 5000)
    _, stale, _ = await running.put(await url_of(running, upload, 1), b"!" * 5000)
    _, etag2, _ = await running.put(await url_of(running, upload, 2), second)
    url = await url_of(running, upload, 1)
    answers = await asyncio.gather(*(running.put(url, first) for _ in range(5)))
    assert {status for status, _, _ in answers} == {200}
    (etag1,) = {etag for _, etag, _ in answers}
    error = await refused(complete(running, upload, [(1, stale), (2, etag2)]), FailedPrecondition, "UPLOAD_INCOMPLETE")
    assert "Part 1" in error.message
    assert (await complete(running, upload, [(1, etag1), (2, etag2)])).state == pb.Upload.COMPLETED
    assert (await model(running)).content.digest == f"sha256:{hashlib.sha256(archive).hexdigest()}"


async def test_an_upload_is_completed_although_its_caller_left(
    running: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = threading.Event(), listings.check_archive

    def slow(file: Any, kind: Any) -> None:
        assert gate.wait(60)
        real(file, kind)

    monkeypatch.setattr(listings, "check_archive", slow)
    await running.new_model(running.admin, "iris", "v1")
    upload = await open_upload(running)
    _, etag, _ = await running.put(await url_of(running, upload, 1), model_archive())
    request = pb.CompleteUploadRequest(name=upload, parts=[pb.Upload.Part(part_number=1, etag=etag)])
    with pytest.raises(DeadlineExceeded):
        await running.admin.uploads.CompleteUpload(request, timeout=0.3)
    assert (await model(running)).content.state == pb.Content.UPLOADING
    again = asyncio.ensure_future(running.admin.uploads.CompleteUpload(request))
    gate.set()
    assert (await again).state == pb.Upload.COMPLETED
    assert (await model(running)).content.state == pb.Content.READY


async def test_an_incomplete_list_of_parts_changes_nothing(running: Registry) -> None:
    await running.new_model(running.admin, "iris", "v1")
    archive = model_archive()
    upload = await open_upload(running)
    _, etag1, _ = await running.put(await url_of(running, upload, 1), archive[:6000])
    _, etag2, _ = await running.put(await url_of(running, upload, 2), archive[6000:])
    for parts in (
        [],
        [(1, etag1)],
        [(2, etag2)],
        [(1, ""), (2, etag2)],
        [(1, etag1), (2, etag2), (3, '"x"')],
        [(2, etag2), (1, etag1)],
    ):
        await refused(complete(running, upload, parts), FailedPrecondition, "UPLOAD_INCOMPLETE")
        assert (await model(running)).content.state == pb.Content.UPLOADING
    assert (await complete(running, upload, [(1, etag1), (2, etag2)])).state == pb.Upload.COMPLETED


async def test_stored_content_is_not_sent_again(running: Registry) -> None:
    archive = model_archive()
    digest = f"sha256:{hashlib.sha256(archive).hexdigest()}"
    await running.new_model(running.admin, "iris", "v1")
    await running.new_model(running.admin, "iris", "v2")
    await running.new_bento(running.admin, "svc", "v1")
    request = pb.CreateUploadRequest(upload=pb.Upload(resource=MODEL, digest=digest))
    assert (await running.admin.uploads.CreateUpload(request)).state == pb.Upload.OPEN
    await running.push(running.admin, MODEL, archive)
    request.upload.resource = "modelRepositories/iris/models/v2"
    assert (await running.admin.uploads.CreateUpload(request)).state == pb.Upload.COMPLETED
    read = await running.admin.models.GetModel(pb.GetModelRequest(name=request.upload.resource))
    assert (read.content.state, read.content.digest) == (pb.Content.READY, digest)
    request.upload.resource = "bentoRepositories/svc/bentos/v1"
    await refused(running.admin.uploads.CreateUpload(request), InvalidArgument, "ARCHIVE_INVALID")
    request.upload.resource, request.upload.size_bytes = MODEL, 5
    await refused(running.admin.uploads.CreateUpload(request), InvalidArgument, "SIZE_MISMATCH")


@pytest.mark.parametrize("whole", [True, False])
async def test_a_wrong_digest_or_size_is_refused(running: Registry, whole: bool) -> None:
    archive = model_archive()
    await running.new_model(running.admin, "iris", "v1")
    for fields, reason in (
        ({"digest": "sha256:" + "0" * 64}, "DIGEST_MISMATCH"),
        ({"size_bytes": len(archive) + 512}, "SIZE_MISMATCH"),
    ):
        upload = await open_upload(running, **fields)
        if whole:
            status, _, body = await running.put(await url_of(running, upload), archive)
            assert (status, reason in body) == (400, True)
            await refused(complete(running, upload), FailedPrecondition, "UPLOAD_INCOMPLETE")
        else:
            _, etag, _ = await running.put(await url_of(running, upload, 1), archive)
            await refused(complete(running, upload, [(1, etag)]), InvalidArgument, reason)
            shown = await running.admin.uploads.GetUpload(pb.GetUploadRequest(name=upload))
            assert shown.state == pb.Upload.FAILED
            assert shown.failure
            assert (await model(running)).content.failure == shown.failure
            await refused(complete(running, upload, [(1, etag)]), FailedPrecondition, "UPLOAD_ENDED")
    await refused(open_upload(running, digest="md5:0"), InvalidArgument, "DIGEST_INVALID")
    await refused(open_upload(running, size_bytes=-1), InvalidArgument, "SIZE_INVALID")


def _link(info: tarfile.TarInfo, kind: bytes) -> None:
    info.type, info.linkname = kind, "/etc/passwd"
    info.size = 0


BAD = {
    "nothing at all": b"",
    "no archive": b"x" * 4096,
    "cut off within a file": model_archive()[:2300],
    "cut off after a file": model_archive()[:2560],
    "cut off before its end": model_archive(b"w" * 512)[:2560],
    "of another kind": bento_archive(),
    "up and out": archive_of({"model.yaml": b"", "../evil": b"x"}),
    "within and out": archive_of({"model.yaml": b"", "a/../../evil": b"x"}),
    "absolute": archive_of(
        {"model.yaml": b"", "x": b""}, change=lambda i: setattr(i, "name", i.name.replace("./x", "/x"))
    ),
    "a link": archive_of({"model.yaml": b""}, change=lambda info: _link(info, tarfile.SYMTYPE)),
    "a hard link": archive_of({"model.yaml": b""}, change=lambda info: _link(info, tarfile.LNKTYPE)),
    "a device": archive_of({"model.yaml": b""}, change=lambda info: _link(info, tarfile.CHRTYPE)),
    "a pipe": archive_of({"model.yaml": b""}, change=lambda info: _link(info, tarfile.FIFOTYPE)),
}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("what", list(BAD))
async def test_a_bad_archive_is_refused_and_changes_nothing(running: Registry, what: str, whole: bool) -> None:
    await running.new_model(running.admin, "iris", "v1")
    await running.push(running.admin, MODEL, model_archive())
    before = (await model(running)).content.digest
    upload = await open_upload(running)
    if whole:
        status, _, body = await running.put(await url_of(running, upload), BAD[what])
        assert (status, "ARCHIVE_INVALID" in body) == (400, True), body
        await refused(complete(running, upload), FailedPrecondition, "UPLOAD_INCOMPLETE")
    else:
        half = len(BAD[what]) // 2
        _, etag1, _ = await running.put(await url_of(running, upload, 1), BAD[what][:half])
        _, etag2, _ = await running.put(await url_of(running, upload, 2), BAD[what][half:])
        await refused(complete(running, upload, [(1, etag1), (2, etag2)]), InvalidArgument, "ARCHIVE_INVALID")
    content = (await model(running)).content
    assert (content.state, content.digest) == (pb.Content.READY, before)


async def test_urls_say_what_they_allow(running: Registry) -> None:
    await running.new_model(running.admin, "iris", "v1")
    await running.push(running.admin, MODEL, model_archive())
    upload = await open_upload(running)
    url = await url_of(running, upload, 1)
    other = url.replace("/1?", "/2?")
    for bad in (other, url.partition("?")[0], url[:-1], url.replace("expires=", "expires=9")):
        status, _, body = await running.put(bad, b"x")
        assert (status, "SIGNATURE_INVALID" in body) == (403, True)
    download = await running.admin.uploads.SignDownload(pb.SignDownloadRequest(resource=MODEL))
    status, _, _ = await running.put(download.url, b"x")
    assert status in (403, 405)
    assert (await running.get(url))[0] in (403, 405)


async def test_content_digest_and_length_are_checked(running: Registry) -> None:
    await running.new_model(running.admin, "iris", "v1")
    url = await url_of(running, await open_upload(running), 1)
    good = b64encode(hashlib.sha256(b"data").digest()).decode()
    bad = b64encode(hashlib.sha256(b"other").digest()).decode()
    assert (await running.put(url, b"data", **{"Content-Digest": f"sha-256=:{good}:"}))[0] == 200
    status, _, body = await running.put(url, b"data", **{"Repr-Digest": f"md5=:AA==:, sha-256=:{bad}:"})
    assert (status, "DIGEST_MISMATCH" in body) == (400, True)

    async def chunks() -> AsyncIterator[bytes]:
        yield b"data"

    status, _, body = await running.put(url, chunks())
    assert (status, "LENGTH_REQUIRED" in body) == (411, True)


async def test_a_client_that_goes_away_leaves_nothing(running: Registry) -> None:
    await running.new_model(running.admin, "iris", "v1")
    upload = await open_upload(running)
    url = await url_of(running, upload)
    assert running.http.connector is not None
    _, writer = await asyncio.open_unix_connection(running.settings.blobs_listen.removeprefix("unix:"))
    writer.write(f"PUT {url} HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n\r\n".encode() + b"x" * 3_000_000)
    await writer.drain()
    folder = Path(running.settings.blobs_url.removeprefix("file://")) / "uploads" / upload.removeprefix("uploads/")
    await until(lambda: folder.exists() and list(folder.iterdir()))
    writer.close()
    await until(lambda: not list(folder.iterdir()))
    await refused(complete(running, upload), FailedPrecondition, "UPLOAD_INCOMPLETE")


async def test_a_large_body_past_aiohttp_arrives_whole_and_its_faults_are_told(running: Registry) -> None:
    await running.new_model(running.admin, "iris", "v1")
    archive = model_archive(os.urandom(9_000_001))
    url = await url_of(running, await open_upload(running))
    bad = b64encode(hashlib.sha256(b"other").digest()).decode()
    for _ in range(2):  # on a connection of its own each: what a body used up is not taken again
        status, _, body = await running.put(url, archive, **{"Content-Digest": f"sha-256=:{bad}:"})
        assert (status, "DIGEST_MISMATCH" in body) == (400, True)
        status, etag, _ = await running.put(url, archive)
        assert (status, etag) == (200, f'"{hashlib.sha256(archive).hexdigest()}"')


async def test_more_large_bodies_at_once_than_have_threads(running: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "_MOST_DIRECT", 2)
    await running.new_model(running.admin, "iris", "v1")
    upload = await open_upload(running)
    data = [os.urandom(5_000_000) for _ in range(5)]
    urls = [await url_of(running, upload, number + 1) for number in range(5)]
    answers = await asyncio.gather(*(running.put(url, each) for url, each in zip(urls, data, strict=True)))
    assert [status for status, _, _ in answers] == [200] * 5
    with pytest.raises(InvalidArgument):  # all there, and no archive together
        await complete(running, upload, [(number + 1, etag) for number, (_, etag, _) in enumerate(answers)])


async def test_an_upload_that_is_given_up_ends_a_large_body_in_flight(running: Registry) -> None:
    await running.new_model(running.admin, "iris", "v1")
    upload = await open_upload(running)
    url = await url_of(running, upload)
    reader, writer = await asyncio.open_unix_connection(running.settings.blobs_listen.removeprefix("unix:"))
    writer.write(f"PUT {url} HTTP/1.1\r\nHost: x\r\nContent-Length: 50000000\r\n\r\n".encode() + b"x" * 6_000_000)
    await writer.drain()
    folder = Path(running.settings.blobs_url.removeprefix("file://")) / "uploads" / upload.removeprefix("uploads/")
    await until(lambda: folder.exists() and list(folder.iterdir()))
    async with asyncio.timeout(10):
        await running.admin.uploads.AbortUpload(pb.AbortUploadRequest(name=upload))
        assert b"UPLOAD_BUSY" in await reader.read()
    writer.close()


async def test_bytes_of_a_client_on_this_machine_pass_by_the_public_port(running: Registry, tmp_path: Path) -> None:
    token = running.settings.admin_token_file.read_text().strip()
    source = model_folder(tmp_path, weights=os.urandom(5 << 20))
    # Of a gRPC server alone: there is no public port at which the URLs would be.
    async with Client(running.address, token) as client:
        await client.models.push(source)
        target = await client.models.pull(MODEL, tmp_path / "pulled")
    assert (target / "weights.bin").read_bytes() == (source / "weights.bin").read_bytes()


@pytest.fixture
def sent_direct(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Offset and size of what is sent past the cache, in which nothing is found."""
    monkeypatch.setattr(sending, "_is_cached", lambda fd, offset: False)
    sent, real = [], sending._send

    async def send(transport: asyncio.Transport, fd: int, offset: int, count: int) -> None:
        sent.append((offset, count))
        await real(transport, fd, offset, count)

    monkeypatch.setattr(sending, "_send", send)
    return sent


async def test_cold_content_is_sent_past_the_cache_the_first_time(
    running: Registry, sent_direct: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    await running.new_model(running.admin, "iris", "v1")
    archive = model_archive(os.urandom(19_000_001))
    await running.push(running.admin, MODEL, archive)
    url = (await running.admin.uploads.SignDownload(pb.SignDownloadRequest(resource=MODEL))).url
    assert (await running.get(url))[:2] == (200, archive)
    assert (await running.get(url))[:2] == (200, archive)
    assert sent_direct == [(0, len(archive))]  # the second went by the cache
    monkeypatch.setattr(sending, "_REMEMBERED", 0)
    await running.get(url)  # forgets it
    sent_direct.clear()
    status, body, headers = await running.get(url, Range="bytes=5000001-")
    assert (status, body) == (206, archive[5_000_001:])
    assert headers["Content-Range"] == f"bytes 5000001-{len(archive) - 1}/{len(archive)}"
    assert (await running.get(url, Range="bytes=4097-12000000"))[1] == archive[4097:12_000_001]
    assert sent_direct == [(5_000_001, len(archive) - 5_000_001), (4097, 11_995_904)]


async def test_a_reader_that_goes_away_frees_its_place(
    running: Registry, sent_direct: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "_REMEMBERED", 0)
    monkeypatch.setattr(sending, "_MOST_DIRECT", 1)
    await running.new_model(running.admin, "iris", "v1")
    archive = model_archive(os.urandom(19_000_001))
    await running.push(running.admin, MODEL, archive)
    url = (await running.admin.uploads.SignDownload(pb.SignDownloadRequest(resource=MODEL))).url
    for _ in range(3):
        reader, writer = await asyncio.open_unix_connection(running.settings.blobs_listen.removeprefix("unix:"))
        writer.write(f"GET {url} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert await reader.read(1000)
        writer.transport.abort()
    before = len(sent_direct)
    async with asyncio.timeout(10):
        while len(sent_direct) == before:
            assert (await running.get(url))[:2] == (200, archive)


async def test_an_empty_body_is_answered_each_time(running: Registry) -> None:
    """aiohttp has one body for all that are empty, of which `iter_chunks` never ends the second time."""
    await running.new_model(running.admin, "iris", "v1")
    url = await url_of(running, await open_upload(running), 1)
    async with asyncio.timeout(10):
        for _ in range(3):
            assert (await running.put(url, b""))[0] == 200


async def test_an_upload_that_was_ended_takes_nothing(running: Registry) -> None:
    await running.new_model(running.admin, "iris", "v1")
    upload = await open_upload(running)
    url = await url_of(running, upload)
    aborted = await running.admin.uploads.AbortUpload(pb.AbortUploadRequest(name=upload, failure="the client fell"))
    assert (aborted.state, aborted.failure) == (pb.Upload.ABORTED, "the client fell")
    assert (await model(running)).content.state == pb.Content.FAILED
    assert (await model(running)).content.failure == "the client fell"
    status, _, body = await running.put(url, model_archive())
    assert (status, "UPLOAD_ENDED" in body) == (400, True)
    await refused(complete(running, upload), FailedPrecondition, "UPLOAD_ENDED")
    await running.push(running.admin, MODEL, model_archive())
    assert (await model(running)).content.state == pb.Content.READY
    unknown = pb.GetUploadRequest(name="uploads/nothing")
    await refused(running.admin.uploads.GetUpload(unknown), NotFound, "UPLOAD_NOT_FOUND")


async def test_a_late_upload_is_given_up(tmp_path: Path) -> None:
    clock = ShiftedClock()
    async with run_registry(tmp_path, clock=clock, collect_interval_s=0.02, upload_expire_s=60) as running:
        await running.new_model(running.admin, "iris", "v1")
        upload = await open_upload(running)
        url = await url_of(running, upload, 1)
        assert (await running.put(url, b"x" * 1000))[0] == 200
        clock.ahead = timedelta(seconds=61)
        status, _, body = await running.put(url, b"x" * 1000)
        assert (status, "URL_EXPIRED" in body) == (403, True)

        async def ended() -> bool:
            shown = await running.admin.uploads.GetUpload(pb.GetUploadRequest(name=upload))
            return shown.state != pb.Upload.OPEN

        await until(ended)
        shown = await running.admin.uploads.GetUpload(pb.GetUploadRequest(name=upload))
        assert (shown.state, shown.failure) == (pb.Upload.ABORTED, "The upload was not completed in time.")
        folder = tmp_path / "blobs" / "uploads"
        await until(lambda: not list(folder.iterdir()))


async def test_blobs_go_with_their_last_name(tmp_path: Path) -> None:
    clock = ShiftedClock()
    async with run_registry(
        tmp_path, clock=clock, collect_interval_s=0.02, garbage_grace_s=0, delete_grace_s=0
    ) as running:
        archive = model_archive()
        for version in ("v1", "v2"):
            await running.new_model(running.admin, "iris", version)
            await running.push(running.admin, f"modelRepositories/iris/models/{version}", archive)
        content = tmp_path / "blobs" / "content"
        blobs = lambda: [path for path in content.rglob("*") if path.is_file()]  # noqa: E731
        assert len(blobs()) == 1
        clock.ahead = timedelta(minutes=2)
        await running.admin.models.DeleteModel(pb.DeleteModelRequest(name=MODEL))
        signed = await running.admin.uploads.SignDownload(
            pb.SignDownloadRequest(resource="modelRepositories/iris/models/v2")
        )
        await asyncio.sleep(0.1)
        assert (await running.get(signed.url))[1] == archive
        await running.admin.models.DeleteModel(pb.DeleteModelRequest(name="modelRepositories/iris/models/v2"))
        await until(lambda: not blobs())
        assert (await running.get(signed.url))[0] == 404


@pytest.mark.parametrize("zipped", [False, True])
async def test_content_is_fetched_and_unpacked(running: Registry, tmp_path: Path, zipped: bool) -> None:
    import gzip

    await running.new_model(running.admin, "iris", "v1")
    archive = model_archive(b"w" * 5_000_000, **{"deep/er/file": b"x"})
    await running.push(running.admin, MODEL, gzip.compress(archive, 1) if zipped else archive)
    into = tmp_path / "models" / "iris" / "v1"
    digest = await fetch_content(running.admin.uploads, running.settings.blobs_listen, MODEL, into)
    assert str(digest) == (await model(running)).content.digest
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.isfile():
                file = tar.extractfile(member)
                assert file is not None
                assert (into / member.name).read_bytes() == file.read()
    assert [path.name for path in into.parent.iterdir()] == ["v1"]


async def test_damaged_content_is_not_unpacked(running: Registry, tmp_path: Path) -> None:
    from ekiben.errors import DataLoss

    await running.new_model(running.admin, "iris", "v1")
    await running.push(running.admin, MODEL, model_archive(b"w" * 2_000_000))
    (blob,) = [path for path in (tmp_path / "blobs" / "content").rglob("*") if path.is_file()]
    with blob.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"damaged")
    into = tmp_path / "into"
    await refused(
        fetch_content(running.admin.uploads, running.settings.blobs_listen, MODEL, into), DataLoss, "BLOB_CORRUPT"
    )
    assert not into.exists()
    # A forced push heals it.
    await running.push(running.admin, MODEL, model_archive(b"w" * 2_000_000))
    await fetch_content(running.admin.uploads, running.settings.blobs_listen, MODEL, into)
