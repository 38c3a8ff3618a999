"""Bytecode by a real Python: what is remembered of one package, and what another may find of it."""

import asyncio
import marshal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.builder.bytecode import Bytecode, Compiled, Compiler
from services.builder.uv import Programs
from tests.fixtures_kernel import until

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


@asynccontextmanager
async def compiling(bytecode: Bytecode, folder: Path) -> AsyncIterator["asyncio.Task[list[Compiled]]"]:
    """A compiler at work that has a child, as ours has, and that would not end by itself."""
    script = folder / "slow.sh"
    script.write_text(f"sleep 40 & echo $$ $! > {folder}/pids.new; mv {folder}/pids.new {folder}/pids; wait\n")
    slow = Compiler(["/bin/sh", str(script)], "3.98.1")
    site_packages = installed(folder / "site", "said = 1\n")
    thread = asyncio.ensure_future(asyncio.to_thread(bytecode.of, site_packages, slow))
    await until((folder / "pids").exists, "it compiles")
    yield thread
    for pid in (folder / "pids").read_text().split():
        await until(lambda pid=pid: not _lives(pid), f"{pid} ends")  # type: ignore[misc]
    with pytest.raises(OSError, match="cannot be compiled"):
        await thread


def _lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_what_compiles_ends_with_its_build(tmp_path: Path) -> None:
    bytecode = Bytecode(tmp_path / "cache")
    async with compiling(bytecode, tmp_path):
        bytecode.stop()
    with pytest.raises(OSError, match="the build has ended"):
        bytecode.of(tmp_path / "site", COMPILER)
    assert len(Bytecode(tmp_path / "cache").of(tmp_path / "site", COMPILER)) == 1


async def test_what_compiled_for_a_killed_builder_ends_when_the_next_starts(tmp_path: Path) -> None:
    async with compiling(Bytecode(tmp_path / "cache"), tmp_path):
        assert await Programs(tmp_path / "cache", tmp_path / "run").end_strays() == 2
