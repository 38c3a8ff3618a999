"""What befalls a build of an image in its middle: killed builders, full disks, models that are deleted.

Whatever happens, each reference of the layout names an image all of which is there.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from ekiben.builder.v1 import builder_pb2 as pb
from ekiben.builder.v1 import images_pb2
from ekiben.registry.v1 import registry_pb2
from ekiben.registry.v1.registry_pb2_grpc import ModelsStub
from services.builder.platforms import here
from services.content.images.layout import LayoutImageStore
from tests.builder_kills import Process, created, ended
from tests.fixtures_builder import PackageIndex, Registry, bento_folder, index, registry, running_builder
from tests.small_base import small_base

__all__ = ["index", "registry"]
MODEL = {"weights": b"w" * 3_000_000}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_base(tmp_path_factory.mktemp("base")).replace("3.11", "{python}")


@pytest.fixture
async def bento(registry: Registry, index: PackageIndex, tmp_path: Path) -> str:
    """One that uses a model."""
    await registry.push_model("iris:m1", MODEL, tmp_path / "model")
    return await registry.push(bento_folder(tmp_path / "bento"), models=["iris:m1"])


async def named(layout: Path) -> dict[str, str]:
    """Reference → digest, of images all of whose content was read and is right."""
    store = LayoutImageStore(layout)
    found = {}
    for reference in await store.references():
        descriptor, image = await store.resolve(reference, here())
        for layer in image.layers:
            async for _ in store.read(layer):
                pass
        found[reference] = str(descriptor.digest)
    return found


@pytest.fixture
async def process(registry: Registry, bases: str, tmp_path: Path) -> AsyncIterator[Process]:
    process = Process(registry, tmp_path / "builder", settings={"bases": bases})
    try:
        yield process
    finally:
        process.end()


async def test_a_killed_builders_image_is_finished_by_another_with_the_same_digest(
    process: Process, bento: str, tmp_path: Path
) -> None:
    digests = {}
    for number, step in enumerate(["", "model", "write 2", "write 4", "tag", "finish"]):
        process.data_dir, process.step = tmp_path / str(number) / "builder", step
        process.data_dir.parent.mkdir()
        layout = process.data_dir / "images"
        process.start()
        name = await created(process, bento, output=pb.Build.IMAGE)
        if step:
            await process.died()
            left = await named(layout) if (layout / "index.json").exists() else {}
            assert len(left) == {"tag": 1, "finish": 2}.get(step, 0), (step, left)
            process.start()
        build, lines = await ended(process, name)
        assert build.state == pb.Build.SUCCEEDED, lines
        assert any("taken up again (attempt 2)" in line for line in lines) == bool(step)
        process.end()
        (digest,) = set((await named(layout)).values())
        assert len(await named(layout)) == 2
        digests[step] = digest
        assert not list((process.data_dir / "tmp").iterdir())
    assert len(set(digests.values())) == 1, digests


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 64 MiB."""
    with tempfile.TemporaryDirectory(prefix="ekfull-", dir="/tmp") as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m,mode=700", "tmpfs", folder]
        if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("needs the right to mount a small file system")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=False)


async def test_a_full_disk_fails_the_build_in_words_and_a_retry_makes_the_image(
    registry: Registry, bento: str, bases: str, small_disk: Path, tmp_path: Path
) -> None:
    filler = small_disk / "filler"
    at = ""

    async def fill(step: str) -> None:
        if step == at:
            with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1 << 16))

    database = f"sqlite:///{tmp_path}/builder.db"
    digests = set()
    async with running_builder(registry, small_disk, fill, bases=bases, database_url=database) as builder:
        for at in ("assemble", "model", "tag"):
            build = await builder.build(bento, output=pb.Build.IMAGE, force=True)
            assert build.state == pb.Build.FAILED, (at, build)
            assert "full" in build.failure.message or "space" in build.failure.message, build.failure
            filler.unlink()
            assert set(await named(small_disk / "images")) <= {f"default/hello:BUILD-{build.name[7:]}"}
            at = ""
            again = await builder.builds.RetryBuild(pb.RetryBuildRequest(name=build.name))
            assert (await builder.ended(again.name)).state == pb.Build.SUCCEEDED
            digests |= set((await named(small_disk / "images")).values())
            image = await builder.images.ListImages(images_pb2.ListImagesRequest())
            await builder.images.DeleteImage(images_pb2.DeleteImageRequest(name=image.images[0].name))
            for path in (small_disk / "images" / "blobs" / "sha256").iterdir():
                os.utime(path, (0, 0))
            await builder.images.CollectImages(images_pb2.CollectImagesRequest())
    assert len(digests) == 1


async def test_a_model_that_is_deleted_while_its_image_is_built_gives_an_error_or_the_image(
    registry: Registry, bento: str, bases: str, tmp_path: Path
) -> None:
    async def delete(step: str) -> None:
        if step == "model":
            name = "modelRepositories/iris/models/m1"
            await ModelsStub(registry.channel).DeleteModel(registry_pb2.DeleteModelRequest(name=name, force=True))

    async with running_builder(registry, tmp_path / "builder", delete, bases=bases) as builder:
        build = await builder.build(bento, output=pb.Build.IMAGE)
        assert build.state == pb.Build.FAILED, await builder.log(build.name)
        assert "iris" in build.failure.message and not build.image
        assert await named(builder.data_dir / "images") == {}
        retried = await builder.builds.RetryBuild(pb.RetryBuildRequest(name=build.name))
        assert "iris" in (await builder.ended(retried.name)).failure.message


async def test_a_cancelled_build_leaves_no_image(registry: Registry, bento: str, bases: str, tmp_path: Path) -> None:
    reached, asked = asyncio.Event(), asyncio.Event()

    async def wait(step: str) -> None:
        if step == "tag":
            reached.set()
            await asked.wait()

    async with running_builder(registry, tmp_path / "builder", wait, bases=bases) as builder:
        build = await builder.builds.CreateBuild(pb.CreateBuildRequest(bento=bento, output=pb.Build.IMAGE))
        async with asyncio.timeout(60):
            await reached.wait()
        await builder.builds.CancelBuild(pb.CancelBuildRequest(name=build.name))
        assert (await builder.ended(build.name)).state == pb.Build.CANCELLED
        assert not (await builder.images.ListImages(images_pb2.ListImagesRequest())).images
        assert list(await named(builder.data_dir / "images")) == [f"default/hello:BUILD-{build.name[7:]}"]
        for path in (builder.data_dir / "images" / "blobs" / "sha256").iterdir():
            os.utime(path, (0, 0))
        await builder.images.CollectImages(images_pb2.CollectImagesRequest())
        assert json.loads((builder.data_dir / "images" / "index.json").read_bytes())["manifests"] == []
