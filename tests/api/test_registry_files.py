"""The files of a content: listed once, with digests, read one by one, from files and from S3 alike."""

import gzip
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from ekiben.client import Client
from ekiben.errors import Aborted, DataLoss, FailedPrecondition, NotFound
from ekiben.registry.v1 import files_pb2
from ekiben.registry.v1 import registry_pb2 as pb
from services.content.digest import Digest
from tests.fixtures_cli import ekiben, model_folder
from tests.fixtures_registry import Registry, model_archive, run_registry, running_registry

__all__ = ["running_registry"]

NAME = "modelRepositories/iris/models/v1"
LONG = "folder/" + "x" * 120 + "/" + "y" * 90 + ".bin"
FILES = {
    "model.yaml": b"name: iris\n",
    "weights.bin": b"weights" * 1000,
    LONG: os.urandom(3000),
    "empty": b"",
    "größe.txt": b"unicode",
}


@asynccontextmanager
async def connected(running: Registry) -> AsyncIterator[Client]:
    """The public client of a registry."""
    async with Client(running.address, running.settings.admin_token_file.read_text().strip()) as client:
        yield client


async def push(running: Registry, archive: bytes, version: str = "v1") -> None:
    """A model with this content."""
    await running.new_model(running.admin, "iris", version)
    name = f"modelRepositories/iris/models/{version}"
    if running.settings.blobs_url.startswith("file:"):
        await running.push(running.admin, name, archive)
        return
    uploads = running.admin.uploads
    upload = await uploads.CreateUpload(pb.CreateUploadRequest(upload=pb.Upload(resource=name)))
    url = (await uploads.SignUpload(pb.SignUploadRequest(name=upload.name))).url
    async with aiohttp.ClientSession(skip_auto_headers=["Content-Type"]) as http:
        async with http.put(url, data=archive) as answer:
            assert answer.status == 200, await answer.text()
    await uploads.CompleteUpload(pb.CompleteUploadRequest(name=upload.name))


async def read(client: Client, path: str, name: str = NAME) -> bytes:
    data = bytearray()
    await client.files.read(name, path, data.extend)
    return bytes(data)


@pytest.mark.parametrize("kind", ["files", "s3"])
async def test_every_file_is_listed_and_read_by_itself(
    kind: str, database_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "s3" and "postgresql" in database_url:
        pytest.skip("rows and bytes do not depend on one another")
    options = {"blobs_url": request.getfixturevalue("s3").new_url()} if kind == "s3" else {}
    async with run_registry(tmp_path, database_url=database_url, **options) as running, connected(running) as client:
        await push(
            running, model_archive(FILES["weights.bin"], **{LONG: FILES[LONG], "empty": b"", "größe.txt": b"unicode"})
        )
        found = [file async for file in client.files.list(NAME)]
        assert {file.path: file.size_bytes for file in found} == {path: len(data) for path, data in FILES.items()}
        for file in found:
            assert file.digest == f"sha256:{hashlib.sha256(FILES[file.path]).hexdigest()}"
            assert await read(client, file.path) == FILES[file.path]
        assert await read(client, "./model.yaml", "modelRepositories/iris/models/latest") == b"name: iris\n"
        with pytest.raises(NotFound, match="List its files") as caught:
            await read(client, "nowhere")
        assert caught.value.reason == "FILE_NOT_FOUND"


async def test_one_range_of_the_signed_url_is_the_file(running: Registry) -> None:
    async with connected(running) as client:
        await push(running, model_archive(b"exactly this"))
        signed = await client.files.sign(NAME, "weights.bin")
        status, body, _ = await running.get(signed.content.url, Range=signed.range)
        assert (status, body) == (206, b"exactly this")
        assert signed.file.size_bytes == 12 and signed.content.digest.startswith("sha256:")


async def test_files_are_given_in_pages_of_one_content(running: Registry) -> None:
    async with connected(running) as client:
        await push(running, model_archive(**{f"f{number:04}": b"x" for number in range(1200)}))
        assert len([file async for file in client.files.list(NAME)]) == 1202
        assert len([file async for file in client.files.list(NAME, limit=7)]) == 7
        request = files_pb2.ListFilesRequest(parent=NAME, page_size=1000)
        page = await client.files._stub.ListFiles(request)
        assert page.total_size == 1202 and len(page.files) == 1000
        request.page_token = page.next_page_token
        assert len((await client.files._stub.ListFiles(request)).files) == 202
        await running.push(running.admin, NAME, model_archive(b"other"))
        with pytest.raises(Aborted, match="from the beginning"):
            await client.files._stub.ListFiles(request)


async def test_files_of_a_compressed_archive_are_listed_and_not_read(running: Registry) -> None:
    async with connected(running) as client:
        await push(running, gzip.compress(model_archive(b"weights")))
        found = {file.path: file async for file in client.files.list(NAME)}
        assert found["weights.bin"].offset == -1
        assert found["weights.bin"].digest == f"sha256:{hashlib.sha256(b'weights').hexdigest()}"
        with pytest.raises(FailedPrecondition, match="Pull all of it"):
            await read(client, "weights.bin")


async def test_the_last_of_two_files_of_one_path_counts_as_when_unpacked(running: Registry) -> None:
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in (("model.yaml", b"name: iris\n"), ("a", b"first"), ("b", b"b"), ("./a", b"second")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    async with connected(running) as client:
        await push(running, buffer.getvalue())
        assert sorted([file.path async for file in client.files.list(NAME)]) == ["a", "b", "model.yaml"]
        assert await read(client, "a") == b"second"


async def test_an_alias_stands_for_its_version(running: Registry) -> None:
    async with connected(running) as client:
        await push(running, model_archive(b"one"))
        await client.aliases.set("modelRepositories/iris/aliases/production", NAME)
        await push(running, model_archive(b"two"), "v2")
        assert await read(client, "weights.bin", "modelRepositories/iris/models/production") == b"one"
        assert await read(client, "weights.bin", "modelRepositories/iris/models/v2") == b"two"


async def test_what_has_no_content_has_no_files(running: Registry) -> None:
    await running.new_model(running.admin, "iris", "v1")
    async with connected(running) as client:
        with pytest.raises(FailedPrecondition, match="push it first"):
            [file async for file in client.files.list(NAME)]
        with pytest.raises(NotFound):
            [file async for file in client.files.list("modelRepositories/iris/models/v9")]


async def test_damaged_content_is_found_when_its_files_are_listed(tmp_path: Path) -> None:
    import sqlite3

    # On files and SQLite, where a test can do damage.
    async with run_registry(tmp_path) as running, connected(running) as client:
        await push(running, model_archive(b"weights"))
        await read(client, "weights.bin")
        digest = (await client.models.get(NAME)).content.digest
        path = tmp_path / "blobs" / "content" / "sha256" / digest[7:9] / digest[7:]
        data = bytearray(path.read_bytes())
        data[data.index(b"weights\0")] ^= 1
        path.write_bytes(data)
        with pytest.raises(DataLoss, match="Try again"):
            await read(client, "weights.bin")
        with sqlite3.connect(tmp_path / "registry.db") as database:
            database.execute("UPDATE blob_listings SET state = 'WAITING', lease_end_time = 0")
        with pytest.raises(DataLoss, match="--force"):
            [file async for file in client.files.list(NAME)]
        # Pushed again it is whole, and is listed again.
        await running.push(running.admin, NAME, model_archive(b"weights"))
        assert await read(client, "weights.bin") == b"weights"
    assert Digest.parse(digest)


async def test_the_command_lists_and_prints_files(running: Registry, tmp_path: Path) -> None:
    token = running.settings.admin_token_file.read_text().strip()
    env = {"EKIBEN_ENDPOINT": running.address, "EKIBEN_API_TOKEN": token}
    model_folder(tmp_path, weights=bytes(range(256)))
    pushed = await ekiben(None, "models", "push", "iris:v1", home=tmp_path, **env)
    assert pushed.code == 0, pushed.err
    listed = await ekiben(None, "models", "files", "iris", home=tmp_path, **env)
    assert listed.code == 0, listed.err
    assert [line.split()[0] for line in listed.out.splitlines()] == ["PATH", "model.yaml", "sub/empty", "weights.bin"]
    names = await ekiben(None, "models", "files", "iris", "-o", "name", home=tmp_path, **env)
    assert names.out.splitlines() == ["model.yaml", "sub/empty", "weights.bin"]
    shown = await ekiben(None, "models", "cat", "iris:v1", "model.yaml", home=tmp_path, **env)
    assert shown.out.startswith("name: iris\n"), shown.err
    missing = await ekiben(None, "models", "cat", "iris:v1", "none", home=tmp_path, **env)
    assert missing.code == 1 and "List its files" in missing.err
