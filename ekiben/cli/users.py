"""`ekiben users`: people and programs with an account."""

import click

from ekiben.api.v1 import annotations_pb2
from ekiben.cli import short
from ekiben.cli.groups import NounGroup
from ekiben.cli.options import confirm, limit_option, output_option, yes_option
from ekiben.cli.output import age, collect, last, moment, print_item, print_items, said
from ekiben.cli.session import run
from ekiben.client import Client
from ekiben.identity.v1 import identity_pb2 as pb

ROLES = click.Choice(["viewer", "developer", "admin"])


def role_value(role: str | None) -> annotations_pb2.Role.ValueType:
    """The enum's value for a word, unspecified for none."""
    return annotations_pb2.Role.Value(f"ROLE_{role.upper()}") if role else annotations_pb2.ROLE_UNSPECIFIED


def role_word(role: annotations_pb2.Role.ValueType) -> str:
    """The word for an enum's value, nothing for unspecified."""
    return annotations_pb2.Role.Name(role).removeprefix("ROLE_").lower() if role else ""


COLUMNS = [
    ("USER", lambda u: last(u.name)),
    ("ROLE", lambda u: role_word(u.role)),
    ("E-MAIL", lambda u: u.email),
    ("FULL NAME", lambda u: f"{u.first_name} {u.last_name}".strip()),
    ("DISABLED", lambda u: "yes" if u.disabled else ""),
    ("AGE", lambda u: age(u.create_time)),
]


def fields(user: pb.User) -> list[tuple[str, str]]:
    """What `get` prints."""
    return [
        ("User", last(user.name)),
        ("Role", role_word(user.role)),
        ("E-mail", user.email),
        ("Full name", f"{user.first_name} {user.last_name}".strip()),
        ("Disabled", "yes" if user.disabled else ""),
        ("Created", moment(user.create_time)),
    ]


@click.group(cls=NounGroup)
def users() -> None:
    """Users, each with a role: viewer reads, developer also deploys, admin also manages."""


@users.command("list")
@limit_option
@output_option
@run
async def list_(client: Client, limit: int, output: str) -> None:
    """List users by name."""
    print_items(await collect(client.users.list(limit=limit)), COLUMNS, output)


@users.command()
@click.argument("user", required=False)
@output_option
@run
async def get(client: Client, user: str | None, output: str) -> None:
    """Show one USER; without a name, yourself."""
    found = await client.users.get(short.resource("users", user) if user else (await client.users.caller()).user)
    print_item(found, fields(found), output)


@users.command()
@click.argument("user")
@click.option("--role", type=ROLES, default="developer", show_default=True, help="What the user may do.")
@click.option("--email", default="", help="E-mail address.")
@click.option("--first-name", default="", help="First name.")
@click.option("--last-name", default="", help="Last name.")
@output_option
@run
async def create(
    client: Client, user: str, role: str, email: str, first_name: str, last_name: str, output: str
) -> None:
    """Create a USER. `ekiben tokens create --user USER` then gives a token."""
    wanted = pb.User(
        name=short.resource("users", user),
        role=role_value(role),
        email=email,
        first_name=first_name,
        last_name=last_name,
    )
    made = await client.users.create(wanted)
    print_item(made, fields(made), output)


@users.command()
@click.argument("user")
@click.option("--role", type=ROLES, help="What the user may do.")
@click.option("--email", help="E-mail address.")
@click.option("--first-name", help="First name.")
@click.option("--last-name", help="Last name.")
@click.option("--disable/--enable", "disabled", default=None, help="Refuse, or accept again, the user's tokens.")
@output_option
@run
async def update(
    client: Client,
    user: str,
    role: str | None,
    email: str | None,
    first_name: str | None,
    last_name: str | None,
    disabled: bool | None,
    output: str,
) -> None:
    """Change a USER."""
    given = {
        "role": role_value(role) if role else None,
        "email": email,
        "first_name": first_name,
        "last_name": last_name,
        "disabled": disabled,
    }
    paths = [path for path, value in given.items() if value is not None]
    if not paths:
        raise click.UsageError("Nothing to change: give --role, --email, --first-name, --last-name or --disable.")
    wanted = pb.User(name=short.resource("users", user))
    for path in paths:
        setattr(wanted, path, given[path])
    changed = await client.users.update(wanted, paths)
    print_item(changed, fields(changed), output)


@users.command()
@click.argument("user")
@yes_option
@run
async def delete(client: Client, user: str, yes: bool) -> None:
    """Delete a USER and the user's tokens."""
    name = short.resource("users", user)
    confirm(f"Delete user {last(name)} and the user's tokens?", yes)
    await client.users.delete(name)
    said(f"Deleted user {last(name)}.")
