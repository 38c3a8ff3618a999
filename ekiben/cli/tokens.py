"""`ekiben tokens`: API tokens."""

from datetime import UTC, datetime, timedelta

import click

from ekiben.cli import short
from ekiben.cli.groups import NounGroup
from ekiben.cli.options import DURATION, confirm, limit_option, output_option, yes_option
from ekiben.cli.output import age, collect, last, moment, print_item, print_items, said
from ekiben.cli.session import run
from ekiben.cli.users import ROLES, role_value, role_word
from ekiben.client import Client
from ekiben.identity.v1 import identity_pb2 as pb


def _expires(token: pb.ApiToken) -> str:
    return moment(token.expire_time) or "never"


COLUMNS = [
    ("TOKEN", lambda t: last(t.name)),
    ("DISPLAY NAME", lambda t: t.display_name),
    ("USER", lambda t: last(t.user)),
    ("ROLE", lambda t: role_word(t.role)),
    ("EXPIRES", _expires),
    ("LAST USED", lambda t: age(t.last_use_time)),
    ("AGE", lambda t: age(t.create_time)),
]


def fields(token: pb.ApiToken) -> list[tuple[str, str]]:
    """What `get` prints."""
    return [
        ("Token", last(token.name)),
        ("Display name", token.display_name),
        ("Description", token.description),
        ("User", last(token.user)),
        ("Role", role_word(token.role)),
        ("Expires", _expires(token)),
        ("Last used", moment(token.last_use_time)),
        ("Created", moment(token.create_time)),
    ]


@click.group(cls=NounGroup)
def tokens() -> None:
    """API tokens. The value of a token is shown once, when it is created."""


@tokens.command("list")
@click.option("--filter", "filter_", default="", help="Words of the display name or the description.")
@limit_option
@output_option
@run
async def list_(client: Client, filter_: str, limit: int, output: str) -> None:
    """List tokens, newest first: all for an admin, else your own."""
    print_items(await collect(client.tokens.list(filter=filter_, limit=limit)), COLUMNS, output)


@tokens.command()
@click.argument("token_id", metavar="TOKEN")
@output_option
@run
async def get(client: Client, token_id: str, output: str) -> None:
    """Show one TOKEN, without its value."""
    found = await client.tokens.get(short.resource("apiTokens", token_id))
    print_item(found, fields(found), output)


@tokens.command()
@click.argument("display_name", metavar="NAME")
@click.option("--role", type=ROLES, help="What it may do; your own role when left out.")
@click.option("--expires", type=DURATION, help="How long it works: 90d, 12h. For ever when left out.")
@click.option("--user", default="", help="Whose it is; yours when left out. For admins.")
@click.option("--description", default="", help="Free text.")
@output_option
@run
async def create(
    client: Client,
    display_name: str,
    role: str | None,
    expires: float | None,
    user: str,
    description: str,
    output: str,
) -> None:
    """Create a token called NAME and print its value, which is not shown again."""
    wanted = pb.ApiToken(display_name=display_name, description=description, role=role_value(role))
    if user:
        wanted.user = short.resource("users", user)
    if expires is not None:
        wanted.expire_time.FromDatetime(datetime.now(UTC) + timedelta(seconds=expires))
    made = await client.tokens.create(wanted)
    if output == "table":
        said(f"Created token {last(made.name)} ({role_word(made.role)}, expires {_expires(made)}). Its value, once:")
        click.echo(made.token)
    else:
        print_item(made, fields(made), output)


@tokens.command()
@click.argument("token_id", metavar="TOKEN")
@yes_option
@run
async def delete(client: Client, token_id: str, yes: bool) -> None:
    """Delete a TOKEN; it stops working within five seconds everywhere."""
    name = short.resource("apiTokens", token_id)
    confirm(f"Delete token {last(name)}?", yes)
    await client.tokens.delete(name)
    said(f"Deleted token {last(name)}.")
