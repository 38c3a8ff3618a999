"""Rows out of tables and into them, as plain values: text, numbers, booleans, bytes and None.

Values are those that the database holds (a time is its microseconds), so that rows of SQLite go into PostgreSQL and
back, and rows of an older release into the tables that it had.
"""

import warnings
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from services.kernel.db import AsyncConnection, Database
from services.operations.store.services import package_of, tables_of, version_table_of

_BATCH = 500
Row = Sequence[Any]


def _stored(column: "sa.Column[Any]") -> sa.ColumnElement[Any]:
    """The column as the database holds it."""
    if isinstance(column.type, sa.types.TypeDecorator):
        return sa.type_coerce(column, column.type.impl_instance).label(column.name)
    return column


async def read_table(connection: AsyncConnection, table: sa.Table) -> AsyncIterator[Sequence[Row]]:
    """All rows of a table in batches, in the order of its key; values of `columns_of`."""
    columns = [_stored(column) for column in table.columns if column.computed is None]
    statement = sa.select(*columns).order_by(*table.primary_key.columns)
    async with connection.stream(statement) as rows:
        async for batch in rows.partitions(_BATCH):
            yield batch


def columns_of(table: sa.Table) -> list[str]:
    """Names of the columns that hold something of their own."""
    return [column.name for column in table.columns if column.computed is None]


async def occupied(connection: AsyncConnection, service: str) -> str:
    """A table of the service that has rows; empty when none has, or none is there."""
    there = set(await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names()))
    for table in tables_of(service):
        if (
            table.name in there
            and (await connection.execute(sa.select(sa.literal(1)).select_from(table).limit(1))).first()
        ):
            return table.name
    return ""


async def tables_there(connection: AsyncConnection) -> dict[str, list[str]]:
    """Every table of the database with its columns."""

    def look(sync: sa.Connection) -> dict[str, list[str]]:
        inspector = sa.inspect(sync)
        return {name: [c["name"] for c in inspector.get_columns(name)] for name in inspector.get_table_names()}

    return await connection.run_sync(look)


async def others(connections: Sequence[AsyncConnection]) -> list[str]:
    """Who else is connected to the PostgreSQL databases of these, as they name themselves; of a SQLite file nobody can
    say. These must be the only connections of this process.
    """
    there = [connection for connection in connections if connection.dialect.name == "postgresql"]
    own = {(await connection.execute(sa.text("SELECT pg_backend_pid()"))).scalar_one() for connection in there}
    statement = sa.text(
        "SELECT pid, coalesce(nullif(application_name, ''), usename, 'somebody') FROM pg_stat_activity "
        "WHERE datname = current_database() AND backend_type = 'client backend'"
    )
    found = {pid: name for connection in there for pid, name in (await connection.execute(statement)).all()}
    return sorted(name for pid, name in found.items() if pid not in own)


async def begin_load(
    database: Database, connection: AsyncConnection, service: str, revision: str
) -> Mapping[str, sa.Table]:
    """Make the tables of a service anew as they were at `revision`; what was there goes. Gives them by name.

    All within the connection's transaction: until that is committed, nobody sees any of it.

    Raises:
        FailedPrecondition: a newer release made that revision (DATABASE_NEWER).
    """
    there = set(await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names()))
    for table in (*reversed(tables_of(service)), sa.Table(version_table_of(service), sa.MetaData())):
        if table.name in there:
            await connection.execute(sa.schema.DropTable(table))
    before = there - {table.name for table in tables_of(service)} - {version_table_of(service)}
    await database.upgrade(connection, package_of(service), revision)

    def reflect(sync: sa.Connection) -> Mapping[str, sa.Table]:
        found = sa.MetaData()
        made = set(sa.inspect(sync).get_table_names()) - before
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sa.exc.SAWarning)  # an index that it cannot describe: nobody asks for one
            found.reflect(bind=sync, only=sorted(made))
        return found.tables

    return await connection.run_sync(reflect)


async def insert_rows(
    connection: AsyncConnection, table: sa.Table, columns: Sequence[str], rows: Sequence[Row]
) -> None:
    """Insert rows whose values are in the order of `columns`."""
    if rows:
        await connection.execute(table.insert(), [dict(zip(columns, row, strict=True)) for row in rows])


async def end_load(
    database: Database, connection: AsyncConnection, service: str, tables: Mapping[str, sa.Table]
) -> None:
    """Let what counts up go on after the highest key, and bring the tables to this release's revision."""
    if connection.dialect.name == "postgresql":
        for table in tables.values():
            for column in table.primary_key.columns:
                if isinstance(column.type, sa.Integer):
                    await connection.execute(_continue_serial(table.name, column.name))
    await database.upgrade(connection, package_of(service))


def _continue_serial(table: str, column: str) -> sa.TextClause:
    highest = f'(SELECT max("{column}") FROM "{table}")'
    return sa.text(
        f"SELECT setval(serial, coalesce({highest}, 1), {highest} IS NOT NULL) "
        f"""FROM pg_get_serial_sequence('"{table}"', '{column}') AS serial WHERE serial IS NOT NULL"""
    )
