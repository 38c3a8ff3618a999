"""Which images are pulled, written down now and then: an image that somebody pulls is used, whoever runs it."""

import logging
from datetime import timedelta

from ekiben.errors import EkibenError
from services.builder.store import ImageRows
from services.content.digest import Digest
from services.kernel.clock import Clock

log = logging.getLogger(__name__)

_WRITE_S = 60.0
_AGAIN = timedelta(hours=1)
"""A pull so soon after one that was written down says nothing new: retention counts days."""
_MOST = 10_000


class Pulls:
    """Notes pulls in memory, and writes each image's last one. A crash loses a minute of them."""

    def __init__(self, rows: ImageRows, clock: Clock) -> None:
        self._rows = rows
        self._clock = clock
        self._noted: set[tuple[str, str]] = set()

    def note(self, repository: str, digest: Digest) -> None:
        """Somebody was given this manifest of `default/summarizer`."""
        if len(self._noted) < _MOST:
            self._noted.add((repository, str(digest)))

    async def run(self) -> None:
        """Write for ever."""
        while True:
            await self._clock.sleep(_WRITE_S)
            await self.write()

    async def write(self) -> None:
        """Write what was noted; it is kept for the next time where that fails."""
        noted, self._noted = self._noted, set()
        now = self._clock.now()
        try:
            if noted:
                await self._rows.pulled(noted, now, unless_since=now - _AGAIN)
        except EkibenError as exc:
            self._noted |= noted
            log.warning("pulls wait to be written down", extra={"reason": exc.reason})
