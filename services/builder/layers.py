"""Layers as deterministic tars: names in order, no times, owners by rule, so that equal content has equal digests.

Source: OCI image-spec 1.1, layer.md. Paths have no leading slash; every folder above an entry is an entry before it.
"""

import io
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ekiben.errors import Aborted, FailedPrecondition

CHUNK_BYTES = 1 << 20
USER = 1034
"""User and group of a bento in its image, as BentoML's own images have it."""


@dataclass(frozen=True)
class Entry:
    """One name in a layer: a file (`path`, `data` or `content`), a symbolic link (`link`), or a folder (none of it)."""

    name: str
    path: Path | None = None
    data: bytes | None = None
    link: str = ""
    executable: bool = False
    owner: int = 0
    content: Iterable[bytes] | None = None
    """What can be read once, `size_bytes` of it, before the entry that comes after it."""
    size_bytes: int = 0

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.path is None and self.data is None and self.content is None and not self.link


class OutOfOrder(Exception):
    """Entries that come one by one do not come in a layer's order."""


def entries_of(
    folder: Path,
    at: str,
    *,
    owner: int = 0,
    without: Iterable[str] = (),
    without_named: Iterable[str] = (),
    follow: bool = False,
) -> Iterator[Entry]:
    """What `folder` holds, named below `at`. `without` are paths relative to it, `without_named` names at any depth.

    `follow` takes what links lead to in their place, in a folder none of whose links leads to a folder above it.

    Raises:
        FailedPrecondition: there is something which is neither file, folder nor link (FILE_NOT_READABLE).
        OSError: the folder, or one in it, is gone or cannot be read.
    """
    left_out, unnamed = set(without), set(without_named)
    yield Entry(at, owner=owner)
    for top, folders, names in os.walk(folder, onerror=_fail, followlinks=follow):
        here = Path(top)
        inside = here.relative_to(folder)
        folders[:] = sorted(name for name in folders if name not in unnamed and str(inside / name) not in left_out)
        for name in sorted([*folders, *names]):
            relative = inside / name
            if name in unnamed or str(relative) in left_out:
                continue
            path = folder / relative
            mode = (path.stat() if follow else path.lstat()).st_mode
            entry = str(PurePosixPath(at) / relative.as_posix())
            if stat.S_ISLNK(mode):
                yield Entry(entry, link=str(path.readlink()), owner=owner)
            elif stat.S_ISREG(mode):
                yield Entry(entry, path=path, executable=bool(mode & 0o100), owner=owner)
            elif stat.S_ISDIR(mode):
                yield Entry(entry, owner=owner)
            else:
                raise FailedPrecondition(
                    f"{path} is neither a file, a folder nor a link.", reason="FILE_NOT_READABLE", path=str(path)
                )


def _fail(error: OSError) -> None:
    """What cannot be listed would be left out without a word."""
    raise error


@dataclass(frozen=True)
class Run:
    """Bytes that follow one another in a layer: an entry's header, a piece of its content, or what fills a block up."""

    data: bytes
    info: tarfile.TarInfo | None = None
    """The entry whose header, or whose content, this is; None for what fills up."""
    offset: int = -1
    """Where in the entry's content the piece begins; negative for a header."""


END = bytes(2 * tarfile.BLOCKSIZE)
"""What a tar ends with."""


def runs(entries: Iterable[Entry]) -> Iterator[Run]:
    """The layer without its end; content in pieces of at most 1 MiB. Files are read as they go out, one at a time.

    Raises:
        Aborted: a file changed while it was read (FILE_CHANGED).
    """
    for entry in with_parents(entries):
        yield from _runs(entry)


def tar(entries: Iterable[Entry]) -> Iterator[bytes]:
    """The layer in chunks of about 1 MiB. Raises what `runs` raises."""
    yield from _chunks(runs(entries))


def tar_of_stream(entries: Iterable[Entry]) -> Iterator[bytes]:
    """The same bytes as `tar`, of entries none of which is held longer than until the next one comes.

    Folders above an entry that nobody gave are made with its owner.

    Raises:
        OutOfOrder: they come in another order than `tar` would put them into, or a name comes twice.
    """
    yield from _chunks(run for entry in _in_order(entries) for run in _runs(entry))


def _in_order(entries: Iterable[Entry]) -> Iterator[Entry]:
    last, below = [""], False
    for entry in entries:
        name = entry.name.strip("/").split("/")
        common = 0
        while common < min(len(last), len(name)) and last[common] == name[common]:
            common += 1
        if name <= last or (common == len(last) and not below):
            raise OutOfOrder(entry.name)
        for depth in range(common + 1, len(name)):
            yield Entry("/".join(name[:depth]), owner=entry.owner)
        yield entry
        last, below = name, entry.is_folder


def _chunks(found: Iterable[Run]) -> Iterator[bytes]:
    waiting: list[bytes] = []
    size = 0
    for run in found:
        waiting.append(run.data)
        size += len(run.data)
        if size >= CHUNK_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    waiting.append(END)
    yield b"".join(waiting)


def with_parents(entries: Iterable[Entry]) -> Iterator[Entry]:
    """In order of names, each once (the last one given counts), with the folders above that nobody gave."""
    found = {entry.name.strip("/"): entry for entry in entries}
    for name in list(found):
        for parent in PurePosixPath(name).parents:
            if str(parent) != ".":
                found.setdefault(str(parent), Entry(str(parent)))
    for name in sorted(found, key=lambda name: name.split("/")):
        yield found[name]


def _runs(entry: Entry) -> Iterator[Run]:
    info = tarfile.TarInfo(entry.name.strip("/"))
    info.uid = info.gid = entry.owner
    info.mtime = 0
    if entry.link:
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, entry.link, 0o777
        yield Run(header(info), info)
    elif entry.is_folder:
        info.type, info.mode = tarfile.DIRTYPE, 0o755
        yield Run(header(info), info)
    elif entry.data is not None:
        info.size, info.mode = len(entry.data), 0o755 if entry.executable else 0o644
        yield Run(header(info), info)
        for start in range(0, info.size, CHUNK_BYTES):
            yield Run(entry.data[start : start + CHUNK_BYTES], info, start)
    elif entry.content is not None:
        info.size, info.mode = entry.size_bytes, 0o755 if entry.executable else 0o644
        yield Run(header(info), info)
        at = 0
        for piece in entry.content:
            yield Run(piece, info, at)
            at += len(piece)
    else:
        assert entry.path is not None
        with entry.path.open("rb", buffering=0) as file:
            info.size, info.mode = os.fstat(file.fileno()).st_size, 0o755 if entry.executable else 0o644
            yield Run(header(info), info)
            left = info.size
            while left:
                chunk = _read(file, min(left, CHUNK_BYTES))
                if not chunk:
                    raise Aborted(f"{entry.path} became shorter while it was read. Build again.", reason="FILE_CHANGED")
                yield Run(chunk, info, info.size - left)
                left -= len(chunk)
            if file.read(1):
                raise Aborted(f"{entry.path} became longer while it was read. Build again.", reason="FILE_CHANGED")
    if rest := -info.size % tarfile.BLOCKSIZE:
        yield Run(bytes(rest))


def _read(file: io.RawIOBase, size: int) -> bytes:
    """As many bytes as asked for, fewer only at the end: pieces, and so digests, must not depend on the file system."""
    chunk = file.read(size) or b""
    while len(chunk) < size and (more := file.read(size - len(chunk))):
        chunk += more
    return chunk


def header(info: tarfile.TarInfo) -> bytes:
    """An entry's header; more than one block where its name or size does not fit."""
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
