"""Images that are built without a server, of what lies in a local store."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from ekiben.errors import EkibenError
from services.builder import offline
from services.content.images import Descriptor, Platform, canonical
from services.content.images.layout import LayoutImageStore
from services.content.images.resolving import read_json
from tests.contract.test_image_environments import platform_wheel
from tests.fixtures_builder import PackageIndex, bento_folder, index
from tests.image_content import put_image
from tests.image_stores import of
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


ALPINE = {
    "etc/os-release": b'NAME="Alpine Linux"\nID=alpine\nVERSION_ID=3.20.3\n',
    "etc/alpine-release": b"3.20.3\n",
    "lib/ld-musl-x86_64.so.1": b"\x7fELF musl libc (x86_64)\n",
    "lib/apk/db/installed": b"P:musl\nV:1.2.5-r0\nA:x86_64\n\n",
    "bin/busybox": b"\x7fELF",
    "usr/local/bin/python3.11": b"\x7fELF",
}
CUDA = {"etc/os-release": b"ID=ubuntu\n", "bin/bash": b"\x7fELF", "usr/local/cuda/version.json": b"{}"}


@pytest.mark.parametrize(
    ("files", "tag", "said"),
    [
        (ALPINE, "", "no bash, .* apk add bash"),
        (ALPINE | {"bin/bash": b""}, "manylinux_2_17", r"\(musl\).* take a base with glibc"),
        (ALPINE | {"bin/bash": b""}, "musllinux_1_2", ""),
        (CUDA, "", r"no Python 3.11 .*\(it has: none\)"),
    ],
)
async def test_a_base_of_another_distribution_does_or_it_is_said_what_it_lacks(
    index: PackageIndex, tmp_path: Path, files: dict[str, bytes], tag: str, said: str
) -> None:
    requirements = "bentoml==1.4.39\n"
    if tag:
        index.files[f"native-1.0-cp311-cp311-{tag}_x86_64.whl"] = platform_wheel(
            "native", "1.0", f"cp311-cp311-{tag}_x86_64", {}
        )
        requirements += "native\n"
    amd64 = Platform("linux", "amd64")
    await put_image(tmp_path / "bases", "base", files, platform=amd64)
    bento = bento_folder(tmp_path / "bento", requirements)
    making = offline.build(
        str(bento),
        base=f"oci:{tmp_path}/bases:base",
        output=f"oci:{tmp_path}/images",
        cache=tmp_path / "cache",
        platforms=[amd64],
    )
    if said:
        with pytest.raises(EkibenError, match=said):
            await making
    else:
        await making


@pytest.mark.parametrize("tag", ["iris:..", "iris:.", "iris:m1/../m1", "../models/iris:m1", "iris:-x"])
async def test_a_model_is_one_version_of_the_store_and_nothing_above_it(home: Path, tmp_path: Path, tag: str) -> None:
    bento = bento_folder(tmp_path / "bento", manifest={"models": [{"tag": tag}]})
    with pytest.raises(EkibenError, match="There is no model"):
        await build(bento, tmp_path)


@pytest.mark.parametrize(
    ("manifest", "output", "said"),
    [
        ({"models": "iris:m1"}, "", "where a list belongs"),
        ({"version": "a b"}, "", "names it 'hello:a b'"),
        ({"version": "a/b"}, "", "names it"),
        ({"version": ["x"]}, "", "names it"),
        ({"version": "v" * 129}, "", "names it"),
        ({"name": "Hello World"}, "", "names it"),
        ({}, "a b", "no reference"),
        ({}, "-x", "no reference"),
    ],
)
async def test_names_that_no_image_can_have_are_refused_before_anything_is_made(
    index: PackageIndex, tmp_path: Path, manifest: dict[str, object], output: str, said: str
) -> None:
    bento = bento_folder(tmp_path / "bento", manifest=manifest)
    with pytest.raises(EkibenError, match=said):
        await offline.build(
            str(bento), base="oci:nowhere", output=f"oci:{tmp_path}/images:{output}", cache=tmp_path / "cache"
        )
    assert not (tmp_path / "cache").exists()


CONFIGURATION = {
    "architecture": Platform.here().architecture,
    "os": "linux",
    "config": {"Env": ["A=1"], "Labels": {"a": "b"}},
    "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "0" * 64]},
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"config": {"Env": [5]}},
        {"config": {"Env": "A=1"}},
        {"config": [1]},
        {"config": {"Labels": ["x"]}},
        {"rootfs": None},
        {"rootfs": {"diff_ids": []}},
        {"rootfs": {"diff_ids": [5]}},
        {"history": "x"},
        {"history": ["x"]},
    ],
)
async def test_a_base_whose_configuration_is_odd_is_refused(
    index: PackageIndex, tmp_path: Path, wrong: dict[str, object]
) -> None:
    layout = tmp_path / "bases"
    files = {"bin/bash": b"", "usr/bin/python3.11": b""}
    descriptor = await put_image(layout, "right", files, platform=Platform.here())
    store = LayoutImageStore(layout)
    manifest = await read_json(store, descriptor)
    digest, size_bytes = await store.write(of(canonical(CONFIGURATION | wrong)))
    manifest["config"] |= {"digest": str(digest), "size": size_bytes}
    await store.tag("base", canonical(manifest), descriptor.media_type, Platform.here())
    bento = bento_folder(tmp_path / "bento")
    with pytest.raises(EkibenError, match="configuration has no usable") as caught:
        await offline.build(
            str(bento), base=f"oci:{layout}:base", output=f"oci:{tmp_path}/images", cache=tmp_path / "cache"
        )
    assert caught.value.reason == "BASE_DAMAGED"


async def test_a_base_that_is_no_layout_is_said_to_be_none(index: PackageIndex, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for where in ("nowhere", "file"):
        with pytest.raises(EkibenError, match=f"no image layout in .*{where}"):
            await offline.build(
                str(bento_folder(tmp_path / f"bento-{where}")),
                base=f"oci:{tmp_path}/{where}",
                output=f"oci:{tmp_path}/images",
                cache=tmp_path / "cache",
            )
