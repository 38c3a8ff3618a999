"""Images of bentos that leave their models to images of their own, over real gRPC with the real uv."""

import gzip
import io
import json
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ekiben.builder.v1 import builder_pb2 as pb
from ekiben.builder.v1 import images_pb2
from services.builder.images import MODEL, NOWHERE
from services.content import open_images
from services.content.images import INDEX, Descriptor, Platform
from services.content.images.layout import LayoutImageStore
from services.content.images.resolving import read_json
from tests.fixtures_builder import Builder, PackageIndex, Registry, bento_folder, index, registry, running_builder
from tests.oci_registry import OciRegistry
from tests.small_base import small_base

__all__ = ["index", "registry"]

APART = {"output": pb.Build.IMAGE_AND_MODELS}
PLATFORMS = ["linux/amd64", "linux/arm64"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base for two platforms."""
    folder = tmp_path_factory.mktemp("base")
    return [small_base(folder, platform=Platform.parse(each)) for each in PLATFORMS][-1]


@pytest.fixture
async def builder(registry: Registry, index: PackageIndex, bases: str, tmp_path: Path) -> AsyncIterator[Builder]:
    async with running_builder(registry, tmp_path / "builder", bases=bases) as running:
        yield running


async def files_of(store: LayoutImageStore, layer: Descriptor) -> dict[str, bytes]:
    content = gzip.decompress(b"".join([chunk async for chunk in store.read(layer)]))
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {each.name: file.read() if (file := archive.extractfile(each)) else b"" for each in archive}


async def made(builder: Builder, build: pb.Build) -> images_pb2.Image:
    assert build.state == pb.Build.SUCCEEDED, await builder.log(build.name)
    return await builder.images.GetImage(images_pb2.GetImageRequest(name=build.image))


async def test_models_are_images_of_their_own_with_the_same_layers(builder: Builder, tmp_path: Path) -> None:
    for version in ("m1", "m2"):
        await builder.registry.push_model(f"iris:{version}", {"weights": version.encode() * 5000}, tmp_path / version)
    bento = await builder.registry.push(bento_folder(tmp_path / "bento"), models=["iris:m1", "iris:m2"])
    whole = await made(builder, await builder.build(bento, output=pb.Build.IMAGE))
    apart = await made(builder, await builder.build(bento, **APART))
    # Each request is answered by its own, and the bento's version goes on naming the image that has all.
    assert apart.name != whole.name and await made(builder, await builder.build(bento, **APART)) == apart
    assert list(apart.references) == ["default/hello:CODE-v1", f"default/hello:IMAGE-{apart.name[7:]}"]
    assert "default/hello:v1" in (await made(builder, await builder.build(bento, output=pb.Build.IMAGE))).references
    mounted = {layer.model: layer for layer in apart.layers if layer.model}
    assert list(mounted) == [f"modelRepositories/iris/models/{each}" for each in ("m1", "m2")] == list(apart.models)
    layers = {layer.content: layer.digest for layer in whole.layers}
    assert {layer.content: layer.digest for layer in mounted.values()} == {
        name: digest for name, digest in layers.items() if name.startswith("model ")
    }
    async with open_images(apart.location) as (store, reference):
        assert isinstance(store, LayoutImageStore)
        descriptor = await store.find(reference)
        assert descriptor.media_type == INDEX and str(descriptor.digest) == apart.digest
        entries = [Descriptor.from_json(each) for each in (await read_json(store, descriptor))["manifests"]]
        assert [each.annotations.get(MODEL) for each in entries] == [None, "iris:m1", "iris:m2"]
        assert {each.platform for each in entries[1:]} == {NOWHERE}
        assert [str(each.digest) for each in entries[1:]] == [layer.image for layer in mounted.values()]
        _, image = await store.resolve(reference, Platform.here())
        assert not any(str(layer.digest) == each.digest for layer in image.layers for each in mounted.values())
        files = await files_of(store, image.layers[-1])
        at = "home/bentoml/bento/models/iris"
        assert files[f"{at}/latest"] == b"m2" and {f"{at}/m1", f"{at}/m2"} <= files.keys()


async def test_for_several_platforms_a_model_is_an_index_of_one_layer(builder: Builder, tmp_path: Path) -> None:
    await builder.registry.push_model("iris:m1", {"weights": b"w" * 5000}, tmp_path / "model")
    bento = await builder.registry.push(bento_folder(tmp_path / "bento"), models=["iris:m1"])
    apart = await made(builder, await builder.build(bento, platforms=PLATFORMS, **APART))
    (mounted,) = [layer for layer in apart.layers if layer.model]
    async with open_images(apart.location) as (store, reference):
        descriptor = await store.find(reference)
        (entry,) = [each for each in (await read_json(store, descriptor))["manifests"] if each.get("annotations")]
        assert entry["digest"] == mounted.image and entry["mediaType"] == INDEX
        of_model: list[dict[str, Any]] = (await read_json(store, Descriptor.from_json(entry)))["manifests"]
        assert [each["platform"]["architecture"] for each in of_model] == ["amd64", "arm64"]
        manifests = [await read_json(store, Descriptor.from_json(each)) for each in of_model]
        assert {layer["digest"] for each in manifests for layer in each["layers"]} == {mounted.digest}
        assert len({each["config"]["digest"] for each in manifests}) == 2


async def test_a_bento_without_models_gives_the_same_image_either_way(builder: Builder, tmp_path: Path) -> None:
    bento = await builder.registry.push(bento_folder(tmp_path / "bento"))
    whole = await made(builder, await builder.build(bento, output=pb.Build.IMAGE))
    apart = await made(builder, await builder.build(bento, **APART))
    assert (apart.digest, list(apart.references)) == (whole.digest, list(whole.references))


async def test_a_build_that_ended_before_its_image_had_a_name_gives_the_same_one_again_and_all_goes_when_deleted(
    registry: Registry, index: PackageIndex, bases: str, tmp_path: Path
) -> None:
    ends = ["tag"]

    async def end(step: str) -> None:
        if step in ends:
            ends.remove(step)
            raise OSError("The machine stops here.")

    await registry.push_model("iris:m1", {"weights": b"w" * 5000}, tmp_path / "model")
    bento = await registry.push(bento_folder(tmp_path / "bento"), models=["iris:m1"])
    async with running_builder(registry, tmp_path / "builder", end, bases=bases) as builder:
        failed = await builder.build(bento, **APART)
        assert failed.state == pb.Build.FAILED and not ends
        apart = await made(builder, await builder.build(bento, **APART))
        blobs = builder.data_dir / "images" / "blobs" / "sha256"
        (mounted,) = [layer.image for layer in apart.layers if layer.model]
        assert (blobs / mounted.removeprefix("sha256:")).exists()
        assert json.loads((blobs / apart.digest.removeprefix("sha256:")).read_bytes())["mediaType"] == INDEX
        await builder.images.DeleteImage(images_pb2.DeleteImageRequest(name=apart.name))
        names = json.loads((builder.data_dir / "images" / "index.json").read_bytes())["manifests"]
        assert not [each for each in names if "CODE-" in str(each) or "IMAGE-" in str(each)]


async def test_in_a_registry_they_lie_in_the_repository_of_the_bento(
    registry: Registry,
    index: PackageIndex,
    bases: str,
    oci_registry: OciRegistry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EKIBEN_REGISTRY_INSECURE", oci_registry.host)
    url = f"docker://{oci_registry.host}/{oci_registry.new_repository()}"
    await registry.push_model("iris:m1", {"weights": b"w" * 5000}, tmp_path / "model")
    bento = await registry.push(bento_folder(tmp_path / "bento"), models=["iris:m1"])
    async with running_builder(registry, tmp_path / "builder", bases=bases, images=url) as builder:
        apart = await made(builder, await builder.build(bento, **APART))
        (mounted,) = [layer for layer in apart.layers if layer.model]
        async with open_images(f"{url}/default/hello@{mounted.image}") as (store, reference):
            _, image = await store.resolve(reference, Platform.here())
            assert [str(layer.digest) for layer in image.layers] == [mounted.digest]
            named = {each for each in await store.references() if not each.startswith("sha256-")}  # what is attached
            assert named == {"CODE-v1", f"IMAGE-{apart.name[7:]}"}
