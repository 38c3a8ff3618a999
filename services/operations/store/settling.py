"""What of restored rows is not taken to the letter."""

from datetime import datetime

from services.kernel.db import AsyncConnection
from services.registry.domain import BlobState, ContentState, UploadState
from services.registry.store.blobs import is_named
from services.registry.store.tables import blobs, collection_holds, uploads, versions

_WHY = "The registry was restored from a backup, which holds no parts of uploads. Push again."


async def settle_registry(connection: AsyncConnection, now: datetime) -> None:
    """End what was on its way when the backup was made, and forget blobs that it does not hold."""
    await connection.execute(collection_holds.delete())
    await connection.execute(
        uploads.update().where(uploads.c.state == UploadState.OPEN).values(state=UploadState.ABORTED, failure=_WHY)
    )
    await connection.execute(
        versions.update()
        .where(versions.c.state == ContentState.UPLOADING)
        .values(state=ContentState.FAILED, failure=_WHY, upload_end_time=now)
    )
    await connection.execute(blobs.delete().where(~is_named()))
    await connection.execute(blobs.update().values(state=BlobState.STORED))
