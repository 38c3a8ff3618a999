"""What `ekiben models` and `ekiben bentos` share: moving versions between the platform and this machine."""

import asyncio
from pathlib import Path
from typing import Any

from ekiben import localstore
from ekiben.cli import short
from ekiben.cli.output import said, tag
from ekiben.cli.progress import Bar
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
