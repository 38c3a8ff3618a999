"""How much each log holds, and what to forget first."""

from collections.abc import Awaitable, Callable

from sqlalchemy import delete, func, select

from services.kernel.db import Database
from services.recorder.store.tables import log_usage


class UsageStore:
    """Reads and forgets the per-minute sums that writes leave."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def alone(self, sweep: Callable[[], Awaitable[None]]) -> None:
        """Sweep, unless another recorder on this database does so now: two would only wait for one another's rows."""
        async with self._database.alone("retention", wait=False) as mine:
            if mine:
                await sweep()

    async def totals(self) -> dict[str, int]:
        """Bytes held by each log, about: what was written and not yet forgotten."""
        query = select(log_usage.c.log, func.sum(log_usage.c.size_bytes)).group_by(log_usage.c.log)
        async with self._database.read() as connection:
            return {log: int(size) for log, size in await connection.execute(query)}

    async def oldest(self, log: str, limit: int) -> list[tuple[int, int]]:
        """The oldest minutes of `log` with their bytes: (minute since the epoch, bytes)."""
        query = (
            select(log_usage.c.minute, log_usage.c.size_bytes)
            .where(log_usage.c.log == log)
            .order_by(log_usage.c.minute)
            .limit(limit)
        )
        async with self._database.read() as connection:
            return [(int(minute), int(size)) for minute, size in await connection.execute(query)]

    async def forget_before(self, log: str, minute: int) -> None:
        """Forget the sums of the minutes before `minute`, once what they sum up is gone."""
        async with self._database.transaction() as connection:
            await connection.execute(delete(log_usage).where(log_usage.c.log == log, log_usage.c.minute < minute))
