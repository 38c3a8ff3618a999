"""Whether what each organization keeps is counted as it is."""

from collections.abc import AsyncIterator

from services.kernel.db import AsyncConnection, Database
from services.operations.findings import Finding, Repair, Severity
from services.registry.store import quotas


async def of_quotas(connection: AsyncConnection, database: Database) -> AsyncIterator[Finding]:
    """Counts that are not what is there. Both are read in one snapshot, so writers do not matter."""
    for organization in await quotas.organizations_with_rows(connection):
        counted = (await quotas.get(connection, organization)).used
        there = await quotas.count(connection, organization)
        if counted != there:
            yield Finding(
                "QUOTA_MISCOUNTED",
                Severity.ERROR,
                "registry",
                f"organizations/{organization}/quota",
                f"It counts {counted.bytes:,} bytes, {counted.versions:,} versions and {counted.repositories:,} "
                f"repositories, and there are {there.bytes:,}, {there.versions:,} and {there.repositories:,}.",
                "A repair counts anew.",
                repair=_recount(database, organization),
            )


def _recount(database: Database, organization: str) -> Repair:
    async def recount() -> bool:
        async with database.transaction() as connection:
            await quotas.recount(connection, organization)
        return True

    return recount
