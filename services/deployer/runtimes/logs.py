"""The log files of replicas, read across rotation. Their format is `services.kernel.shim.RotatedLog`'s."""

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

FOLLOW_PAUSE_S = 0.2
"""How often a followed file is looked at: what a person takes for at once."""
_STAMP = len("2026-11-25T09:47:08.123456Z")


def parse(line: bytes) -> tuple[datetime, str]:
    """Time and text of a line of a log."""
    text = line.decode("utf-8", "replace").rstrip("\n")
    try:
        time = datetime.strptime(text[:_STAMP], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
    except ValueError:
        return datetime.fromtimestamp(0, UTC), text
    return time, text[_STAMP + 1 :]


def files_of(log: Path) -> list[Path]:
    """The file and its rotated predecessors, oldest first."""
    rotated = [path for path in log.parent.glob(log.name + ".*") if path.suffix[1:].isdigit()]
    return [*sorted(rotated, key=lambda path: -int(path.suffix[1:])), *([log] if log.exists() else [])]


def tail(log: Path, lines: int) -> list[tuple[datetime, str]]:
    """The last so many lines; all when negative. Blocks."""
    last: deque[bytes] = deque(maxlen=None if lines < 0 else lines)
    for path in files_of(log):
        try:
            with path.open("rb") as file:
                last.extend(file)
        except FileNotFoundError:
            continue
    return [parse(line) for line in last]


def tail_text(log: Path, lines: int, since: datetime | None) -> list[str]:
    """The last so many lines since a time, without their times. Blocks."""
    return [text for time, text in tail(log, lines) if since is None or time >= since]


class Follower:
    """What is added to one log, across rotation."""

    def __init__(self, log: Path, *, from_start: bool) -> None:
        self._log = log
        self._file: BinaryIO | None = None
        self._rest = b""
        self._open(at_end=not from_start)

    def _open(self, *, at_end: bool = False) -> None:
        try:
            self._file = self._log.open("rb")
        except FileNotFoundError:
            self._file = None
        else:
            if at_end:
                self._file.seek(0, os.SEEK_END)

    def read(self) -> Iterator[tuple[datetime, str]]:
        """The lines since the last call."""
        if self._file is None:
            self._open()
        while self._file is not None:
            *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
            yield from map(parse, lines)
            try:
                renamed = self._log.stat().st_ino != os.fstat(self._file.fileno()).st_ino
            except FileNotFoundError:
                return
            if not renamed:
                return
            # What was written between the read above and the rename.
            *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
            yield from map(parse, lines)
            self._file.close()
            self._open()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


async def read(
    logs: Callable[[], dict[str, Path]], lines: int, follow: bool, since: datetime | None = None
) -> AsyncIterator[tuple[str, datetime, str]]:
    """Lines of several replicas with the replica's id, by time; then, with `follow`, what comes, of new ones too.

    Args:
        logs: gives the log of each replica by its id; asked again while following.
        lines: how many of the past of each; negative for all.
        follow: go on with what comes.
        since: nothing of the past from before.
    """
    followers: dict[str, Follower] = {}
    try:
        past: list[tuple[datetime, str, str]] = []
        for replica, log in logs().items():
            if follow:
                followers[replica] = Follower(log, from_start=False)
            past += [(time, replica, text) for time, text in await asyncio.to_thread(tail, log, lines)]
        for time, replica, text in sorted(past, key=lambda line: line[0]):
            if since is None or time >= since:
                yield replica, time, text
        while follow:
            for replica, log in logs().items():
                if replica not in followers:
                    followers[replica] = Follower(log, from_start=True)
            fresh = [(time, replica, text) for replica, follower in followers.items() for time, text in follower.read()]
            for time, replica, text in sorted(fresh, key=lambda line: line[0]):
                yield replica, time, text
            await asyncio.sleep(FOLLOW_PAUSE_S)
    finally:
        for follower in followers.values():
            follower.close()
