"""The folder that commands copy from."""

from pathlib import Path

import pytest

from services.builder.contexts import lay_out


@pytest.fixture
def bento(tmp_path: Path) -> Path:
    bento = tmp_path / "bento"
    for name in ("src/a.py", "src/deep/b.py", "models/weights", "bento.yaml", ".dockerignore"):
        (bento / name).parent.mkdir(parents=True, exist_ok=True)
        (bento / name).write_text(name)
    return bento


def laid(bento: Path, *names: str) -> set[str]:
    into = bento.parent / f"laid {len(list(bento.parent.iterdir()))}"
    lay_out(bento, names, into)
    return {str(path.relative_to(into)) for path in into.rglob("*") if path.is_symlink() or not path.is_dir()}


def test_only_what_is_read_is_laid_out(bento: Path) -> None:
    assert laid(bento) == set()
    assert laid(bento, "./src/deep/", "bento.yaml") == {"src/deep/b.py", "bento.yaml", ".dockerignore"}
    assert laid(bento, "../bento.yaml", "src/../src/a.py") == {"bento.yaml", "src/a.py", ".dockerignore"}
    assert laid(bento, ".") == {"src/a.py", "src/deep/b.py", "models/weights", "bento.yaml", ".dockerignore"}


def test_where_links_or_unknown_names_are_in_the_way_all_of_it_is_laid_out(bento: Path) -> None:
    everything = laid(bento, ".")
    assert laid(bento, "not/there", "bento.yaml") == everything
    (bento / "link").symlink_to("src")
    (bento / "nowhere").symlink_to("/etc/passwd/x")
    assert laid(bento, "link/a.py") == {*everything, "link", "nowhere"}
    assert laid(bento, "nowhere") == {*everything, "link", "nowhere"}
