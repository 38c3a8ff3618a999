"""Who compiles for an image: what of a base may be started on this machine, and what not."""

import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from services.builder import compilers
from services.builder.bases import Base, BaseImage, Python, open_base
from services.builder.bytecode import Compiler
from services.builder.interpreters import Interpreters
from services.builder.platforms import here
from services.builder.settings import Settings
from services.builder.uv import Programs
from services.content.images.layout import LayoutImageStore
from services.kernel.clock import SYSTEM
from tests.image_content import put_image

MINOR = f"{sys.version_info.major}.{sys.version_info.minor}"
PYTHON = Python(f"/usr/bin/python{MINOR}", MINOR)
TRUE = Path(shutil.which("true") or "/bin/true")


def interpreters(tmp_path: Path) -> Interpreters:
    settings = Settings(database_url="", data_dir=tmp_path / "data", python_downloads=False)
    return Interpreters(Programs(tmp_path / "data", tmp_path / "run"), settings, SYSTEM)


async def base_with(tmp_path: Path, loader: bytes) -> BaseImage:
    layout = tmp_path / "bases"
    files = {"bin/bash": b"", PYTHON.path.strip("/"): b"", "lib64/ld-linux-a.so.2": loader}
    await put_image(layout, "base", files)
    return await open_base(LayoutImageStore(layout), "base", f"oci:{layout}:base", here(), tmp_path / "looked")


async def test_a_loader_that_is_a_script_is_not_started(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    script = f"#!/bin/sh\n: > {shlex.quote(str(ran))}\necho cpython {MINOR}.98\n"
    base = await base_with(tmp_path, script.encode())
    found = await compilers.find(base, PYTHON, tmp_path / "cache", interpreters(tmp_path), lambda _: None)
    assert found is not None and found.version != f"{MINOR}.98"
    assert not ran.exists()


def test_a_loader_that_leads_out_of_the_image_is_left_alone(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    for name in ("lib64", "usr/bin"):
        (inside / name).mkdir(parents=True)
    (inside / PYTHON.path.strip("/")).touch()
    secret = tmp_path / "secret"
    shutil.copy(TRUE, secret)
    secret.chmod(0o600)
    (inside / "lib64" / "ld-linux-a.so.2").symlink_to("../../secret")
    (inside / "lib64" / "ld-linux-b.so.2").symlink_to("nowhere")
    (inside / "lib64" / "ld-linux-c.so.2").mkdir()
    assert compilers._started(inside, PYTHON) is None
    assert secret.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("told", [None, "3.98.1"])
async def test_a_base_that_is_not_trusted_or_has_another_python_is_not_taken_apart(
    tmp_path: Path, told: str | None
) -> None:
    base = None
    if told is not None:
        about = Base(pythons={PYTHON.path: told})
        base = await base_with(tmp_path, b"")
        base = BaseImage(base.store, base.name, base.reference, base.descriptor, base.image, about)
    found = await compilers.find(base, PYTHON, tmp_path / "cache", interpreters(tmp_path), lambda _: None)
    assert found is not None and found.version.startswith(f"{MINOR}.")
    assert not (tmp_path / "cache").exists()


async def test_a_cache_that_was_moved_has_its_interpreters_where_it_lies_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = await base_with(tmp_path, b"\x7fELF")
    base = replace(base, about=Base(pythons={PYTHON.path: PYTHON.version}))
    begun = []

    def started(folder: Path, python: Python) -> Compiler:
        begun.append(folder)
        files = [str(folder / name) for name in ("lib64/ld-linux-a.so.2", python.path.strip("/"))]
        return Compiler([files[0], "--library-path", str(folder / "lib64"), files[1]], "3.11.2", {"HOME": str(folder)})

    monkeypatch.setattr(compilers, "_started", started)

    async def find(cache: Path) -> Compiler:
        found = await compilers.find(base, PYTHON, cache, interpreters(tmp_path), lambda _: None)
        assert found is not None
        assert {str(cache) in each for each in (*found.argv, *found.env.values())} == {True, False}
        assert Path(found.argv[0]).is_file() and Path(found.argv[-1]).is_file()
        return found

    await find(tmp_path / 'caché "one"')
    (tmp_path / 'caché "one"').rename(tmp_path / "two")
    await find(tmp_path / "two")
    assert len(begun) == 1
    (known,) = (tmp_path / "two").rglob("compiler.json")
    for damage in (known.read_text().replace("{here}", str(tmp_path / "one")), "[]", ""):
        known.write_text(damage)
        await find(tmp_path / "two")
    assert len(begun) == 4
    assert len(list((tmp_path / "two" / "pythons-of-bases").iterdir())) == 1
