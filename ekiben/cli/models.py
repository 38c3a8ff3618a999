"""`ekiben models`: models and what is in them."""

import asyncio
from typing import Any

import click

from ekiben import localstore
from ekiben.cli import deletions, short, versions
from ekiben.cli.changes import change_options, changed, shown
from ekiben.cli.groups import NounGroup
from ekiben.cli.options import confirm, label_option, limit_option, output_option, resume_option, yes_option
from ekiben.cli.output import age, collect, last, moment, pairs, print_item, print_items, said, size, tag
from ekiben.cli.session import run
from ekiben.client import Client
from ekiben.registry.v1 import registry_pb2 as pb

COLUMNS = [
    ("MODEL", lambda m: tag(m.name)),
    ("STATE", lambda m: pb.Content.State.Name(m.content.state)),
    ("SIZE", lambda m: size(m.content.size_bytes) if m.content.size_bytes else ""),
    ("ALIASES", lambda m: " ".join(m.aliases)),
    ("MODULE", lambda m: m.module),
    ("LABELS", lambda m: pairs(m.labels)),
    ("AGE", lambda m: age(m.create_time)),
]


def fields(model: pb.Model) -> list[tuple[str, str]]:
    """What `get` prints."""
    return [
        ("Model", tag(model.name)),
        ("State", pb.Content.State.Name(model.content.state)),
        ("Failure", model.content.failure),
        ("Size", size(model.content.size_bytes) if model.content.size_bytes else ""),
        ("Digest", model.content.digest),
        ("Aliases", " ".join(model.aliases)),
        ("Module", model.module),
        ("Labels", pairs(model.labels)),
        ("Annotations", shown(model.annotations)),
        ("Description", model.description),
        ("Built", moment(model.build_time)),
        ("Created", f"{moment(model.create_time)} by {last(model.creator)}"),
        ("Name", model.name),
    ]


@click.group(cls=NounGroup)
def models() -> None:
    """Models: weights and what belongs to them, by name and version.

    A MODEL is written iris:v1, iris:production (an alias), iris (the latest), or as its resource name.
    """


@models.command("list")
@click.argument("repository", required=False)
@click.option("--filter", "filter_", default="", help="Words and label:KEY=VALUE terms, all of which must match.")
@click.option("--deleted", is_flag=True, help="Those that were deleted and can be restored, deleted last first.")
@limit_option
@output_option
@run
async def list_(client: Client, repository: str | None, filter_: str, deleted: bool, limit: int, output: str) -> None:
    """List models, newest first: all, or those of one REPOSITORY."""
    parent = short.resource("modelRepositories", repository) if repository else "modelRepositories/-"
    if deleted:
        if filter_:
            raise click.UsageError("--deleted takes no --filter.")
        await deletions.print_deleted(client, parent, limit, output)
        return
    found = await collect(client.models.list(parent, filter=filter_, limit=limit))
    print_items(found, COLUMNS, output, empty="No models yet. `ekiben models push NAME:VERSION` uploads one.")


@models.command()
@click.argument("model")
@output_option
@run
async def get(client: Client, model: str, output: str) -> None:
    """Show one MODEL."""
    found = await client.models.get(short.model(model))
    print_item(found, fields(found), output)


@models.command()
@click.argument("source")
@click.option("--force", is_flag=True, help="Send the bytes even where the model is there already.")
@resume_option
@label_option
@output_option
@run
async def push(
    client: Client, source: str, force: bool, resume: bool, labels: tuple[tuple[str, str], ...], output: str
) -> None:
    """Upload a model: a tag of the local BentoML store, a folder, or a tar file.

    \b
    ekiben models push iris:v1
    ekiben models push iris:v1 --resume      # after a push that was interrupted
    """
    version = await asyncio.to_thread(localstore.read_model, versions.source_path("models", source))
    model = await versions.push(client.models, "model", version, force=force, resume=resume, labels=dict(labels))
    if output != "table":
        print_item(model, fields(model), output)


@models.command()
@click.argument("model")
@click.option("--to", default="", metavar="PATH", help="A new folder, or a .tar file, instead of the BentoML store.")
@run
async def pull(client: Client, model: str, to: str) -> None:
    """Download a MODEL to the local BentoML store."""
    click.echo(await versions.pull(client.models, "model", short.model(model), to))


@models.command()
@click.argument("model")
@limit_option
@output_option
@run
async def files(client: Client, model: str, limit: int, output: str) -> None:
    """List the files of a MODEL, each with its size and digest.

    \b
    ekiben models files iris:v1
    ekiben models files iris:v1 -o json | jq -r '.[] | [.digest, .path] | @tsv'
    """
    await versions.show_files(client, short.model(model), limit, output)


@models.command()
@click.argument("model")
@click.argument("path")
@run
async def cat(client: Client, model: str, path: str) -> None:
    """Write one file of a MODEL to stdout, without the rest of it; PATH is as `files` lists it.

    \b
    ekiben models cat iris:v1 weights/model.bin > model.bin
    """
    await versions.cat(client, short.model(model), path)


@models.command()
@click.argument("model")
@change_options
@output_option
@run
async def update(client: Client, model: str, output: str, **changes: Any) -> None:
    """Change labels, annotations and description of a MODEL."""
    message, paths = changed(await client.models.get(short.model(model)), **changes)
    updated = await client.models.update(message, paths)
    print_item(updated, fields(updated), output)


@models.command()
@click.argument("model")
@click.option("--force", is_flag=True, help="Although something uses it: what runs goes on, but may not start again.")
@yes_option
@run
async def delete(client: Client, model: str, force: bool, yes: bool) -> None:
    """Delete a MODEL that nothing uses. `ekiben models restore` brings it back, by default for a week."""
    name = short.exact(short.model(model))
    confirm(f"Delete model {tag(name)}?", yes)
    await client.models.delete(name, force=force)
    said(f"Deleted model {tag(name)}. `ekiben models restore {tag(name)}` brings it back.")


@models.command()
@click.argument("model")
@click.option("--uid", default="", help="Which one, where several of this name were deleted; the last one without.")
@output_option
@run
async def restore(client: Client, model: str, uid: str, output: str) -> None:
    """Restore a deleted MODEL, where its name is still free: `ekiben models restore iris:v1`."""
    name = short.exact(short.model(model))
    restored = await deletions.restore(client, client.models, name, uid)
    if output != "table":
        print_item(restored, fields(restored), output)


@models.command()
@click.argument("model")
@click.option("--uid", default="", help="Which one, where several of this name were deleted; the last one without.")
@yes_option
@run
async def purge(client: Client, model: str, uid: str, yes: bool) -> None:
    """Delete a deleted MODEL for good, before its time, so that its bytes are freed. For admins."""
    name = short.exact(short.model(model))
    confirm(f"Delete model {tag(name)} for good?", yes)
    await deletions.purge(client, name, uid)
