"""Builds of the platform whose bentos run commands: real commands, a real registry with its secrets, the real uv."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ekiben.builder.v1 import builder_pb2 as pb
from ekiben.builder.v1 import images_pb2
from ekiben.identity.v1 import identity_pb2
from tests.fixtures_builder import Builder, PackageIndex, Registry, bento_folder, index, registry, running_builder
from tests.platform import wait_for
from tests.shell_base import named_shell_base

__all__ = ["index", "registry"]

IMAGE = {"output": pb.Build.IMAGE}
TOKEN = "correct-horse-battery"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    if os.getuid() != 0:
        pytest.skip("the engine is tested as root: a user namespace needs ranges in /etc/subuid")
    return named_shell_base(tmp_path_factory.mktemp("shell") / "base")


@pytest.fixture
async def builder(registry: Registry, index: PackageIndex, base: str, tmp_path: Path) -> AsyncIterator[Builder]:
    async with running_builder(registry, tmp_path / "builder", bases=base) as running:
        yield running


def running(folder: Path, *commands: str, source: bytes = b"import bentoml\n", post: tuple[str, ...] = ()) -> Path:
    """A bento that runs these."""
    image = {"base_image": "x", "python_version": "3.11", "commands": list(commands), "post_commands": list(post)}
    return bento_folder(folder, manifest={"image": image}, files={"src/service.py": source})


async def contents(builder: Builder, build: pb.Build) -> list[str]:
    """What the layers of a build's image hold, lowest first."""
    assert build.state == pb.Build.SUCCEEDED, await builder.log(build.name)
    image = await builder.images.GetImage(images_pb2.GetImageRequest(name=build.image))
    return [layer.content.partition(" sha256")[0] for layer in image.layers]


async def test_commands_run_with_secrets_and_once(builder: Builder, tmp_path: Path) -> None:
    secret = await builder.registry.keep_secret("for-builds", identity_pb2.Secret.BUILD, TOKEN=TOKEN)
    commands = ('echo "it is $TOKEN"; echo ${#TOKEN} > /opt/length',)
    post = ("ls /app/.venv > /opt/there",)
    bento = await builder.registry.push(running(tmp_path / "a", *commands, post=post))
    build = await builder.build(bento, secrets=[secret], **IMAGE)
    assert await contents(builder, build) == [
        *("", "the user bentoml", "the bento's commands", "Python environment"),
        *("the bento's commands on its environment", "bento hello:v1"),
    ]
    log = await builder.log(build.name)
    assert "it is …" in log and "STEP" in " ".join(log) and not [line for line in log if TOKEN in line]
    assert not [line for line in log if "applies to images only" in line]
    kept = [path for path in builder.data_dir.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert kept == []
    other = running(tmp_path / "b", *commands, post=post, source=b"import bentoml  # changed\n")
    again = await builder.build(await builder.registry.push(other, "v2"), secrets=[secret], **IMAGE)
    assert len(await contents(builder, again)) == 6
    assert "STEP" not in " ".join(await builder.log(again.name)), "what ran is used again"


async def test_a_command_that_fails_fails_the_build_and_says_which(builder: Builder, tmp_path: Path) -> None:
    bento = await builder.registry.push(running(tmp_path / "a", "echo on its way", "echo because; exit 7"))
    build = await builder.build(bento, **IMAGE)
    assert (build.state, build.step) == (pb.Build.FAILED, "running the bento's commands")
    assert "exit code 7: echo because; exit 7\nbecause" in build.failure.message
    assert "on its way" in await builder.log(build.name)


async def test_cancelling_a_build_ends_its_commands(builder: Builder, tmp_path: Path) -> None:
    bento = await builder.registry.push(running(tmp_path / "a", "echo it runs; sleep 876543"))
    build = await builder.builds.CreateBuild(pb.CreateBuildRequest(bento=bento, **IMAGE))
    call = builder.builds.ReadBuildLog(pb.ReadBuildLogRequest(name=build.name, follow=True))
    async for line in call:
        if line.text == "it runs":
            break
    call.cancel()
    await builder.builds.CancelBuild(pb.CancelBuildRequest(name=build.name))
    cancelled = [line async for line in builder.builds.WatchBuild(pb.WatchBuildRequest(name=build.name))][-1]
    assert cancelled.state == pb.Build.CANCELLED
    await asyncio.to_thread(wait_for, "the end of the command", lambda: not _is_running("sleep\x00876543"), 60)
    left = builder.data_dir / "engine"
    await asyncio.to_thread(wait_for, "the engine's tidying up", lambda: not list(left.glob("storage-*/work")), 60)


def _is_running(command: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if command.encode() in path.read_bytes():
                return True
    return False


async def test_what_a_killed_builder_left_of_its_engine_is_gone_once_the_next_has_started(
    registry: Registry, index: PackageIndex, tmp_path: Path
) -> None:
    engine = tmp_path / "builder" / "engine"
    (engine / "storage-3" / "work" / "tmp").mkdir(parents=True)
    (engine / "storage-3.lock").touch()
    (engine / "storage-3" / "work" / "tmp" / "secret-0").write_text(TOKEN)
    async with running_builder(registry, tmp_path / "builder"):
        assert sorted(engine.rglob("*")) == [engine / "storage-3", engine / "storage-3.lock"]
