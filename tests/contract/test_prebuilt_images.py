"""A tag of an image that somebody else made, looked up in a real registry."""

from pathlib import Path

import pytest

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.errors import NotFound
from services.content import open_images
from services.content.images.copying import copy_image
from services.content.images.layout import LayoutImageStore
from services.deployer import prebuilt
from tests.image_content import put_image
from tests.oci_registry import OciRegistry


async def test_a_tag_is_looked_up_once_and_kept_with_what_it_stood_for(
    oci_registry: OciRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EKIBEN_REGISTRY_INSECURE", oci_registry.host)
    name = f"{oci_registry.host}/{oci_registry.new_repository()}"

    async def push(content: bytes) -> str:
        await put_image(tmp_path / "images", "default/iris:v1", {"weights": content})
        async with open_images(f"docker://{name}:v1") as (store, tag):
            copied = await copy_image(LayoutImageStore(tmp_path / "images"), "default/iris:v1", store, tag)
        return str(copied.digest)

    first = await push(b"1")
    template = pb.Template()
    template.image.reference = f"{name}:v1"
    await prebuilt.settle(template, "kubernetes")
    assert template.image.reference == f"docker://{name}:v1@{first}"
    second = await push(b"2")
    await prebuilt.settle(template, "kubernetes")
    assert template.image.reference == f"docker://{name}:v1@{first}" and second != first
    template.image.reference = f"{name}:v2"
    with pytest.raises(NotFound, match="v2"):
        await prebuilt.settle(template, "kubernetes")
