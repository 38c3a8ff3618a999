"""A registry that is killed with SIGKILL at a step of a push, as its client sees it: the push goes on, or says so."""

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ekiben import archives, uploading
from ekiben.client import Client
from ekiben.errors import Unavailable
from ekiben.registry.v1 import registry_pb2 as pb
from tests.client_process import NAME, Elsewhere
from tests.cutting import cutting
from tests.fixtures_cli import model_folder


@asynccontextmanager
async def registry(folder: Path, run: Path, blobs_url: str, step: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The process, once it answers."""
    for name in ("grpc", "blobs"):
        (run / name).unlink(missing_ok=True)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.registry_process", str(folder), str(run), blobs_url, step),
        cwd=Path(__file__).resolve().parents[2],
    )
    try:
        async with asyncio.timeout(60):
            while not ((run / "grpc").exists() and (run / "blobs").exists()):
                assert process.returncode is None
                await asyncio.sleep(0.02)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.parametrize(
    ("step", "blobs"),
    [*((step, "files") for step in ("receiving", "committing", "naming", "answering")), ("committing", "s3")],
)
async def test_a_push_outlives_its_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, step: str, blobs: str
) -> None:
    blobs_url = f"file://{tmp_path}/blobs" if blobs == "files" else request.getfixturevalue("s3").new_url()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(uploading, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(uploading, "HASH_FIRST_BYTES", 1 << 10)
    source = model_folder(tmp_path, weights=os.urandom(12 << 20))
    when = "before" if step == "naming" else "after"
    with tempfile.TemporaryDirectory(prefix="ekr-", dir="/tmp") as name:
        run = Path(name)
        async with cutting(lambda: asyncio.open_unix_connection(f"{run}/blobs")) as proxy:
            async with registry(tmp_path, run, blobs_url, f"{when}:{step}") as doomed:
                token = (tmp_path / "admin-token").read_text().strip()
                async with Client(Elsewhere(f"unix:{run}/grpc", tls=False, bytes_url=proxy.url), token) as client:
                    pushing = asyncio.ensure_future(client.models.push(source, resume=True))
                    async with asyncio.timeout(60):
                        assert await doomed.wait() == -9
                    async with registry(tmp_path, run, blobs_url, ""):
                        with contextlib.suppress(Unavailable):  # of what cannot be asked twice
                            await pushing
                        model, _ = await client.models.push(source, resume=True)
                        assert model.content.state == pb.Content.READY
                        assert model.content.digest == archives.of_folder(source).digest()
                        files = {file.path: file.size_bytes async for file in client.files.list(NAME)}
                        assert files["weights.bin"] == 12 << 20
                        pulled = await client.models.pull(NAME, tmp_path / "pulled")
                        assert (pulled / "weights.bin").read_bytes() == (source / "weights.bin").read_bytes()
