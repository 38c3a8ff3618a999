"""The cache of `ekiben images build`: a builder's folder without a builder that tidies it.

So builds do, at their end and once a day at most, by the rules of `pruning`: what no build used for thirty days goes,
locks and wheels that were built from source after a year, or as a server's settings say. Nothing goes while a build is
at work. `ekiben images gc --local` does it now. A folder that a server uses is refused: only the server knows what its
deployments run from.
"""

import argparse
import asyncio
import contextlib
import fcntl
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from ekiben.errors import EkibenError, FailedPrecondition, Unavailable
from services.builder.caches import Caches
from services.builder.pruning import Pruned, Pruning
from services.builder.settings import Settings
from services.builder.uv import Programs
from services.content.files import make_folder
from services.kernel.clock import SYSTEM
from services.kernel.settings import SettingsError, load

_EVERY_S = 86_400.0
_LOOK_AGAIN_S = 0.2
_OF_SERVERS = ("owner", "site")
"""What a server's builder has in its folder from its first start on."""
_PREFIX = "EKIBEN_BUILDER"
_RULES = ("CACHES_KEEP_DAYS", "CACHES_MOST_BYTES", "LOCKS_KEEP_DAYS", "LOGS_KEEP_DAYS")
"""The settings of servers that count here too."""


@contextlib.asynccontextmanager
async def used(cache: Path, say: Callable[[str], None]) -> AsyncIterator[None]:
    """Use the cache, with as many others as like, and with nobody who takes something away: for such a one it waits.

    Raises:
        FailedPrecondition: a server uses the folder (CACHE_OF_SERVER).
    """
    check(cache)
    with _lock_file(cache) as file:
        waits = False
        while not _lock(file, fcntl.LOCK_SH):
            if not waits:
                say(f"Waiting for the cache {cache} to be tidied.")
            waits = True
            await asyncio.sleep(_LOOK_AGAIN_S)  # a lock that is waited for would keep Ctrl-C from being seen
        yield


def check(cache: Path) -> None:
    """Refuse a folder that a server uses. Raises FailedPrecondition (CACHE_OF_SERVER)."""
    if any((cache / name).exists() for name in _OF_SERVERS):
        raise FailedPrecondition(
            f"{cache} is the folder of a server's builder, which tidies it itself, by its own settings. For that now, "
            "ask the server: `ekiben builds gc` or `ekiben images gc`. To build without a server, give another folder "
            "by --cache.",
            reason="CACHE_OF_SERVER",
            path=str(cache),
        )


async def prune(cache: Path, *, dry_run: bool = False) -> Pruned:
    """Take away what no build used for long.

    Raises:
        FailedPrecondition: a server uses the folder (CACHE_OF_SERVER).
        Unavailable: a build uses the cache, or somebody else prunes it (CACHES_BUSY).
        SettingsError: EKIBEN_BUILDER_CACHES_KEEP_DAYS or another of the rules is no such number.
    """
    check(cache)
    settings = _settings(cache)
    with contextlib.ExitStack() as stack:
        if not dry_run:
            file = stack.enter_context(_lock_file(cache))
            if not _lock(file, fcntl.LOCK_EX):
                raise Unavailable(f"A build uses {cache} now. Try again when it has ended.", reason="CACHES_BUSY")
        run_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="ekb"))
        pruning = Pruning(Caches(cache), None, None, Programs(cache, Path(run_dir)), settings, SYSTEM)
        return await pruning.prune(dry_run=dry_run)


async def prune_daily(cache: Path, say: Callable[[str], None]) -> None:
    """The same, unless it was done within a day or a build is at work. What goes wrong is said, and stops nobody."""
    stamp = cache / ".pruned"
    with contextlib.suppress(OSError):
        if abs(time.time() - stamp.stat().st_mtime) < _EVERY_S:
            return
    try:
        pruned = await prune(cache)
        stamp.touch()
    except Exception as exc:  # the build has ended well, whatever this is
        if not (isinstance(exc, EkibenError) and exc.reason == "CACHES_BUSY"):
            say(f"WARNING: the cache {cache} could not be tidied: {exc}")
        return
    if pruned.counts:
        say(f"Deleted {_told(pruned)} from {cache}, which no build used for long.")


def _told(pruned: Pruned) -> str:
    return f"{pruned.counts.total()} things ({pruned.size_bytes.total() / (1 << 20):.1f} MiB)"


def _settings(cache: Path) -> Settings:
    """With the rules of the environment, as a server reads them."""
    told = {f"{_PREFIX}_{name}": os.environ.get(f"{_PREFIX}_{name}", "") for name in _RULES}
    given = {f"{_PREFIX}_DATABASE_URL": "sqlite://", f"{_PREFIX}_DATA_DIR": str(cache)}
    return load(Settings, _PREFIX, {**told, **given})


@contextlib.contextmanager
def _lock_file(cache: Path) -> Iterator[IO[bytes]]:
    make_folder(cache)
    with open(cache / ".builds.lock", "wb") as file:
        yield file


def _lock(file: IO[bytes], how: int) -> bool:
    """Lock the file until it is closed, unless somebody else has it."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="ekiben images gc --local")
    parser.add_argument("cache", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args(arguments)
    if not given.cache.is_dir():
        print(f"There is no {given.cache}: nothing was built here yet.", file=sys.stderr)
        return 0
    try:
        pruned = asyncio.run(prune(given.cache, dry_run=given.dry_run))
    except (EkibenError, OSError, SettingsError) as exc:
        print(f"Error: {exc.message if isinstance(exc, EkibenError) else exc}", file=sys.stderr)
        return 1
    would = "Would delete" if given.dry_run else "Deleted"
    for kind, count in pruned.counts.items():
        size_bytes = pruned.size_bytes[kind]
        print(f"{would} {count} of {kind.replace('-', ' ')} ({size_bytes / (1 << 20):.1f} MiB).", file=sys.stderr)
    if not pruned.counts:
        print("Nothing is kept that goes now.", file=sys.stderr)
    return 0
