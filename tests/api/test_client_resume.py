"""Pushes and pulls that are interrupted at any byte, against a real registry behind a proxy that cuts connections."""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ekiben import archives, localstore, patience, pending, ranges, uploading
from ekiben.client import Client
from ekiben.errors import Aborted, DataLoss, Unavailable
from ekiben.registry.v1 import registry_pb2 as pb
from tests.client_process import Elsewhere
from tests.cutting import Cutting, cutting
from tests.fixtures_cli import model_folder
from tests.fixtures_registry import Registry, run_registry, running_embedded, until

__all__ = ["running_embedded"]

NAME = "modelRepositories/iris/models/v1"


@asynccontextmanager
async def reached(running: Registry) -> AsyncIterator[tuple[Client, Cutting]]:
    """A client of the registry, and the proxy that its bytes go through."""
    path = running.settings.blobs_listen.removeprefix("unix:")
    token = running.settings.admin_token_file.read_text().strip()
    async with cutting(lambda: asyncio.open_unix_connection(path)) as proxy:
        async with Client(Elsewhere(running.address, tls=False, bytes_url=proxy.url), token) as client:
            yield client, proxy


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Everything at the size of a test, and no waiting for a server that is away."""
    monkeypatch.setattr(uploading, "PART_BYTES", 1 << 14)
    monkeypatch.setattr(uploading, "HASH_FIRST_BYTES", 1 << 10)
    monkeypatch.setattr(ranges, "RANGE_BYTES", 1 << 13)
    monkeypatch.setattr(patience, "PATIENCE_S", -1.0)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "pulled-home"))


def several_files(folder: Path, seed: int) -> Path:
    """A model of files of many sizes, folders and long names."""
    chance = random.Random(seed)
    source = model_folder(folder, weights=chance.randbytes(chance.randrange(20_000, 90_000)))
    for number in range(chance.randrange(2, 9)):
        name = "x" * chance.choice([1, 20, 120]) + str(number)
        (source / "sub" / name).write_bytes(chance.randbytes(chance.choice([0, 1, 511, 512, 513, 5_000, 30_000])))
    return source


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("seed", range(3))
async def test_a_push_that_breaks_at_any_byte_goes_on_where_it_was(
    running: Registry, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    source = several_files(tmp_path, seed)
    size = archives.of_folder(source).size_bytes
    async with reached(running) as (client, proxy):
        for attempt in range(200):
            proxy.up_limit = chance.randrange(1, 60_000)
            try:
                model, sent = await client.models.push(source, resume=True)
            except Unavailable:
                assert pending.load(running.address, NAME) is not None, attempt
                continue
            break
        assert sent and model.content.state == pb.Content.READY
        assert model.content.digest == archives.of_folder(source).digest()
        assert pending.load(running.address, NAME) is None
        # What arrived was not sent again: at most the four parts under way at each break.
        assert proxy.up_bytes < size + (attempt + 1) * 4 * (uploading.PART_BYTES + 600)
        listed = await running.admin.models.GetModel(pb.GetModelRequest(name=NAME))
        assert listed.content.open_upload == ""


async def test_a_push_that_another_machine_began_is_taken_up_by_its_digest(
    running: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "HASH_FIRST_BYTES", 1 << 30)
    monkeypatch.setattr(uploading, "PARALLEL_PARTS", 1)
    source = model_folder(tmp_path, weights=os.urandom(100_000))
    async with reached(running) as (client, proxy):
        proxy.most_connections = 3
        with pytest.raises(Unavailable):
            await client.models.push(source)
        proxy.most_connections = None
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
        before = proxy.up_bytes
        model, _ = await client.models.push(source, resume=True)
        assert model.content.state == pb.Content.READY
        assert proxy.up_bytes - before < archives.of_folder(source).size_bytes - 2 * uploading.PART_BYTES


async def test_a_push_that_is_cancelled_goes_on_without_hashing_again(
    running: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ctrl-C does."""
    monkeypatch.setattr(patience, "PATIENCE_S", 60.0)
    source = model_folder(tmp_path, weights=os.urandom(200_000))
    async with reached(running) as (client, proxy):
        proxy.hold_at = 100_000
        pushing = asyncio.ensure_future(client.models.push(source))
        await proxy.held.wait()
        await until(lambda: (pending.load(running.address, NAME) or pending.Pending("", "", 0, "")).digest)
        pushing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pushing
    kept = pending.load(running.address, NAME)
    assert kept is not None
    upload = await running.admin.uploads.GetUpload(pb.GetUploadRequest(name=kept.upload))
    assert upload.state == pb.Upload.OPEN
    monkeypatch.setattr(archives.Archive, "digest", None)  # hashing again would fail
    async with reached(running) as (client, proxy):
        model, _ = await client.models.push(source, resume=True)
        monkeypatch.undo()
        assert model.content.digest == archives.of_folder(source).digest()


async def test_changed_files_begin_a_new_upload(running: Registry, tmp_path: Path) -> None:
    source = model_folder(tmp_path, weights=os.urandom(100_000))
    async with reached(running) as (client, proxy):
        proxy.most_connections = 3
        with pytest.raises(Unavailable):
            await client.models.push(source)
        proxy.most_connections = None
        (source / "weights.bin").write_bytes(os.urandom(100_000))
        model, _ = await client.models.push(source, resume=True)
        assert model.content.digest == archives.of_folder(source).digest()


async def test_parts_that_were_damaged_are_found_by_their_digest(running: Registry, tmp_path: Path) -> None:
    """The state of an upload is a hint: here its parts are another archive's."""
    source = model_folder(tmp_path, weights=os.urandom(100_000))
    archive = archives.of_folder(source)
    async with reached(running) as (client, _):
        model = await client.models.create(NAME)
        wanted = pb.Upload(resource=NAME, size_bytes=archive.size_bytes)
        upload = await running.admin.uploads.CreateUpload(pb.CreateUploadRequest(upload=wanted))
        signed = await running.admin.uploads.SignUpload(pb.SignUploadRequest(name=upload.name, part_number=2))
        assert (await running.put(signed.url, bytes(uploading.PART_BYTES)))[0] == 200
        kept = pending.Pending(NAME, upload.name, uploading.PART_BYTES, archive.fingerprint())
        pending.save(running.address, kept)
        with pytest.raises(DataLoss, match="--force"):
            await client.models.push(source, resume=True)
        model, _ = await client.models.push(source, force=True)
        assert model.content.digest == archive.digest()


async def test_a_client_killed_after_its_upload_completed_finds_that_out(running: Registry, tmp_path: Path) -> None:
    source = model_folder(tmp_path, weights=os.urandom(100_000))
    archive = archives.of_folder(source)
    async with reached(running) as (client, proxy):
        await client.models.push(source)
        upload = (await _uploads_of(running))[0]
        pending.save(running.address, pending.Pending(NAME, upload, uploading.PART_BYTES, archive.fingerprint()))
        before = proxy.up_bytes
        _, sent = await client.models.push(source, resume=True, force=True)
        assert sent and proxy.up_bytes == before


async def _uploads_of(running: Registry) -> list[str]:
    import sqlite3

    with sqlite3.connect(running.settings.database_url.removeprefix("sqlite:///")) as database:
        return [f"uploads/{row[0]}" for row in database.execute("SELECT upload FROM uploads")]


async def test_the_same_content_pushed_twice_costs_no_bytes(running: Registry, tmp_path: Path) -> None:
    source = model_folder(tmp_path, weights=os.urandom(100_000))
    version = localstore.read_model(source)
    async with reached(running) as (client, proxy):
        await client.models.push(version)
        sent_once = proxy.up_bytes
        await client.models.push(version, force=True)
        assert proxy.up_bytes == sent_once
        # Nor under another name, though it is too large to be hashed before anything else.
        again = localstore.Version("other", "v9", version.manifest, version.archive)
        model, _ = await client.models.push(again)
        assert proxy.up_bytes == sent_once and model.content.state == pb.Content.READY


async def test_of_two_first_pushes_of_a_version_the_first_to_end_wins(running: Registry, tmp_path: Path) -> None:
    one = model_folder(tmp_path / "one", weights=os.urandom(100_000))
    two = model_folder(tmp_path / "two", weights=os.urandom(100_000))
    async with reached(running) as (client, _), reached(running) as (other, _):
        ended = await asyncio.gather(
            client.models.push(one), other.models.push(two), other.models.push(one), return_exceptions=True
        )
        digests = [archives.of_folder(path).digest() for path in (one, two, one)]
        model = await client.models.get(NAME)
        assert model.content.state == pb.Content.READY
        for digest, result in zip(digests, ended, strict=True):
            if digest == model.content.digest:
                assert not isinstance(result, BaseException), result
            else:
                assert isinstance(result, Aborted) and result.reason == "CONTENT_EXISTS"
        target = await client.models.pull(NAME, tmp_path / "target")
        assert files_of(target) in (files_of(one), files_of(two))
        # Who insists replaces it.
        loser = two if model.content.digest == digests[0] else one
        replaced, _ = await other.models.push(loser, force=True)
        assert replaced.content.digest == archives.of_folder(loser).digest()


async def test_two_forced_pushes_leave_one_of_them_whole(running: Registry, tmp_path: Path) -> None:
    first = model_folder(tmp_path / "first")
    sources = [model_folder(tmp_path / name, weights=os.urandom(100_000)) for name in ("one", "two")]
    async with reached(running) as (client, _), reached(running) as (other, _):
        await client.models.push(first)
        ended = await asyncio.gather(
            client.models.push(sources[0], force=True),
            other.models.push(sources[1], force=True),
            return_exceptions=True,
        )
        digests = [archives.of_folder(path).digest() for path in sources]
        model = await client.models.get(NAME)
        assert model.content.digest in digests
        for digest, result in zip(digests, ended, strict=True):
            if isinstance(result, BaseException):
                assert isinstance(result, Aborted) and result.reason == "CONTENT_REPLACED"
                assert digest != model.content.digest


@pytest.mark.parametrize("unpack", [True, False])
@pytest.mark.parametrize("seed", range(3))
async def test_a_pull_that_breaks_at_any_byte_goes_on_where_it_was(
    running: Registry, tmp_path: Path, seed: int, unpack: bool
) -> None:
    chance = random.Random(seed)
    source = several_files(tmp_path, seed)
    target = tmp_path / "into" / "here"
    passed: list[int] = []
    async with reached(running) as (client, proxy):
        model, _ = await client.models.push(source)
        proxy.down_bytes = 0
        for attempt in range(400):
            proxy.down_limit = chance.randrange(1, 24_000)
            passed.clear()
            try:
                await client.models.pull(NAME, target, unpack=unpack, progress=passed.append)
            except Unavailable:
                assert not target.exists(), attempt
                continue
            break
        assert sum(passed) == model.content.size_bytes
        if unpack:
            assert files_of(target) == files_of(source)
            assert archives.of_folder(target).size_bytes == archives.of_folder(source).size_bytes
        else:
            assert archives.of_file(target).digest() == model.content.digest
        assert [path.name for path in target.parent.iterdir()] == ["here"]
        # What was read is not fetched again; what the workers had ahead is.
        ahead = (ranges.WORKERS + 1) * (ranges.RANGE_BYTES + 1000)
        assert proxy.down_bytes < model.content.size_bytes + (attempt + 1) * ahead


async def test_a_pull_to_the_store_keeps_what_is_not_whole_away_from_bentoml(running: Registry, tmp_path: Path) -> None:
    source = model_folder(tmp_path, weights=os.urandom(200_000))
    async with reached(running) as (client, proxy):
        await client.models.push(source)
        proxy.down_limit = 30_000
        with pytest.raises(Unavailable):
            await client.models.pull(NAME)
        assert list((localstore.home() / "models" / "iris").iterdir()) == []
        proxy.down_limit = None
        # Two at once: one goes on, the other begins its own; both find the model.
        paths = await asyncio.gather(client.models.pull(NAME), client.models.pull(NAME))
        assert paths[0] == paths[1] and files_of(paths[0]) == files_of(source)
        assert sorted(path.name for path in paths[0].parent.iterdir()) == ["latest", "v1"]
        assert list(localstore.work().iterdir()) == []


async def test_what_is_kept_of_a_pull_and_was_damaged_is_not_taken(running: Registry, tmp_path: Path) -> None:
    source = model_folder(tmp_path, weights=os.urandom(200_000))
    target = tmp_path / "into" / "here"
    async with reached(running) as (client, proxy):
        await client.models.push(source)
        proxy.down_limit = 30_000
        with pytest.raises(Unavailable):
            await client.models.pull(NAME, target)
        proxy.down_limit = None
        (kept,) = target.parent.glob(".here.*.part/tree/weights.bin")
        data = bytearray(kept.read_bytes())
        data[100] ^= 1
        kept.write_bytes(data)
        with pytest.raises(DataLoss, match="Try again"):
            await client.models.pull(NAME, target)
        assert list(target.parent.iterdir()) == []
        await client.models.pull(NAME, target)
        assert files_of(target) == files_of(source)


async def test_a_push_goes_on_at_a_registry_that_was_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "PARALLEL_PARTS", 1)
    source = model_folder(tmp_path, weights=os.urandom(200_000))
    data = tmp_path / "registry"
    data.mkdir()
    for most in (1, 3, 5):
        async with run_registry(data) as running, reached(running) as (client, proxy):
            proxy.most_connections = most
            client.models._transfer._endpoint = Elsewhere("always", tls=False, bytes_url=proxy.url)
            with pytest.raises(Unavailable):
                await client.models.push(source, resume=True)
    async with run_registry(data) as running, reached(running) as (client, proxy):
        client.models._transfer._endpoint = Elsewhere("always", tls=False, bytes_url=proxy.url)
        model, _ = await client.models.push(source, resume=True)
        assert model.content.digest == archives.of_folder(source).digest()
        assert proxy.connections <= -(-archives.of_folder(source).size_bytes // uploading.PART_BYTES) - 9
