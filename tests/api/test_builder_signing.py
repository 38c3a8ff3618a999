"""What a builder says of the images that it makes, and signs, over real gRPC."""

from pathlib import Path

import pytest

from ekiben.builder.v1 import builder_pb2 as pb
from ekiben.builder.v1 import images_pb2
from services.builder.image_signing import attestations, one_of, verify
from services.builder.platforms import here
from services.builder.settings import Settings
from services.content.attestations import keys
from services.content.attestations.verification import Trust
from services.kernel.settings import SettingsError
from tests.fixtures_builder import PackageIndex, Registry, bento_folder, index, registry, running_builder
from tests.small_base import small_base

__all__ = ["index", "registry"]


@pytest.fixture
def bases(tmp_path: Path) -> str:
    return small_base(tmp_path / "base").replace("3.11", "{python}")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    made = keys.generate()
    (tmp_path / "our.key").write_bytes(keys.private_pem(made, b"secret"))
    (tmp_path / "our.pub").write_bytes(keys.public_pem(made.public_key()))
    (tmp_path / "password").write_text("secret\n")
    return tmp_path / "our.key"


async def test_a_builder_with_a_key_signs_what_it_makes(
    registry: Registry, index: PackageIndex, bases: str, key: Path, tmp_path: Path
) -> None:
    options = {
        "bases": bases,
        "signing_key_file": key,
        "signing_key_password_file": tmp_path / "password",
        "identity": "https://builds.example.com/one",
    }
    async with running_builder(registry, tmp_path / "builder", **options) as builder:
        await registry.push_model("iris:m1", {"weights": b"w" * 5000}, tmp_path / "model")
        bento = await registry.push(bento_folder(tmp_path / "bento"), models=["iris:m1"])
        build = await builder.build(bento, output=pb.Build.IMAGE)
        assert build.state == pb.Build.SUCCEEDED, await builder.log(build.name)
        image = await builder.images.GetImage(images_pb2.GetImageRequest(name=build.image))
        trust = Trust(keys.load_trusted([key.with_suffix(".pub")]))
        assert str((await verify(image.location, here(), trust, whole=True)).digest) == image.digest
        found = await attestations(image.location, here(), trust)
        bill = one_of(found, "sbom", "it", signed=True).statement.predicate
        assert {"bentoml", "iris"} <= {each["name"] for each in bill["components"]}
        said = one_of(found, "provenance", "it", signed=True).statement.predicate
        assert said["runDetails"]["builder"]["id"] == "https://builds.example.com/one"
        assert any(line.startswith("Signed sha256:") for line in await builder.log(build.name))
        again = await builder.build(bento, output=pb.Build.IMAGE, force=True)
        assert again.name != build.name and again.image == build.image
        assert len(await attestations(image.location, here(), trust)) == len(found)


async def test_a_builder_without_attestations_attaches_nothing(
    registry: Registry, index: PackageIndex, bases: str, tmp_path: Path
) -> None:
    async with running_builder(registry, tmp_path / "builder", bases=bases, attestations=False) as builder:
        build = await builder.build(await registry.push(bento_folder(tmp_path / "bento")), output=pb.Build.IMAGE)
        image = await builder.images.GetImage(images_pb2.GetImageRequest(name=build.image))
        assert await attestations(image.location, here(), Trust()) == []


async def test_a_key_that_cannot_be_used_stops_the_start_in_words(
    registry: Registry, key: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="is encrypted: give its password"):
        async with running_builder(registry, tmp_path / "builder", signing_key_file=key):
            pass
    with pytest.raises(SettingsError, match="leave attestations on"):
        Settings(database_url="sqlite://", data_dir=tmp_path, signing_key_file=key, attestations=False)
