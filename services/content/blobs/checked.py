"""Reading that verifies."""

import hashlib
from collections.abc import AsyncIterator

from ekiben.errors import DataLoss
from services.content.blobs import BlobReader
from services.content.digest import Digest


async def read_verified(blobs: BlobReader, digest: Digest) -> AsyncIterator[bytes]:
    """Stream a whole blob; act on the bytes only once the iteration has ended.

    Raises:
        NotFound: no such blob (BLOB_NOT_FOUND).
        DataLoss: after the last chunk, when the bytes hash to something else (BLOB_CORRUPT).
    """
    sha256 = hashlib.sha256()
    async for chunk in blobs.read(digest):
        sha256.update(chunk)
        yield chunk
    if sha256.hexdigest() != digest.hex:
        raise DataLoss(
            f"Blob {digest} holds other bytes than its digest says. Push its model or bento again with --force.",
            reason="BLOB_CORRUPT",
            digest=digest,
        )
