"""Clients killed with SIGKILL in the middle of a push and of a pull: the next one goes on."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from ekiben import archives
from ekiben.registry.v1 import registry_pb2 as pb
from tests.client_process import NAME, PART_BYTES, RANGE_BYTES
from tests.cutting import Cutting, cutting
from tests.fixtures_cli import model_folder
from tests.fixtures_registry import Registry, running_embedded

__all__ = ["running_embedded"]

SIZE = 400_000


async def run(
    running: Registry, proxy: Cutting, verb: str, path: Path, home: Path, *, kill_at: int | None = None
) -> int:
    """The client to its end, or until so many bytes more have passed: its exit code."""
    token = running.settings.admin_token_file.read_text().strip()
    proxy.held.clear()
    proxy.hold_at = None if kill_at is None else proxy.up_bytes + proxy.down_bytes + kill_at
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.client_process", verb, running.address, proxy.url, token, str(path)),
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        cwd=Path(__file__).resolve().parents[2],
    )
    async with asyncio.timeout(60):
        if kill_at is not None:
            await proxy.held.wait()
            process.kill()
        return await process.wait()


@pytest.mark.parametrize("kill_at", [1, 250_000])
async def test_a_push_and_a_pull_that_are_killed_go_on(running: Registry, tmp_path: Path, kill_at: int) -> None:
    source = model_folder(tmp_path, weights=os.urandom(SIZE))
    path = running.settings.blobs_listen.removeprefix("unix:")
    async with cutting(lambda: asyncio.open_unix_connection(path)) as proxy:
        assert await run(running, proxy, "push", source, tmp_path, kill_at=kill_at) == -9
        assert await run(running, proxy, "push", source, tmp_path) == 0
        model = await running.admin.models.GetModel(pb.GetModelRequest(name=NAME))
        assert model.content.digest == archives.of_folder(source).digest()
        assert proxy.up_bytes < model.content.size_bytes + 5 * (PART_BYTES + 1000)

        target, proxy.down_bytes = tmp_path / "into" / "here", 0
        assert await run(running, proxy, "pull", target, tmp_path, kill_at=kill_at) == -9
        assert not target.exists()
        assert await run(running, proxy, "pull", target, tmp_path) == 0
        assert (target / "weights.bin").read_bytes() == (source / "weights.bin").read_bytes()
        assert [path.name for path in target.parent.iterdir()] == ["here"]
        # Lost at most: what the workers had fetched ahead, and what had not passed the hash yet.
        assert proxy.down_bytes < model.content.size_bytes + 12 * RANGE_BYTES
