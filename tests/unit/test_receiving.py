"""A download that is unpacked, by each Python that the project runs on."""

import hashlib
import importlib.util
import io
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

import ekiben.receiving
from ekiben.errors import FailedPrecondition


def _archive(name: str) -> bytes:
    into = io.BytesIO()
    with tarfile.open(fileobj=into, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = 5
        tar.addfile(entry, io.BytesIO(b"hello"))
    return into.getvalue()


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as a Python 3.11.2 imports it, whose tarfile has no filters."""

    def extractall(self: tarfile.TarFile, path: str = ".", members: object = None, *, numeric_owner: bool = False):
        raise AssertionError("this would unpack whatever the archive says, anywhere")

    monkeypatch.setattr(tarfile.TarFile, "extractall", extractall)
    monkeypatch.setattr(sys, "version_info", (3, 11, 2, "final", 0))
    spec = importlib.util.spec_from_file_location("receiving_of_old", str(ekiben.receiving.__file__))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _receive(module: ModuleType, content: bytes, into: Path) -> None:
    source = io.BytesIO(content)
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    with module.Receiving(into, digest, unpack=True) as receiving:
        receiving.take(source.readinto)


def test_pythons_before_3_11_4_unpack_too(old: ModuleType, tmp_path: Path) -> None:
    _receive(old, _archive("model/words.txt"), tmp_path / "got")
    assert (tmp_path / "got" / "model" / "words.txt").read_text() == "hello"


def test_pythons_before_3_11_4_leave_no_folder(old: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="outside"):
        _receive(old, _archive("../words.txt"), tmp_path / "got")
    assert not (tmp_path / "words.txt").exists() and not (tmp_path / "got").exists()
