"""SQL for stores: SQLite through aiosqlite or PostgreSQL through asyncpg, one code path.

    async with open_database("sqlite+aiosqlite:////data/registry.db") as database:
        await database.migrate("services.registry.migrations")
        async with database.transaction() as connection: ...   # commits, or rolls back on any exception
        async with database.read() as connection: ...          # sees one snapshot, cannot write
        await database.lookups.execute(statement, values)      # one SELECT alone, for a fraction of the cost

URLs may also be given short: `sqlite:////data/registry.db`, `postgresql://user@host/name` (see `kernel.postgres`).
A use case is one `transaction()`. On SQLite writers take turns, first come first served, so keep nothing
slow (a call to a peer, a file) inside of one. How the migrations of a service must look: `kernel.migrations`.
"""

import asyncio
import importlib.util
import logging
import random
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.types import TypeDecorator

from ekiben.errors import Aborted, DataLoss, FailedPrecondition, Unavailable
from services.kernel import migrations, outages, postgres, telemetry
from services.kernel.engines import AsyncConnection, AsyncEngine, create_async_engine, insert_into
from services.kernel.lookups import Executor, Lookups
from services.kernel.settings import DatabaseSettings, SettingsError

__all__ = ["AsyncConnection", "Database", "Executor", "UtcDateTime", "insert_into", "open_database"]

log = logging.getLogger(__name__)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# How long SQLite waits for another process's lock, in ms. Within the process writers queue before they ask.
_BUSY_TIMEOUT_MS = 30_000
_READERS = 8
# Connections for look-ups at once: on PostgreSQL besides those of transactions.
_LOOKUPS = 4

_LISTENER_S = 5.0
_ATTEMPTS = 6
_Made = TypeVar("_Made")

_migrating: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime, stored as integer microseconds since 1970: exact, ordered, the same in both databases."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> int | None:
        """Microseconds for the database; a naive datetime is refused."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a datetime without a time zone cannot be stored")
        return (value - _EPOCH) // timedelta(microseconds=1)

    def process_result_value(self, value: int | None, dialect: sa.Dialect) -> datetime | None:
        """The datetime, in UTC."""
        return None if value is None else _EPOCH + timedelta(microseconds=value)


class Database:
    """A service's own database."""

    def __init__(
        self,
        writer: AsyncEngine,
        reader: AsyncEngine,
        *,
        shown: str,
        schema: str = "",
        connector: postgres.Connector | None = None,
    ) -> None:
        self.engine = writer
        self._reader = reader
        self.shown = shown
        """Its URL for people, without a password."""
        self.schema = schema
        """PostgreSQL's schema that holds its tables; empty for whichever the role finds first."""
        self._connector = connector
        self._locks: dict[str, asyncio.Lock] = {}
        self._turn = asyncio.Lock() if self.dialect == "sqlite" else None
        self.lookups = Lookups(reader, _LOOKUPS, outages.Translated)
        """Runs a SELECT that was made at import, in a snapshot of its own."""

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self.engine.dialect.name

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """A connection in a transaction that may write: committed at the end, rolled back on any exception.

        On SQLite it begins with `BEGIN IMMEDIATE`, so a read in it stays true until its commit. On PostgreSQL it is
        READ COMMITTED: compare-and-set, or lock rows with `FOR UPDATE`.

        Raises:
            Unavailable: the database cannot be reached (DATABASE_UNAVAILABLE); nothing was changed.
            Aborted: PostgreSQL gave up this transaction for another (TRANSACTION_LOST), or went away during the
                commit, which it may have made or not (COMMIT_UNKNOWN).
            ResourceExhausted: the disk is full (DISK_FULL).
            DataLoss: a SQLite file is damaged (DATABASE_DAMAGED).
        """
        async with AsyncExitStack() as stack:
            if self._turn is not None:
                await stack.enter_async_context(self._turn)
            with outages.Translated(writes=True):
                connection = await stack.enter_async_context(self.engine.connect())
                await connection.begin()
                yield connection
                try:
                    await connection.commit()
                except Exception as exc:
                    if (error := outages.at_commit(exc)) is not None:
                        raise error from exc
                    raise

    async def attempt(self, work: Callable[[AsyncConnection], Awaitable[_Made]]) -> _Made:
        """Do `work` in a `transaction`, and once more where PostgreSQL gave that up for another, a few times.

        For what is dear to begin again from the caller's side. Of what `work` did outside of its transaction it has to
        be true that it may be done twice.

        Raises: as `transaction`; TRANSACTION_LOST after the last time.
        """
        for left in reversed(range(_ATTEMPTS)):
            try:
                async with self.transaction() as connection:
                    return await work(connection)
            except Aborted as exc:
                if exc.reason != "TRANSACTION_LOST" or not left:
                    raise
                log.info("a transaction was lost and is tried again", extra={"left": left})
            # Whoever went first has to be through, and those who lost together must not come back together.
            await asyncio.sleep(random.uniform(0.01, 0.03) * 2 ** (_ATTEMPTS - left))
        raise AssertionError("the last attempt returns or raises")

    @asynccontextmanager
    async def alone(self, work: str, *, wait: bool = True) -> AsyncIterator[bool]:
        """Hold the name `work` among all processes on this database; whether it is held.

        For work that is right without, and only done twice: the lock goes with its connection, of which it takes one.
        On SQLite, which one process uses, it is a lock of this process.

        Args:
            wait: until it is free; otherwise the block runs at once and is told False.

        Raises:
            Unavailable: as `transaction`.
        """
        if self.dialect != "postgresql":
            lock = self._locks.setdefault(work, asyncio.Lock())
            if lock.locked() and not wait:
                yield False
                return
            async with lock:
                yield True
            return
        with outages.Translated():
            async with self.engine.connect() as connection:
                key = migrations.lock_key(f"{self.schema}/{work}")
                take = "pg_advisory_xact_lock" if wait else "pg_try_advisory_xact_lock"
                held = (await connection.execute(sa.text(f"SELECT {take}(:key)"), {"key": key})).scalar_one()
                yield wait or bool(held)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection for reading only, all of whose statements see one snapshot. Errors as of `transaction`."""
        with outages.Translated():
            async with self._reader.connect() as connection:
                yield connection

    async def close(self) -> None:
        """Close every connection; what is in use ends first."""
        await self.lookups.close()
        await self.engine.dispose()
        await self._reader.dispose()

    @asynccontextmanager
    async def listening(self, channel: str, heard: Callable[..., None]) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Call `heard` with PostgreSQL's notifications of `channel`, the payload last, on a connection of its own.

        Gives what returns after some seconds in which that connection lived; both raise Unavailable where it does not.
        """
        assert self._connector is not None, "only PostgreSQL notifies"
        with outages.Translated():
            connection = await self._connector()
            try:
                ended = asyncio.Event()
                connection.add_termination_listener(lambda _connection: ended.set())
                await connection.add_listener(channel, heard)

                async def alive() -> None:
                    with outages.Translated():
                        try:
                            async with asyncio.timeout(_LISTENER_S):
                                await ended.wait()
                        except TimeoutError:
                            await connection.execute("SELECT 1", timeout=_LISTENER_S)
                            return
                        raise postgres.NotConnected("The connection that listens has ended.")

                yield alive
            finally:
                connection.terminate()

    async def ping(self) -> None:
        """Return when the database answers; raises as `read` does."""
        async with self.read() as connection:
            await connection.execute(sa.text("SELECT 1"))

    async def migrate(self, package: str) -> None:
        """Bring the tables of `package` ("services.registry.migrations") to its newest revision.

        All in one transaction, under a lock that other processes respect too, so services may start together.
        When the tables are there already, Alembic is not even imported.

        Raises:
            FailedPrecondition: a newer release made these tables (DATABASE_NEWER); PostgreSQL's role may not make
                them (DATABASE_NOT_PERMITTED).
            DataLoss: a SQLite file is damaged (DATABASE_DAMAGED).
            Unavailable: as `transaction`.
        """
        folder = _folder(package)
        head, known = await asyncio.to_thread(migrations.history_of, folder)
        table = migrations.version_table(package)
        where = self.shown
        try:
            async with self.read() as connection:
                current = await connection.run_sync(migrations.current, table)
        except (Unavailable, DataLoss) as exc:  # the first that anybody asks of the database: name it
            cause = outages.cause_of(exc)
            if isinstance(exc, DataLoss):
                raise DataLoss(
                    f"The database {where} is damaged: {cause}. Move it away and put back a copy.",
                    reason="DATABASE_DAMAGED",
                    database=where,
                ) from exc
            if not isinstance(exc.__cause__, postgres.NotConnected):  # which is a sentence already
                cause = f"The database {where} does not answer: {cause}."
            raise Unavailable(cause, reason="DATABASE_UNAVAILABLE", database=where, retry_after_s=1.0) from exc
        if current == head:
            return
        if current is not None and current not in known:
            raise FailedPrecondition(
                f"A newer release made the database {where}: it is at revision {current}, and this one ends "
                f"with {head}. Start that release, or put back a copy from before it.",
                reason="DATABASE_NEWER",
                database=where,
                revision=current,
            )
        # Alembic hands its context to env.py in a variable of its module, and a migration gives way to the event
        # loop at each statement: two at once in this process would read one another's.
        lock = _migrating.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        async with lock:
            try:
                async with self.transaction() as connection:
                    if self.dialect == "postgresql":
                        await self._lock_tables(connection, package)
                    await connection.run_sync(migrations.upgrade, folder, table)
            except sa.exc.DBAPIError as exc:
                if (error := outages.not_permitted(exc, where)) is not None:
                    raise error from exc
                raise
        log.info("database migrated", extra={"package": package, "revision": head})

    async def revision(self, package: str) -> tuple[str | None, str]:
        """The revision that the tables of `package` are at, None where there are none; and the newest."""
        async with self.read() as connection:
            current = await connection.run_sync(migrations.current, migrations.version_table(package))
        return current, migrations.head_of(_folder(package))

    async def upgrade(self, connection: AsyncConnection, package: str, revision: str = "head") -> None:
        """Bring the tables of `package` to `revision` within a transaction of this database.

        Raises:
            FailedPrecondition: no such revision here: a newer release made it (DATABASE_NEWER).
        """
        folder = _folder(package)
        head, known = migrations.history_of(folder)
        if revision != "head" and revision not in known:
            raise FailedPrecondition(
                f"A newer release made these tables: they are at revision {revision}, and this one ends with {head}. "
                "Use that release.",
                reason="DATABASE_NEWER",
                revision=revision,
            )
        lock = _migrating.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        async with lock:
            if self.dialect == "postgresql":
                await self._lock_tables(connection, package)
            await connection.run_sync(migrations.upgrade, folder, migrations.version_table(package), revision)

    async def _lock_tables(self, connection: AsyncConnection, package: str) -> None:
        """Wait for whoever migrates now, and make the schema where it is missing."""
        key = {"key": migrations.lock_key(package)}
        if not (await connection.execute(sa.text("SELECT pg_try_advisory_xact_lock(:key)"), key)).scalar_one():
            log.warning("another process migrates the database; waiting for it", extra={"package": package})
            await connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), key)
        missing = sa.text("SELECT to_regnamespace(:schema) IS NULL")
        if self.schema and (await connection.execute(missing, {"schema": self.schema})).scalar_one():
            await connection.execute(sa.schema.CreateSchema(self.schema))

    async def schema_differences(self, package: str, metadata: sa.MetaData) -> list[Any]:
        """What the migrated database lacks or has beyond `metadata`; for the test that keeps both in step."""
        async with self.read() as connection:
            return await connection.run_sync(migrations.differences, metadata, migrations.version_table(package))


@asynccontextmanager
async def open_database(where: str | DatabaseSettings) -> AsyncIterator[Database]:
    """Open the database at a URL, or as settings say; the folder of a SQLite file is made when missing.

    Connections are made when they are asked for: a server that is away is told by the first transaction. Closed at
    the end.

    Raises:
        SettingsError: the URL is none of SQLite or PostgreSQL, or its parameters cannot be used.
    """
    settings = DatabaseSettings(database_url=where) if isinstance(where, str) else where
    url = settings.database_url
    scheme, colon, _ = url.partition("://")
    if not colon:
        raise SettingsError(["database_url: it is no URL of a database."])  # not shown: it may hold a password
    if scheme.partition("+")[0] == "sqlite":
        database = _sqlite(url)
    elif scheme in postgres.SCHEMES:
        database = _postgresql(settings)
    else:
        raise SettingsError([f"database_url: {postgres.redacted(url)} is neither a SQLite nor a PostgreSQL URL."])
    try:
        yield database
    finally:
        await database.close()


def _postgresql(settings: DatabaseSettings) -> Database:
    address = postgres.parse(settings.database_url, settings.database_password_file)
    connector = postgres.Connector(address)
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connector,
        pool_size=settings.database_connections,
        max_overflow=0,
        pool_timeout=10,
        pool_pre_ping=True,  # a restarted server leaves dead connections in the pool
    )
    _trace(engine)
    # As on SQLite a reader sees one snapshot and cannot write; it shares the pool.
    reader = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    return Database(engine, reader, shown=address.shown, schema=address.schema, connector=connector)


def _sqlite(text: str) -> Database:
    try:
        url = make_url(text).set(drivername="sqlite+aiosqlite")
    except sa.exc.ArgumentError:
        raise SettingsError(["database_url: it is no URL of a database."]) from None
    if not url.database or url.database == ":memory:":
        raise SettingsError(["database_url: SQLite needs a file; one in memory cannot be read beside a writer."])
    Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    # One connection writes and several read: WAL lets them run side by side, and a second writer could only wait.
    writer = create_async_engine(url, poolclass=AsyncAdaptedQueuePool, pool_size=1, max_overflow=0, pool_timeout=60)
    reader = create_async_engine(url, poolclass=AsyncAdaptedQueuePool, pool_size=_READERS, max_overflow=0)
    for engine, read_only in ((writer, False), (reader, True)):

        def connected(dbapi: Any, _record: Any, read_only: bool = read_only) -> None:
            # None: Python's sqlite3 module then never begins or commits by itself.
            dbapi.isolation_level = None
            cursor = dbapi.cursor()
            cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
            _into_wal(cursor)
            # FULL: a commit survives power loss. NORMAL would lose the last ones, and rows here name blobs
            # and predictions that somebody was told are kept.
            cursor.execute("PRAGMA synchronous = FULL")
            cursor.execute("PRAGMA foreign_keys = ON")
            cursor.execute("PRAGMA temp_store = MEMORY")
            if read_only:
                cursor.execute("PRAGMA query_only = ON")
            cursor.close()

        def begin(connection: sa.Connection, statement: str = "BEGIN" if read_only else "BEGIN IMMEDIATE") -> None:
            connection.exec_driver_sql(statement)

        event.listen(engine.sync_engine, "connect", connected)
        event.listen(engine.sync_engine, "begin", begin)
        _trace(engine)
    return Database(writer, reader, shown=url.render_as_string())


def _into_wal(cursor: Any) -> None:
    """Of processes that open a new file together one changes the mode, and SQLite has the others wait for nothing."""
    deadline = time.monotonic() + _BUSY_TIMEOUT_MS / 1000
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as exc:
            if "locked" not in str(exc) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{package} is not a package.")
    return Path(next(iter(spec.submodule_search_locations)))


def _trace(engine: AsyncEngine) -> None:
    """One CLIENT span for each statement within a trace; loops that poll outside of one leave none."""
    system = engine.dialect.name

    def before(_c: Any, _cursor: Any, statement: str, _p: Any, context: Any, _many: bool) -> None:
        span = telemetry.start_sql_span(system, statement)
        if span is not None:
            context._ekiben_span = span

    def after(_c: Any, _cursor: Any, _s: str, _p: Any, context: Any, _many: bool) -> None:
        span = getattr(context, "_ekiben_span", None)
        if span is not None:
            span.end()

    def failed(error: sa.engine.ExceptionContext) -> None:
        span = getattr(error.execution_context, "_ekiben_span", None)
        if span is not None:
            telemetry.fail_span(span, type(error.original_exception).__name__)
            span.end()

    event.listen(engine.sync_engine, "before_cursor_execute", before)
    event.listen(engine.sync_engine, "after_cursor_execute", after)
    event.listen(engine.sync_engine, "handle_error", failed)
