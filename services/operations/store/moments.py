"""Several databases as they are at one moment, while others write to them."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

import sqlalchemy as sa

from services.kernel.db import AsyncConnection, Database


@asynccontextmanager
async def one_moment(databases: Mapping[str, Database]) -> AsyncIterator[Mapping[str, AsyncConnection]]:
    """A connection for each service; together they show one moment.

    Services in one PostgreSQL database share a snapshot, whatever their schemas. Files of SQLite are all locked
    against writers for the few milliseconds in which their snapshots begin. Separate databases of PostgreSQL are read
    in the order of `databases`, so put who names before who is named: what is named then was there a moment before.
    """
    distinct = list(dict.fromkeys(databases.values()))
    connections: dict[Database, AsyncConnection] = {}
    exported: list[str] = []
    async with AsyncExitStack() as stack:
        async with AsyncExitStack() as still:
            for database in distinct:
                if database.dialect == "sqlite":
                    await still.enter_async_context(database.transaction())
            for database in distinct:
                if database.dialect == "sqlite":
                    connections[database] = connection = await stack.enter_async_context(database.read())
                    await connection.execute(sa.text("SELECT count(*) FROM sqlite_master"))  # it begins by this
                else:
                    connections[database] = await _with_snapshot(database, exported, stack)
        yield {service: connections[database] for service, database in databases.items()}


async def _with_snapshot(database: Database, exported: list[str], stack: AsyncExitStack) -> AsyncConnection:
    """A connection with one of the exported snapshots, if one is of its database, else with its own, exported too."""
    for snapshot in exported:
        async with AsyncExitStack() as trying:
            connection = await trying.enter_async_context(database.read())
            try:
                await connection.execute(sa.text(f"SET TRANSACTION SNAPSHOT '{snapshot}'"))
            except sa.exc.DBAPIError:  # of another database: it does not know this snapshot
                continue
            stack.push_async_exit(trying.pop_all())
            return connection
    connection = await stack.enter_async_context(database.read())
    exported.append((await connection.execute(sa.text("SELECT pg_export_snapshot()"))).scalar_one())
    return connection
