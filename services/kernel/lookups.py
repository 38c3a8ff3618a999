"""Look-ups: one SELECT, for which a transaction would cost more than the answer.

A transaction asks four times: whether the connection lives, BEGIN, the SELECT, ROLLBACK. On SQLite each is a turn of
another thread and back, on PostgreSQL each but the BEGIN is a round trip; SQLAlchemy's own work comes to as much again.
One statement has a snapshot of its own. So it goes to the driver as it is: SQLAlchemy makes the SQL once and knows the
types; connections are kept here, and whether they live is found out by using them, since a read may be asked twice.
"""

import asyncio
import contextlib
from collections import namedtuple
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import sqlalchemy as sa

from services.kernel import telemetry
from services.kernel.engines import AsyncEngine

# Statements are made once, at import; one made for each call would only lose the room to others.
_STATEMENTS = 256
_GIVEN: Any = object()


class Rows:
    """What a look-up found, in the statement's order. Each row has its columns as attributes."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def first(self) -> Any | None:
        """The first row, or None."""
        return self._rows[0] if self._rows else None

    def all(self) -> Sequence[Any]:
        """Every row."""
        return self._rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)


class Executor(Protocol):
    """What runs a statement: a connection in a transaction, or `Lookups`. For a query that either may ask."""

    def execute(self, statement: Any, parameters: Any, /) -> Awaitable[Any]:
        """The rows."""
        ...


class Lookups:
    """Runs single statements on connections of its own, at most `size`, opened when they are needed."""

    def __init__(
        self, engine: AsyncEngine, size: int, translated: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        self._translated = translated
        self.dialect = engine.dialect
        self._engine = engine
        self._system = engine.dialect.name
        self._idle: list[Any] = []
        self._room = asyncio.Semaphore(size)
        self._statements: dict[sa.Select[Any], _Statement] = {}

    async def execute(self, statement: "sa.Select[Any]", parameters: Mapping[str, Any]) -> Rows:
        """The rows of a SELECT that only reads. Its values are named by `bindparam`, its lists are part of it.

        Raises:
            As `Database.read`.
        """
        prepared = self._statements.get(statement) or self._prepare(statement, parameters)
        values = prepared.values(parameters)
        span = telemetry.start_sql_span(self._system, prepared.sql)
        try:
            async with self._room:
                with self._translated():
                    return Rows([prepared.row(row) for row in await self._ask(prepared.sql, values)])
        except Exception as exc:
            if span is not None:
                cause = exc.orig if isinstance(exc, sa.exc.DBAPIError) else exc
                telemetry.fail_span(span, type(cause).__name__)
            raise
        finally:
            if span is not None:
                span.end()

    async def close(self) -> None:
        """Close the connections that are not in use."""
        while self._idle:
            with contextlib.suppress(Exception):
                await self._idle.pop().close()

    def _prepare(self, statement: "sa.Select[Any]", parameters: Mapping[str, Any]) -> "_Statement":
        if len(self._statements) >= _STATEMENTS:
            self._statements.clear()
        prepared = self._statements[statement] = _Statement(statement, parameters, self.dialect)
        return prepared

    async def _ask(self, sql: str, values: Sequence[Any]) -> Sequence[Any]:
        kept = True
        while True:
            connection = self._take()
            if connection is None:
                connection, kept = await self._connect(), False
            usable = False
            try:
                rows: Sequence[Any] = await (
                    connection.fetch(sql, *values)
                    if self._system == "postgresql"
                    else connection.execute_fetchall(sql, values)
                )
                usable = True
                return rows
            except Exception as exc:
                usable = not self._lost(connection)
                # A server that was restarted leaves dead connections here: a new one tells whether it is back.
                if usable or not kept:
                    raise sa.exc.DBAPIError(sql, None, exc, connection_invalidated=not usable) from exc
            finally:
                # Cancelled, it may be in the midst of an answer.
                if usable:
                    self._idle.append(connection)
                else:
                    self._drop(connection)

    def _take(self) -> Any | None:
        """The connection that was used last, so that those of a busy moment stay idle."""
        while self._idle:
            connection = self._idle.pop()
            if not self._lost(connection):
                return connection
        return None

    async def _connect(self) -> Any:
        pooled = await self._engine.raw_connection()
        connection = pooled.driver_connection
        pooled.detach()  # so that it does not count among those of transactions
        return connection

    def _lost(self, connection: Any) -> bool:
        return self._system == "postgresql" and connection.is_closed()

    def _drop(self, connection: Any) -> None:
        if self._system == "postgresql":
            connection.terminate()
        else:
            self._idle.append(connection)  # its thread ends what it does first, then takes what comes next


class _Statement:
    """A statement as the driver takes it, and how to convert what goes in and what comes out."""

    def __init__(self, statement: "sa.Select[Any]", parameters: Mapping[str, Any], dialect: sa.Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        # Expanded: the values of an IN in the statement itself are spelt out.
        expanded = compiled.construct_expanded_state(dict(parameters))
        self.sql: str = expanded.statement
        if set(parameters) & set(expanded.parameter_expansion):
            raise ValueError("a look-up takes no list as a parameter: each length of it is another statement")
        convert: dict[str, Any] = dict(expanded.processors)
        for name, bind in compiled.binds.items():
            convert[name] = bind.type.dialect_impl(dialect).bind_processor(dialect)
        self._values: list[tuple[str, Any, Callable[[Any], Any] | None]] = [
            (name, _GIVEN if name in parameters else expanded.parameters[name], convert.get(name))
            for name in expanded.positiontup or ()
        ]
        columns = [(column.key, column.type) for column in statement.selected_columns]
        self._row: Any = namedtuple("Row", [name for name, _ in columns])  # type: ignore[misc]
        self._converters = [
            (place, converter)
            for place, (_, type_) in enumerate(columns)
            if (converter := type_.dialect_impl(dialect).result_processor(dialect, None)) is not None
        ]

    def values(self, given: Mapping[str, Any]) -> tuple[Any, ...]:
        """The parameters in the statement's order."""
        values = []
        for name, known, convert in self._values:
            value = given[name] if known is _GIVEN else known
            values.append(value if convert is None else convert(value))
        return tuple(values)

    def row(self, row: Sequence[Any]) -> Any:
        """A row as the types of its columns have it."""
        values = list(row)
        for place, convert in self._converters:
            values[place] = convert(values[place])
        return self._row._make(values)
