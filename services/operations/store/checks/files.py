"""Whether the files of each blob are listed, as far as rows say; the lists themselves follow from the bytes."""

from collections.abc import AsyncIterator

import sqlalchemy as sa

from services.kernel.db import AsyncConnection, Database
from services.operations.findings import Finding, Repair, Severity
from services.registry.domain import ListingState
from services.registry.store import files
from services.registry.store.blobs import is_named, namers
from services.registry.store.tables import blob_files, blob_listings, blobs


async def of_files(connection: AsyncConnection, database: Database) -> AsyncIterator[Finding]:
    """Blobs that are named and whose files nobody lists, or whose list is not whole."""
    join = blobs.outerjoin(blob_listings, blob_listings.c.digest == blobs.c.digest)
    missing = sa.select(blobs.c.digest).select_from(join).where(is_named(), blob_listings.c.digest.is_(None))
    count = sa.select(sa.func.count()).where(blob_files.c.digest == blob_listings.c.digest).scalar_subquery()
    listed = sa.select(blob_listings.c.digest)
    done = blob_listings.c.state == ListingState.DONE
    found = {
        "LISTING_MISSING": missing,
        "LISTING_INCOMPLETE": listed.where(done, count != blob_listings.c.file_count),
        "LISTING_FAILED": listed.where(blob_listings.c.state == ListingState.FAILED),
    }
    says = {
        "LISTING_MISSING": "Nobody lists its files: images and nodes cannot take single ones.",
        "LISTING_INCOMPLETE": "The list of its files has lost some.",
        "LISTING_FAILED": "Its files could not be listed, though its archive was taken.",
    }
    for check, statement in found.items():
        digests = list((await connection.execute(statement.limit(1000))).scalars())
        owners = await namers(connection, digests)
        for digest in digests:
            yield Finding(
                check,
                Severity.WARNING if check == "LISTING_FAILED" else Severity.ERROR,
                "registry",
                ", ".join(owners.get(digest, [])) or digest,
                says[check],
                "A repair has them listed again.",
                digest,
                repair=_list_again(database, digest),
            )


def _list_again(database: Database, digest: str) -> Repair:
    async def list_again() -> bool:
        async with database.transaction() as connection:
            there = sa.select(blobs.c.digest).where(blobs.c.digest == digest).with_for_update()
            if (await connection.execute(there)).first() is None:
                return False
            await connection.execute(blob_listings.delete().where(blob_listings.c.digest == digest))
            await files.want(connection, digest)
            return True

    return list_again
