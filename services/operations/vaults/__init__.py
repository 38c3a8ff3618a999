"""The port for where backups lie, and its promises.

A vault holds files by path. A file appears whole, durably, or not at all; writing one again replaces it. Nobody else
writes to the paths of a backup while one is made.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from ekiben.errors import InvalidArgument


class Vault(Protocol):
    """Files by path: `snapshots/ID/snapshot.json`."""

    async def write(self, path: str, chunks: AsyncIterator[bytes]) -> int:
        """Keep a file; its size. An error of `chunks` leaves nothing.

        Raises:
            ResourceExhausted: no space left (VAULT_FULL).
        """
        ...

    def read(self, path: str) -> AsyncIterator[bytes]:
        """Stream a file. Raises NotFound (BACKUP_FILE_MISSING)."""
        ...

    async def sizes(self, folder: str) -> dict[str, int]:
        """Every file below a folder, by path; of a folder that is not there, none."""
        ...

    async def delete(self, path: str) -> None:
        """Remove a file; one that is not there is no error."""
        ...


@asynccontextmanager
async def open_vault(where: str, *, may_make: bool = False) -> AsyncIterator[Vault]:
    """Open a vault, to write if it `may_make` one: a folder, `file:///absolute/folder`, or `s3://bucket/prefix?endpoint=…`.

    Raises:
        InvalidArgument: not of these forms (VAULT_INVALID, BLOBS_URL_INVALID).
        NotFound: no such folder, unless it `may_make` one (VAULT_NOT_FOUND).
        FailedPrecondition: somebody else writes to it (VAULT_IN_USE).
    """
    if where.startswith("s3://"):
        from services.operations.vaults.bucket import open_bucket_vault  # here: its library costs half a second

        async with open_bucket_vault(where) as bucket:
            yield bucket
        return
    if "://" in where and not where.startswith("file:///"):
        raise InvalidArgument(
            f"{where!r} is neither a folder nor of the form 's3://bucket/prefix'.", reason="VAULT_INVALID", vault=where
        )
    from services.operations.vaults.folder import open_folder

    with open_folder(Path(where.removeprefix("file://")).absolute(), may_make=may_make) as folder:
        yield folder
