"""What is read of an unpacked bento, whoever wrote it."""

import os
from pathlib import Path

import pytest

from ekiben.errors import FailedPrecondition
from services.builder import bento
from services.builder.recipe import Recipe, make_recipe


def bento_of(folder: Path, manifest: str) -> Path:
    (folder / "bento.yaml").write_text(manifest)
    return folder


def laughs(levels: int) -> str:
    """YAML of some hundred bytes which, written out, has 9 to the power of `levels` words."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 9)}]" for level in range(1, levels)]
    return "\n".join([*lines, f"docker: {{system_packages: *a{levels - 1}}}", "bentoml_version: 1.3.0"])


@pytest.mark.parametrize(
    "manifest",
    [
        laughs(9),
        "a: &a [*a]",
        "a: &a {b: *a}",
        f"a: &a {'x' * (1 << 20)}\nb: [{','.join(['*a'] * 40)}]",
        "\n".join(["a0: &a0 [x]", *(f"a{level}: &a{level} [*a{level - 1}]" for level in range(1, 2000))]),
        "[" * 100_000,
    ],
)
def test_a_manifest_that_would_fill_the_memory_is_refused(manifest: str, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"bento\.yaml") as refused:
        bento.read(bento_of(tmp_path, manifest))
    assert refused.value.reason == "BENTO_INCOMPLETE"


def test_it_is_told_whether_commands_find_what_is_installed(tmp_path: Path) -> None:
    bento_of(tmp_path, "bentoml_version: 1.4.39")
    assert not bento.read(tmp_path).has_python
    (tmp_path / "env" / "python").mkdir(parents=True)
    assert bento.read(tmp_path).has_python


def test_aliases_that_stand_for_little_are_read(tmp_path: Path) -> None:
    files = bento.read(bento_of(tmp_path, laughs(4)))
    assert len(files.manifest["docker"]["system_packages"]) == 9


@pytest.mark.parametrize(
    "said, named",
    [
        ("image: {commands: 5}", "image.commands"),
        ("image: {commands: echo hello}", "image.commands"),
        ("image: {post_commands: {a: b}}", "image.post_commands"),
        ("image: {build_include: true}", "image.build_include"),
        ("docker: {system_packages: 5}", "docker.system_packages"),
        ("python: {index_url: 5}", "python.index_url"),
    ],
)
def test_what_should_be_a_list_and_is_none_is_named(said: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=f"for {named}, where a list belongs") as refused:
        bento.read(bento_of(tmp_path, said))
    assert refused.value.reason == "BENTO_INCOMPLETE"


def test_values_that_say_nothing_are_no_lists_and_words_are_taken(tmp_path: Path) -> None:
    said = "image: {commands: null, post_commands: [], build_include: }\npython: {index_url: https://x}\ndocker: x"
    assert bento.read(bento_of(tmp_path, said)).manifest["docker"] == "x"


def requirements_of(folder: Path, **files: str) -> Recipe:
    """The recipe of a bento with these files; `__` in their names stands for `/`, and they end with .txt."""
    (folder / "bento.yaml").write_text("{bentoml_version: 1.4.39, image: {python_version: '3.11'}}")
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return make_recipe(bento.read(folder))


def test_files_that_requirements_name_are_read_with_them(tmp_path: Path) -> None:
    recipe = requirements_of(
        tmp_path,
        env__python__requirements="bentoml==1.4.39\n-r extra.txt  # ours\n--constraint=limits.txt\n",
        src__extra="toolz\n-r more/other.txt\n-c ../limits.txt\n--pre\n",
        src__more__other="six\n",
        env__python__limits="six==1.15.0\n",
        limits="toolz<1\n",
    )
    assert {"toolz", "six"} <= set(recipe.requirements) and recipe.prerelease
    assert {"six==1.15.0", "toolz<1"} <= set(recipe.constraints)
    plain = requirements_of(tmp_path, env__python__requirements="bentoml==1.4.39\ntoolz\nsix\n")
    assert plain.digest() != recipe.digest()


@pytest.mark.parametrize(
    "line", ["-r away.txt", "-c /etc/hostname", "--requirement=../../away.txt", "-r src", "-r self.txt"]
)
def test_a_file_that_requirements_name_and_the_bento_has_not_fails_the_build(line: str, tmp_path: Path) -> None:
    (tmp_path / "away.txt").write_text("six\n")
    (tmp_path / "bento").mkdir()
    with pytest.raises(FailedPrecondition, match="is not in the bento") as refused:
        requirements_of(tmp_path / "bento", env__python__requirements=f"{line}\n", src__self="-r self.txt\n")
    assert refused.value.reason == "REQUIREMENT_NOT_FOUND"


def test_only_files_of_the_bento_are_taken_for_archives(tmp_path: Path) -> None:
    src = tmp_path / "bento" / "src"
    src.mkdir(parents=True)
    (tmp_path / "outside.whl").write_text("theirs")
    os.mkfifo(src / "pipe.zip")
    (src / "outside.whl").symlink_to(tmp_path / "outside.whl")
    (src / "dangling.whl").symlink_to("nowhere.whl")
    (src / "mine.whl").write_text("mine")
    (src / "link.whl").symlink_to("mine.whl")
    bento_of(tmp_path / "bento", "bentoml_version: 1.4.39")
    assert sorted(bento.read(tmp_path / "bento").shipped or {}) == ["src/link.whl", "src/mine.whl"]


def test_a_source_folder_is_what_of_it_lies_in_the_bento(tmp_path: Path) -> None:
    folder = tmp_path / "bento" / "src" / "mine"
    (folder / "package" / "empty").mkdir(parents=True)
    common = tmp_path / "bento" / "src" / "common"
    common.mkdir()
    (tmp_path / "theirs").write_text("theirs")
    for path in (folder / "pyproject.toml", folder / "package" / "a.py", common / "b.py"):
        path.write_text(path.name)
    os.mkfifo(folder / "pipe")
    links = {"away": "/etc/hostname", "theirs": "../../../theirs", "dangling": "nowhere", "loop": ".", "up": ".."}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (folder / "package" / "common").symlink_to("../../common")
    bento_of(tmp_path / "bento", "bentoml_version: 1.4.39")
    before = (bento.read(tmp_path / "bento").shipped or {})["src/mine"]
    bento.copy_folder(folder, tmp_path / "copy", tmp_path / "bento")
    copied = {str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert {each for each in copied if not each.startswith("up/")} == {
        "pyproject.toml",
        "package/a.py",
        "package/common/b.py",
    }
    (common / "b.py").write_text("changed")
    assert (bento.read(tmp_path / "bento").shipped or {})["src/mine"] != before
