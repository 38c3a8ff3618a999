"""What is shown while something long goes on: bars for bytes, a line for steps. All of it on stderr."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ekiben.cli.output import size
from ekiben.transfer import Progress


@contextmanager
def bar(what: str, total_bytes: int) -> Iterator[Progress]:
    """A bar with rate and remaining time on a terminal, a line at the start elsewhere."""
    if not sys.stderr.isatty():
        click.echo(f"{what} ({size(total_bytes)})" if total_bytes else what, err=True)
        yield lambda count: None
        return
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
    with Drawn(*columns, console=Console(stderr=True)) as drawn:
        task = drawn.add_task(what, total=total_bytes or None)
        lock = threading.Lock()

        def advance(count: int) -> None:
            with lock:
                drawn.advance(task, count)

        yield advance


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
