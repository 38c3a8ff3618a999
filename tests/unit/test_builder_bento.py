"""What is read of an unpacked bento, whoever wrote it."""

from pathlib import Path

import pytest

from ekiben.errors import FailedPrecondition
from services.builder import bento


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


def test_aliases_that_stand_for_little_are_read(tmp_path: Path) -> None:
    files = bento.read(bento_of(tmp_path, laughs(4)))
    assert len(files.manifest["docker"]["system_packages"]) == 9


@pytest.mark.parametrize(
    "said, named",
    [
        ("image: {commands: 5}", "image.commands"),
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
