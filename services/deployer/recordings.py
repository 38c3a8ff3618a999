"""Recordings of terminals: an asciicast as it is written, in pieces, while the command runs."""

import asyncio
import contextlib

from ekiben.errors import ResourceExhausted
from services.deployer.casts import Cast
from services.deployer.domain import Terminal
from services.deployer.store import TerminalStore
from services.kernel.clock import Clock

FLUSH_S = 1.0
"""So much of a recording is lost with a deployer that is killed."""
FLUSH_CHARS = 64 << 10


class Recording:
    """See the module.

    What adds to it, but for `mark`, raises ResourceExhausted (RECORDING_FULL) once it may not grow any more: what is
    not recorded is not done.
    """

    def __init__(self, store: TerminalStore, terminal: Terminal, max_bytes: int, clock: Clock) -> None:
        self._store, self._terminal, self._clock = store, terminal, clock
        self._room = max_bytes
        self._cast, self._lines, self._chars, self._number, self._began = Cast(), list[str](), 0, 0, 0.0
        self._full = asyncio.Event()
        self._writing = asyncio.Lock()
        self.begun = False
        """Whether anything was done."""

    def begin(self, size: tuple[int, int]) -> None:
        """It runs now, in a window of so many columns and rows."""
        self.begun, self._began = True, self._clock.monotonic()
        terminal = self._terminal
        title = f"{terminal.deployment} {terminal.replica} {terminal.user}"
        self._add(Cast.header(terminal.command, title, int(self._clock.now().timestamp()), *size))

    def output(self, data: bytes) -> None:
        """The command wrote this."""
        self._add(self._cast.output(self._at(), data))

    def input(self, data: bytes) -> None:
        """The caller typed this."""
        self._add(self._cast.input(self._at(), data))

    def resize(self, columns: int, rows: int) -> None:
        """The window has another size."""
        self._add(self._cast.resize(self._at(), columns, rows))

    def mark(self, text: str) -> None:
        """A word of the platform; there is always room for one."""
        if self.begun:
            self._room = 1000
            self._add(self._cast.marker(self._at(), text))

    async def keep(self) -> None:
        """Write what has come, again and again."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_S):
                    await self._full.wait()
            await self.flush()

    async def flush(self) -> None:
        """Write what has come. Raises what the store raises: then the terminal ends."""
        # Whoever is cancelled here leaves the piece to be written all the same, before the next one.
        await asyncio.shield(asyncio.ensure_future(self._write()))

    async def _write(self) -> None:
        async with self._writing:
            if not self._lines:
                return
            text, self._lines, self._chars = "".join(self._lines), [], 0
            self._full.clear()
            await self._store.append(self._terminal.id, self._number, text)
            self._number += 1

    def _at(self) -> float:
        return self._clock.monotonic() - self._began

    def _add(self, line: str) -> None:
        if not line:
            return
        self._room -= len(line.encode())
        if self._room < 0:
            raise ResourceExhausted(
                "The recording is full, and what is not recorded is not done; open another terminal.",
                reason="RECORDING_FULL",
            )
        self._lines.append(line)
        self._chars += len(line)
        if self._chars > FLUSH_CHARS:
            self._full.set()
