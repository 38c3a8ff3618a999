"""Bytes in and out of a registry whose blobs lie on S3: straight to the bucket, and through the registry."""

import asyncio
import hashlib
import io
import os
import tarfile
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ekiben.client import Client
from ekiben.errors import FailedPrecondition, InvalidArgument
from ekiben.registry.v1 import registry_pb2 as pb
from services.content import open_blobs
from services.content.archives import fetch_content
from tests.api.test_registry_uploads import (
    BAD,
    MODEL,
    ShiftedClock,
    complete,
    model,
    open_upload,
    refused,
    url_of,
)
from tests.fixtures_cli import model_folder
from tests.fixtures_registry import Registry, model_archive, run_registry, until
from tests.s3 import S3Server

SOME_BAD = ["nothing at all", "no archive", "cut off within a file", "of another kind", "up and out", "a link"]


@pytest.fixture(params=["direct", "through the registry"])
async def running(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server) -> AsyncIterator[Registry]:
    options = {"blobs_url": s3.new_url(), "blobs_direct": request.param == "direct", "garbage_grace_s": 0.0}
    async with run_registry(tmp_path, **options) as running:
        yield running


def keys(s3: S3Server, running: Registry) -> list[str]:
    """What lies in the bucket, less what tells its format."""
    bucket = urlsplit(running.settings.blobs_url).netloc
    found = s3.client().list_objects_v2(Bucket=bucket).get("Contents", ())
    unfinished = s3.client().list_multipart_uploads(Bucket=bucket).get("Uploads", ())
    return [item["Key"] for item in found if item["Key"] != "ekiben-blobs"] + [item["UploadId"] for item in unfinished]


async def test_one_put_and_back_byte_for_byte(running: Registry, s3: S3Server) -> None:
    await running.new_model(running.admin, "iris", "v1")
    archive = model_archive(os.urandom(20_000_000))
    upload = await open_upload(running)
    url = await url_of(running, upload)
    assert ("://" in url) is running.settings.blobs_direct
    status, etag, body = await running.put(url, archive)
    assert (status, bool(etag)) == (200, True), body
    for _ in range(2):  # again: nothing changes
        assert (await complete(running, upload)).state == pb.Upload.COMPLETED
    content = (await model(running)).content
    digest = hashlib.sha256(archive).hexdigest()
    assert (content.state, content.digest, content.size_bytes) == (pb.Content.READY, f"sha256:{digest}", len(archive))
    signed = await running.admin.uploads.SignDownload(pb.SignDownloadRequest(resource=MODEL))
    assert (signed.digest, signed.size_bytes) == (content.digest, len(archive))
    status, body_back, headers = await running.get(signed.url)
    assert (status, body_back, headers["Content-Length"]) == (200, archive, str(len(archive)))
    for asked, wanted in (
        ("bytes=100-199", archive[100:200]),
        ("bytes=19000000-", archive[19_000_000:]),
        ("bytes=-5", archive[-5:]),
        (f"bytes=0-{len(archive) + 10}", archive),
    ):
        status, body_back, headers = await running.get(signed.url, Range=asked)
        assert (status, body_back) == (206, wanted)
        assert headers["Content-Range"].endswith(f"/{len(archive)}")
    assert (await running.get(signed.url, Range=f"bytes={len(archive)}-"))[0] == 416
    if not running.settings.blobs_direct:
        async with running.http.head(f"http://registry{signed.url}") as response:
            assert (response.status, response.headers["Content-Length"]) == (200, str(len(archive)))
            assert response.headers["Repr-Digest"].startswith("sha-256=:")
    assert sorted(key.partition("/")[0] for key in keys(s3, running)) == ["content", "ends", "sha256"]


async def test_parts_at_once_make_the_whole(running: Registry, s3: S3Server) -> None:
    await running.new_model(running.admin, "iris", "v1")
    archive = model_archive(os.urandom(18_000_000))
    size = 6 << 20
    pieces = {n + 1: archive[start : start + size] for n, start in enumerate(range(0, len(archive), size))}
    upload = await open_upload(running, digest=f"sha256:{hashlib.sha256(archive).hexdigest()}")
    url = await url_of(running, upload, 1)
    await running.put(url, os.urandom(size))  # sent anew below
    _, stale, _ = await running.put(url, os.urandom(size))

    async def send(number: int) -> tuple[int, str]:
        status, etag, body = await running.put(await url_of(running, upload, number), pieces[number])
        assert status == 200, body
        return number, etag

    etags = dict(await asyncio.gather(*(send(number) for number in reversed(pieces))))
    shown = await running.admin.uploads.GetUpload(pb.GetUploadRequest(name=upload))
    assert [(p.part_number, p.size_bytes, p.etag) for p in shown.parts] == [
        (n, len(pieces[n]), etags[n]) for n in pieces
    ]
    good = sorted(etags.items())
    for parts in ([], good[:-1], good[1:], [(1, stale), *good[1:]], [*good, (9, '"x"')], good[::-1]):
        await refused(complete(running, upload, parts), FailedPrecondition, "UPLOAD_INCOMPLETE")
        assert (await model(running)).content.state == pb.Content.UPLOADING
    assert (await complete(running, upload, good)).state == pb.Upload.COMPLETED
    signed = await running.admin.uploads.SignDownload(pb.SignDownloadRequest(resource=MODEL))
    assert (await running.get(signed.url))[1] == archive
    # Neither what came before nor what a client still may send is left.
    await running.put(url, b"late")
    assert sorted(key.partition("/")[0] for key in keys(s3, running)) == ["content", "ends", "sha256"]


async def test_parts_that_are_too_small_are_told(running: Registry) -> None:
    await running.new_model(running.admin, "iris", "v1")
    archive = model_archive(os.urandom(11 << 20))
    pieces = {1: archive[:1000], 2: archive[1000 : 6 << 20], 3: archive[6 << 20 :]}
    upload = await open_upload(running)
    etags = [(n, (await running.put(await url_of(running, upload, n), piece))[1]) for n, piece in pieces.items()]
    await refused(complete(running, upload, etags), FailedPrecondition, "PART_TOO_SMALL")
    assert (await model(running)).content.state == pb.Content.UPLOADING


async def test_a_url_that_is_still_held_cannot_change_what_was_checked(running: Registry) -> None:
    await running.new_model(running.admin, "iris", "v1")
    archive = model_archive(b"good" * 1000)
    upload = await open_upload(running)
    urls = [await url_of(running, upload, number) for number in (0, 1)]
    await running.put(urls[0], archive)
    await complete(running, upload)
    for url in urls:
        assert (await running.put(url, model_archive(b"evil" * 1000)))[0] >= 400
    signed = await running.admin.uploads.SignDownload(pb.SignDownloadRequest(resource=MODEL))
    assert (await running.get(signed.url))[1] == archive
    assert (await running.put(signed.url, b"evil"))[0] >= 400


@pytest.mark.parametrize("what", SOME_BAD)
async def test_a_bad_archive_is_refused_and_changes_nothing(running: Registry, s3: S3Server, what: str) -> None:
    await running.new_model(running.admin, "iris", "v1")
    await running.push(running.admin, MODEL, model_archive())
    before, there = (await model(running)).content.digest, keys(s3, running)
    upload = await open_upload(running)
    status, _, body = await running.put(await url_of(running, upload), BAD[what])
    assert status == 200, body
    await refused(complete(running, upload), InvalidArgument, "ARCHIVE_INVALID")
    content = (await model(running)).content
    assert (content.state, content.digest) == (pb.Content.READY, before)
    assert "The archive is refused" in content.failure
    assert keys(s3, running) == there


async def test_a_wrong_digest_or_size_is_refused(running: Registry) -> None:
    archive = model_archive()
    await running.new_model(running.admin, "iris", "v1")
    for fields, reason in (
        ({"digest": "sha256:" + "0" * 64}, "DIGEST_MISMATCH"),
        ({"size_bytes": len(archive) + 512}, "SIZE_MISMATCH"),
    ):
        upload = await open_upload(running, **fields)
        status, _, body = await running.put(await url_of(running, upload), archive)
        if running.settings.blobs_direct:
            assert status == 200
            await refused(complete(running, upload), InvalidArgument, reason)
        else:
            assert (status, reason in body) == (400, True)
            await refused(complete(running, upload), FailedPrecondition, "UPLOAD_INCOMPLETE")


async def test_stored_content_is_not_sent_again(running: Registry) -> None:
    archive = model_archive(b"w" * 3_000_000)
    digest = f"sha256:{hashlib.sha256(archive).hexdigest()}"
    for version in ("v1", "v2"):
        await running.new_model(running.admin, "iris", version)
    await running.new_bento(running.admin, "svc", "v1")
    await running.push(running.admin, MODEL, archive)
    request = pb.CreateUploadRequest(upload=pb.Upload(resource="modelRepositories/iris/models/v2", digest=digest))
    assert (await running.admin.uploads.CreateUpload(request)).state == pb.Upload.COMPLETED
    request.upload.resource = "bentoRepositories/svc/bentos/v1"
    await refused(running.admin.uploads.CreateUpload(request), InvalidArgument, "ARCHIVE_INVALID")


async def test_what_is_given_up_or_unnamed_leaves_the_bucket(tmp_path: Path, s3: S3Server) -> None:
    clock = ShiftedClock()
    options = {"collect_interval_s": 0.05, "garbage_grace_s": 0, "delete_grace_s": 0, "upload_expire_s": 60}
    async with run_registry(tmp_path, blobs_url=s3.new_url(), clock=clock, **options) as running:
        await running.new_model(running.admin, "iris", "v1")
        upload = await open_upload(running)
        await running.put(await url_of(running, upload, 1), os.urandom(6 << 20))
        await running.admin.uploads.AbortUpload(pb.AbortUploadRequest(name=upload))
        assert keys(s3, running) == []
        late = await open_upload(running)
        await running.put(await url_of(running, late), model_archive())
        clock.ahead = timedelta(seconds=61)
        await until(lambda: not keys(s3, running))
        await running.push(running.admin, MODEL, model_archive())
        clock.ahead = timedelta(seconds=200)
        await running.admin.models.DeleteModel(pb.DeleteModelRequest(name=MODEL))
        await until(lambda: not keys(s3, running))


async def test_content_is_fetched_and_unpacked(running: Registry, tmp_path: Path) -> None:
    await running.new_model(running.admin, "iris", "v1")
    archive = model_archive(os.urandom(9_000_000), **{"deep/er/file": b"x"})
    await running.push(running.admin, MODEL, archive)
    into = tmp_path / "models" / "iris" / "v1"
    digest = await fetch_content(running.admin.uploads, running.settings.blobs_listen, MODEL, into)
    assert str(digest) == (await model(running)).content.digest
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if (file := tar.extractfile(member)) is not None:
                assert (into / member.name).read_bytes() == file.read()


async def test_the_client_pushes_and_pulls(running: Registry, tmp_path: Path) -> None:
    source = model_folder(tmp_path, weights=os.urandom(5 << 20))
    async with Client(running.address, running.settings.admin_token_file.read_text().strip()) as client:
        await client.models.push(source)
        target = await client.models.pull(MODEL, tmp_path / "pulled")
    assert (target / "weights.bin").read_bytes() == (source / "weights.bin").read_bytes()


async def test_two_registries_share_a_bucket(tmp_path: Path, s3: S3Server) -> None:
    """Parts sent by way of one, completed at the other, at once at both; and at last one gives up what the other completes."""
    (tmp_path / "a").mkdir()
    options = {"blobs_url": s3.new_url(), "database_url": f"sqlite:///{tmp_path}/registry.db"}
    async with run_registry(tmp_path / "a", **options) as one:
        options["secrets_key_file"] = one.settings.secrets_key_file
        options["admin_token_file"] = one.settings.admin_token_file
        (tmp_path / "b").mkdir()
        async with run_registry(tmp_path / "b", **options) as two:
            await one.new_model(one.admin, "iris", "v1")
            archive = model_archive(os.urandom(8 << 20))
            upload = await open_upload(one)
            urls = await asyncio.gather(url_of(one, upload, 1), url_of(two, upload, 2), url_of(two, upload, 1))
            cut = 5 << 20
            etags = [(await one.put(urls[0], archive[:cut]))[1], (await one.put(urls[1], archive[cut:]))[1]]
            parts = list(enumerate(etags, start=1))
            both = await asyncio.gather(
                complete(one, upload, parts), complete(two, upload, parts), return_exceptions=True
            )
            assert [getattr(each, "state", each) for each in both] == [pb.Upload.COMPLETED] * 2
            signed = await two.admin.uploads.SignDownload(pb.SignDownloadRequest(resource=MODEL))
            assert (await two.get(signed.url))[1] == archive

            upload = await open_upload(two)
            await two.put(await url_of(two, upload), model_archive(b"other"))
            abort = pb.AbortUploadRequest(name=upload)
            await asyncio.gather(complete(one, upload), two.admin.uploads.AbortUpload(abort), return_exceptions=True)
            content = (await model(one)).content
            assert content.state == pb.Content.READY
            signed = await two.admin.uploads.SignDownload(pb.SignDownloadRequest(resource=MODEL))
            got = (await two.get(signed.url))[1]
            assert f"sha256:{hashlib.sha256(got).hexdigest()}" == content.digest


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda url: url.replace("s3://test-", "s3://missing-"), "BUCKET_NOT_FOUND"),
        (lambda url: url.replace("s3://", "s3://key:hunter2@"), "BLOBS_URL_INVALID"),
        (lambda url: url + "&aws_secret_access_key=hunter2", "BLOBS_URL_INVALID"),
        (lambda url: url + "&part_size=1MiB", "BLOBS_URL_INVALID"),
    ],
)
async def test_a_url_that_is_wrong_is_told_without_its_secrets(s3: S3Server, change, reason: str) -> None:  # type: ignore[no-untyped-def]
    async def opened() -> None:
        async with open_blobs(change(s3.new_url())):
            pass

    error = await refused(opened(), (FailedPrecondition, InvalidArgument), reason)  # type: ignore[arg-type]
    assert "hunter2" not in error.message + str(error.metadata)


async def test_wrong_credentials_are_told(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def opened() -> None:
        async with open_blobs(s3.new_url()):
            pass

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    error = await refused(opened(), FailedPrecondition, "BLOBS_REFUSED")
    assert "credentials" in error.message
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    error = await refused(opened(), FailedPrecondition, "BLOBS_REFUSED")
    assert "AWS_ACCESS_KEY_ID" in error.message
