"""What podman is shown of a layout when it is to pull an image."""

import asyncio
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from ekiben.errors import FailedPrecondition
from services.deployer.runtimes.views import show
from tests.image_content import put_image, put_index


async def test_a_manifest_that_was_exchanged_is_not_shown_under_the_digest_that_was_verified(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    good, evil = [await put_image(layout, "") for _ in range(2)]
    show(layout, str(good.digest), tmp_path / "view")
    (shown,) = json.loads((tmp_path / "view" / "index.json").read_text())["manifests"]
    assert (shown["digest"], shown["size"]) == (str(good.digest), good.size_bytes)
    blobs = layout / "blobs" / "sha256"
    whole = (blobs / good.digest.hex).read_bytes()
    (blobs / good.digest.hex).write_bytes((blobs / evil.digest.hex).read_bytes())
    assert (tmp_path / "view" / "blobs" / "sha256" / good.digest.hex).read_bytes() == whole, "as it was checked"
    with pytest.raises(FailedPrecondition, match="damaged") as caught:
        show(layout, str(good.digest), tmp_path / "again")
    assert caught.value.reason == "IMAGE_MISSING" and not (tmp_path / "again").exists()


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed (Debian: apt-get install skopeo)")
def test_all_of_an_image_or_an_index_is_shown(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    images = [asyncio.run(put_image(layout, "")) for _ in range(3)]
    index = asyncio.run(put_index(layout, "v1", {"linux/amd64": images[0], "linux/arm64": images[1]}))
    for number, each in enumerate((images[2], index)):
        show(layout, str(each.digest), tmp_path / f"view{number}")
        target = tmp_path / f"copy{number}"
        command = ["skopeo", "copy", "--all", "--preserve-digests", f"oci:view{number}:image", f"oci:{target}:v1"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
        (copied,) = json.loads((target / "index.json").read_text())["manifests"]
        assert copied["digest"] == str(each.digest)
        assert len(list((target / "blobs" / "sha256").iterdir())) == (3 if each is images[2] else 7)
