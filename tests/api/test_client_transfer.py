"""Bytes to and from a server: broken connections, refusals, parts, digests. A real HTTP server, real gRPC."""

import os
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import UnixStreamServer
from urllib.parse import quote

import pytest

from ekiben import archives, localstore, patience, uploading
from ekiben.client import Client
from ekiben.endpoints import UNIX, Endpoint
from ekiben.errors import DataLoss, FailedPrecondition, InvalidArgument, Unavailable
from ekiben.registry.v1 import registry_pb2 as pb
from tests.fixtures_cli import Platform, bento_folder, model_folder, platform

__all__ = ["platform"]

NAME = "modelRepositories/iris/models/v1"


def client_of(platform: Platform) -> Client:
    return Client(platform.endpoint, "ekb_dev")


def elsewhere(client: Client) -> None:
    """Make the client believe that the server is on another machine."""
    client.models._transfer._endpoint = type(
        "Elsewhere",
        (),
        {
            "target": "elsewhere:7400",
            "loopback": False,
            "resolve": lambda _, url: url,
            "shortcut": lambda *_: "",
            "is_near": lambda *_: False,
        },
    )()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


async def test_push_then_pull_gives_the_same_files(platform: Platform, tmp_path: Path) -> None:
    source = model_folder(tmp_path, weights=os.urandom(5 << 20))
    passed: list[int] = []
    async with client_of(platform) as client:
        model, sent = await client.models.push(source, progress=passed.append)
        assert sent and model.content.state == pb.Content.READY
        assert sum(passed) == model.content.size_bytes
        assert model.labels == {"stage": "test"} and '"module": "sklearn"' in model.manifest
        assert model.build_time.seconds == 1767323045
        passed.clear()
        target = await client.models.pull(NAME, tmp_path / "pulled", progress=passed.append)
        assert files_of(target) == files_of(source)
        assert sum(passed) == model.content.size_bytes


@pytest.mark.parametrize("there", ["nobody", "another registry"])
async def test_a_socket_that_is_not_the_registrys_is_tried_once(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    class Refuses(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            asked.append(self.path)
            self.send_error(403)

        do_GET = do_PUT

    asked: list[str] = []
    path = str(tmp_path / "s")
    monkeypatch.setattr(Endpoint, "shortcut", lambda *_: f"{UNIX}//{quote(path, safe='')}/blobs/x?signature=y")
    source = model_folder(tmp_path, weights=os.urandom(5 << 20))
    with UnixStreamServer(path, Refuses) as server:
        if there == "another registry":
            thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
            thread.start()
        else:
            server.server_close()
        async with client_of(platform) as client:
            await client.models.push(source)
            assert files_of(await client.models.pull(NAME, tmp_path / "pulled")) == files_of(source)
        if there == "another registry":
            server.shutdown()
            assert asked == ["/blobs/x?signature=y"] * 2


async def test_push_of_what_is_there_sends_nothing_unless_forced(platform: Platform, tmp_path: Path) -> None:
    source = model_folder(tmp_path)
    async with client_of(platform) as client:
        await client.models.push(source)
        assert (await client.models.push(source))[1] is False
        assert platform.uploads.bytes.puts == 1
        # Forced, the registry still has the bytes: it says so by their digest, and none pass.
        assert (await client.models.push(source, force=True))[1] is True
        assert platform.uploads.bytes.puts == 1


async def test_put_that_breaks_is_tried_again_and_progress_is_taken_back(platform: Platform, tmp_path: Path) -> None:
    source = model_folder(tmp_path, weights=os.urandom(8 << 20))
    platform.uploads.bytes.break_puts = 2
    passed: list[int] = []
    async with client_of(platform) as client:
        model, _ = await client.models.push(source, progress=passed.append)
    assert platform.uploads.bytes.puts == 3
    assert sum(passed) == model.content.size_bytes


async def test_refused_put_is_not_tried_again_and_the_upload_is_aborted(platform: Platform, tmp_path: Path) -> None:
    source = model_folder(tmp_path, weights=os.urandom(8 << 20))
    problem = b'{"status": 400, "detail": "The archive holds a link.", "reason": "ARCHIVE_INVALID"}'
    platform.uploads.bytes.refuse = (400, problem)
    async with client_of(platform) as client:
        with pytest.raises(InvalidArgument, match="holds a link") as caught:
            await client.models.push(source)
    assert caught.value.reason == "ARCHIVE_INVALID"
    assert platform.uploads.bytes.puts == 1
    upload = platform.uploads.uploads["uploads/u0"]
    assert upload.state == pb.Upload.ABORTED and "holds a link" in upload.failure


async def test_to_another_machine_a_large_archive_goes_in_parts(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "PART_BYTES", 1 << 20)
    source = model_folder(tmp_path, weights=os.urandom(5 << 20))
    archive = localstore.read_model(source).archive
    async with client_of(platform) as client:
        elsewhere(client)
        await client.models.create(NAME)
        platform.uploads.bytes.break_puts = 1
        _, digest = await client.models._transfer.upload(NAME, archive)
        assert platform.uploads.uploads["uploads/u0"].digest == digest  # hashed before, so that it may be there already
        assert platform.uploads.bytes.puts == 7  # six parts, one of them twice


async def test_a_large_archive_is_hashed_while_it_is_sent(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "HASH_FIRST_BYTES", 1 << 20)
    monkeypatch.setattr(uploading, "PART_BYTES", 1 << 20)
    source = model_folder(tmp_path, weights=os.urandom(5 << 20))
    async with client_of(platform) as client:
        elsewhere(client)
        model, _ = await client.models.push(source)
    assert platform.uploads.uploads["uploads/u0"].digest == "" and platform.uploads.bytes.puts == 6
    assert model.content.digest == archives.of_folder(source).digest()


async def test_get_that_breaks_is_taken_up_where_it_broke(platform: Platform, tmp_path: Path) -> None:
    source = model_folder(tmp_path, weights=os.urandom(8 << 20))
    async with client_of(platform) as client:
        await client.models.push(source)
        platform.uploads.bytes.break_gets = 2
        assert files_of(await client.models.pull(NAME, tmp_path / "pulled")) == files_of(source)
    assert platform.uploads.bytes.gets == 3


async def test_pull_of_other_bytes_than_promised_leaves_nothing(platform: Platform, tmp_path: Path) -> None:
    async with client_of(platform) as client:
        model, _ = await client.models.push(model_folder(tmp_path))
        blobs = platform.uploads.bytes.blobs
        data = bytearray(blobs[model.content.digest])
        data[2000] ^= 1
        blobs[model.content.digest] = bytes(data)
        for unpack in (True, False):
            with pytest.raises(DataLoss) as caught:
                await client.models.pull(NAME, tmp_path / "into" / "here", unpack=unpack)
            assert caught.value.reason == "DIGEST_MISMATCH"
    assert not list((tmp_path / "into").iterdir())


@pytest.mark.parametrize("name", ["../escaped", "/tmp/ekiben-escaped"])
async def test_pull_of_an_archive_that_leaves_its_folder_is_refused(
    platform: Platform, tmp_path: Path, name: str
) -> None:
    (tmp_path / "evil").write_text("evil")
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        tar.add(tmp_path / "evil", name)
    async with client_of(platform) as client:
        await client.models.push(model_folder(tmp_path))
        archive = archives.of_file(tmp_path / "evil.tar")
        await client.models._transfer.upload(NAME, archive)
        (tmp_path / "into").mkdir()
        target = tmp_path / "into" / "here"
        if name.startswith("/"):  # tarfile's filter takes the slash off: it lands inside
            await client.models.pull(NAME, target)
            assert files_of(target) == {"tmp/ekiben-escaped": b"evil"}
        else:
            with pytest.raises(FailedPrecondition, match="cannot be unpacked"):
                await client.models.pull(NAME, target)
            assert not list((tmp_path / "into").iterdir())
    assert not (tmp_path / "escaped").exists() and not Path("/tmp/ekiben-escaped").exists()


async def test_pull_to_a_tar_file_gives_the_archive_as_it_was_sent(platform: Platform, tmp_path: Path) -> None:
    async with client_of(platform) as client:
        model, _ = await client.models.push(model_folder(tmp_path))
        path = await client.models.pull(NAME, tmp_path / "iris.tar", unpack=False)
        assert archives.of_file(path).digest() == model.content.digest
        # The tar file can be pushed as it is.
        version = replace(localstore.read_model(path), version="v2")
        again, _ = await client.models.push(version)
        assert again.content.digest == model.content.digest


async def test_bento_is_pushed_without_its_models_and_forced_with_a_new_manifest(
    platform: Platform, tmp_path: Path
) -> None:
    source = bento_folder(tmp_path)
    async with client_of(platform) as client:
        bento, _ = await client.bentos.push(source)
        assert bento.description == "# Summaries\n"
        target = await client.bentos.pull(bento.name, tmp_path / "pulled")
        assert sorted(files_of(target)) == ["README.md", "bento.yaml", "src/service.py"]
        text = (source / "bento.yaml").read_text().replace("labels: {}", "labels: {new: 'yes'}")
        (source / "bento.yaml").write_text(text)
        changed, _ = await client.bentos.push(source, force=True)
        assert changed.labels == {"new": "yes"} and changed.content.digest != bento.content.digest


async def test_server_that_stays_away_leaves_the_upload_open(
    platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.5)
    platform.uploads.bytes.refuse = (503, b"")
    async with client_of(platform) as client:
        with pytest.raises(Unavailable):
            await client.models.push(model_folder(tmp_path))
    assert platform.uploads.uploads["uploads/u0"].state == pb.Upload.OPEN
