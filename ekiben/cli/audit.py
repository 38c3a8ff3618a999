"""`ekiben audit`: who did what, and what was refused."""

import click

from ekiben.cli import short
from ekiben.cli.groups import NounGroup
from ekiben.cli.options import limit_option, output_option
from ekiben.cli.output import collect, last, moment, print_items
from ekiben.cli.session import run
from ekiben.client import Client

COLUMNS = [
    ("TIME", lambda e: moment(e.create_time)),
    ("USER", lambda e: last(e.user)),
    ("METHOD", lambda e: last(e.method)),
    ("RESOURCE", lambda e: e.resource),
    ("OUTCOME", lambda e: e.outcome),
    ("DETAIL", lambda e: e.detail),
]


@click.group(cls=NounGroup)
def audit() -> None:
    """The audit log: every change, and every refused attempt. For admins."""


@audit.command("list")
@click.option("--user", default="", help="Only what this user did.")
@click.option("--resource", default="", help="Only what was done to this resource, by its resource name.")
@click.option("--refused", is_flag=True, help="Only what was refused.")
@limit_option
@output_option
@run
async def list_(client: Client, user: str, resource: str, refused: bool, limit: int, output: str) -> None:
    """List audit entries, newest first."""
    named = short.resource("users", user) if user and not user.startswith("services/") else user
    found = await collect(client.audit.list(user=named, resource=resource, refused=refused, limit=limit))
    print_items(found, COLUMNS, output)
