"""What `ekiben models` and `ekiben bentos` share: moving versions between the platform and this machine."""

from pathlib import Path
from typing import Any

from ekiben import localstore
from ekiben.cli import short
from ekiben.cli.output import said, tag
from ekiben.cli.progress import bar


def source_path(kind: str, text: str) -> Path:
    """Where a version lies: a file or a folder that is named, or a tag's folder in the BentoML store."""
    path = Path(text).expanduser()
    if short.is_path(text) or (path.exists() and ":" not in text):
        return path
    return localstore.folder(kind, text)


async def push(resources: Any, noun: str, version: localstore.Version, *, force: bool, labels: dict[str, str]) -> Any:
    """Push one version with a bar; says so where it is there already."""
    with bar(f"Pushing {noun} {version.tag}", version.archive.size_bytes) as progress:
        resource, sent = await resources.push(version, force=force, labels=labels, progress=progress)
    if sent:
        said(f"Pushed {noun} {version.tag}.")
    else:
        said(f"{noun.capitalize()} {version.tag} is there already; --force sends it again.")
    return resource


async def pull(resources: Any, noun: str, name: str, to: str) -> Path:
    """Pull one version with a bar: to the BentoML store, to a folder, or to a file that is named like a tar."""
    resource = await resources.get(name)
    into = Path(to).expanduser() if to else None
    as_file = to.endswith((".tar", ".tgz", ".tar.gz", ".bento"))
    with bar(f"Pulling {noun} {tag(resource.name)}", resource.content.size_bytes) as progress:
        path: Path = await resources.pull(resource.name, into, unpack=not as_file, progress=progress)
    return path
