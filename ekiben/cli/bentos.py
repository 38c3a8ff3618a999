"""`ekiben bentos`: bentos and what is in them."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
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
from ekiben.errors import NotFound
from ekiben.registry.v1 import registry_pb2 as pb

COLUMNS = [
    ("BENTO", lambda b: tag(b.name)),
    ("STATE", lambda b: pb.Content.State.Name(b.content.state)),
    ("SIZE", lambda b: size(b.content.size_bytes) if b.content.size_bytes else ""),
    ("ALIASES", lambda b: " ".join(b.aliases)),
    ("BENTOML", lambda b: b.bentoml_version),
    ("MODELS", lambda b: " ".join(tag(name) for name in b.models)),
    ("LABELS", lambda b: pairs(b.labels)),
    ("AGE", lambda b: age(b.create_time)),
]


def fields(bento: pb.Bento) -> list[tuple[str, str]]:
    """What `get` prints."""
    return [
        ("Bento", tag(bento.name)),
        ("State", pb.Content.State.Name(bento.content.state)),
        ("Failure", bento.content.failure),
        ("Size", size(bento.content.size_bytes) if bento.content.size_bytes else ""),
        ("Digest", bento.content.digest),
        ("Aliases", " ".join(bento.aliases)),
        ("BentoML", bento.bentoml_version),
        ("Models", "\n".join(tag(name) for name in bento.models)),
        ("Labels", pairs(bento.labels)),
        ("Annotations", shown(bento.annotations)),
        ("Description", bento.description.partition("\n\n")[0].lstrip("# ")),
        ("Built", moment(bento.build_time)),
        ("Created", f"{moment(bento.create_time)} by {last(bento.creator)}"),
        ("Name", bento.name),
    ]


@click.group(cls=NounGroup)
def bentos() -> None:
    """Bentos: services packed with their code, requirements and models.

    A BENTO is written summarizer:v1, summarizer:production (an alias), summarizer (the latest), or as its resource
    name.
    """


@bentos.command("list")
@click.argument("repository", required=False)
@click.option("--filter", "filter_", default="", help="Words and label:KEY=VALUE terms, all of which must match.")
@click.option("--deleted", is_flag=True, help="Those that were deleted and can be restored, deleted last first.")
@limit_option
@output_option
@run
async def list_(client: Client, repository: str | None, filter_: str, deleted: bool, limit: int, output: str) -> None:
    """List bentos, newest first: all, or those of one REPOSITORY."""
    parent = short.resource("bentoRepositories", repository) if repository else "bentoRepositories/-"
    if deleted:
        if filter_:
            raise click.UsageError("--deleted takes no --filter.")
        await deletions.print_deleted(client, parent, limit, output)
        return
    found = await collect(client.bentos.list(parent, filter=filter_, limit=limit))
    print_items(found, COLUMNS, output, empty="No bentos yet. `ekiben bentos push NAME:VERSION` uploads one.")


@bentos.command()
@click.argument("bento")
@output_option
@run
async def get(client: Client, bento: str, output: str) -> None:
    """Show one BENTO."""
    found = await client.bentos.get(short.bento(bento))
    print_item(found, fields(found), output)


@bentos.command()
@click.argument("source")
@click.option("--force", is_flag=True, help="Send the bytes even where the bento is there already.")
@resume_option
@click.option("--models/--no-models", "with_models", default=True, help="Push its models of the local store first.")
@label_option
@output_option
@run
async def push(
    client: Client,
    source: str,
    force: bool,
    resume: bool,
    with_models: bool,
    labels: tuple[tuple[str, str], ...],
    output: str,
) -> None:
    """Upload a bento: a tag of the local BentoML store, a folder, or a tar file."""
    path = versions.source_path("bentos", source)
    bento = await push_from(client, path, with_models=with_models, force=force, resume=resume, labels=dict(labels))
    if output != "table":
        print_item(bento, fields(bento), output)


async def push_from(
    client: Client,
    path: Path,
    *,
    with_models: bool = True,
    force: bool = False,
    resume: bool = False,
    labels: Mapping[str, str] = {},
) -> pb.Bento:
    """Push the bento at `path`, its models first."""
    version = await asyncio.to_thread(localstore.read_bento, path)
    if with_models:
        await push_models(client, version.models, resume=resume)
    pushed: pb.Bento = await versions.push(
        client.bentos, "bento", version, force=force, resume=resume, labels=dict(labels)
    )
    return pushed


async def get_or_push(client: Client, name: str) -> pb.Bento:
    """A bento of the platform; one that only the local BentoML store has is pushed first.

    Raises:
        NotFound: neither has it.
    """
    try:
        return await client.bentos.get(name)
    except NotFound:
        try:
            path = localstore.folder("bentos", tag(name))
        except NotFound:
            path = None
        if path is None:
            raise
    said(f"{tag(name)} is in the local BentoML store only; pushing it.")
    return await push_from(client, path)


async def push_models(client: Client, tags: tuple[str, ...], *, resume: bool = False) -> None:
    """Push the models that a bento names; one that the local store does not have must be there already."""
    for model in tags:
        try:
            path = localstore.folder("models", model)
        except NotFound:
            await client.models.get(short.model(model))
            continue
        version = await asyncio.to_thread(localstore.read_model, path)
        await versions.push(client.models, "model", version, force=False, resume=resume, labels={})


@bentos.command()
@click.argument("bento")
@click.option("--to", default="", metavar="PATH", help="A new folder, or a .tar file, instead of the BentoML store.")
@click.option("--models/--no-models", "with_models", default=True, help="Pull its models to the local store too.")
@run
async def pull(client: Client, bento: str, to: str, with_models: bool) -> None:
    """Download a BENTO to the local BentoML store."""
    found = await client.bentos.get(short.bento(bento))
    for model in found.models if with_models and not to else ():
        await versions.pull(client.models, "model", model, "")
    click.echo(await versions.pull(client.bentos, "bento", found.name, to))


@bentos.command()
@click.argument("bento")
@limit_option
@output_option
@run
async def files(client: Client, bento: str, limit: int, output: str) -> None:
    """List the files of a BENTO, each with its size and digest.

    \b
    ekiben bentos files summarizer:v1
    ekiben bentos files summarizer:v1 -o json | jq -r '.[] | [.digest, .path] | @tsv'
    """
    await versions.show_files(client, short.bento(bento), limit, output)


@bentos.command()
@click.argument("bento")
@click.argument("path")
@run
async def cat(client: Client, bento: str, path: str) -> None:
    """Write one file of a BENTO to stdout, without the rest of it; PATH is as `files` lists it.

    \b
    ekiben bentos cat summarizer:v1 src/service.py
    """
    await versions.cat(client, short.bento(bento), path)


@bentos.command()
@click.argument("bento")
@change_options
@output_option
@run
async def update(client: Client, bento: str, output: str, **changes: Any) -> None:
    """Change labels, annotations and description of a BENTO."""
    message, paths = changed(await client.bentos.get(short.bento(bento)), **changes)
    updated = await client.bentos.update(message, paths)
    print_item(updated, fields(updated), output)


@bentos.command()
@click.argument("bento")
@click.option("--force", is_flag=True, help="Although something uses it: what runs goes on, but may not start again.")
@yes_option
@run
async def delete(client: Client, bento: str, force: bool, yes: bool) -> None:
    """Delete a BENTO that nothing uses. `ekiben bentos restore` brings it back, by default for a week."""
    name = short.exact(short.bento(bento))
    confirm(f"Delete bento {tag(name)}?", yes)
    await client.bentos.delete(name, force=force)
    said(f"Deleted bento {tag(name)}. `ekiben bentos restore {tag(name)}` brings it back.")


@bentos.command()
@click.argument("bento")
@click.option("--uid", default="", help="Which one, where several of this name were deleted; the last one without.")
@output_option
@run
async def restore(client: Client, bento: str, uid: str, output: str) -> None:
    """Restore a deleted BENTO, where its name is still free: `ekiben bentos restore summarizer:v1`."""
    name = short.exact(short.bento(bento))
    restored = await deletions.restore(client, client.bentos, name, uid)
    if output != "table":
        print_item(restored, fields(restored), output)


@bentos.command()
@click.argument("bento")
@click.option("--uid", default="", help="Which one, where several of this name were deleted; the last one without.")
@yes_option
@run
async def purge(client: Client, bento: str, uid: str, yes: bool) -> None:
    """Delete a deleted BENTO for good, before its time, so that its bytes are freed. For admins."""
    name = short.exact(short.bento(bento))
    confirm(f"Delete bento {tag(name)} for good?", yes)
    await deletions.purge(client, name, uid)
