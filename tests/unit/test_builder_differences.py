"""What of an engine's tar gets into a layer."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ekiben.errors import FailedPrecondition
from services.builder.differences import Difference

CACHED = "root/.cache/uv/archive-v0/x.py"
INSTALLED = "usr/local/lib/python3.11/site-packages/x.py"


def written(path: Path, *members: tuple[str, bytes | str]) -> Path:
    """A tar of files (bytes), and of names of files before them (text)."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.LNKTYPE, content
            else:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def layer(path: Path, **options: Any) -> dict[str, tuple[str, bytes]]:
    """What the layer holds: for each name what it is linked to, and its content."""
    whole = b"".join(Difference(path, **options).chunks())
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        files = {each.name: archive.extractfile(each) for each in archive}
        return {each.name: (each.linkname, file.read()) for each in archive if (file := files[each.name])}


def test_a_file_whose_first_name_is_left_out_keeps_its_content(tmp_path: Path) -> None:
    path = written(tmp_path / "1", (CACHED, b"abc"), (INSTALLED, CACHED))
    assert layer(path) == {INSTALLED: ("", b"abc")}
    path = written(tmp_path / "2", (CACHED, b"abc"), ("opt/z", CACHED), ("opt/y", CACHED), ("opt/x", b"other"))
    assert layer(path) == {"opt/x": ("", b"other"), "opt/y": ("", b"abc"), "opt/z": ("opt/y", b"abc")}
    path = written(tmp_path / "3", (INSTALLED, b"abc"), (CACHED, INSTALLED))
    assert layer(path) == {INSTALLED: ("", b"abc")}
    path = written(tmp_path / "4", ("home/own", b"abc"), ("opt/own", "home/own"))
    assert layer(path, without={"home/own"}) == {"opt/own": ("", b"abc")}
    path = written(tmp_path / "5", (CACHED, b"abc"), ("var/cache/apt/x", CACHED))
    assert layer(path) == {}


SECRET = "s3cr3t-value"


@pytest.mark.parametrize("value", [SECRET, f"{SECRET}\n", f" {SECRET}\r\n"])
@pytest.mark.parametrize("where", ["content", "name", "link", "attribute", "removed"])
def test_the_value_of_a_secret_is_found_wherever_it_is(where: str, value: str, tmp_path: Path) -> None:
    names = {"name": f"opt/{SECRET}/x", "removed": f"opt/.wh.{SECRET}"}
    info = tarfile.TarInfo(names.get(where, "etc/pip.conf"))
    content = f"index-url = https://{SECRET}@host/\n".encode() if where == "content" else b""
    info.size = len(content)
    if where == "link":
        info.type, info.linkname = tarfile.SYMTYPE, f"/x/{SECRET}"
    if where == "attribute":
        info.pax_headers = {"SCHILY.xattr.user.origin": f"https://{SECRET}@host/"}
    with tarfile.open(tmp_path / "tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(content))
    with pytest.raises(FailedPrecondition) as caught:
        layer(tmp_path / "tar", secrets={"TOKEN": value})
    assert caught.value.reason == "SECRET_IN_IMAGE" and caught.value.metadata["secret"] == "TOKEN"
    assert SECRET not in f"{caught.value.message} {caught.value.metadata}"
    others = {"TOKEN": "another-value\n", "SHORT": "opt\n\n\n\n\n\n"}
    assert SECRET.encode() in b"".join(Difference(tmp_path / "tar", secrets=others).chunks())
