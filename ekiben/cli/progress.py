"""What is shown while something long goes on: bars for bytes, a line for steps. All of it on stderr."""

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import click

from ekiben.cli.output import size
from ekiben.transfer import Progress

_LINE_S = 10.0
"""Between two lines in a pipe: a log of an hour's push has 360 of them."""


class Bar:
    """A bar with rate and time left on a terminal; in a pipe a line at the start, and one every ten seconds.

    A context manager that gives the `Progress` to call.
    """

    def __init__(self, what: str, total_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._total, self._clock = what, total_bytes, clock
        self._lock = threading.Lock()
        self._passed, self._began, self._said = 0, clock(), clock()
        self._drawn: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if not sys.stderr.isatty():
            click.echo(f"{self._what} ({size(self._total)})" if self._total else self._what, err=True)
            return self._count
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Drawn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
        )
        self._drawn = Drawn(*columns, console=Console(stderr=True))
        self._drawn.start()
        self._task = self._drawn.add_task(self._what, total=self._total or None)
        return self._count

    def __exit__(self, *_: object) -> None:
        if self._drawn is not None:
            self._drawn.stop()

    @property
    def summary(self) -> str:
        """` in 12 s, 340.0 MiB/s`; empty for what took less than a second."""
        took = self._clock() - self._began
        return f" in {round(took)} s, {size(round(self._passed / took))}/s" if took >= 1 and self._passed else ""

    def _count(self, count: int) -> None:
        with self._lock:
            self._passed += count
            if self._drawn is not None:
                self._drawn.advance(self._task, count)
                return
            now = self._clock()
            if now - self._said < _LINE_S or self._passed <= 0:
                return
            self._said = now
            rate = self._passed / (now - self._began)
            line = f"  {size(self._passed)}"
            if self._total:
                left = max(0, self._total - self._passed) / rate
                line += f" of {size(self._total)} ({100 * self._passed // self._total} %), {_time_left(left)} left"
            click.echo(f"{line}, {size(round(rate))}/s", err=True)


def _time_left(seconds: float) -> str:
    minutes = round(seconds) // 60
    return f"{round(seconds)} s" if minutes < 2 else f"{minutes} min" if minutes < 120 else f"{minutes // 60} h"


class Steps:
    """Steps of something long: a spinner on a terminal, a line for each new step in a pipe. A context manager."""

    def __init__(self) -> None:
        self._status: Any = None
        self._text = ""

    def __enter__(self) -> "Steps":
        if sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True, highlight=False).status("")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def now(self, text: str) -> None:
        """Say what is being done now; the same text again says nothing."""
        if text == self._text:
            return
        self._text = text
        if self._status is not None:
            from rich.text import Text

            self._status.update(Text(text))
        else:
            click.echo(text, err=True)

    def done(self, text: str) -> None:
        """Leave a line that stays."""
        self._text = ""
        mark = click.style("✓ ", fg="green")
        if self._status is None:
            click.echo(mark + text, err=True)
            return
        from rich.text import Text

        self._status.console.print(Text.assemble(("✓ ", "green"), text))
