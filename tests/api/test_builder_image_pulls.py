"""What a build gave is pulled through `/v2/` with the registry's own API tokens, wherever the builder keeps images."""

import base64
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from ekiben.builder.v1 import builder_pb2 as pb
from ekiben.builder.v1 import images_pb2
from tests.fixtures_builder import Builder, PackageIndex, Registry, bento_folder, index, registry, running_builder
from tests.image_content import digest_of
from tests.oci_registry import OciRegistry
from tests.small_base import small_base

__all__ = ["index", "registry"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A rule that finds a base for Python 3.11."""
    return small_base(tmp_path_factory.mktemp("base")).replace("3.11", "{python}")


@dataclass
class Place:
    """A builder that serves its images, and what it keeps them in."""

    builder: Builder
    socket: Path
    kind: str

    async def get(self, path: str, token: str) -> tuple[int, Mapping[str, str], bytes]:
        """Ask as an engine does."""
        login = base64.b64encode(f"engine:{token}".encode()).decode()
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.socket))) as session:
            async with session.get(f"http://images{path}", headers={"Authorization": f"Basic {login}"}) as answer:
                return answer.status, answer.headers, await answer.read()


@pytest.fixture(params=["layout", "registry"])
async def place(
    request: pytest.FixtureRequest,
    registry: Registry,
    index: PackageIndex,
    bases: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Place]:
    settings = {"bases": bases, "images_listen": f"unix:{registry.run_dir}/images"}
    if request.param == "registry":
        elsewhere: OciRegistry = request.getfixturevalue("oci_registry")
        monkeypatch.setenv("EKIBEN_REGISTRY_INSECURE", elsewhere.host)
        settings["images"] = f"docker://{elsewhere.host}/{elsewhere.new_repository('place')}"
    async with running_builder(registry, tmp_path / "builder", **settings) as running:
        yield Place(running, registry.run_dir / "images", request.param)


async def test_an_image_that_was_built_is_pulled_until_it_is_deleted(place: Place, tmp_path: Path) -> None:
    builder, admin = place.builder, place.builder.registry.admin_token
    assert (await place.get("/v2/default/hello/manifests/v1", admin))[0] == 404
    await builder.registry.push_model("iris:m1", {"weights": b"w" * 5000}, tmp_path / "model")
    bento = await builder.registry.push(bento_folder(tmp_path / "bento"), models=["iris:m1"])
    build = await builder.build(bento, output=pb.Build.IMAGE)
    assert build.state == pb.Build.SUCCEEDED, await builder.log(build.name)
    image = await builder.images.GetImage(images_pb2.GetImageRequest(name=build.image))
    status, headers, body = await place.get("/v2/default/hello/manifests/v1", admin)
    assert (status, str(digest_of(body)), headers["Docker-Content-Digest"]) == (200, image.digest, image.digest)
    manifest = json.loads(body)
    assert [each["digest"] for each in manifest["layers"]] == [layer.digest for layer in image.layers]
    for each in [manifest["config"], *manifest["layers"]]:
        status, _, content = await place.get(f"/v2/default/hello/blobs/{each['digest']}", admin)
        assert (status, str(digest_of(content)), len(content)) == (200, each["digest"], each["size"])
    tags = json.loads((await place.get("/v2/default/hello/tags/list", admin))[2])["tags"]
    assert {reference.rpartition(":")[2] for reference in image.references} <= set(tags)
    attached = json.loads((await place.get(f"/v2/default/hello/referrers/{image.digest}", admin))[2])["manifests"]
    for each in attached:
        assert (await place.get(f"/v2/default/hello/manifests/{each['digest']}", admin))[0] == 200
    await builder.images.DeleteImage(images_pb2.DeleteImageRequest(name=build.image))
    if place.kind == "layout":  # A registry's tags are its owner's affair.
        assert (await place.get("/v2/default/hello/manifests/v1", admin))[0] == 404
        assert (await place.get(f"/v2/default/hello/manifests/{image.digest}", admin))[0] == 404
