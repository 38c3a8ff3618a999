"""What lies in the builder's folder besides images: measured, and taken away where nobody used it for long.

Whoever uses something here touches it (`services.content.files.touch`), so that its time is that of its last use. What
is taken away is first moved aside; a use that came between the look and the move is seen then, and it is put back. So
who makes anything here needs no lock: it only has to begin later than the time before which things go.

uv's cache is uv's own: packages are hidden from it as far as it says itself where they are, and it prunes its files. A
file's number of links tells there whether an environment has it, and the time at which that changed its last use.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ekiben.errors import Unavailable
from services.content.files import make_folder, touch

_BLOCK = 512
_SHIPPED = re.compile(r"shipped:([0-9a-f]{64})/")
_NOT_UNFINISHED = ".gone-"


class Kind(StrEnum):
    """What there is."""

    ENVIRONMENTS = "environments"
    """Of local replicas."""
    IMAGE_ENVIRONMENTS = "image-environments"
    BYTECODE = "bytecode"
    PYTHONS_OF_BASES = "pythons-of-bases"
    LISTS = "lists"
    """Small files: which layers there are, and which packages an environment has."""
    DOWNLOADS = "downloads"
    """uv's cache."""
    LOCKS = "locks"
    """What requirements resolved to, and which wheel was built of which source: made again, they may be others."""
    SHIPPED = "shipped"
    """Archives that bentos brought along, and wheels that were built from source."""
    LOGS = "logs"
    UNFINISHED = "unfinished"
    """What builds work on, or left."""


_FOLDERS: Mapping[Kind, tuple[tuple[str, str], ...]] = {
    Kind.ENVIRONMENTS: (("environments", "[!.]*"),),
    Kind.IMAGE_ENVIRONMENTS: (("image-environments", "[!.]*"),),
    Kind.BYTECODE: (("bytecode", "[!.]*"),),
    Kind.PYTHONS_OF_BASES: (("pythons-of-bases", "[!.]*"),),
    Kind.LISTS: (("layers", "[!.]*.json"), ("packages", "[!.]*.json")),
    Kind.LOCKS: (("locks", "[!.]*.txt"), ("built", "[!.]*.json")),
    Kind.SHIPPED: (("shipped", "[!.]*"),),
    Kind.LOGS: (("logs", "[!.]*.log"),),
    Kind.UNFINISHED: (("tmp", "*"),),
}
SAME_AGAIN = (
    *(Kind.ENVIRONMENTS, Kind.IMAGE_ENVIRONMENTS, Kind.BYTECODE, Kind.PYTHONS_OF_BASES, Kind.LISTS, Kind.DOWNLOADS),
)
"""What costs time where it is gone, and is the same when it is made again."""


@dataclass(frozen=True)
class Thing:
    """A file or a folder that goes as a whole."""

    kind: Kind
    path: Path
    used: float
    """Seconds since the epoch."""


@dataclass(frozen=True)
class Amount:
    """How much there is of a kind."""

    count: int = 0
    size_bytes: int = 0
    """On the disk; what several have in common counts for the first kind that has it."""


class Caches:
    """The folder of a builder. All methods block."""

    def __init__(self, data_dir: Path, moved: Callable[[Path], None] = lambda path: None) -> None:
        """`moved` is told of each thing that was moved aside, before anything else happens to it; tests fail there."""
        self._data_dir = data_dir.absolute()
        self._aside = self._data_dir / "tmp"
        self._moved = moved

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Take things away alone among all builders of the folder.

        Raises:
            Unavailable: another one is at it (CACHES_BUSY).
        """
        make_folder(self._data_dir)
        with open(self._data_dir / ".caches.lock", "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Unavailable(
                    "Another builder of this folder tidies it now. Try again in a minute.", reason="CACHES_BUSY"
                ) from None
            self._sweep()
            yield

    def things(self, kind: Kind) -> list[Thing]:
        """What there is of a kind, the longest unused first."""
        if kind is Kind.DOWNLOADS:
            found = [each for cache in self.uv_caches() for each in _packages(cache)]
        else:
            found = [
                Thing(kind, path, used)
                for folder, pattern in _FOLDERS[kind]
                for path in (self._data_dir / folder).glob(pattern)
                if not path.name.startswith(_NOT_UNFINISHED) and (used := _time(path)) is not None
            ]
        return sorted(found, key=lambda each: (each.used, each.path))

    def unnamed_shipped(self) -> list[Thing]:
        """What bentos brought along that neither a lock nor a list of built wheels names."""
        named: set[str] = set()
        for lock in self.things(Kind.LOCKS):
            with contextlib.suppress(FileNotFoundError):
                named |= set(_SHIPPED.findall(lock.path.read_text("utf-8", "replace")))
        return [each for each in self.things(Kind.SHIPPED) if each.path.name not in named]

    def amounts(self) -> dict[Kind, Amount]:
        """How much there is."""
        seen: set[tuple[int, int]] = set()
        found = {}
        for kind in Kind:
            things = self.things(kind)
            paths = self.uv_caches() if kind is Kind.DOWNLOADS else [each.path for each in things]
            found[kind] = Amount(len(things), sum(size for path in paths for _, size in _files(path, seen)))
        return found

    def size_of(self, thing: Thing) -> int:
        """The bytes that are free without it: what other links lead to stays."""
        path = thing.path.resolve() if thing.kind is Kind.DOWNLOADS else thing.path
        return sum(size for links, size in _files(path, set()) if links == 1)

    def remove(self, thing: Thing) -> int | None:
        """Take it away; the bytes that are free then. None where it was used meanwhile, or is gone.

        A crash in the middle leaves it aside, for the next round.
        """
        if thing.kind is Kind.DOWNLOADS:
            return self._hide(thing)
        make_folder(self._aside)
        aside = self._aside / f"{_NOT_UNFINISHED}{secrets.token_hex(8)}"
        try:
            thing.path.rename(aside)
        except OSError:
            return None
        self._moved(aside)
        if _time(aside) != thing.used:
            with contextlib.suppress(OSError):  # somebody made it again meanwhile
                aside.rename(thing.path)
                return None
        size_bytes = sum(size for links, size in _files(aside, set()) if links == 1)
        _delete(aside)
        return size_bytes

    def keep(self, thing: Thing) -> None:
        """Let it count as used now."""
        touch(thing.path)

    def uv_caches(self) -> list[Path]:
        """uv's caches: everybody's, and those of organizations."""
        return sorted(path for path in (self._data_dir / "cache").glob("uv*") if path.is_dir())

    def _hide(self, thing: Thing) -> int | None:
        """Let uv not know a package any more; `uv cache prune` frees its files."""
        if (now := _of_package(thing.path)) is None or now != thing:
            return None
        size_bytes = self.size_of(thing)
        for each in (thing.path, *(thing.path.with_name(f"{thing.path.name}{end}") for end in (".http", ".msgpack"))):
            each.unlink(missing_ok=True)
        return size_bytes

    def _sweep(self) -> None:
        """What was moved aside, and is still there."""
        for path in self._aside.glob(f"{_NOT_UNFINISHED}*"):
            _delete(path)


def _packages(cache: Path) -> Iterator[Thing]:
    """Packages of uv's cache that no environment has. Reads its layout; nothing where that ever changes."""
    for kind in cache.glob("wheels-v*"):
        for root in (kind / "pypi", *kind.glob("index/*"), *kind.glob("url/*"), *kind.glob("flat-index/*")):
            for link in root.glob("*/*"):
                if link.is_symlink() and (thing := _of_package(link)) is not None:
                    yield thing


def _of_package(link: Path) -> Thing | None:
    """A package by its entry; None where an environment has its files."""
    try:
        info = next(iter(sorted(link.glob("*.dist-info"))))
        status = (info / "METADATA").stat()
    except (OSError, StopIteration):
        return None
    return Thing(Kind.DOWNLOADS, link, status.st_ctime) if status.st_nlink == 1 else None


def _time(path: Path) -> float | None:
    try:
        return path.lstat().st_mtime
    except OSError:
        return None


def _files(path: Path, seen: set[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """Of each file below that was not seen yet: how many links lead to it, and its bytes on the disk."""
    waiting = [path]
    while waiting:
        each = waiting.pop()
        try:
            status = each.lstat()
            if each.is_dir() and not each.is_symlink():
                waiting += [Path(entry.path) for entry in os.scandir(each)]
                continue
        except OSError:
            continue  # gone meanwhile
        key = (status.st_dev, status.st_ino)
        if key not in seen:
            seen.add(key)
            yield status.st_nlink, status.st_blocks * _BLOCK


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
