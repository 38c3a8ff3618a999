"""Interpreters are found by asking each; what cannot answer is passed over."""

import os
import sys
from pathlib import Path

import pytest

from ekiben.errors import FailedPrecondition
from services.builder.interpreters import Interpreters
from services.builder.settings import Settings
from services.builder.uv import Programs
from services.kernel.clock import SYSTEM

OWN = ".".join(map(str, sys.version_info[:2]))


def finder(tmp_path: Path, **settings: object) -> Interpreters:
    values = {"database_url": "", "data_dir": tmp_path / "data", "python_downloads": False, **settings}
    return Interpreters(Programs(tmp_path / "data", tmp_path / "run"), Settings(**values), SYSTEM)  # type: ignore[arg-type]


def command(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


async def test_the_own_python_is_found_past_commands_that_cannot_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(tmp_path / "shims" / f"python{OWN}", f"echo 'pyenv: python{OWN}: command not found' >&2; exit 127")
    command(tmp_path / "shims" / "python3", "echo not json")
    monkeypatch.setenv("PATH", f"{tmp_path / 'shims'}{os.pathsep}/no/such/folder{os.pathsep}{os.environ['PATH']}")
    found = await finder(tmp_path).find(OWN, lambda _: None)
    assert found.minor == OWN
    assert found.complete
    assert "shims" not in found.path


async def test_versions_of_a_version_manager_are_found_where_it_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that are not the selected version, which its commands refuse to run."""
    answer = (
        '{"version": "3.98.1", "implementation": "cpython", "venv": false, "base": "", '
        '"platform": "linux-x86_64-glibc", "complete": true}'
    )
    command(tmp_path / "pyenv" / "versions" / "3.98.1" / "bin" / "python3.98", f"echo '{answer}'")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    found = await finder(tmp_path).find("3.98", lambda _: None)
    assert (found.version, found.path) == ("3.98.1", str(tmp_path / "pyenv/versions/3.98.1/bin/python3.98"))
    lines: list[str] = []
    assert (await finder(tmp_path).find("3.98.7", lines.append)).version == "3.98.1"
    assert lines == ["Python 3.98.7 cannot be had; 3.98.1 of the same series is used."]


async def test_nothing_of_the_machine_is_used_where_that_is_not_wanted(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        await finder(tmp_path, python_preference="only-managed").find("3.98", lambda _: None)
    assert caught.value.reason == "PYTHON_NOT_FOUND"


async def test_a_download_that_fails_is_not_tried_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_PYTHON_INSTALL_MIRROR", "http://127.0.0.1:1")
    interpreters = finder(tmp_path, python_downloads=True, python_preference="only-managed")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("UV_PYTHON_DOWNLOADS", raising=False)
    for lines in ([], []):  # type: list[str]
        with pytest.raises(FailedPrecondition):
            await interpreters.find("3.12", lines.append)
    assert lines == []
