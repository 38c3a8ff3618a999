"""How answers are printed: tables and fields for people, JSON and YAML for programs.

JSON and YAML are what the HTTP API says: protobuf's JSON form, lowerCamelCase. A list is an array over all pages.
Tables have colour and fit the terminal there; piped they are plain columns, never cut.
"""

import json
import os
import re
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import click
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

Column = tuple[str, Callable[[Any], str]]
"""A heading, and what an item has under it."""

_STEERING = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069]")
_SHORT = 12
_COLOURS = {
    "RUNNING": "green",
    "READY": "green",
    "SUCCEEDED": "green",
    "FAILED": "red",
    "CRASHED": "red",
    "UNHEALTHY": "red",
    "DEPLOYING": "yellow",
    "BUILDING": "yellow",
    "QUEUED": "yellow",
    "STARTING": "yellow",
    "DRAINING": "yellow",
    "TERMINATING": "yellow",
}


def as_data(message: Any) -> Any:
    """A message as the HTTP API says it, ready for JSON."""
    return _plain(json_format.MessageToDict(message))


def _plain(value: Any) -> Any:
    """Without protobuf's OrderedDict (what an `Any` becomes), which YAML has no form for."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def dump(data: Any, output: str) -> str:
    """Data as JSON or YAML text."""
    if output == "yaml":
        import yaml

        return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True)).rstrip("\n")
    return json.dumps(data, indent=2, ensure_ascii=False)


async def collect(items: AsyncIterator[Any]) -> list[Any]:
    """All items of a list."""
    return [item async for item in items]


def print_items(items: Sequence[Any], columns: Sequence[Column], output: str, *, empty: str = "Nothing there.") -> None:
    """Print a list. On a terminal an empty table says so in words (to stderr, so that pipes stay clean)."""
    if output in ("json", "yaml"):
        click.echo(dump([as_data(item) for item in items], output))
    elif output == "name":
        for item in items:
            click.echo(item.name)
    elif not items and _is_terminal():
        click.echo(empty, err=True)
    else:
        table([heading for heading, _ in columns], [[show(item) for _, show in columns] for item in items])


def print_item(item: Any, fields: Iterable[tuple[str, str]], output: str) -> None:
    """Print one resource: its fields, one a line, those without a value left out."""
    if output in ("json", "yaml"):
        click.echo(dump(as_data(item), output))
    elif output == "name":
        click.echo(item.name)
    else:
        shown = [(label, value) for label, value in fields if value]
        width = max((len(label) for label, _ in shown), default=0)
        for label, value in shown:
            first, *rest = value.splitlines() or [""]
            click.echo(click.style(label.ljust(width), dim=True) + "  " + coloured(first))
            for line in rest:
                click.echo(" " * (width + 2) + line)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: fitted to a terminal, else plain columns of full width."""
    if _is_terminal():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
        for index, heading in enumerate(headings):
            longest = max(len(line[index]) for line in (headings, *rows))
            # What is long gives way: half of a number, of a state or of an age says nothing.
            drawn.add_column(Text(heading, no_wrap=True, overflow="ellipsis"), no_wrap=longest <= _SHORT)
        for row in rows:
            drawn.add_row(
                *(
                    Text(cell, style=_COLOURS.get(cell.split(" ")[0], ""), no_wrap=True, overflow="ellipsis")
                    for cell in row
                )
            )
        Console(highlight=False).print(drawn)
        return
    lines = [list(headings), *(list(row) for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(headings))]
    for line in lines:
        click.echo("   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def coloured(text: str) -> str:
    """A word of state in its colour; anything else as it is."""
    colour = _COLOURS.get(text.split(" ")[0])
    return click.style(text, fg=colour) if colour else text


def visible(text: str, *, lines: bool = False) -> str:
    """Text of somebody else with what would steer a terminal or turn the reading around spelled out; line ends and
    tabs too, unless `lines` are wanted."""
    return _STEERING.sub(
        lambda found: found[0] if lines and found[0] in "\n\t" else found[0].encode("unicode_escape").decode(), text
    )


def _is_terminal() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def last(name: str) -> str:
    """The last id of a resource name: `deployments/demo` is `demo`."""
    return name.rpartition("/")[2]


def tag(name: str) -> str:
    """The BentoML tag of a model's or a bento's resource name: `iris:v1`."""
    parts = name.split("/")
    return f"{parts[1]}:{parts[3]}" if len(parts) == 4 else name


def size(count: int) -> str:
    """Bytes for people: `1.2 MiB`."""
    if count < 1024:
        return f"{count} B"
    amount = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        amount /= 1024
        if amount < 1000:
            return f"{amount:.1f} {unit}"
    return f"{amount / 1024:.1f} TiB"


def moment(stamp: Timestamp) -> str:
    """A time for people, in the local zone, or nothing where it is not set."""
    if not stamp.seconds:
        return ""
    return stamp.ToDatetime(UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def age(stamp: Timestamp) -> str:
    """How long ago: `45s`, `12m`, `3h`, `8d`."""
    if not stamp.seconds:
        return ""
    passed = max(0, int((datetime.now(UTC) - stamp.ToDatetime(UTC)).total_seconds()))
    for length, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if passed >= 2 * length:
            return f"{passed // length}{unit}"
    return f"{passed}s"


def duration(length: Duration) -> str:
    """A duration: `840 µs`, `12.3 ms`, `4.56 s`."""
    return nanoseconds(length.ToNanoseconds())


def nanoseconds(count: int) -> str:
    """Nanoseconds as people write durations."""
    if count < 1_000_000:
        return f"{count / 1000:.0f} µs"
    if count < 1_000_000_000:
        return f"{count / 1e6:.1f} ms"
    return f"{count / 1e9:.2f} s"


def pairs(values: Any) -> str:
    """A map as `key=value` words, in order."""
    return " ".join(f"{key}={values[key]}" for key in sorted(values))


def said(text: str) -> None:
    """Tell what was done: to stderr, so that stdout holds only what was asked for."""
    click.echo(text, err=True)
