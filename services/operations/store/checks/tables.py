"""Of any service: its tables are those of this release, and the database finds no fault in itself."""

from collections.abc import AsyncIterator

import sqlalchemy as sa

from services.kernel import migrations
from services.kernel.db import AsyncConnection
from services.operations.findings import Finding, Severity
from services.operations.store.services import metadata_of, version_table_of


async def of_any(connection: AsyncConnection, service: str, *, deep: bool) -> AsyncIterator[Finding]:
    """What is wrong with the tables of a service, which are at this release's revision."""
    differences = await connection.run_sync(migrations.differences, metadata_of(service), version_table_of(service))
    own = metadata_of(service).tables
    for difference in differences:
        told = str(difference)
        # A database that services share has tables of others too.
        if "remove_" in told.split(",")[0] and not any(f"'{name}'" in told for name in own):
            continue
        yield Finding(
            "SCHEMA_DIFFERS",
            Severity.ERROR,
            service,
            "",
            f"The tables are not those of this release: {told[:300]}",
            "Somebody changed them by hand. Undo that, or restore a backup.",
        )
    if connection.dialect.name == "sqlite":
        pragma = "integrity_check" if deep else "quick_check"
        for row in (await connection.execute(sa.text(f"PRAGMA {pragma}(100)"))).all():
            if row[0] != "ok":
                yield Finding(
                    "DATABASE_DAMAGED",
                    Severity.ERROR,
                    service,
                    "",
                    f"SQLite finds its file damaged: {row[0]}",
                    "Restore a backup.",
                )
        for row in (await connection.execute(sa.text("PRAGMA foreign_key_check"))).all():
            yield Finding(
                "FOREIGN_KEY_BROKEN",
                Severity.ERROR,
                service,
                f"{row[0]} row {row[1]}",
                f"It names a row of {row[2]} that does not exist.",
                "Somebody deleted rows by hand. Restore a backup.",
            )
