"""`ekiben builds stats|gc`: what the builder keeps so that builds find it again."""

import click

from ekiben.cli.options import output_option
from ekiben.cli.output import print_item, said, size
from ekiben.cli.session import run
from ekiben.client import Client

_WORDS = {
    "environments": "Environments",
    "image-environments": "Image environments",
    "bytecode": "Bytecode",
    "pythons-of-bases": "Pythons of bases",
    "lists": "Lists",
    "downloads": "Downloads",
    "locks": "Locks",
    "shipped": "Shipped files",
    "logs": "Logs",
    "unfinished": "Unfinished",
}


@click.command()
@output_option
@run
async def stats(client: Client, output: str) -> None:
    """Show how much lies in the builder's folder, besides images."""
    found = await client.builds.stats()
    shown = [("Location", found.location)]
    for each in found.kinds:
        shown.append((_WORDS.get(each.kind, each.kind), f"{each.count} ({size(each.size_bytes)})"))
    shown.append(("All", size(sum(each.size_bytes for each in found.kinds))))
    print_item(found, shown, output)


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would go, and change nothing.")
@run
async def gc(client: Client, dry_run: bool) -> None:
    """Take away what no build used for long and no deployment runs from."""
    found = await client.builds.prune(dry_run=dry_run)
    would = "Would delete" if dry_run else "Deleted"
    for each in found.kinds:
        said(f"{would} {each.count} of {_WORDS.get(each.kind, each.kind).lower()} ({size(each.size_bytes)}).")
    if not found.kinds:
        said("Nothing is kept that goes now.")
