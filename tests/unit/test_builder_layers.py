"""Layers depend on what is in them, and on nothing else."""

import io
import os
import random
import re
import shutil
import tarfile
from pathlib import Path

import pytest

from ekiben.errors import FailedPrecondition
from services.builder import image_builds, images
from services.builder.images import commands_of
from services.builder.layers import Entry, OutOfOrder, entries_of, tar, tar_of_stream
from services.builder.recipe import BentoFiles
from services.content.images import Image


def make(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        os.utime(path, (random.randrange(2**31),) * 2)
    (folder / "link").symlink_to("a/b.txt")
    (folder / "run.sh").write_text("#!")
    (folder / "run.sh").chmod(0o700 if random.random() < 0.5 else 0o755)
    return folder


def test_equal_folders_give_equal_layers_whatever_their_times_order_and_modes(tmp_path: Path) -> None:
    names = ["z.txt", "a/b.txt", "a-b.txt", "a/c/d.txt", "é.txt", "x" * 120 + ".txt"]
    one, other = make(tmp_path / "1", names), make(tmp_path / "2", names[::-1])
    first = b"".join(tar(entries_of(one, "app")))
    assert first == b"".join(tar(entries_of(other, "app")))
    with tarfile.open(fileobj=io.BytesIO(first)) as archive:
        members = {member.name: member for member in archive}
    assert set(members) == {"app", "app/a", "app/a/c", "app/link", "app/run.sh", *(f"app/{name}" for name in names)}
    assert {member.mtime for member in members.values()} == {0}
    assert (members["app/run.sh"].mode, members["app/z.txt"].mode, members["app/a"].mode) == (0o755, 0o644, 0o755)
    assert (members["app/link"].issym(), members["app/link"].linkname) == (True, "a/b.txt")


def test_folders_above_come_before_what_is_in_them_and_each_name_once() -> None:
    entries = [Entry("a/b/c", data=b"1"), Entry("a/b", owner=1034), Entry("a/b/c", data=b"2")]
    with tarfile.open(fileobj=io.BytesIO(b"".join(tar(entries)))) as archive:
        assert archive.getnames() == ["a", "a/b", "a/b/c"]
        assert archive.getmember("a/b").uid == 1034
        file = archive.extractfile("a/b/c")
        assert file is not None and file.read() == b"2"


def test_files_that_come_one_by_one_give_the_same_layer() -> None:
    folders = [Entry("app"), Entry("app/m", owner=1034), Entry("app/m/a", owner=1034)]
    small = Entry("app/m/a/b", data=b"1", owner=1034)
    large, run = b"2" * 3_000_000, b"#!"
    held = [*folders, small, Entry("app/m/a-b", data=large, owner=1034), Entry("app/m/run", data=run, executable=True)]
    coming = [
        *folders[:2],  # the folder a itself does not come: it is its files'
        small,
        Entry(
            "app/m/a-b",
            content=(large[at : at + 999] for at in range(0, 3_000_000, 999)),
            size_bytes=3_000_000,
            owner=1034,
        ),
        Entry("app/m/run", content=[run], size_bytes=2, executable=True),
    ]
    assert b"".join(tar_of_stream(coming)) == b"".join(tar(held))


@pytest.mark.parametrize("names", [("b", "a"), ("a-b", "a/b"), ("a", "a"), ("a", "a/b"), ("a/b", "a")])
def test_files_that_come_in_another_order_are_not_taken_one_by_one(names: tuple[str, str]) -> None:
    with pytest.raises(OutOfOrder):
        list(tar_of_stream(Entry(name, data=b"x") for name in names))


def test_what_is_neither_file_nor_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FailedPrecondition, match="neither"):
        list(entries_of(tmp_path, "app"))


def test_a_folder_that_is_taken_away_meanwhile_is_no_empty_one(tmp_path: Path) -> None:
    (tmp_path / "model" / "parts").mkdir(parents=True)
    (tmp_path / "model" / "parts" / "weights").write_bytes(b"1")
    entries = entries_of(tmp_path / "model", "app")
    assert [next(entries).name, next(entries).name] == ["app", "app/parts"]
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(FileNotFoundError):
        list(entries)
    with pytest.raises(FileNotFoundError):
        list(entries_of(tmp_path / "model", "app"))


def test_only_what_a_bento_asks_for_itself_is_a_command() -> None:
    every = (
        "apt-get update && apt-get install -q -y --no-install-recommends --allow-remove-essential "
        "ca-certificates gnupg2 bash build-essential git"
    )
    assert commands_of({"image": {"commands": [every, every], "post_commands": []}}) == []
    assert commands_of({"image": {"commands": [every, f"{every} && curl evil"]}}) == [f"{every} && curl evil"]
    assert commands_of({"image": {"commands": [], "post_commands": ["echo 1"]}}) == ["echo 1"]
    assert commands_of({"docker": {"distro": "debian", "system_packages": ["git"]}}) == ["system_packages: ['git']"]
    assert commands_of({"image": None, "docker": "junk"}) == []


def environment_of(envs: dict[str, str], *, hub: bool = False) -> dict[str, str]:
    base = Image({"config": {"Env": ["PATH=/opt/bin:/bin"]}}, [])
    configuration = images.configuration_of(base, envs)
    configuration = images.without_hub(configuration) if hub else configuration
    return dict(each.split("=", 1) for each in configuration["Env"])


def test_the_environment_goes_before_a_path_of_the_bento_s_own() -> None:
    assert environment_of({})["PATH"] == "/app/.venv/bin:/opt/bin:/bin"
    assert environment_of({"PATH": "/cuda:/bin"})["PATH"] == "/app/.venv/bin:/cuda:/bin"
    assert environment_of({"PATH": "/app/.venv/bin:/bin"})["PATH"] == "/app/.venv/bin:/bin"


def test_models_that_are_fetched_at_the_start_go_where_that_can_be_written() -> None:
    assert environment_of({})["BENTOML_HF_CACHE_DIR"] == "/home/bentoml/bento/hf-models"
    assert "BENTOML_HF_CACHE_DIR" not in environment_of({}, hub=True)
    assert environment_of({"BENTOML_HF_CACHE_DIR": "/cache"}, hub=True)["BENTOML_HF_CACHE_DIR"] == "/cache"


@pytest.mark.parametrize(
    ("manifest", "named"),
    [
        ({"envs": [{"name": "TOKEN", "value": "x\0y"}]}, "TOKEN has a NUL"),
        ({"docker": {"env": {"TOKEN": "x\0y"}}}, "TOKEN has a NUL"),
        ({"envs": [{"name": "A=B", "value": "1"}]}, "'A=B'"),
        ({"envs": {"A": "b"}}, "{'A': 'b'}"),
        ({"envs": ["A=b"]}, "'A=b'"),
        ({"envs": [{"value": "b"}]}, "{'value': 'b'}"),
    ],
)
def test_variables_that_no_container_can_have_are_refused_before_anything_is_made(
    manifest: dict[str, object], named: str
) -> None:
    with pytest.raises(FailedPrecondition, match=re.escape(named)) as refused:
        image_builds.check(BentoFiles(manifest, ""), None)
    assert refused.value.reason == "BENTO_INCOMPLETE"


def test_variables_for_the_build_and_without_a_value_are_none_of_the_image() -> None:
    envs = [{"name": "A", "value": "1"}, {"name": "B", "stage": "build", "value": "2"}, {"name": "C"}]
    assert images.envs_of({"envs": envs, "docker": {"env": {"D": 3}}}) == {"A": "1", "D": "3"}
    assert images.envs_of({"envs": None}) == {}
