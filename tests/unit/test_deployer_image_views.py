"""What podman is shown of a layout when it is to pull an image."""

import json
from pathlib import Path

import pytest

from ekiben.errors import FailedPrecondition
from services.deployer.runtimes import podman
from tests.image_content import put_image


async def test_a_manifest_that_was_exchanged_is_not_shown_under_the_digest_that_was_verified(tmp_path: Path) -> None:
    layout = tmp_path / "layout"
    good, evil = [await put_image(layout, "") for _ in range(2)]
    podman._view(layout, str(good.digest), tmp_path / "view")
    (shown,) = json.loads((tmp_path / "view" / "index.json").read_text())["manifests"]
    assert (shown["digest"], shown["size"]) == (str(good.digest), good.size_bytes)
    blobs = layout / "blobs" / "sha256"
    (blobs / good.digest.hex).write_bytes((blobs / evil.digest.hex).read_bytes())
    with pytest.raises(FailedPrecondition, match="damaged") as caught:
        podman._view(layout, str(good.digest), tmp_path / "again")
    assert caught.value.reason == "IMAGE_MISSING" and not (tmp_path / "again").exists()
