"""What `ekiben models` and `ekiben bentos` share: moving versions between the platform and this machine."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import click

from ekiben import localstore
from ekiben.cli import short
from ekiben.cli.output import collect, print_items, said, size, tag, visible
from ekiben.cli.progress import Bar
from ekiben.client import Client
from ekiben.errors import Unavailable
from ekiben.uploading import PART_BYTES


def source_path(kind: str, text: str) -> Path:
    """Where a version lies: a file or a folder that is named, or a tag's folder in the BentoML store."""
    path = Path(text).expanduser()
    if short.is_path(text) or (path.exists() and ":" not in text):
        return path
    return localstore.folder(kind, text)


async def push(
    resources: Any, noun: str, version: localstore.Version, *, force: bool, resume: bool, labels: dict[str, str]
) -> Any:
    """Push one version with a bar; says so where it is there already, and how to go on where it was interrupted."""
    shown = Bar(f"Pushing {noun} {version.tag}", version.archive.size_bytes)
    try:
        with shown as progress:
            resource, sent = await resources.push(version, force=force, labels=labels, progress=progress, resume=resume)
    except (Unavailable, asyncio.CancelledError):
        if version.archive.size_bytes > PART_BYTES:
            said("What has arrived is kept for a day: the same command with --resume goes on from there.")
        raise
    if sent:
        said(f"Pushed {noun} {version.tag}{shown.summary}.")
    else:
        said(f"{noun.capitalize()} {version.tag} is there already; --force sends it again.")
    return resource


FILE_COLUMNS = [
    ("PATH", lambda f: visible(f.path)),
    ("SIZE", lambda f: size(f.size_bytes)),
    ("DIGEST", lambda f: f.digest),
]


async def show_files(client: Client, name: str, limit: int, output: str) -> None:
    """Print the files of one version; `-o name` prints their paths."""
    found = await collect(client.files.list(name, limit=limit))
    if output == "name":
        for file in found:
            click.echo(visible(file.path))
        return
    print_items(found, FILE_COLUMNS, output)


async def cat(client: Client, name: str, path: str) -> None:
    """Write one file of one version to stdout as it is."""
    out = sys.stdout.buffer
    await client.files.read(name, path, out.write)
    out.flush()


async def pull(resources: Any, noun: str, name: str, to: str) -> Path:
    """Pull one version with a bar: to the BentoML store, to a folder, or to a file that is named like a tar."""
    resource = await resources.get(name)
    into = Path(to).expanduser() if to else None
    as_file = to.endswith((".tar", ".tgz", ".tar.gz", ".bento"))
    shown = Bar(f"Pulling {noun} {tag(resource.name)}", resource.content.size_bytes)
    try:
        with shown as progress:
            path: Path = await resources.pull(resource.name, into, unpack=not as_file, progress=progress)
    except (Unavailable, asyncio.CancelledError):
        said("What has arrived is kept: the same command goes on from there.")
        raise
    return path
