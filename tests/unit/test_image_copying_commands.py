"""`ekiben images copy` says what is wrong with what it was given."""

import asyncio
from pathlib import Path

import pytest

from services.builder import image_copying
from tests.image_content import put_image


def test_wrong_places_are_told_of_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(put_image(tmp_path / "layout", "v1"))
    (tmp_path / "file").write_text("no layout")
    image, file = f"oci:{tmp_path}/layout:v1", f"oci:{tmp_path}/file:v1"
    cases = [
        (image, file, "Not a directory"),
        (file, f"oci:{tmp_path}/other:v1", "no image layout"),
        (file, f"docker-archive:{tmp_path}", "Is a directory"),  # the target is looked at before any work
        (file, "docker-archive:/", "Is a directory"),
        ("docker://registry.example.com:99999/a/b:v1", f"oci:{tmp_path}/other:v1", "no host"),
    ]
    for source, target, words in cases:
        assert image_copying.main([source, target]) == 1, (source, target)
        assert words in capsys.readouterr().err, (source, target)
    assert image_copying.main([image, f"docker-archive:{tmp_path}/image.tar"]) == 0
