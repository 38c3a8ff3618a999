"""`ekiben predictions`: what was asked and answered."""

import json
from datetime import datetime

import click

from ekiben.cli import short
from ekiben.cli.groups import NounGroup
from ekiben.cli.options import TIME, lines_option, output_option
from ekiben.cli.output import (
    as_data,
    collect,
    duration,
    last,
    moment,
    print_item,
    print_items,
    said,
    size,
    tag,
    visible,
)
from ekiben.cli.session import run
from ekiben.client import Client
from ekiben.recorder.v1 import recorder_pb2 as pb

DEFAULT_LIMIT = 50
"""A log has no end worth printing: `--limit 0` asks for all of it."""

COLUMNS = [
    ("TIME", lambda p: moment(p.start_time)),
    ("DEPLOYMENT", lambda p: last(p.deployment)),
    ("STATUS", lambda p: str(p.status or "-")),
    ("LATENCY", lambda p: duration(p.latency)),
    ("METHOD", lambda p: visible(p.method)),
    ("PATH", lambda p: visible(p.path)),
    ("REQUEST", lambda p: size(p.request.body_size_bytes)),
    ("RESPONSE", lambda p: size(p.response.body_size_bytes)),
    ("PREDICTION", lambda p: last(p.name)),
]


@click.group(cls=NounGroup)
def predictions() -> None:
    """Predictions: every request to a deployment, with its response."""


@predictions.command("list")
@click.option("-d", "--deployment", default="", help="Only of this deployment.")
@click.option("--revision", default="", help="Only of this revision: demo/3, or its resource name.")
@click.option("--since", type=TIME, help="Only begun after: 15m (ago), 2026-01-31, 2026-01-31T12:00:00Z.")
@click.option("--until", type=TIME, help="Only begun before.")
@click.option("--status", default="", help="200, or a class: 5xx.")
@click.option("--trace", default="", metavar="ID", help="Only of this trace.")
@click.option("--bodies", is_flag=True, help="With headers and bodies, in json and yaml.")
@click.option(
    "--limit", type=click.IntRange(0), default=DEFAULT_LIMIT, show_default=True, help="At most so many; 0 is all."
)
@output_option
@run
async def list_(
    client: Client,
    deployment: str,
    revision: str,
    since: datetime | None,
    until: datetime | None,
    status: str,
    trace: str,
    bodies: bool,
    limit: int,
    output: str,
) -> None:
    """List predictions, newest first."""
    found = await collect(
        client.predictions.list(
            deployment=short.resource("deployments", deployment) if deployment else "",
            revision=short.any_revision(revision) if revision else "",
            since=since,
            until=until,
            status=status,
            trace_id=last(short.trace(trace)) if trace else "",
            include_bodies=bodies,
            limit=limit,
        )
    )
    print_items(found, COLUMNS, output, empty="No predictions.")


@predictions.command()
@click.argument("prediction")
@output_option
@run
async def show(client: Client, prediction: str, output: str) -> None:
    """Show one PREDICTION with headers, bodies, and what the service's monitors logged."""
    found = await client.predictions.get(short.resource("predictions", prediction))
    print_item(found, _fields(found), output)
    if output == "table":
        _print_payload("Request", found.request)
        _print_payload("Response", found.response)
        for entry in found.monitor_entries:
            click.echo(
                f"\n{click.style('Monitor ' + entry.monitor, bold=True)}  {moment(entry.time)}\n{visible(entry.data)}"
            )


@predictions.command()
@click.option("-d", "--deployment", default="", help="Only of this deployment.")
@click.option("--status", default="", help="200, or a class: 5xx.")
@click.option("--bodies", is_flag=True, help="With headers and bodies, in json.")
@lines_option
@run
async def tail(client: Client, deployment: str, status: str, bodies: bool, output: str) -> None:
    """Print predictions as they come, until Ctrl-C."""
    named = short.resource("deployments", deployment) if deployment else ""
    if output == "table":
        said("Waiting for predictions (Ctrl-C to stop)")
    async for found in client.predictions.tail(deployment=named, status=status, include_bodies=bodies):
        click.echo(json.dumps(as_data(found), ensure_ascii=False) if output == "json" else _line(found))


def _line(found: pb.Prediction) -> str:
    colour = "green" if 200 <= found.status < 400 else "red" if found.status >= 500 or not found.status else "yellow"
    status = click.style(str(found.status or "-").rjust(3), fg=colour)
    what = visible(f"{found.method} {found.path}")
    return (
        f"{moment(found.start_time)}  {status}  {duration(found.latency):>9}  {last(found.deployment):<20}  "
        f"{what:<32}  {last(found.name)}"
    )


def _fields(found: pb.Prediction) -> list[tuple[str, str]]:
    return [
        ("Prediction", last(found.name)),
        ("Time", moment(found.start_time)),
        ("Request", visible(f"{found.method} {found.path} ({found.protocol})")),
        ("Status", f"{found.status or 'none: the caller left'}"),
        ("Flags", found.response_flags),
        ("Latency", _latency(found)),
        ("Deployment", f"{last(found.deployment)}, revision {last(found.revision)}, target {found.target}"),
        ("Bento", tag(found.bento)),
        ("Models", " ".join(tag(name) for name in found.models)),
        ("Replica", found.replica),
        ("API token", found.api_token),
        ("Caller", found.peer),
        ("Trace", f"{found.trace_id}   (ekiben traces show {found.trace_id})" if found.trace_id else ""),
    ]


def _latency(found: pb.Prediction) -> str:
    first = f", first byte after {duration(found.time_to_first_byte)}" if found.HasField("time_to_first_byte") else ""
    return f"{duration(found.latency)}{first}"


def _print_payload(title: str, payload: pb.Payload) -> None:
    cut = ", truncated" if payload.truncated else ""
    about = f"{visible(payload.content_type) or 'no content type'}, {size(payload.body_size_bytes)}{cut}"
    click.echo(f"\n{click.style(title, bold=True)}  {about}")
    for name in sorted(payload.headers):
        click.echo(f"  {click.style(visible(name), dim=True)}: {visible(payload.headers[name])}")
    if payload.text:
        click.echo(f"\n{visible(_pretty(payload), lines=True)}")
    elif payload.body:
        click.echo(f"\n  {len(payload.body)} bytes that are not text; `-o json` has them in base64.")


def _pretty(payload: pb.Payload) -> str:
    """JSON that is whole indented, anything else as it passed."""
    try:
        return json.dumps(json.loads(payload.text), indent=2, ensure_ascii=False)
    except ValueError:
        return payload.text
