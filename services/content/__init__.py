"""Bytes by digest: what every service that moves archives shares.

- `digest.py`: the name of bytes.
- `blobs/`: the port BlobStore with its adapters; the registry writes through it.
- `archives.py`: tar archives of models and bentos: checked, fetched, unpacked.

`open_blobs` is the only place where a URL scheme becomes a class.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ekiben.errors import InvalidArgument
from services.content.blobs import BlobStore
from services.content.blobs.filesystem import open_filesystem


@asynccontextmanager
async def open_blobs(url: str) -> AsyncIterator[BlobStore]:
    """Open the blob store that `url` names: `file:///absolute/folder`, made when absent.

    Raises:
        InvalidArgument: an unknown scheme (BLOBS_URL_INVALID).
        FailedPrecondition: another process has the folder open (BLOBS_IN_USE).
    """
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc or not parts.path.startswith("/"):
        raise InvalidArgument(
            f"Blob store {url!r} is not of the form 'file:///absolute/folder'.", reason="BLOBS_URL_INVALID", url=url
        )
    async with open_filesystem(Path(unquote(parts.path))) as blobs:
        yield blobs
