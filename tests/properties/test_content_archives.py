"""The archive reader against tarfile, and against damage."""

import gzip
import io
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ekiben.errors import InvalidArgument
from services.content.archives import check_archive, unpack_archive

SEGMENT = st.text(
    st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="/\0"), min_size=1, max_size=60
).filter(lambda name: name not in (".", "..") and len(name.encode()) <= 200)
FILES = st.dictionaries(st.lists(SEGMENT, min_size=1, max_size=6).map("/".join), st.binary(max_size=2000), max_size=6)
FORMAT = st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])


def packed(files: dict[str, bytes], form: int, prefix: str = "./") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=form) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def consistent(files: dict[str, bytes]) -> bool:
    return not any(other.startswith(name + "/") for name in files for other in files)


@settings(deadline=None, max_examples=60)
@given(FILES.filter(consistent), FORMAT, st.sampled_from(["./", ""]))
def test_what_tarfile_writes_is_unpacked_the_same(files: dict[str, bytes], form: int, prefix: str) -> None:
    files = {name: content for name, content in files.items() if not name.startswith("model.yaml/")}
    files["model.yaml"] = b"name: x"
    archive = packed(files, form, prefix)
    check_archive(io.BytesIO(archive), "model")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(archive)
        unpack_archive(path, Path(folder) / "into")
        found = {
            str(file.relative_to(Path(folder) / "into")): file.read_bytes()
            for file in (Path(folder) / "into").rglob("*")
            if file.is_file()
        }
    assert found == files


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_damaged_archive_is_refused_or_read_but_never_a_bug(data: st.DataObject) -> None:
    archive = bytearray(packed({"model.yaml": b"x" * 700, "a/b": b"y" * 10}, data.draw(FORMAT)))
    for _ in range(data.draw(st.integers(1, 4))):
        archive[data.draw(st.integers(0, min(len(archive) - 1, 4096)))] = data.draw(st.integers(0, 255))
    try:
        check_archive(io.BytesIO(bytes(archive)), "model")
    except InvalidArgument as exc:
        assert exc.reason == "ARCHIVE_INVALID"


@settings(deadline=None)
@given(st.integers(0, 3583))
def test_an_archive_that_is_cut_off_is_refused(length: int) -> None:
    archive = packed({"model.yaml": b"x" * 700, "a/b": b"y" * 10}, tarfile.GNU_FORMAT)
    end = 512 + 1024 + 512 + 512
    if length < end + 512:
        with pytest.raises(InvalidArgument):
            check_archive(io.BytesIO(archive[:length]), "model")


def test_a_header_that_claims_much_costs_nothing() -> None:
    info = tarfile.TarInfo("./huge")
    info.size = 1 << 50
    for kind in (tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        info.type = kind
        block = info.tobuf(tarfile.GNU_FORMAT)
        with pytest.raises(InvalidArgument):
            check_archive(io.BytesIO(block + b"\0" * 1024), "model")


def test_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.content.tar._FREE_BYTES", 8 << 20)
    info = tarfile.TarInfo("./zeros")
    info.size = 3 << 30
    zeros = gzip.compress(bytes(4 << 20))  # members of a gzip stream may follow one another
    bomb = gzip.compress(info.tobuf(tarfile.GNU_FORMAT)) + zeros * 16
    with pytest.raises(InvalidArgument, match="times its size"):
        check_archive(io.BytesIO(bomb), "model")
