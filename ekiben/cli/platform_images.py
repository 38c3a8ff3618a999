"""`ekiben images list|get|delete`: images that builds of the platform made."""

import re
from pathlib import Path

import click

from ekiben.builder.v1 import images_pb2 as pb
from ekiben.cli import short
from ekiben.cli.becoming import become
from ekiben.cli.options import hidden_connection_options, limit_option, output_option
from ekiben.cli.output import age, collect, last, moment, print_item, print_items, said, size, tag
from ekiben.cli.session import finish, open_client, run, take_options
from ekiben.client import Client
from ekiben.errors import NotFound

COLUMNS = [
    ("IMAGE", lambda i: last(i.name)),
    ("BENTO", lambda i: tag(i.bento)),
    ("PLATFORMS", lambda i: ",".join(i.platforms)),
    ("SIZE", lambda i: size(i.size_bytes)),
    ("CURRENT", lambda i: "yes" if len(i.references) > 1 else ""),
    ("AGE", lambda i: age(i.create_time)),
]


def fields(image: pb.Image) -> list[tuple[str, str]]:
    """What `get` prints."""
    return [
        ("Image", last(image.name)),
        ("Bento", tag(image.bento)),
        ("Digest", image.digest),
        ("Platforms", ", ".join(image.platforms)),
        ("Size", size(image.size_bytes)),
        ("References", ", ".join(image.references)),
        ("Location", image.location),
        ("Base", image.base),
        ("Models", ", ".join(tag(model) for model in image.models)),
        ("Build", last(image.build)),
        ("Created", moment(image.create_time)),
        ("Used", moment(image.use_time)),
        *((f"Layer {n}", _layer(layer)) for n, layer in enumerate(image.layers, 1)),
    ]


def _layer(layer: pb.Image.Layer) -> str:
    apart = f" (image {layer.image})" if layer.image else ""
    return f"{layer.digest}  {size(layer.size_bytes)}  {layer.content or 'base'}{apart}"


@click.command("list")
@click.option("--bento", default="", help="Only images of this bento.")
@limit_option
@output_option
@run
async def list_(client: Client, bento: str, limit: int, output: str) -> None:
    """List the platform's images, newest first."""
    named = (await client.bentos.get(short.bento(bento))).name if bento else ""
    found = await collect(client.images.list(bento=named, limit=limit))
    print_items(found, COLUMNS, output, empty="No images yet. Make one: ekiben builds create BENTO --image")


@click.command()
@click.argument("image")
@output_option
@run
async def get(client: Client, image: str, output: str) -> None:
    """Show one IMAGE: its id, or a bento for its newest image."""
    found = await client.images.get(await named(client, image))
    print_item(found, fields(found), output)


@click.command()
@click.argument("image")
@click.option("--force", is_flag=True, help="Even where a deployment uses it.")
@run
async def delete(client: Client, image: str, force: bool) -> None:
    """Delete an IMAGE: its id, or a bento for its newest image."""
    name = await named(client, image)
    await client.images.delete(name, force=force)
    said(f"Deleted image {last(name)}.")


@click.command()
@output_option
@run
async def stats(client: Client, output: str) -> None:
    """Show how much the platform's images take, and how much they share."""
    found = await client.images.stats()
    shown = [
        ("Images", str(found.image_count)),
        ("Location", found.location),
        ("Blobs", f"{found.blob_count} ({size(found.size_bytes)})"),
        ("Shared", f"{size(found.shared_bytes)} that images have in common"),
        ("Garbage", f"{found.garbage_count} ({size(found.garbage_bytes)})"),
        ("Layers made", f"{found.layers_made} ({size(found.made_bytes)}) since the builder's start"),
        ("Layers reused", f"{found.layers_reused} ({size(found.reused_bytes)}) since the builder's start"),
    ]
    print_item(found, shown, output)


@click.command()
@click.option("--dry-run", is_flag=True, help="Say what would go, and change nothing.")
@click.option(
    "--local",
    is_flag=True,
    help="Instead of the platform's images: what `ekiben images build` keeps on this machine and no build used for "
    "long. Builds do this themselves, once a day.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("~/.cache/ekiben/images"),
    show_default=True,
    help="With --local: the folder.",
)
@hidden_connection_options(without=())
@click.pass_context
def gc(context: click.Context, /, dry_run: bool, local: bool, cache: Path, **connection: object) -> None:
    """Delete images that are kept no longer, and layers that no image has."""
    if local:
        become("services.builder.offline_caches", cache.expanduser().resolve(), *["--dry-run"] * dry_run)
    options = take_options(context, connection)

    async def collected() -> None:
        async with open_client(options) as client:
            await _collect(client, dry_run)

    finish(collected(), options)


async def _collect(client: Client, dry_run: bool) -> None:
    found = await client.images.collect(dry_run=dry_run)
    would = "Would delete" if dry_run else "Deleted"
    for image in found.images:
        said(f"{would} image {last(image.name)} of {tag(image.bento)}.")
    said(f"{would} {len(found.images)} images and {found.blob_count} blobs ({size(found.blob_bytes)}).")


async def named(client: Client, text: str) -> str:
    """The resource name of an image, by its id, its digest, its name, or a bento that has one."""
    if re.fullmatch(r"[0-9a-f]{20}", text) or text.startswith(("images/", "sha256:")):
        return short.resource("images", text.removeprefix("sha256:")[:20] if text.startswith("sha256:") else text)
    bento = (await client.bentos.get(short.bento(text))).name
    async for image in client.images.list(bento=bento, limit=1):
        return image.name
    raise NotFound(
        f"Bento {text} has no image. Make one: ekiben builds create {text} --image",
        reason="IMAGE_NOT_FOUND",
        image=text,
    )
