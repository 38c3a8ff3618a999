"""A builder killed with SIGKILL in the middle: the next one ends the build, right, and nothing is left behind."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ekiben.builder.v1 import builder_pb2 as pb
from tests.builder_kills import Process, created, ended
from tests.fixtures_builder import PackageIndex, Registry, bento_folder, index, registry
from tests.fixtures_kernel import until

__all__ = ["index", "registry"]


@pytest.fixture
async def process(registry: Registry, index: PackageIndex, tmp_path: Path) -> AsyncIterator[Process]:
    process = Process(registry, tmp_path / "builder")
    try:
        yield process
    finally:
        process.end()


@pytest.mark.parametrize("step", ["fetch", "python", "resolve", "install", "finish"])
async def test_a_build_goes_on_whatever_its_builder_was_killed_at(process: Process, tmp_path: Path, step: str) -> None:
    bento = await process.registry.push(bento_folder(tmp_path / "bento"))
    process.step = step
    process.start()
    name = await created(process, bento)
    await process.died()
    process.start()
    build, lines = await ended(process, name)
    assert build.state == pb.Build.SUCCEEDED, lines
    assert any("taken up again (attempt 2)" in line for line in lines)
    assert (Path(build.environment.path) / "complete.json").exists()
    environments = [path for path in (process.data_dir / "environments").iterdir() if path.is_dir()]
    assert [str(path) for path in environments] == [build.environment.path]
    assert not list((process.data_dir / "tmp").iterdir())


async def test_uv_does_not_outlive_a_killed_builder(process: Process, index: PackageIndex, tmp_path: Path) -> None:
    bento = await process.registry.push(bento_folder(tmp_path / "bento"))
    index.held.clear()
    process.start()
    name = await created(process, bento)
    await until(lambda: any(path.startswith("/files/") for path in index.requests), "uv downloads", 30)
    process.end()
    await until(lambda: not _processes_in(process.data_dir), "uv is gone", 15)
    index.held.set()
    process.start()
    build, lines = await ended(process, name)
    assert build.state == pb.Build.SUCCEEDED, lines


async def test_equal_bentos_give_equal_environments_on_another_builder(process: Process, tmp_path: Path) -> None:
    bento = await process.registry.push(bento_folder(tmp_path / "bento"))
    process.start()
    first, _ = await ended(process, await created(process, bento))
    process.end()
    process.data_dir = tmp_path / "another"
    process.start()
    second, _ = await ended(process, await created(process, bento))
    assert second.environment.digest == first.environment.digest
    assert second.environment.path != first.environment.path


def _processes_in(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if str((path / "cwd").readlink()).startswith(str(folder)):
                found.append((path / "cmdline").read_bytes().decode())
        except OSError:
            continue
    return found
