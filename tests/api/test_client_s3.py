"""Bytes that pass between a client and an S3 server, without the registry in between."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ekiben import archives, patience, ranges, signed, uploading
from ekiben.client import Client
from ekiben.errors import PermissionDenied, Unavailable
from ekiben.registry.v1 import registry_pb2 as pb
from tests.client_process import NAME, Elsewhere
from tests.fixtures_cli import model_folder
from tests.fixtures_registry import Registry, run_registry
from tests.s3 import S3Server

PART_BYTES = 5 << 20
"""The least that S3 takes."""


@asynccontextmanager
async def reached(s3: S3Server, folder: Path) -> AsyncIterator[tuple[Registry, Client]]:
    """A registry on S3, and a client that cannot reach its bytes endpoint."""
    async with run_registry(folder, blobs_url=s3.new_url()) as running:
        token = running.settings.admin_token_file.read_text().strip()
        async with Client(Elsewhere(running.address, tls=False, bytes_url="http://127.0.0.1:1"), token) as client:
            yield running, client


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(uploading, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(uploading, "HASH_FIRST_BYTES", 1 << 10)
    monkeypatch.setattr(ranges, "RANGE_BYTES", 1 << 20)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


class Puts:
    """Counts the parts that are PUT; those after the first `good` fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done, self.bytes, self.good = 0, 0, 1 << 30
        real = signed.put

        def put(url: str, archive: archives.Archive, start: int, end: int, **options: Any) -> str:
            self.done += 1
            if self.done > self.good:
                raise Unavailable("Cut.", reason="CONNECTION_BROKEN")
            self.bytes += end - start
            return real(url, archive, start, end, **options)

        monkeypatch.setattr(signed, "put", put)


async def test_push_resume_and_pull_go_straight_to_the_object_store(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model_folder(tmp_path, weights=os.urandom(23 << 20))
    size = archives.of_folder(source).size_bytes
    puts = Puts(monkeypatch)
    async with reached(s3, tmp_path) as (_, client):
        puts.good = 2
        with monkeypatch.context() as impatient:
            impatient.setattr(patience, "PATIENCE_S", -1.0)
            impatient.setattr(uploading, "PARALLEL_PARTS", 1)
            with pytest.raises(Unavailable):
                await client.models.push(source)
        assert puts.bytes == 2 * PART_BYTES
        puts.good = 1 << 30
        model, _ = await client.models.push(source, resume=True)
        assert puts.bytes == size
        assert model.content.state == pb.Content.READY
        assert model.content.digest == archives.of_folder(source).digest()
        # The same again costs no bytes, also under another name.
        await client.models.push(source, force=True)
        assert puts.bytes == size

        for unpack in (True, False):
            target = await client.models.pull(NAME, tmp_path / f"pulled-{unpack}", unpack=unpack)
            read = target / "weights.bin" if unpack else target
            expected = source / "weights.bin"
            if unpack:
                assert read.read_bytes() == expected.read_bytes()
            else:
                assert archives.of_file(read).digest() == model.content.digest


async def test_what_the_object_store_refuses_is_told_in_its_words(s3: S3Server, tmp_path: Path) -> None:
    source = archives.of_folder(model_folder(tmp_path))
    async with reached(s3, tmp_path) as (running, client):
        await client.models.create(NAME)
        upload = await running.admin.uploads.CreateUpload(pb.CreateUploadRequest(upload=pb.Upload(resource=NAME)))
        url = (await running.admin.uploads.SignUpload(pb.SignUploadRequest(name=upload.name))).url
        assert url.startswith("http")

        def put(url: str) -> str:
            return signed.put(url, source, 0, source.size_bytes, progress=lambda _: None, stop=signed.Stop())

        with pytest.raises(PermissionDenied, match="The object store refused"):
            await asyncio.to_thread(put, url.replace("Signature=", "Signature=0"))
        assert await asyncio.to_thread(put, url)
