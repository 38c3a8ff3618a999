"""The tar that a folder would be, read by tarfile."""

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from ekiben import archives
from ekiben.errors import FailedPrecondition, InvalidArgument

LONG = "d" * 90 + "/" + "e" * 90 + "/" + "f" * 120


def make(folder: Path) -> Path:
    for name, data in {
        "a.txt": b"a" * 1000,
        "empty": b"",
        "exact": b"x" * 512,
        "sub/b.bin": os.urandom(3 << 20),
        "große/ñ.txt": "ü".encode(),
        LONG: b"deep",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "a.txt").chmod(0o755)
    return folder


def test_tarfile_reads_what_the_folder_holds(tmp_path: Path) -> None:
    archive = archives.of_folder(make(tmp_path))
    data = b"".join(archive.chunks())
    assert len(data) == archive.size_bytes and len(data) % 10240 == 0
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = {member.name: member for member in tar.getmembers()}
        for path in tmp_path.rglob("*"):
            member = members[f"./{path.relative_to(tmp_path)}"]
            assert member.isdir() == path.is_dir()
            assert (member.uid, member.gid, member.mode) == (0, 0, path.stat().st_mode & 0o777)
            if path.is_file():
                file = tar.extractfile(member)
                assert file is not None and file.read() == path.read_bytes()
        assert members["."].mode == 0o700
        assert len(members) == 1 + len(list(tmp_path.rglob("*")))


def test_equal_folders_give_equal_digests_and_any_range_can_be_read_alone(tmp_path: Path) -> None:
    archive = archives.of_folder(make(tmp_path))
    whole = b"".join(archive.chunks())
    assert archive.digest() == "sha256:" + hashlib.sha256(whole).hexdigest() == archives.of_folder(tmp_path).digest()
    size = 700_001
    parts = [b"".join(archive.chunks(at, min(at + size, len(whole)))) for at in range(0, len(whole), size)]
    assert b"".join(parts) == whole


def test_what_is_excluded_is_left_out_with_all_below(tmp_path: Path) -> None:
    archive = archives.of_folder(make(tmp_path), exclude=lambda name: name == "sub")
    with tarfile.open(fileobj=io.BytesIO(b"".join(archive.chunks()))) as tar:
        assert not [name for name in tar.getnames() if "sub" in name]


def test_links_are_followed_and_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("file")
    with tarfile.open(fileobj=io.BytesIO(b"".join(archives.of_folder(tmp_path).chunks()))) as tar:
        assert all(member.isfile() or member.isdir() for member in tar)
        file = tar.extractfile("./link")
        assert file is not None and file.read() == b"text"
    (tmp_path / "loop").symlink_to(".")
    with pytest.raises(InvalidArgument, match="link"):
        archives.of_folder(tmp_path)


def test_a_file_changed_after_the_archive_was_laid_out_is_found(tmp_path: Path) -> None:
    archive = archives.of_folder(make(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"b" * 1001)
    with pytest.raises(FailedPrecondition) as caught:
        archive.digest()
    assert caught.value.reason == "FILE_CHANGED"


def test_a_file_larger_than_ustar_can_say_gets_a_pax_size(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as sparse:
        sparse.truncate(9 << 30)
    archive = archives.of_folder(tmp_path)
    assert archive.size_bytes > 9 << 30
    head = b"".join(archive.chunks(0, 4096))
    with tarfile.open(fileobj=io.BytesIO(head), mode="r|") as tar:
        assert [(member.name, member.size) for member in (tar.next(), tar.next()) if member] == [
            (".", 0),
            ("./big", 9 << 30),
        ]


def test_a_device_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FailedPrecondition, match="neither a file nor a folder"):
        archives.of_folder(tmp_path)
