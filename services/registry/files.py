"""Use cases over the files of a content."""

from collections.abc import Sequence
from dataclasses import dataclass

from ekiben.errors import Aborted, DataLoss, FailedPrecondition, NotFound, Unavailable
from services.kernel.db import AsyncConnection, Database
from services.kernel.identity import Principal
from services.registry.domain import File, ListingState
from services.registry.store import files as rows
from services.registry.uploads import Signed, Uploads

Position = tuple[int, str]
"""Of a file in a list: its number, and the digest of the content, which may be replaced between two pages."""


@dataclass(frozen=True)
class FilePage:
    """A page of files, the position after it (None at the end), and how many there are in all."""

    items: Sequence[File]
    next: Position | None
    total: int


class Files:
    """Reads what the lister has written."""

    def __init__(self, database: Database, uploads: Uploads) -> None:
        self._database = database
        self._uploads = uploads

    async def list(self, caller: Principal, resource: str, size: int, after: Position | None) -> FilePage:
        """A page of files, in the order of the archive.

        Raises:
            NotFound, FailedPrecondition: as `Uploads.sign_download`.
            Unavailable: they are not listed yet (FILES_NOT_LISTED).
            Aborted: the content was replaced since the page before (CONTENT_REPLACED).
            DataLoss: the content is damaged (BLOB_CORRUPT).
        """
        number, of = after or (-1, "")
        content = (await self._uploads.readable(caller, resource)).content
        if of and of != content.digest:
            raise Aborted(
                f"The content of {resource} was replaced meanwhile. List its files again from the beginning.",
                reason="CONTENT_REPLACED",
                resource=resource,
            )
        async with self._database.read() as connection:
            total = await _listed(connection, resource, content.digest)
            found = await rows.page(connection, content.digest, size, number)
        following = (found[-1][0], content.digest) if len(found) == size else None
        return FilePage([file for _, file in found], following, total)

    async def sign(self, caller: Principal, resource: str, path: str) -> tuple[Signed, File]:
        """A URL of the content, and the file in it.

        Raises:
            As `list`, and NotFound: FILE_NOT_FOUND; FailedPrecondition: the archive is compressed (FILE_COMPRESSED).
        """
        path = path.removeprefix("./")
        signed = await self._uploads.sign_download(caller, resource)
        async with self._database.read() as connection:
            await _listed(connection, resource, signed.digest)
            found = await rows.get(connection, signed.digest, path)
        if found is None:
            raise NotFound(
                f"{resource} holds no file {path[:200]!r}. List its files to see what it holds.",
                reason="FILE_NOT_FOUND",
                resource=resource,
                path=path[:200],
            )
        if found.offset < 0:
            raise FailedPrecondition(
                f"The archive of {resource} is compressed, so that no single file of it can be read. Pull all of it.",
                reason="FILE_COMPRESSED",
                resource=resource,
            )
        return signed, found


async def _listed(connection: AsyncConnection, resource: str, digest: str) -> int:
    """How many files there are."""
    state, count, failure = await rows.state_of(connection, digest) or (ListingState.WAITING, 0, "")
    if state is ListingState.DONE:
        return count
    if state is ListingState.FAILED:
        raise DataLoss(
            f"The files of {resource} cannot be listed: {failure} Push it again with --force.",
            reason="BLOB_CORRUPT",
            digest=digest,
        )
    raise Unavailable(
        f"The files of {resource} are being listed. Ask again in a moment.",
        reason="FILES_NOT_LISTED",
        resource=resource,
    )
