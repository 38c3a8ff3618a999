"""Logs of builds: a file each, a line for each line, readable while it grows."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from services.kernel.clock import Clock

MOST_LINE_CHARS = 8192
"""A compiler's one-line command can be longer; nobody reads the rest of it."""
MOST_BYTES = 64 << 20
"""A log ends here with a line that says so: a source that prints for ever must not fill the disk."""
_CHUNK = 1 << 16
_SHORTEST_SECRET = 4
"""Values shorter than this are not masked: they would hide ordinary words."""


@dataclass(frozen=True)
class LogLine:
    """One line of a build's log."""

    index: int
    time: datetime
    text: str


class BuildLog:
    """The log of one build, being written. A build that is taken up again appends to what is there."""

    def __init__(self, file: BinaryIO, clock: Clock) -> None:
        self._file = file
        self._clock = clock
        self._masked: re.Pattern[str] | None = None
        self._full = False

    def mask(self, values: Collection[str]) -> None:
        """Write `…` for these from now on, and for any that holds several lines, for each of its lines."""
        parts = {part for value in values for part in (value, *value.splitlines()) if len(part) >= _SHORTEST_SECRET}
        longest_first = sorted(parts, key=len, reverse=True)
        self._masked = re.compile("|".join(map(re.escape, longest_first))) if parts else None

    def masked(self, text: str) -> str:
        """The text without secrets."""
        return self._masked.sub("…", text) if self._masked else text

    def write(self, text: str) -> None:
        """Append each line of `text`; written through, so that readers see it at once. A full disk loses lines."""
        if self._full:
            return
        now = f"{self._clock.now().timestamp():.6f}\t"
        lines = (line[:MOST_LINE_CHARS] for line in self.masked(text).split("\n"))
        self._append("".join(f"{now}{line}\n" for line in lines).encode("utf-8", "replace"))
        if self._file.tell() > MOST_BYTES:
            self._full = True
            self._append(f"{now}This log is full; what follows is left out.\n".encode())

    def _append(self, data: bytes) -> None:
        at = self._file.tell()
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(at)  # half a line would be glued to the next

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class BuildLogs:
    """All logs of builds, in one folder."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock
        directory.mkdir(parents=True, exist_ok=True)

    def open(self, build: str) -> BuildLog:
        """The log of a build, for writing."""
        return BuildLog(open(self._path(build), "ab", buffering=0), self._clock)

    async def read(
        self,
        build: str,
        *,
        tail_lines: int = 0,
        more: Callable[[], Awaitable[bool]] | None = None,
    ) -> AsyncIterator[LogLine]:
        """The lines that are there, the last `tail_lines` of them unless 0; with `more`, then those that come.

        `more` waits a while for news and says whether the build goes on; lines written before it says no are given.
        """
        path = self._path(build)
        offset, index = await asyncio.to_thread(_start, path, tail_lines)
        rest = b""
        going = True
        while True:
            data = await asyncio.to_thread(_read, path, offset)
            offset += len(data)
            *lines, rest = (rest + data).split(b"\n")
            for raw in lines:
                yield _line(index, raw)
                index += 1
            if data:
                continue
            if not going or more is None:
                return
            going = await more()

    def _path(self, build: str) -> Path:
        return self._directory / f"{build}.log"


def _start(path: Path, tail_lines: int) -> tuple[int, int]:
    """Where to begin: byte offset, and the index of the line there."""
    if tail_lines <= 0 or not path.exists():
        return 0, 0
    starts = [0]
    total = 0
    with open(path, "rb") as file:
        while line := file.readline():
            total += len(line)
            if line.endswith(b"\n"):
                starts.append(total)
    index = max(0, len(starts) - 1 - tail_lines)
    return starts[index], index


def _read(path: Path, offset: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(_CHUNK)
    except FileNotFoundError:
        return b""  # nobody has begun to write


def _line(index: int, raw: bytes) -> LogLine:
    stamp, _, text = raw.decode("utf-8", "replace").partition("\t")
    try:
        time = datetime.fromtimestamp(float(stamp), UTC)
    except ValueError:
        time, text = datetime.fromtimestamp(0, UTC), raw.decode("utf-8", "replace")
    return LogLine(index, time, text)
