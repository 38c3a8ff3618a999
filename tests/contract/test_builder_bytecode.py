"""Bytecode by a real Python: what is remembered of one package, and what another may find of it."""

import marshal
import sys
from pathlib import Path

from services.builder.bytecode import Bytecode, Compiler

COMPILER = Compiler([getattr(sys, "_base_executable", sys.executable)], "{}.{}.{}".format(*sys.version_info))
TAG = f"cpython-{sys.version_info.major}{sys.version_info.minor}"


def installed(folder: Path, source: str, *more: str) -> Path:
    """A folder with a package whose RECORD has nothing to do with its source."""
    info = folder / "pkg-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "pkg.py").write_text(source)
    (info / "RECORD").write_text("".join(f"{name},sha256=AAAA,5\n" for name in ("pkg.py", *more)))
    return folder


def run(module: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    exec(marshal.loads(module.read_bytes()[16:]), found)
    return found


def test_packages_with_one_record_and_two_sources_do_not_share_bytecode(tmp_path: Path) -> None:
    for word in ("first", "second"):
        site_packages = installed(tmp_path / word, f"said = {word!r}\n")
        (module,) = Bytecode(tmp_path / "cache").of(site_packages, COMPILER)
        assert run(module.path)["said"] == word
    (again,) = Bytecode(tmp_path / "cache").of(tmp_path / "second", COMPILER)
    assert again == module and len(list((tmp_path / "cache" / "bytecode").iterdir())) == 2


def test_a_record_names_no_file_outside_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "host.py").write_text("secret = 1\n")
    outside = ["../others/host.py", f"{tmp_path}/others/host.py", "pkg-1.0.dist-info/../../others/host.py"]
    site_packages = installed(tmp_path / "site", "said = 1\n", "link/host.py", "../site/pkg.py", "gone.py", *outside)
    (site_packages / "link").symlink_to(tmp_path / "others")
    found = Bytecode(tmp_path / "cache").of(site_packages, COMPILER)
    assert [each.name for each in found] == [f"__pycache__/pkg.{TAG}.pyc"]
    assert {each.name for each in tmp_path.rglob("__pycache__")} == {"__pycache__"}
    assert [each.parent.parent.name for each in tmp_path.rglob("__pycache__")] == ["bytecode"]
