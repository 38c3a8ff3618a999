"""Podman as the deployer has it: images come and go by their digests, whatever happens meanwhile."""

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from ekiben.errors import FailedPrecondition
from services.content.images import Descriptor
from services.deployer.runtimes.podman import Podman, hybrid
from services.kernel.settings import SettingsError
from tests.fixtures_containers import need_podman, wipe
from tests.image_content import put_image
from tests.oci_registry import OciRegistry, run_registry
from tests.platform import run


@pytest.fixture
async def podman(tmp_path: Path) -> AsyncIterator[Podman]:
    """Podman with stores of this test, below a folder with a capital, which is no name of an image."""
    need_podman()
    run_dir = Path(tempfile.mkdtemp(prefix="ekr-", dir="/tmp"))
    podman = Podman(tmp_path / "Data", run_dir)
    await podman.open()
    yield podman
    wipe(podman)
    shutil.rmtree(run_dir, ignore_errors=True)


@pytest.fixture
def registry() -> Iterator[OciRegistry]:
    """A registry that wants a login and has no TLS."""
    try:
        with run_registry(login=True) as running:
            yield running
    except FileNotFoundError as exc:
        pytest.skip(str(exc))


def told(_: str) -> None:
    """Nobody waits."""


async def pull(podman: Podman, layout: Path, image: Descriptor) -> str:
    return (await podman.image(f"oci:{layout}:anything", str(image.digest), told)).id


async def ids(podman: Podman) -> set[str]:
    return set((await podman.run("images", "--all", "--no-trunc", "--quiet"))[1].replace("sha256:", "").split())


async def test_what_is_asked_for_by_its_digest_is_pulled_once_whatever_the_reference_names(
    podman: Podman, tmp_path: Path
) -> None:
    layout = tmp_path / "layout"
    first = await put_image(layout, "default/iris:v1")
    second = await put_image(layout, "default/iris:v1")
    found = await asyncio.gather(*(pull(podman, layout, first) for _ in range(3)))
    assert len(set(found)) == 1
    assert await ids(podman) == set(found)
    assert await pull(podman, layout, second) not in found
    shutil.rmtree(layout)
    assert await pull(podman, layout, first) == found[0], "it is here"
    podman.doubt()
    await podman.run("rmi", "--force", found[0])
    with pytest.raises(FailedPrecondition) as caught:
        await pull(podman, layout, first)
    assert caught.value.reason == "IMAGE_MISSING"


async def test_a_pull_that_was_killed_is_made_again(podman: Podman, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    image = await put_image(layout, "big", {"weights": os.urandom(192 << 20)})
    storage = tmp_path / "Data" / "containers" / "storage"
    pulling = asyncio.create_task(pull(podman, layout, image))
    async with asyncio.timeout(30):
        while not any((storage / "overlay-layers").glob("*.json")) and not list(storage.glob("tmp/*")):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    pulling.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await pulling
    assert await pull(podman, layout, image) in await ids(podman)
    assert not list((tmp_path / "Data" / "containers" / "views").iterdir())


async def test_images_go_that_nobody_used_for_long(podman: Podman, tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    used, recent, old = [await put_image(layout, name) for name in ("used", "recent", "old")]
    known = [await pull(podman, layout, each) for each in (used, recent, old)]
    kept = tmp_path / "Data" / "containers" / "images"
    for each in (used, old):
        os.utime(kept / each.digest.hex, (0, 0))
    await podman.prune([str(used.digest)], older_than_s=3600)
    assert await ids(podman) == set(known[:2])
    assert {path.name for path in kept.iterdir()} == {used.digest.hex, recent.digest.hex}
    assert await pull(podman, layout, old) == known[2]


async def test_stores_that_were_moved_are_made_anew(podman: Podman, tmp_path: Path) -> None:
    image = await put_image(tmp_path / "layout", "v1")
    id = await pull(podman, tmp_path / "layout", image)
    shutil.move(tmp_path / "Data", tmp_path / "Elsewhere")
    run_dir = Path(tempfile.mkdtemp(prefix="ekr-", dir="/tmp"))
    moved = Podman(tmp_path / "Elsewhere", run_dir)
    try:
        await moved.open()
        assert await pull(moved, tmp_path / "layout", image) == id
        assert await ids(moved) == {id}
    finally:
        wipe(moved)
        shutil.rmtree(run_dir)


async def test_images_of_a_registry_are_pulled_with_its_login(
    podman: Podman, registry: OciRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(registry.write_docker_config(tmp_path / "login")))
    image = await put_image(tmp_path / "layout", "v1")
    place = f"docker://{registry.host}/{registry.new_repository()}"
    run(
        ["skopeo", "copy", "--dest-tls-verify=false", "--preserve-digests", f"oci:{tmp_path}/layout:v1", f"{place}:v1"],
        env=os.environ,
    )
    with pytest.raises(FailedPrecondition) as caught:
        await podman.image(f"{place}@{image.digest}", str(image.digest), told)
    assert caught.value.reason == "IMAGE_NOT_PULLED", "without being told so it is not pulled without TLS"
    monkeypatch.setenv("EKIBEN_REGISTRY_INSECURE", registry.host)
    for location in (f"{place}@{image.digest}", f"{place}:v1"):
        assert (await podman.image(location, str(image.digest), told)).id in await ids(podman)
    with pytest.raises(FailedPrecondition) as caught:
        await podman.image(place, f"sha256:{'0' * 64}", told)
    assert caught.value.reason == "IMAGE_MISSING"


async def test_a_machine_without_podman_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="apt-get install podman"):
        await Podman(tmp_path, tmp_path, program="no-such-podman").open()


def test_the_runtime_fits_the_machine(podman: Podman) -> None:
    about = json.loads(run(podman.command("info", "--format", "json"), env=podman.env).stdout)
    assert about["host"]["ociRuntime"]["name"] == "runc" or not hybrid()
    assert Podman(Path("/x"), Path("/y"), runtime="youki").command("ps")[-3:] == ["--runtime", "youki", "ps"]
