"""Where backups lie: a folder and a bucket alike."""

import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ekiben.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from services.operations.vaults import Vault, folder, open_vault
from tests.s3 import S3Server

LARGE = bytes(range(256)) * (12 << 12)


@pytest.fixture(params=["folder", "bucket"])
async def vault(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Vault]:
    where = str(tmp_path / "vault")
    if request.param == "bucket":
        server: S3Server = request.getfixturevalue("s3")
        where = server.new_url() + "&part_size=5MiB"
    async with open_vault(where, may_make=True) as vault:
        yield vault


async def chunks(data: bytes, *, fails: bool = False) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 1 << 20):
        yield data[start : start + (1 << 20)]
    if fails:
        raise ValueError("the source broke")


async def read(vault: Vault, path: str) -> bytes:
    return b"".join([chunk async for chunk in vault.read(path)])


async def test_files_are_kept_read_listed_and_deleted(vault: Vault) -> None:
    assert await vault.sizes("") == {}
    files = {"a/b/one": b"", "a/two": b"2", "a/b/large": LARGE}
    for path, data in files.items():
        assert await vault.write(path, chunks(data)) == len(data)
    assert {path: await read(vault, path) for path in files} == files
    assert await vault.sizes("a/b") == {"a/b/one": 0, "a/b/large": len(LARGE)}
    assert await vault.sizes("absent") == {}
    await vault.write("a/two", chunks(b"new"))
    assert await read(vault, "a/two") == b"new"
    for path in (*files, "absent"):
        await vault.delete(path)
    assert await vault.sizes("") == {}
    with pytest.raises(NotFound) as missing:
        await read(vault, "a/two")
    assert missing.value.reason == "BACKUP_FILE_MISSING"


@pytest.mark.parametrize("data", [b"short", LARGE], ids=["short", "large"])
async def test_what_breaks_off_leaves_what_was_there(vault: Vault, data: bytes) -> None:
    for before in (None, b"before"):
        if before is not None:
            await vault.write("file", chunks(before))
        with pytest.raises(ValueError, match="broke"):
            await vault.write("file", chunks(data, fails=True))
        assert await vault.sizes("") == ({} if before is None else {"file": len(before)})


async def test_a_folder_has_one_writer_who_cleans_up(tmp_path: Path) -> None:
    where = str(tmp_path / "a" / "vault")
    with pytest.raises(NotFound, match="There is no folder"):
        async with open_vault(where):
            pass
    for bad in ("http://x/y", "file://host/x"):
        with pytest.raises(InvalidArgument):
            async with open_vault(bad, may_make=True):
                pass
    async with open_vault(where, may_make=True) as vault:
        await vault.write("x/one", chunks(b"1"))
        left = tmp_path / "a" / "vault" / "x" / ".two.abc"
        left.write_bytes(b"half")
        with pytest.raises(FailedPrecondition, match="Wait for it"):
            async with open_vault(where, may_make=True):
                pass
        async with open_vault(f"file://{where}") as reader:
            assert await reader.sizes("") == {"x/one": 1}
        assert left.exists()
        assert await vault.sizes("") == {"x/one": 1}
        assert not left.exists()


async def test_a_full_disk_leaves_nothing_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_vault(str(tmp_path / "vault"), may_make=True) as vault:
        with monkeypatch.context() as patch:
            patch.setattr(folder, "_write_all", _full)
            with pytest.raises(ResourceExhausted, match="Free some, then go on"):
                await vault.write("x/one", chunks(LARGE))
        assert await vault.sizes("") == {}
        await vault.write("x/one", chunks(b"1"))


def _full(fd: int, chunk: bytes) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
