"""Wake-ups among the processes of one service, over PostgreSQL's LISTEN and NOTIFY.

    news = News(database)                     # a Topic; `news.run` is a loop of the component
    news.notify(name)                         # wakes who watches here at once, and elsewhere in a moment

A wake-up carries no news and may be lost, as when the connection that listens breaks: so who watches looks again by
itself now and then (`at_most_s`), and everybody is woken once a lost connection is back. On SQLite there is one
process, and this is a Topic.
"""

import asyncio
import logging
import secrets
from typing import Any

import sqlalchemy as sa

from ekiben.errors import EkibenError
from services.kernel.clock import SYSTEM, Clock
from services.kernel.db import Database
from services.kernel.watches import Topic

log = logging.getLogger(__name__)

# PostgreSQL takes 8,000 bytes; keys are ids. One statement tells many.
_LONGEST_KEY, _BATCH = 255, 500
_AGAIN_S = 1.0


class News(Topic):
    """A Topic whose wake-ups reach every process on the same database and schema."""

    def __init__(self, database: Database, clock: Clock = SYSTEM) -> None:
        super().__init__()
        self._database = database
        self._clock = clock
        # Apart by schema: installations may share a database.
        self._own = secrets.token_hex(4)
        self._channel = f"{database.schema or 'ekiben'}_news"
        self._untold: dict[str, None] = {}
        self._more = asyncio.Event()
        self._listening = asyncio.Event()

    def notify(self, key: str = "") -> None:
        """Wake who watches `key` here, and see to it that the others hear of it too; with no key, everybody."""
        super().notify(key)
        if self._database.dialect == "postgresql" and len(key) <= _LONGEST_KEY:
            self._untold[key] = None
            self._more.set()

    async def listening(self) -> None:
        """Return once others' wake-ups arrive here."""
        if self._database.dialect == "postgresql":
            await self._listening.wait()

    async def run(self) -> None:
        """Send and listen, for ever."""
        if self._database.dialect != "postgresql":
            await asyncio.Event().wait()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._send())
            group.create_task(self._listen())

    async def _send(self) -> None:
        statement = sa.text("SELECT pg_notify(:channel, key) FROM unnest(CAST(:keys AS text[])) AS key")
        while True:
            await self._more.wait()
            self._more.clear()
            keys = list(self._untold)[:_BATCH]
            told = [f"{self._own} {key}" for key in keys]
            try:
                async with self._database.transaction() as connection:
                    await connection.execute(statement, {"channel": self._channel, "keys": told})
            except EkibenError as exc:
                log.info("others are not woken", extra={"reason": exc.reason})
                await self._clock.sleep(_AGAIN_S)
                self._more.set()
                continue
            for key in keys:
                self._untold.pop(key, None)
            if self._untold:
                self._more.set()

    async def _listen(self) -> None:
        while True:
            try:
                async with self._database.listening(self._channel, self._heard) as alive:
                    self._listening.set()
                    super().notify()  # what was told while nobody listened
                    while True:
                        await alive()
            except EkibenError as exc:
                log.info("others are not heard", extra={"reason": exc.reason})
            self._listening.clear()
            await self._clock.sleep(_AGAIN_S)

    def _heard(self, *arguments: Any) -> None:
        origin, _, key = str(arguments[-1]).partition(" ")
        if origin != self._own:
            super().notify(key)
