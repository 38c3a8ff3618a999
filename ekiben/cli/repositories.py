"""`ekiben repositories`: the names under which models and bentos are kept."""

from typing import Any

import click

from ekiben.cli import deletions, short
from ekiben.cli.changes import change_options, changed, shown
from ekiben.cli.groups import NounGroup
from ekiben.cli.options import KIND, confirm, limit_option, output_option, yes_option
from ekiben.cli.output import age, collect, last, moment, pairs, print_item, print_items, said, tag
from ekiben.cli.session import run
from ekiben.client import Client


def _latest(repository: Any) -> str:
    return tag(getattr(repository, "latest_model", "") or getattr(repository, "latest_bento", ""))


def _count(repository: Any) -> str:
    return str(getattr(repository, "model_count", 0) or getattr(repository, "bento_count", 0))


COLUMNS = [
    ("REPOSITORY", lambda r: last(r.name)),
    ("KIND", lambda r: "models" if r.name.startswith("model") else "bentos"),
    ("VERSIONS", _count),
    ("LATEST", _latest),
    ("LABELS", lambda r: pairs(r.labels)),
    ("AGE", lambda r: age(r.create_time)),
]


def fields(repository: Any) -> list[tuple[str, str]]:
    """What `get` prints."""
    return [
        ("Repository", last(repository.name)),
        ("Kind", "models" if repository.name.startswith("model") else "bentos"),
        ("Versions", _count(repository)),
        ("Latest", _latest(repository)),
        ("Labels", pairs(repository.labels)),
        ("Annotations", shown(repository.annotations)),
        ("Description", repository.description),
        ("Created", f"{moment(repository.create_time)} by {last(repository.creator)}"),
        ("Name", repository.name),
    ]


@click.group(cls=NounGroup)
def repositories() -> None:
    """Repositories: the names under which models and bentos are kept.

    KIND is models or bentos.
    """


@repositories.command("list")
@click.argument("kind", type=KIND, required=False)
@click.option("--filter", "filter_", default="", help="Words and label:KEY=VALUE terms, all of which must match.")
@limit_option
@output_option
@run
async def list_(client: Client, kind: str | None, filter_: str, limit: int, output: str) -> None:
    """List repositories of both kinds, or of one KIND, newest first."""
    found: list[Any] = []
    for name, resources in (("models", client.models), ("bentos", client.bentos)):
        if kind in (None, name):
            found += await collect(resources.repositories(filter=filter_, limit=limit))
    print_items(found[: limit or None], COLUMNS, output, empty="No repositories yet: the first push makes one.")


@repositories.command()
@click.argument("kind", type=KIND)
@click.argument("repository")
@output_option
@run
async def get(client: Client, kind: str, repository: str, output: str) -> None:
    """Show one REPOSITORY."""
    found = await _get(client, kind, repository)
    print_item(found, fields(found), output)


@repositories.command()
@click.argument("kind", type=KIND)
@click.argument("repository")
@change_options
@output_option
@run
async def update(client: Client, kind: str, repository: str, output: str, **changes: Any) -> None:
    """Change labels, annotations and description of a REPOSITORY."""
    message, paths = changed(await _get(client, kind, repository), **changes)
    resources = client.models if kind == "models" else client.bentos
    updated = await resources.update_repository(message, paths)
    print_item(updated, fields(updated), output)


async def _get(client: Client, kind: str, repository: str) -> Any:
    if kind == "models":
        return await client.models.get_repository(short.resource("modelRepositories", repository))
    return await client.bentos.get_repository(short.resource("bentoRepositories", repository))


@repositories.command()
@click.argument("kind", type=KIND)
@click.argument("repository")
@click.option("--force", is_flag=True, help="Also delete everything in it.")
@yes_option
@run
async def delete(client: Client, kind: str, repository: str, force: bool, yes: bool) -> None:
    """Delete a REPOSITORY, which must be empty unless --force is given."""
    confirm(f"Delete the repository {repository} of {kind}{' and everything in it' if force else ''}?", yes)
    if kind == "models":
        await client.models.delete_repository(short.resource("modelRepositories", repository), force=force)
    else:
        await client.bentos.delete_repository(short.resource("bentoRepositories", repository), force=force)
    said(f"Deleted repository {repository}.")


@repositories.command()
@click.argument("kind", type=KIND)
@click.argument("repository")
@run
async def restore(client: Client, kind: str, repository: str) -> None:
    """Restore a deleted REPOSITORY with all that was in it, or what was deleted of one that is there."""
    name = short.resource(f"{kind[:-1]}Repositories", repository)
    restored = await deletions.restore_all(client, name)
    said(f"Restored {len(restored)} {kind} of {repository}.")
