"""What every write of the recorder shares: one writer at a time per log, a reserve of disk space, usage."""

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Dialect, Table, text

from ekiben.errors import ResourceExhausted
from services.kernel.db import AsyncConnection, Database, insert_into
from services.recorder.store.tables import log_usage

PREDICTIONS = "predictions"
TRACES = "traces"
# On a small disk the reserve is a twentieth of it.
_RESERVE_SHARE = 20
# One call brings at most a message, 16 MiB.
_ENOUGH_FREE_BYTES = 16 << 20
# Any two numbers that no other user of the database takes: they name locks.
_ADVISORY_LOCKS = {PREDICTIONS: 0x656B6962_01, TRACES: 0x656B6962_02}


class Writer:
    """Gives transactions in which a log has no other writer.

    Only then is `sequence` the order of commits, which a tail needs: with free writers, a row may become visible
    after a later one was read, and the tail would never see it. A log is written in batches, so that waiting for one
    another costs little: SQLite has one writer anyway, PostgreSQL takes an advisory lock.
    """

    def __init__(self, database: Database, *, min_free_bytes: int = 0) -> None:
        self._database = database
        self._min_free_bytes = min_free_bytes
        name = database.engine.url.database
        self._folder = Path(name).parent if database.dialect == "sqlite" and name else None

    @asynccontextmanager
    async def transaction(self, log: str) -> AsyncIterator[AsyncConnection]:
        """A transaction as the only writer of `log`; committed at the end of the block.

        Raises:
            ResourceExhausted: the disk is full, or below its reserve (DISK_FULL).
            Unavailable: the database does not answer (DATABASE_UNAVAILABLE).
        With either nothing was written: the sender keeps its data and sends it again.
        """
        scarce = self._space_is_scarce()
        async with self._database.transaction() as connection:
            if scarce:
                await _check_free_pages(connection)
            if self._database.dialect == "postgresql":
                await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCKS[log]})
            yield connection

    def _space_is_scarce(self) -> bool:
        if self._folder is None or not self._min_free_bytes:
            return False
        try:
            disk = os.statvfs(self._folder)
        except OSError:
            return False  # the write itself will tell
        reserve = min(self._min_free_bytes, disk.f_blocks * disk.f_frsize // _RESERVE_SHARE)
        return disk.f_bavail * disk.f_frsize < reserve


async def _check_free_pages(connection: AsyncConnection) -> None:
    """Refuse to write where the database would have to grow: what retention freed may be used again."""
    pages = (await connection.execute(text("PRAGMA freelist_count"))).scalar_one()
    size_bytes = (await connection.execute(text("PRAGMA page_size"))).scalar_one()
    if pages * size_bytes < _ENOUGH_FREE_BYTES:
        raise ResourceExhausted(
            "The disk of the recorder's database is nearly full; free some space.",
            reason="DISK_FULL",
            retry_after_s=30.0,
        )


def upsert(dialect: Dialect, table: Any) -> Any:
    """An INSERT of this dialect which knows ON CONFLICT."""
    return insert_into(dialect.name, table)


async def write_rows(
    connection: AsyncConnection, table: Table, rows: Sequence[tuple[Any, ...]], *, merge: bool = False
) -> None:
    """Insert rows, given as values in the order of the table's columns; with `merge` a row of the same key is replaced.

    As the driver takes them: SQLAlchemy would look up the name and the type of each value anew, which took longer than
    SQLite does. So the columns must be of types that both drivers know, as text, numbers and booleans are.
    """
    if rows:
        await connection.exec_driver_sql(_insertion(connection.dialect, table, merge), list(rows))


_insertions: dict[tuple[str, str, bool], str] = {}


def _insertion(dialect: Dialect, table: Table, merge: bool) -> str:
    key = (dialect.name, table.name, merge)
    if key not in _insertions:
        statement = upsert(dialect, table)
        if merge:
            changed = {column.name: statement.excluded[column.name] for column in table.c if not column.primary_key}
            statement = statement.on_conflict_do_update(index_elements=list(table.primary_key), set_=changed)
        compiled = statement.compile(dialect=dialect)
        assert compiled.positiontup == [column.name for column in table.c]
        _insertions[key] = str(compiled)
    return _insertions[key]


async def add_usage(connection: AsyncConnection, log: str, now_us: int, size_bytes: int) -> None:
    """Count bytes of `log` as written in the minute of `now_us`, in the transaction that writes them."""
    statement = upsert(connection.dialect, log_usage)
    statement = statement.on_conflict_do_update(
        index_elements=[log_usage.c.log, log_usage.c.minute],
        set_={"size_bytes": log_usage.c.size_bytes + statement.excluded.size_bytes},
    )
    await connection.execute(statement, {"log": log, "minute": now_us // 60_000_000, "size_bytes": size_bytes})
