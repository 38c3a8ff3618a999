"""`ekiben traces`: what each hop of a request did."""

import os
import shutil
import sys
from collections.abc import Sequence
from datetime import datetime

import click

from ekiben.cli import short, waterfall
from ekiben.cli.groups import NounGroup
from ekiben.cli.options import TIME, output_option
from ekiben.cli.output import collect, duration, last, moment, nanoseconds, print_item, print_items, visible
from ekiben.cli.session import run
from ekiben.client import Client
from ekiben.recorder.v1 import recorder_pb2 as pb

COLUMNS = [
    ("TIME", lambda t: moment(t.start_time)),
    ("TRACE", lambda t: last(t.name)),
    ("ROOT", lambda t: visible(t.root)),
    ("DURATION", lambda t: duration(t.duration)),
    ("SPANS", lambda t: str(t.span_count)),
    ("ERRORS", lambda t: str(t.error_count or "")),
    ("SERVICES", lambda t: visible(" ".join(t.services))),
]

_COLOURS = ("cyan", "magenta", "blue", "yellow", "green", "bright_cyan", "bright_magenta", "bright_blue")
_LEAST_BAR = 20
_MOST_NAME = 60
_PIPED_WIDTH = 160


@click.group(cls=NounGroup)
def traces() -> None:
    """Traces: what each hop of a request did, from the caller to the replica."""


@traces.command("list")
@click.option("--since", type=TIME, help="Only begun after: 15m (ago), 2026-01-31, 2026-01-31T12:00:00Z.")
@click.option("--service", default="", help="Only with a span of this service.")
@click.option("--errors", is_flag=True, help="Only with a failed span.")
@click.option("--limit", type=click.IntRange(0), default=50, show_default=True, help="At most so many; 0 is all.")
@output_option
@run
async def list_(client: Client, since: datetime | None, service: str, errors: bool, limit: int, output: str) -> None:
    """List traces, newest first."""
    found = await collect(client.traces.list(since=since, service=service, errors_only=errors, limit=limit))
    print_items(found, COLUMNS, output, empty="No traces.")


@traces.command()
@click.argument("trace_id", metavar="TRACE")
@click.option("--attributes", is_flag=True, help="With what each span knows.")
@click.option("--all", "every", is_flag=True, help="With a span for each message of a server, such as each chunk.")
@output_option
@run
async def show(client: Client, trace_id: str, attributes: bool, every: bool, output: str) -> None:
    """Show one TRACE as a waterfall. TRACE is its id, or a traceparent."""
    found = await client.traces.get(short.trace(trace_id))
    if output != "table":
        print_item(found, [], output)
        return
    errors = click.style(f", {found.error_count} failed", fg="red") if found.error_count else ""
    shown = list(found.spans) if every else waterfall.without_messages(found.spans)
    left_out = len(found.spans) - len(shown)
    messages = click.style(f" ({left_out} of single messages not shown: --all)", dim=True) if left_out else ""
    click.echo(
        f"{click.style(last(found.name), bold=True)}  {moment(found.start_time)}  {duration(found.duration)}, "
        f"{found.span_count} spans{errors}{messages}"
    )
    for line in draw(shown, shutil.get_terminal_size().columns if sys.stdout.isatty() else _width(), attributes):
        click.echo(line)


def _width() -> int:
    """How wide to draw into a pipe: `$COLUMNS`, or enough for names and bars."""
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdigit() and int(columns) else _PIPED_WIDTH


def draw(spans: Sequence[pb.Span], width: int, attributes: bool = False) -> list[str]:
    """The waterfall as lines of at most `width` columns: tree, service, duration, bar."""
    rows = waterfall.rows(spans)
    total = max((row.start_ns + row.duration_ns for row in rows), default=0)
    services = sorted({visible(row.span.service) for row in rows})
    colours = {service: _COLOURS[index % len(_COLOURS)] for index, service in enumerate(services)}
    service_width = max((len(service) for service in services), default=0)
    longest = max((len(row.tree) + len(visible(row.span.display_name)) for row in rows), default=0)
    name_width = max(12, min(longest + 2, _MOST_NAME, width - service_width - 10 - _LEAST_BAR - 6))
    bar_width = max(_LEAST_BAR // 2, width - name_width - service_width - 10 - 6)
    lines = []
    for row in rows:
        span = row.span
        name = f"{row.tree}{'✗ ' if span.error else ''}{visible(span.display_name)}"
        if len(name) > name_width:
            name = name[: name_width - 1] + "…"
        colour = "red" if span.error else colours[visible(span.service)]
        shown = click.style(name.ljust(name_width), fg="red" if span.error else None, bold=not row.tree)
        bar = click.style(waterfall.bar(row.start_ns, row.duration_ns, total, bar_width), fg=colour)
        took = nanoseconds(row.duration_ns).rjust(9)
        service = visible(span.service)
        service = click.style(service.ljust(service_width), fg=colours[service])
        lines.append(f"{shown}  {service}  {took}  {bar}".rstrip())
        indent = " " * len(row.tree) + "     "
        if span.error and span.status_message:
            lines.append(click.style(f"{indent}{visible(span.status_message)}", fg="red"))
        if attributes:
            lines += [f"{indent}{visible(key)}={visible(span.attributes[key])}" for key in sorted(span.attributes)]
    return lines
