"""Terminals and their recordings. They outlive the deployment that they were opened in: who looks into what happened
does so afterwards."""

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from services.deployer.domain import Terminal
from services.deployer.store.deployment_rows import metadata
from services.kernel.db import Database, UtcDateTime

terminals = sa.Table(
    "terminals",
    metadata,
    sa.Column("id", sa.String(63), primary_key=True),
    sa.Column("organization", sa.String(128), nullable=False),
    sa.Column("deployment", sa.String(63), nullable=False),
    sa.Column("deployment_uid", sa.String(36), nullable=False),
    sa.Column("replica", sa.String(253), nullable=False),
    sa.Column("service", sa.String(128), nullable=False),
    sa.Column("command", sa.JSON, nullable=False),
    sa.Column("tty", sa.Boolean, nullable=False),
    sa.Column("debug_image", sa.Text, nullable=False),
    sa.Column("user", sa.String(128), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("reason", sa.String(32), nullable=False),
    sa.Column("exit_code", sa.Integer, nullable=True),
    sa.Column("create_time", UtcDateTime, nullable=False),
    sa.Column("end_time", UtcDateTime, nullable=True),
    # The deployer through which it goes, by its data directory.
    sa.Column("owner", sa.String(64), nullable=False),
    sa.Index("terminals_by_deployment", "organization", "deployment", "create_time"),
)
pieces = sa.Table(
    "terminal_pieces",
    metadata,
    sa.Column("terminal", sa.String(63), sa.ForeignKey("terminals.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    # Whole lines of an asciicast.
    sa.Column("text", sa.Text, nullable=False),
)


class TerminalStore:
    """Rows in and out. Each call is a transaction of its own."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, terminal: Terminal) -> None:
        """Insert one."""
        values = {column.name: getattr(terminal, column.name) for column in terminals.columns}
        async with self._database.transaction() as connection:
            await connection.execute(sa.insert(terminals).values(**values))

    async def get(self, organization: str, deployment: str, id: str) -> Terminal | None:
        """One, by its deployment's id and its own."""
        query = sa.select(terminals).where(
            terminals.c.organization == organization, terminals.c.deployment == deployment, terminals.c.id == id
        )
        async with self._database.read() as connection:
            row = (await connection.execute(query)).mappings().one_or_none()
        return None if row is None else _terminal(row)

    async def list_(
        self, organization: str, deployment: str, user: str, after: tuple[datetime, str] | None, limit: int
    ) -> list[Terminal]:
        """Newest first, those of one user where one is named, older than `after`."""
        query = sa.select(terminals).where(
            terminals.c.organization == organization, terminals.c.deployment == deployment
        )
        if user:
            query = query.where(terminals.c.user == user)
        if after is not None:
            time, id = after
            older = sa.and_(terminals.c.create_time == time, terminals.c.id > id)
            query = query.where(sa.or_(terminals.c.create_time < time, older))
        query = query.order_by(terminals.c.create_time.desc(), terminals.c.id).limit(limit)
        async with self._database.read() as connection:
            return [_terminal(row) for row in (await connection.execute(query)).mappings()]

    async def open(self, id: str, owner: str) -> bool:
        """Take one that nobody has opened yet; False where somebody has."""
        async with self._database.transaction() as connection:
            opened = (
                sa.update(terminals)
                .where(terminals.c.id == id, terminals.c.state == "PENDING")
                .values(state="OPEN", owner=owner)
            )
            return (await connection.execute(opened)).rowcount == 1

    async def append(self, id: str, number: int, text: str) -> None:
        """Add a piece to its recording."""
        async with self._database.transaction() as connection:
            await connection.execute(sa.insert(pieces).values(terminal=id, number=number, text=text))

    async def end(self, id: str, reason: str, exit_code: int | None, time: datetime) -> None:
        """Say that one that is open has ended."""
        await self._end(terminals.c.id == id, reason=reason, exit_code=exit_code, end_time=time)

    async def end_lost(self, owner: str, before: datetime, now: datetime) -> None:
        """Say so of those which the owner (a former run of it) left open, and of all that were created before."""
        mine = sa.and_(terminals.c.owner == owner, terminals.c.state == "OPEN")
        await self._end(sa.or_(mine, terminals.c.create_time < before), reason="LOST", end_time=now)

    async def read(self, id: str) -> AsyncIterator[str]:
        """The recording, piece by piece."""
        number = 0
        while True:
            query = sa.select(pieces.c.text).where(pieces.c.terminal == id, pieces.c.number == number)
            async with self._database.read() as connection:
                text = (await connection.execute(query)).scalar_one_or_none()
            if text is None:
                return
            yield text
            number += 1

    async def remove(self, id: str) -> None:
        """Delete one with its recording."""
        await self._remove(terminals.c.id == id)

    async def remove_old(self, before: datetime) -> None:
        """Delete those that ended before."""
        await self._remove(terminals.c.end_time < before)

    async def _end(self, which: sa.ColumnElement[bool], **values: Any) -> None:
        async with self._database.transaction() as connection:
            living = terminals.c.state.in_(("PENDING", "OPEN"))
            await connection.execute(sa.update(terminals).where(living, which).values(state="ENDED", **values))

    async def _remove(self, which: sa.ColumnElement[bool]) -> None:
        async with self._database.transaction() as connection:
            chosen = sa.select(terminals.c.id).where(which)
            await connection.execute(sa.delete(pieces).where(pieces.c.terminal.in_(chosen)))
            await connection.execute(sa.delete(terminals).where(which))


def _terminal(row: Any) -> Terminal:
    return Terminal(**{**row, "command": tuple(row["command"])})
