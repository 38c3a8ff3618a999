"""`ekiben aliases`: names such as `production` that mean one version, and move."""

from datetime import datetime

import click

from ekiben import names
from ekiben.cli import short
from ekiben.cli.groups import NounGroup
from ekiben.cli.options import KIND, TIME, confirm, limit_option, output_option, yes_option
from ekiben.cli.output import collect, last, moment, print_item, print_items, said, tag, visible
from ekiben.cli.session import run
from ekiben.client import Client
from ekiben.registry.v1 import aliases_pb2 as pb


def _alias(name: str) -> str:
    """`iris:production` for an alias's name, or for that of a change of it."""
    return tag("/".join(name.split("/")[:4]))


COLUMNS = [
    ("ALIAS", lambda a: _alias(a.name)),
    ("KIND", lambda a: "models" if a.name.startswith("model") else "bentos"),
    ("VERSION", lambda a: last(a.version)),
    ("SINCE", lambda a: moment(a.update_time)),
    ("BY", lambda a: last(a.updater)),
    ("REASON", lambda a: visible(a.reason)),
]
CHANGE_COLUMNS = [
    ("TIME", lambda c: moment(c.create_time)),
    ("ALIAS", lambda c: _alias(c.name)),
    ("FROM", lambda c: last(c.from_version) or "-"),
    ("TO", lambda c: last(c.to_version) or "-"),
    ("BY", lambda c: last(c.user)),
    ("REASON", lambda c: visible(c.reason)),
]


def fields(alias: pb.Alias) -> list[tuple[str, str]]:
    """What `get` prints."""
    return [
        ("Alias", _alias(alias.name)),
        ("Version", tag(alias.version)),
        ("Since", f"{moment(alias.update_time)} by {last(alias.updater)}"),
        ("Reason", visible(alias.reason, lines=True)),
        ("Name", alias.name),
    ]


def version_name(alias: str, text: str) -> str:
    """The resource name of a version of the alias's repository, for `v3`, `iris:v3`, `latest` or the name itself."""
    collection, repository, _, _ = alias.split("/")
    make = short.model if collection == "modelRepositories" else short.bento
    return make(text if "/" in text or ":" in text else f"{repository}:{text}")


def _parent(kind: str, text: str) -> str:
    """The aliases of which history is asked for: `iris:production`, `iris` (all of it), or nothing (all)."""
    if "/" in text or ":" in text:
        return short.alias(kind, text)
    repository = short.resource(f"{kind[:-1]}Repositories", text) if text else f"{kind[:-1]}Repositories/-"
    return f"{repository}/aliases/{names.WILDCARD}"


@click.group(cls=NounGroup)
def aliases() -> None:
    """Aliases: names such as production that mean one version, and move.

    An ALIAS is written iris:production, or as its resource name. KIND is models or bentos. Wherever a version is
    shown, pulled or deployed, an alias will do.

    \b
      ekiben aliases set models iris:production v3 --expect v2 --reason "passed the review"
      ekiben aliases get models iris:production --at 2026-01-27T14:03
      ekiben aliases history models iris:production
      ekiben models pull iris:production
    """


@aliases.command("list")
@click.argument("kind", type=KIND, required=False)
@click.argument("repository", required=False)
@limit_option
@output_option
@run
async def list_(client: Client, kind: str | None, repository: str | None, limit: int, output: str) -> None:
    """List aliases: all, those of one KIND, or those of one REPOSITORY."""
    found: list[pb.Alias] = []
    for collection in ("models", "bentos"):
        if kind in (None, collection):
            parents = f"{collection[:-1]}Repositories"
            parent = short.resource(parents, repository) if repository else f"{parents}/-"
            found += await collect(client.aliases.list(parent, limit=limit))
    empty = "No aliases yet. `ekiben aliases set models NAME:ALIAS VERSION` makes one."
    print_items(found[: limit or None], COLUMNS, output, empty=empty)


@aliases.command()
@click.argument("kind", type=KIND)
@click.argument("alias")
@click.option("--at", type=TIME, metavar="TIME", help="As it was then: 2026-01-31T14:03, or 15m (ago).")
@output_option
@run
async def get(client: Client, kind: str, alias: str, at: datetime | None, output: str) -> None:
    """Show what an ALIAS names, or named at a time."""
    found = await client.aliases.get(short.alias(kind, alias), at=at)
    print_item(found, fields(found), output)


@aliases.command("set")
@click.argument("kind", type=KIND)
@click.argument("alias")
@click.argument("version")
@click.option("--reason", default="", help="Why, for the history.")
@click.option("--expect", metavar="VERSION", help="Only if it names this version now.")
@click.option("--expect-none", is_flag=True, help="Only if it names none now.")
@output_option
@run
async def set_(
    client: Client,
    kind: str,
    alias: str,
    version: str,
    reason: str,
    expect: str | None,
    expect_none: bool,
    output: str,
) -> None:
    """Make an ALIAS name a VERSION: v3, another alias, or latest.

    What another alias or latest means is looked up once: the ALIAS does not follow it.
    """
    if expect is not None and expect_none:
        raise click.UsageError("--expect and --expect-none exclude one another.")
    name = short.alias(kind, alias)
    expected = "" if expect_none else version_name(name, expect) if expect is not None else None
    found = await client.aliases.set(name, version_name(name, version), expected=expected, reason=reason)
    if output == "table":
        said(f"{_alias(found.name)} is {tag(found.version)}.")
    else:
        print_item(found, fields(found), output)


@aliases.command()
@click.argument("kind", type=KIND)
@click.argument("alias", default="")
@limit_option
@output_option
@run
async def history(client: Client, kind: str, alias: str, limit: int, output: str) -> None:
    """Show who moved an ALIAS when, and why.

    Newest first. A repository in place of the ALIAS shows the moves of all its aliases; nothing at all, those of every
    repository.
    """
    found = await collect(client.aliases.changes(_parent(kind, alias), limit=limit))
    print_items(found, CHANGE_COLUMNS, output, empty="It was never set.")


@aliases.command()
@click.argument("kind", type=KIND)
@click.argument("alias")
@click.option("--reason", default="", help="Why, for the history.")
@click.option("--expect", metavar="VERSION", default="", help="Only if it names this version now.")
@yes_option
@run
async def delete(client: Client, kind: str, alias: str, reason: str, expect: str, yes: bool) -> None:
    """Delete an ALIAS. Its history stays."""
    name = short.alias(kind, alias)
    confirm(f"Delete the alias {_alias(name)} of {kind}?", yes)
    await client.aliases.delete(name, expected=version_name(name, expect) if expect else "", reason=reason)
    said(f"Deleted alias {_alias(name)}.")
