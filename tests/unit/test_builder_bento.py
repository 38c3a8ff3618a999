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
