"""Two builders in processes of their own, on one PostgreSQL and one folder: what one is killed at, the other ends."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from ekiben.builder.v1 import builder_pb2 as pb
from tests.builder_kills import Process, created, ended
from tests.fixtures_builder import PackageIndex, Registry, bento_folder, index, registry, running_builder
from tests.fixtures_kernel import until
from tests.postgres import PostgresServer
from tests.small_base import small_base

__all__ = ["index", "registry"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_base(tmp_path_factory.mktemp("base")).replace("3.11", "{python}")


@pytest.fixture
async def pair(
    registry: Registry, index: PackageIndex, postgres: PostgresServer, bases: str, tmp_path: Path
) -> AsyncIterator[Sequence[Process]]:
    url = f"{postgres.create(f'builder_{os.urandom(6).hex()}')}&schema=ekiben_builder"
    settings = {"bases": bases, "database_url": url, "lease_s": 3.0}
    processes = [Process(registry, tmp_path / "shared", settings=settings, name=name) for name in "bc"]
    try:
        yield processes
    finally:
        for process in processes:
            process.end()


@pytest.mark.parametrize("step", ["write 2", "tag"])
async def test_a_killed_builder_s_image_is_made_by_the_other_with_the_same_digest(
    pair: Sequence[Process], registry: Registry, tmp_path: Path, step: str
) -> None:
    await registry.push_model("iris:m1", {"weights": b"w" * 100_000}, tmp_path / "model")
    bento = await registry.push(bento_folder(tmp_path / "bento"), models=["iris:m1"])
    for process in pair:  # whoever takes the build dies of it, once
        process.step = step
        process.start()
    name = await created(pair[0], bento, output=pb.Build.IMAGE)
    await until(lambda: any(each.running and each.running.poll() for each in pair), "one of them is killed", 60)
    (alive,) = [process for process in pair if process.running and process.running.poll() is None]
    build, lines = await ended(alive, name)
    assert build.state == pb.Build.SUCCEEDED, lines
    assert any("taken up again (attempt 2)" in line for line in lines)
    made = sorted(path.name for path in (tmp_path / "shared" / "images" / "blobs" / "sha256").glob("[!.]*"))

    where = {"bases": pair[0].settings["bases"], "attestations": True}
    async with running_builder(registry, tmp_path / "alone", name="d", **where) as builder:
        alone = await builder.build(bento, output=pb.Build.IMAGE)
        assert alone.state == pb.Build.SUCCEEDED and alone.image == build.image
    blobs = (path.name for path in (tmp_path / "alone" / "images" / "blobs" / "sha256").glob("[!.]*"))
    assert made == await asyncio.to_thread(sorted, blobs), "not a byte is other, and nothing is left over"
