"""Builds that give images, over real gRPC, with a real registry, the real uv and a base of a few hundred bytes."""

import asyncio
import hashlib
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ekiben.builder.v1 import builder_pb2 as pb
from ekiben.builder.v1 import images_pb2
from ekiben.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from services.builder.assembler import _of_model
from services.builder.compression import Method, Packed
from services.builder.platforms import here
from services.content import open_images
from services.content.archives import fetch_content
from services.content.images import REF_NAME, Platform
from services.content.images.layout import LayoutImageStore
from tests.fixtures_builder import Builder, PackageIndex, Registry, bento_folder, index, registry, running_builder
from tests.fixtures_lineage import use
from tests.oci_registry import OciRegistry, run_registry
from tests.small_base import small_base

__all__ = ["index", "registry"]

IMAGE = {"output": pb.Build.IMAGE}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A rule that finds a base for Python 3.11."""
    return small_base(tmp_path_factory.mktemp("base")).replace("3.11", "{python}")


@pytest.fixture
async def builder(registry: Registry, index: PackageIndex, bases: str, tmp_path: Path) -> AsyncIterator[Builder]:
    async with running_builder(registry, tmp_path / "builder", bases=bases) as running:
        yield running


async def get(builder: Builder, name: str) -> images_pb2.Image:
    return await builder.images.GetImage(images_pb2.GetImageRequest(name=name))


def entries(builder: Builder) -> dict[str, str]:
    """What the platform's layout names: reference → digest."""
    index = json.loads((builder.data_dir / "images" / "index.json").read_bytes())
    names = [(each.get("annotations", {}).get(REF_NAME), each["digest"]) for each in index["manifests"]]
    return {name: digest for name, digest in names if name}  # without a name: what is attached to images


async def test_a_build_gives_an_image_with_its_models(builder: Builder, tmp_path: Path) -> None:
    model = await builder.registry.push_model("iris:m1", {"weights": b"w" * 5000}, tmp_path / "model")
    bento = await builder.registry.push(bento_folder(tmp_path / "bento"), models=["iris:m1"])
    created = await builder.builds.CreateBuild(pb.CreateBuildRequest(bento=bento, **IMAGE))
    seen = [each async for each in builder.builds.WatchBuild(pb.WatchBuildRequest(name=created.name))]
    build = seen[-1]
    assert build.state == pb.Build.SUCCEEDED, await builder.log(build.name)
    percents = [each.progress_percent for each in seen]
    assert percents == sorted(percents) and percents[-1] == 100
    assert "assembling the image" in [each.step for each in seen]
    assert (build.output, list(build.platforms)) == (pb.Build.IMAGE, [str(here())])
    image = await get(builder, build.image)
    assert (image.bento, image.build, list(image.models)) == (bento, build.name, [model])
    assert [layer.content.split(" ")[0] for layer in image.layers] == ["", "the", "Python", "model", "bento"]
    assert image.size_bytes >= sum(layer.size_bytes for layer in image.layers)
    assert list(image.references) == [f"default/hello:{tag}" for tag in ("v1", f"IMAGE-{image.name[7:]}")]
    assert entries(builder) == dict.fromkeys(image.references, image.digest)
    assert image.location == f"oci:{builder.data_dir}/images:{image.references[1]}"
    listed = await builder.images.ListImages(images_pb2.ListImagesRequest(bento=bento))
    assert [each.name for each in listed.images] == [build.image] and not listed.images[0].layers
    assert not list((builder.data_dir / "tmp").iterdir())


async def test_equal_requests_share_one_build_and_a_model_that_is_there_is_not_fetched(
    builder: Builder, tmp_path: Path
) -> None:
    await builder.registry.push_model("iris:m1", {"weights": b"w" * 5000}, tmp_path / "model")
    bento = await builder.registry.push(bento_folder(tmp_path / "bento"), models=["iris:m1"])
    request = pb.CreateBuildRequest(bento=bento, **IMAGE)
    asked = await asyncio.gather(*(builder.builds.CreateBuild(request) for _ in range(4)))
    assert len({build.name for build in asked}) == 1
    first = await builder.ended(asked[0].name)
    assert await builder.builds.CreateBuild(request) == first
    other = bento_folder(tmp_path / "other", files={"src/service.py": b"import bentoml  # 2\n"})
    second = await builder.build(await builder.registry.push(other, "v2", ["iris:m1"]), **IMAGE)
    lines = await builder.log(second.name)
    assert second.state == pb.Build.SUCCEEDED and second.image != first.image
    assert "The layer of model iris:m1 is there already." in lines
    assert not any("Fetching model" in line for line in lines)
    environment = await builder.build(bento)
    assert environment.name != first.name and environment.environment.path and not environment.image


async def test_what_cannot_be_made_is_refused_in_words(builder: Builder, registry: Registry, tmp_path: Path) -> None:
    bento = await builder.registry.push(bento_folder(tmp_path / "bento"))
    with pytest.raises(FailedPrecondition, match="for linux/s390x are not looked for") as unsupported:
        await builder.build(bento, platforms=["linux/s390x"], **IMAGE)
    assert unsupported.value.reason == "PLATFORM_UNSUPPORTED"
    with pytest.raises(InvalidArgument, match="Only an image is for platforms"):
        await builder.build(bento, platforms=["linux/amd64"])
    with pytest.raises(NotFound, match="does not exist"):
        await get(builder, "images/0123456789")
    async with running_builder(registry, tmp_path / "without", name="c", bases="") as without:
        with pytest.raises(FailedPrecondition, match="EKIBEN_BUILDER_BASES"):
            await without.build(bento, **IMAGE)


async def test_a_build_that_failed_or_was_cancelled_is_retried(
    builder: Builder, index: PackageIndex, tmp_path: Path
) -> None:
    bento = await builder.registry.push(bento_folder(tmp_path / "bento", "late==1.0\nbentoml==1.4.39\n"))
    failed = await builder.build(bento, priority=pb.Build.BATCH, **IMAGE)
    assert failed.state == pb.Build.FAILED and not failed.image
    index.add("late", "1.0")
    again = await builder.builds.RetryBuild(pb.RetryBuildRequest(name=failed.name))
    assert (again.output, again.priority, again.bento) == (pb.Build.IMAGE, pb.Build.BATCH, bento)
    assert again.name != failed.name
    assert (await builder.ended(again.name)).state == pb.Build.SUCCEEDED
    with pytest.raises(FailedPrecondition, match="is SUCCEEDED") as refused:
        await builder.builds.RetryBuild(pb.RetryBuildRequest(name=again.name))
    assert refused.value.reason == "BUILD_NOT_RETRIABLE"


async def test_a_build_in_which_something_was_aborted_fails_and_was_not_cancelled(
    registry: Registry, index: PackageIndex, bases: str, tmp_path: Path
) -> None:
    async def fail(step: str) -> None:
        if step == "assemble":
            raise Aborted("A file of the bento changed while it was packed. Build again.", reason="FILE_CHANGED")

    bento = await registry.push(bento_folder(tmp_path / "bento"))
    async with running_builder(registry, tmp_path / "builder", fail, bases=bases) as builder:
        build = await builder.build(bento, **IMAGE)
        assert build.state == pb.Build.FAILED and build.failure.message.startswith("A file of the bento changed")
        assert "The build was cancelled." not in await builder.log(build.name)


async def test_an_image_that_is_used_is_kept_and_one_that_was_deleted_leaves_nothing(
    registry: Registry, index: PackageIndex, bases: str, tmp_path: Path
) -> None:
    keep_nothing = {"images_keep_newest": 0, "images_keep_days": 0.0}
    async with running_builder(registry, tmp_path / "builder", bases=bases, **keep_nothing) as builder:
        first = await builder.build(await registry.push(bento_folder(tmp_path / "one")), **IMAGE)
        other = bento_folder(tmp_path / "two", files={"src/service.py": b"import bentoml  # 2\n"})
        second = await builder.build(await registry.push(other, "v2"), **IMAGE)
        await use(registry, first.name)
        with pytest.raises(FailedPrecondition, match="is used by deployments/demo/revisions/1") as used:
            await builder.images.DeleteImage(images_pb2.DeleteImageRequest(name=first.image))
        assert used.value.reason == "IMAGE_IN_USE"

        would = await builder.images.CollectImages(images_pb2.CollectImagesRequest(dry_run=True))
        assert [image.name for image in would.images] == [second.image]
        layout = builder.data_dir / "images"
        before = entries(builder)
        assert len(before) == 4
        for path in (layout / "blobs" / "sha256").iterdir():
            os.utime(path, (0, 0))
        stats = await builder.images.GetImageStats(images_pb2.GetImageStatsRequest())
        assert (stats.image_count, stats.garbage_count) == (2, 0) and stats.shared_bytes > 0 and stats.layers_reused > 0

        done = await builder.images.CollectImages(images_pb2.CollectImagesRequest())
        assert [image.name for image in done.images] == [second.image]
        image = await get(builder, first.image)
        assert entries(builder) == dict.fromkeys(image.references, image.digest)
        assert done.blob_count >= 3  # manifest, configuration, the bento's own layer; what was attached to it
        for layer in image.layers:
            assert (
                layout / "blobs" / "sha256" / layer.digest.removeprefix("sha256:")
            ).stat().st_size == layer.size_bytes
        rebuilt = await builder.build(second.bento, **IMAGE)
        assert rebuilt.name != second.name and rebuilt.image == second.image
        await builder.images.DeleteImage(images_pb2.DeleteImageRequest(name=first.image, force=True))
        with pytest.raises(NotFound):
            await get(builder, first.image)


async def test_what_a_crash_left_in_the_layout_is_put_right(builder: Builder, tmp_path: Path) -> None:
    bento = await builder.registry.push(bento_folder(tmp_path / "bento"))
    build = await builder.build(bento, **IMAGE)
    store = LayoutImageStore(builder.data_dir / "images")
    named = await store.find("default/hello:v1")
    await store.move(["default/gone:v1", "default/gone:IMAGE-0123", "default/hello:BUILD-b0123"], named)
    for path in (builder.data_dir / "images" / "blobs" / "sha256").iterdir():
        os.utime(path, (0, 0))
    await builder.images.CollectImages(images_pb2.CollectImagesRequest())
    image = await get(builder, build.image)
    assert entries(builder) == dict.fromkeys(image.references, image.digest)


async def test_images_are_kept_in_a_registry_where_the_settings_say_so(
    registry: Registry,
    index: PackageIndex,
    bases: str,
    oci_registry: OciRegistry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EKIBEN_REGISTRY_INSECURE", oci_registry.host)
    url = f"docker://{oci_registry.host}/{oci_registry.new_repository('builder')}"
    await registry.push_model("iris:m1", {"weights": b"w" * 5000}, tmp_path / "model")
    first = await registry.push(bento_folder(tmp_path / "one"), models=["iris:m1"])
    other = bento_folder(tmp_path / "two", files={"src/service.py": b"import bentoml  # 2\n"})
    second = await registry.push(other, "v2", ["iris:m1"])
    async with running_builder(registry, tmp_path / "builder", bases=bases, images=url) as builder:
        build = await builder.build(first, **IMAGE)
        assert build.state == pb.Build.SUCCEEDED, await builder.log(build.name)
        image = await get(builder, build.image)
        assert image.location == f"{url}/{image.references[1]}"
        async with open_images(f"{url}/default/hello") as (store, _):
            assert {"v1", image.references[1].rpartition(":")[2]} <= set(await store.references())
            for tag in ("v1", image.references[1].rpartition(":")[2]):
                assert str((await store.resolve(tag, here()))[0].digest) == image.digest
        again = await builder.build(second, **IMAGE)
        assert "The layer of model iris:m1 is there already." in await builder.log(again.name)
        stats = await builder.images.GetImageStats(images_pb2.GetImageStatsRequest())
        assert (stats.image_count, stats.location, stats.blob_count) == (2, url, 0)
        await builder.images.DeleteImage(images_pb2.DeleteImageRequest(name=build.image))
        assert not (await builder.images.CollectImages(images_pb2.CollectImagesRequest())).images
        async with open_images(f"{url}/default/hello") as (store, _):
            other = await get(builder, again.image)
            named = {each for each in await store.references() if not each.startswith("sha256-")}  # what is attached
            assert named == {each.rpartition(":")[2] for each in other.references}
        rebuilt = await builder.build(first, **IMAGE)
        assert rebuilt.name != build.name and rebuilt.image == build.image


async def test_models_of_the_hub_are_not_asked_of_the_registry(builder: Builder, tmp_path: Path) -> None:
    hub = {"tag": "google--bert:r1", "registry": "huggingface", "metadata": {"model_id": "google/bert"}}
    folder = bento_folder(tmp_path / "bento", manifest={"models": [hub]})
    build = await builder.build(await builder.registry.push(folder, models=["google--bert:r1"]), **IMAGE)
    assert build.state == pb.Build.SUCCEEDED, await builder.log(build.name)
    assert any("google/bert of Hugging Face" in line for line in await builder.log(build.name))
    assert list((await get(builder, build.image)).models) == []


async def test_a_registry_that_takes_no_tags_away_is_named(
    registry: Registry, index: PackageIndex, bases: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_registry(settings={"storage": {"filesystem": {"rootdirectory": str(tmp_path / "oci")}}}) as server:
        monkeypatch.setenv("EKIBEN_REGISTRY_INSECURE", server.host)
        where = {"bases": bases, "images": f"docker://{server.host}/ekiben", "images_keep_newest": 0}
        async with running_builder(registry, tmp_path / "builder", images_keep_days=0.0, **where) as builder:
            bento = await registry.push(bento_folder(tmp_path / "one"))
            build = await builder.build(bento, **IMAGE)
            with pytest.raises(FailedPrecondition, match="does not let us take tags away") as refused:
                await builder.images.DeleteImage(images_pb2.DeleteImageRequest(name=build.image))
            assert refused.value.reason == "TAGS_NOT_DELETABLE" and (await get(builder, build.image)).references
            done = await builder.images.CollectImages(images_pb2.CollectImagesRequest())
            assert [image.name for image in done.images] == [build.image]
            again = await builder.build(bento, **IMAGE)
            assert again.image == build.image
            await builder.images.DeleteImage(images_pb2.DeleteImageRequest(name=build.image, force=True))


async def test_what_is_pushed_again_while_it_is_built_answers_no_request_for_what_was_there(
    registry: Registry, index: PackageIndex, bases: str, tmp_path: Path
) -> None:
    old, new = (bento_folder(tmp_path / each, files={"src/service.py": each.encode()}) for each in ("old", "new"))
    digests: list[str] = []
    bento = await registry.push(old)

    async def push(step: str) -> None:
        if step == "fetch" and not digests:
            digests.append(await registry.digest(bento))
            await registry.push(new)
            digests.append(await registry.digest(bento))

    async with running_builder(registry, tmp_path / "builder", push, bases=bases) as builder:
        first = await builder.build(bento, **IMAGE)
        assert (await get(builder, first.image)).bento_digest == digests[1]
        assert await builder.builds.CreateBuild(pb.CreateBuildRequest(bento=bento, **IMAGE)) == first
        await registry.push(old)
        second = await builder.build(bento, **IMAGE)
        assert second.name != first.name and second.image != first.image
        assert (await get(builder, second.image)).bento_digest == digests[0]


async def test_who_asks_for_what_is_there_again_does_not_wait_for_what_was_pushed_between(
    registry: Registry, index: PackageIndex, bases: str, tmp_path: Path
) -> None:
    old, new = (bento_folder(tmp_path / each, files={"src/service.py": each.encode()}) for each in ("old", "new"))
    bento = await registry.push(old)
    running: list[Builder] = []
    asked: list[pb.Build] = []

    async def push(step: str) -> None:
        if step == "fetch" and not asked:
            await registry.push(new)
        elif step == "assemble" and not asked:
            await registry.push(old)
            asked.append(await running[0].builds.CreateBuild(pb.CreateBuildRequest(bento=bento, **IMAGE)))

    async with running_builder(registry, tmp_path / "builder", push, bases=bases) as builder:
        running.append(builder)
        first = await builder.build(bento, **IMAGE)
        second = await builder.ended(asked[0].name)
        assert second.name != first.name and second.image != first.image
        assert (await get(builder, second.image)).bento_digest == await registry.digest(bento)


async def test_an_image_that_is_deleted_while_it_is_built_again_is_there(
    registry: Registry, index: PackageIndex, bases: str, tmp_path: Path
) -> None:
    bento = await registry.push(bento_folder(tmp_path / "bento"))
    running: list[Builder] = []

    async def delete(step: str) -> None:
        if step == "finish" and running:
            listed = await running[0].images.ListImages(images_pb2.ListImagesRequest())
            await running[0].images.DeleteImage(images_pb2.DeleteImageRequest(name=listed.images[0].name))

    async with running_builder(registry, tmp_path / "builder", delete, bases=bases) as builder:
        await builder.build(bento, **IMAGE)
        running.append(builder)
        image = await get(builder, (await builder.build(bento, force=True, **IMAGE)).image)
        assert entries(builder) == dict.fromkeys(image.references, image.digest)


async def test_an_image_has_the_model_that_is_there_now(builder: Builder, tmp_path: Path) -> None:
    registry = builder.registry
    await registry.push_model("iris:m1", {"weights": b"one"}, tmp_path / "model")
    bento = await registry.push(bento_folder(tmp_path / "bento"), models=["iris:m1"])
    first = await builder.build(bento, **IMAGE)
    assert await builder.build(bento, **IMAGE) == first
    await registry.push_model("iris:m1", {"weights": b"two"}, tmp_path / "model")
    second = await builder.build(bento, **IMAGE)
    assert second.name != first.name and second.image != first.image


async def test_a_model_that_is_pushed_again_while_it_is_fetched_is_not_taken_for_the_one_before(
    registry: Registry, index: PackageIndex, bases: str, tmp_path: Path
) -> None:
    await registry.push_model("iris:m1", {"weights": b"one"}, tmp_path / "model")
    bento = await registry.push(bento_folder(tmp_path / "bento"), models=["iris:m1"])
    pushed: list[str] = []

    async def push(step: str) -> None:
        if step == "model" and not pushed:
            pushed.append(await registry.push_model("iris:m1", {"weights": b"two"}, tmp_path / "model"))

    async with running_builder(registry, tmp_path / "builder", push, bases=bases) as builder:
        failed = await builder.build(bento, **IMAGE)
        assert failed.state == pb.Build.FAILED and "pushed again while" in failed.failure.message
        again = await builder.builds.RetryBuild(pb.RetryBuildRequest(name=failed.name))
        assert (await builder.ended(again.name)).state == pb.Build.SUCCEEDED


@pytest.mark.parametrize("how", ["in order", "zipped", "backwards"])
async def test_a_model_comes_straight_into_its_layer_which_is_the_same_however_it_was_sent(
    registry: Registry, index: PackageIndex, bases: str, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"weights": b"w" * 3_000_000, "a/deep/file": b"1", "a-file": b"2"}
    await registry.push_model("iris:m1", files, tmp_path / "model")
    (tmp_path / "model" / "run.sh").write_bytes(b"#!")
    (tmp_path / "model" / "run.sh").chmod(0o755)
    paths = sorted(each for each in (tmp_path / "model").rglob("*"))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz" if how == "zipped" else "w") as archive:
        for path in paths[:: -1 if how == "backwards" else 1]:
            archive.add(path, f"./{path.relative_to(tmp_path / 'model')}", recursive=False)
    await registry.push_model("iris:m1", files, tmp_path / "model", out.getvalue())
    bento = await registry.push(bento_folder(tmp_path / "bento"), models=["iris:m1"])
    unpacked: list[str] = []

    async def fetch(uploads: Any, address: str, resource: str, into: Path) -> Any:
        unpacked.append(resource)
        return await fetch_content(uploads, address, resource, into)

    monkeypatch.setattr("services.builder.app.fetch_content", fetch)
    async with running_builder(registry, tmp_path / "builder", bases=bases) as builder:
        build = await builder.build(bento, **IMAGE)
        assert build.state == pb.Build.SUCCEEDED, await builder.log(build.name)
        image = await get(builder, build.image)
        (layer,) = (layer for layer in image.layers if layer.content == "model iris:m1")
        of_folder = Packed(_of_model("iris:m1", tmp_path / "model")(), Method.NONE)
        assert layer.digest == f"sha256:{hashlib.sha256(b''.join(of_folder)).hexdigest()}"
        assert unpacked == [bento, *["modelRepositories/iris/models/m1"] * (how == "backwards")]


async def test_another_layout_is_another_place_whose_images_are_left_alone(
    registry: Registry, index: PackageIndex, bases: str, tmp_path: Path
) -> None:
    bento, at = await registry.push(bento_folder(tmp_path / "bento")), tmp_path / "builder"
    async with running_builder(registry, at, bases=bases, images=f"oci:{tmp_path}/a") as builder:
        image = await get(builder, (await builder.build(bento, **IMAGE)).image)
    async with running_builder(registry, at, bases=bases, images=f"oci:{tmp_path}/b") as builder:
        assert not (await builder.images.ListImages(images_pb2.ListImagesRequest())).images
        assert not (await builder.images.CollectImages(images_pb2.CollectImagesRequest())).images
    async with running_builder(registry, at, bases=bases, images=f"oci:{tmp_path}/a") as builder:
        assert await get(builder, image.name) == image


async def test_another_organizations_image_in_that_registry_is_no_base(
    registry: Registry, index: PackageIndex, bases: str, tmp_path: Path
) -> None:
    named = {"image": {"base_image": "127.0.0.1:1/ekiben/other/iris:v1", "python_version": "3.11"}}
    bento = await registry.push(bento_folder(tmp_path / "bento", manifest=named))
    url = "docker://127.0.0.1:1/ekiben"
    async with running_builder(registry, tmp_path / "builder", bases=bases, images=url) as builder:
        build = await builder.build(bento, **IMAGE)
        assert build.state == pb.Build.FAILED and "not one of default" in build.failure.message


async def test_an_image_for_two_platforms_is_an_index_of_two(
    registry: Registry, index: PackageIndex, tmp_path: Path
) -> None:
    platforms = [Platform("linux", "amd64"), Platform("linux", "arm64")]
    for platform in platforms:
        base = await asyncio.to_thread(small_base, tmp_path / "base", platform=platform)
    bento = await registry.push(bento_folder(tmp_path / "bento"))
    async with running_builder(registry, tmp_path / "builder", bases=base) as builder:
        one = await builder.build(bento, platforms=["linux/amd64"], **IMAGE)
        both = await builder.build(bento, platforms=["linux/arm64", "linux/amd64"], **IMAGE)
        assert both.state == pb.Build.SUCCEEDED, await builder.log(both.name)
        image = await get(builder, both.image)
        assert list(image.platforms) == ["linux/amd64", "linux/arm64"]
        assert {layer.platform for layer in image.layers} == set(image.platforms)
        store = LayoutImageStore(builder.data_dir / "images")
        resolved = {str(p): (await store.resolve("default/hello:v1", p))[0].digest for p in platforms}
        assert len(set(resolved.values())) == 2
        before = await get(builder, one.image)
        assert list(before.references) == [f"default/hello:IMAGE-{one.image[7:]}"]
        assert str(resolved["linux/amd64"]) == before.digest
        for path in (builder.data_dir / "images" / "blobs" / "sha256").iterdir():
            os.utime(path, (0, 0))
        await builder.images.CollectImages(images_pb2.CollectImagesRequest())
        for platform in platforms:
            _, found = await store.resolve("default/hello:v1", platform)
            assert [await store.size(layer.digest) for layer in found.layers] == [
                layer.size_bytes for layer in found.layers
            ]
