"""`ekiben deployments events`: what the cluster wrote down of a deployment."""

import json

import click

from ekiben.cli import short
from ekiben.cli.options import lines_option
from ekiben.cli.output import as_data, moment, visible
from ekiben.cli.session import run
from ekiben.client import Client
from ekiben.deployer.v1 import events_pb2 as pb


@click.command()
@click.argument("deployment")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes.")
@click.option("--warnings", is_flag=True, help="Only what is wrong.")
@lines_option
@run
async def events(client: Client, deployment: str, follow: bool, warnings: bool, output: str) -> None:
    """Print what the cluster wrote down of a DEPLOYMENT: why no node takes a pod, what a probe was answered."""
    async for event in client.deployments.events(short.resource("deployments", deployment), follow=follow):
        if event.warning or not warnings:
            click.echo(json.dumps(as_data(event), ensure_ascii=False) if output == "json" else _line(event))


def _line(event: pb.Event) -> str:
    times = f" ({event.count} times)" if event.count > 1 else ""
    reason = click.style(event.reason, fg="yellow" if event.warning else "green")
    return f"{moment(event.time)}  {reason}  {event.object}: {visible(event.message)}{times}"
