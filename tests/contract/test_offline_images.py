"""Images that are built without a server, of what lies in a local store."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from ekiben.errors import EkibenError
from services.builder import offline
from services.content.images import Descriptor
from tests.fixtures_builder import PackageIndex, bento_folder, index
from tests.small_base import small_base

__all__ = ["index"]


@pytest.fixture
def home(tmp_path: Path, index: PackageIndex, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with a model of two files and a folder."""
    model = tmp_path / "home" / "models" / "iris" / "m1"
    (model / "parts").mkdir(parents=True)
    (model / "model.yaml").write_text("name: iris\nversion: m1\n")
    for name in ("weights", "parts/one"):
        (model / name).write_text(name)
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


async def build(bento: Path, folder: Path) -> Descriptor:
    base = await asyncio.to_thread(small_base, folder / "base")
    return await offline.build(str(bento), base=base, output=f"oci:{folder}/images", cache=folder / "cache")


def bento_with(folder: Path) -> Path:
    models = [{"tag": "iris:m1", "module": "", "creation_time": "2026-01-01T00:00:00+00:00"}]
    files = {"src/data/a.txt": b"a", "src/run.sh": b"#!"}
    made = bento_folder(folder / "bento", manifest={"models": models}, files=files)
    (made / "src" / "run.sh").chmod(0o755)
    return made


async def test_links_are_what_a_push_makes_of_them(home: Path, tmp_path: Path) -> None:
    bento, model, away = bento_with(tmp_path), home / "models" / "iris" / "m1", tmp_path / "away"
    (away / "deep").mkdir(parents=True)
    (away / "deep" / "file").write_text("from elsewhere")
    for path, target in {
        bento / "src" / "linked.sh": "run.sh",
        bento / "src" / "data2": "data",
        bento / "src" / "away": str(away),
        model / "linked": "weights",
        model / "folder": "parts",
    }.items():
        path.symlink_to(target)
    linked = await build(bento, tmp_path)
    for folder in (bento, model):
        shutil.copytree(folder, tmp_path / "copy")
        shutil.rmtree(folder)
        (tmp_path / "copy").rename(folder)
    assert not any(path.is_symlink() for path in (*bento.rglob("*"), *model.rglob("*")))
    assert (bento / "src" / "away" / "deep" / "file").is_file() and os.access(bento / "src" / "linked.sh", os.X_OK)
    assert (await build(bento, tmp_path)).digest == linked.digest


@pytest.mark.parametrize("target", ["nowhere", "."])
@pytest.mark.parametrize("of_model", [False, True])
async def test_a_link_that_could_not_be_pushed_is_named(
    home: Path, tmp_path: Path, target: str, *, of_model: bool
) -> None:
    bento = bento_with(tmp_path)
    ((home / "models" / "iris" / "m1" if of_model else bento / "src") / "odd").symlink_to(target)
    with pytest.raises(EkibenError, match="odd") as caught:
        await build(bento, tmp_path)
    assert caught.value.reason == ("LINK_LOOP" if target == "." else "FILE_NOT_READABLE")
