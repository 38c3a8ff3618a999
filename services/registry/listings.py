"""Lists of files on their way into rows: made by the lister, or in the pass in which an upload is checked."""

from collections.abc import Sequence
from functools import partial
from typing import BinaryIO

from services.content.archives import check_archive
from services.content.listing import ListedFile, Listing
from services.content.tar import refused
from services.kernel.db import Database
from services.registry.domain import File, Kind
from services.registry.store import files as rows

BATCH = 500
_MOST = 20_000
"""Files of one content that a check remembers; of one with more, the lister writes down as it reads."""
_DESCRIPTIONS = {Kind.MODEL: "model.yaml", Kind.BENTO: "bento.yaml"}


def file_of(listed: ListedFile) -> File:
    """What is kept of a file. Its path becomes text: databases and protobuf take no bytes that are not UTF-8."""
    path = listed.path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return File(path, listed.size_bytes, listed.offset, listed.mode, str(listed.digest))


class CheckedListing:
    """A check of an archive of this kind that lists its files meanwhile, where all of its bytes pass anyhow."""

    def __init__(self, kind: Kind, *, lists: bool) -> None:
        self._kind, self._lists = kind, lists
        self.files: list[File] | None = None
        """The files; None when they were not listed."""

    def __call__(self, archive: BinaryIO) -> None:
        """See `services.content.blobs.Check`. Raises InvalidArgument (ARCHIVE_INVALID)."""
        if not self._lists:
            check_archive(archive, self._kind.value)
            return
        files: list[File] | None = []
        found, wanted = False, _DESCRIPTIONS[self._kind]
        for listed in Listing(archive, whole=False):
            found = found or listed.path == wanted
            if files is not None:
                files.append(file_of(listed))
                files = files if len(files) <= _MOST else None
        if not found:
            raise refused(f"there is no {wanted} at its root, so it is no {self._kind}")
        self.files = files


async def keep(database: Database, digest: str, files: Sequence[File]) -> None:
    """Write down all files of a blob that is claimed. What a crash leaves half done, the lister ends."""
    await database.attempt(partial(rows.want, digest=digest))
    for first in range(0, len(files), BATCH):
        batch = files[first : first + BATCH]
        await database.attempt(partial(rows.add, digest=digest, first=first, files=batch))
    await database.attempt(partial(rows.end, digest=digest))
