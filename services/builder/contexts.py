"""The folder that commands copy from: with the same modes on every machine, whatever umask the bento was unpacked with.

COPY keeps modes. A layer says only whether a file is executable, and so does what a script is remembered by.
"""

import posixpath
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from services.builder.layers import Entry, entries_of, with_parents

_IGNORED = (".containerignore", ".dockerignore")
"""What engines look for themselves."""


def lay_out(context: Path, names: Iterable[str], into: Path) -> None:
    """Copy what a script reads of `context` (`.` for all of it) into a new folder. Blocks.

    Raises:
        FailedPrecondition: there is something which is neither file, folder nor link (FILE_NOT_READABLE).
    """
    wanted = {posixpath.normpath(f"/{name}").strip("/") for name in names}
    if wanted:
        wanted |= {name for name in _IGNORED if (context / name).is_file()}
    if not all(_is_plain(context, name) for name in wanted):
        wanted = {""}  # what links lead to, and what the engine finds otherwise or complains of
    into.mkdir()
    into.chmod(0o755)
    for entry in with_parents(each for name in sorted(wanted) for each in _entries(context, name)):
        path = into / entry.name
        if entry.link:
            path.symlink_to(entry.link)
        elif entry.path is not None:
            shutil.copyfile(entry.path, path)
            path.chmod(0o755 if entry.executable else 0o644)
        else:
            path.mkdir(exist_ok=True)
            path.chmod(0o755)


def _entries(context: Path, name: str) -> Iterator[Entry]:
    path = context / name
    if path.is_dir():
        yield from entries_of(path, name or ".")
    else:
        yield Entry(name, path=path, executable=bool(path.stat().st_mode & 0o100))


def _is_plain(context: Path, name: str) -> bool:
    """Whether it is there, and no part of its path is a link."""
    path = context / name
    return path.exists() and path.resolve() == context.resolve() / name
