"""What an image has not, or not as it should be, is found; each blob is looked at once."""

import asyncio
import json
from pathlib import Path

import pytest

from ekiben.errors import NotFound
from services.builder import image_checking
from services.content import open_images
from services.content.images import MANIFEST, Descriptor, canonical
from services.content.images.checking import check
from services.content.images.layout import LayoutImageStore
from tests.image_stores import AMD64, put
from tests.oci_registry import OciRegistry


async def _layout(folder: Path) -> tuple[LayoutImageStore, dict[str, Path]]:
    """A layout with two images of which one has an attachment, and the places of what they are made of."""
    store = LayoutImageStore(folder)
    one = await put(store, "one", b"first")
    await put(store, "two", b"second")
    blobs = folder / "blobs" / "sha256"
    manifest = json.loads((blobs / one.digest.hex).read_bytes())
    attached = {**manifest, "subject": one.to_json(), "artifactType": "test"}
    attachment = await store.attach(canonical(attached), MANIFEST)
    found = {"manifest": one, "attachment": attachment, "layer": Descriptor.from_json(manifest["layers"][0])}
    return store, {name: blobs / each.digest.hex for name, each in found.items()}


async def test_whole_images_are_whole(tmp_path: Path) -> None:
    store, _ = await _layout(tmp_path)
    for whole in (False, True):
        checked = await check(store, whole=whole)
        assert (checked.references, checked.blobs, checked.faults) == (2, 7, [])


@pytest.mark.parametrize("what", ["manifest", "attachment", "layer"])
@pytest.mark.parametrize("harm", ["gone", "shorter", "other"])
async def test_what_is_not_as_it_should_be_is_named(tmp_path: Path, what: str, harm: str) -> None:
    store, places = await _layout(tmp_path)
    path = places[what]
    content = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if harm == "shorter" else content[:-1] + bytes([content[-1] ^ 1]))
    quick, whole = await check(LayoutImageStore(tmp_path)), await check(LayoutImageStore(tmp_path), whole=True)
    assert bool(quick.faults) == (what != "layer" or harm != "other")
    assert whole.faults and all(fault.why for fault in whole.faults)
    assert "two" in {fault.reference for fault in whole.faults} or (await check(store, ["two"])).faults == []


def test_the_command_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, places = asyncio.run(_layout(tmp_path))
    assert image_checking.main([f"oci:{tmp_path}", "--whole"]) == 0
    assert "2 references, 7 blobs" in capsys.readouterr().err
    places["layer"].unlink()
    assert image_checking.main([f"oci:{tmp_path}"]) == 1
    said = capsys.readouterr()
    assert f"one: layer sha256:{places['layer'].name}" in said.out and "--force" in said.err
    assert image_checking.main([f"oci:{tmp_path}:two"]) == 0


async def test_a_repository_of_a_registry_is_checked_too(
    oci_registry: OciRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EKIBEN_REGISTRY_INSECURE", oci_registry.host)
    name = f"docker://{oci_registry.host}/{oci_registry.new_repository()}"
    async with open_images(name) as (store, _):
        made = await put(store, "v1", b"content of a layer")
        layer = (await store.resolve("v1", AMD64))[1].layers[0]
    assert (await image_checking.look(name)).references == 1
    assert (await image_checking.look(f"{name}:v1", whole=True)).faults == []
    oci_registry.blob(str(layer.digest)).unlink()
    (fault,) = (await image_checking.look(f"{name}@{made.digest}")).faults
    assert (fault.what, fault.digest) == ("layer", layer.digest)


async def test_a_folder_that_is_no_layout_is_not_said_to_be_whole(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(NotFound, match="no image layout"):
            await image_checking.look(f"oci:{folder}")
