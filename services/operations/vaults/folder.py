"""A vault in a folder."""

import asyncio
import fcntl
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

from ekiben.errors import FailedPrecondition, NotFound, ResourceExhausted
from services.content.files import make_folder, storage_error, sync_folder
from services.operations.vaults.files import no_file

_READ_BYTES = 1 << 20


class FolderVault:
    """See Vault. One writer at a time: a lock says so, and so what another left half written can go."""

    def __init__(self, root: Path, *, writes: bool) -> None:
        self._root = root
        self._writes = writes

    async def write(self, path: str, chunks: AsyncIterator[bytes]) -> int:
        """See Vault: a temporary file that is synced, then renamed, then its folder synced."""
        target = self._root / path
        await asyncio.to_thread(make_folder, target.parent)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
        size = 0
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb", buffering=0) as file:
                async for chunk in chunks:
                    await asyncio.to_thread(_write_all, fd, chunk)
                    size += len(chunk)
                await asyncio.to_thread(os.fsync, file.fileno())
            await asyncio.to_thread(_put, temporary, target)
        except OSError as exc:
            if isinstance(storage_error(exc), ResourceExhausted):
                raise ResourceExhausted(
                    f"There is no space left in {str(self._root)!r}: {path} was not kept. Free some, then go on.",
                    reason="VAULT_FULL",
                    vault=self._root,
                ) from exc
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return size

    async def read(self, path: str) -> AsyncIterator[bytes]:
        """See Vault."""
        try:
            file = (self._root / path).open("rb", buffering=0)
        except FileNotFoundError:
            raise no_file(path) from None
        with file:
            while chunk := await asyncio.to_thread(file.read, _READ_BYTES):
                yield chunk

    async def sizes(self, folder: str) -> dict[str, int]:
        """See Vault; what a killed backup left half written is removed."""
        return await asyncio.to_thread(self._sizes, folder)

    def _sizes(self, folder: str) -> dict[str, int]:
        found = {}
        for place, _, names in os.walk(self._root / folder):
            for name in names:
                path = Path(place, name)
                if name.startswith("."):
                    if self._writes and name != ".lock":
                        path.unlink(missing_ok=True)
                else:
                    found[str(path.relative_to(self._root))] = path.stat().st_size
        return found

    async def delete(self, path: str) -> None:
        """See Vault; folders that are empty then go too."""
        target = self._root / path
        target.unlink(missing_ok=True)
        for parent in target.relative_to(self._root).parents:
            try:
                (self._root / parent).rmdir()
            except OSError:
                return


@contextmanager
def open_folder(root: Path, *, may_make: bool) -> Iterator["FolderVault"]:
    """Open the vault in a folder; to write, and made when absent, if it `may_make` one.

    Raises:
        NotFound: no such folder (VAULT_NOT_FOUND).
        FailedPrecondition: another process writes to it (VAULT_IN_USE).
    """
    if not may_make:
        if not root.is_dir():
            raise NotFound(f"There is no folder {str(root)!r}.", reason="VAULT_NOT_FOUND", vault=root)
        yield FolderVault(root, writes=False)
        return
    make_folder(root)
    fd = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPrecondition(
                f"Another backup writes to {str(root)!r}. Wait for it.", reason="VAULT_IN_USE", vault=root
            ) from None
        yield FolderVault(root, writes=True)
    finally:
        os.close(fd)


def _write_all(fd: int, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _put(temporary: Path, target: Path) -> None:
    temporary.rename(target)
    sync_folder(target.parent)
