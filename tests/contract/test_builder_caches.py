"""What lies in the builder's folder and is taken away: by age, by size, and never what is used."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ekiben.errors import Unavailable
from services.builder import bento, offline_caches
from services.builder.caches import Caches, Kind
from services.builder.domain import Build, Environment
from services.builder.environments import Environments
from services.builder.interpreters import Interpreters
from services.builder.locks import Locks, Work
from services.builder.pruning import Pruned, Pruning
from services.builder.recipe import make_recipe
from services.builder.settings import Settings
from services.builder.store import Store
from services.builder.usage import Usage
from services.builder.uv import Programs
from services.kernel.clock import SYSTEM
from services.kernel.db import open_database
from tests.fixtures_builder import PackageIndex, bento_folder, index

__all__ = ["index"]
DAY_S = 86_400.0
DIGEST = "d" * 64


class Killed(BaseException):
    """Where a test has the builder die: nothing on the way out may tidy up."""


@dataclass
class Users(Usage):
    """Which environments deployments run from, as a test says."""

    found: set[str] = field(default_factory=set)
    away: bool = False

    def __init__(self) -> None:
        self.found, self.away = set(), False

    async def runs_from(self, environment: str) -> bool:
        if self.away:
            raise Unavailable("The registry is away.")
        return environment in self.found


@dataclass
class Folder:
    """A builder's folder with all that looks after it."""

    path: Path
    programs: Programs
    locks: Locks
    environments: Environments
    store: Store
    usage: Users
    caches: Caches
    made: int = 0

    async def prune(self, *, dry_run: bool = False, caches: Caches | None = None, **settings: float) -> Pruned:
        values = {"caches_keep_days": 1.0, "images_grace_s": 1.0, "build_timeout_s": 1.0, **settings}
        found = Settings(database_url="sqlite://", data_dir=self.path, **values)  # type: ignore[arg-type]
        pruning = Pruning(caches or self.caches, self.store, self.usage, self.programs, found, SYSTEM)
        return await pruning.prune(dry_run=dry_run)

    async def environment(self, requirements: str) -> Environment:
        self.made += 1
        folder = bento_folder(self.path.parent / f"bento{self.made}", requirements)
        recipe = make_recipe(bento.read(folder))
        settings = Settings(database_url="", data_dir=self.path, python_downloads=False)
        interpreter = await Interpreters(self.programs, settings, SYSTEM).find(recipe.python, print)
        work = Work(self.path / "tmp" / str(self.made), print)
        work.directory.mkdir(parents=True)
        lock = await self.locks.make(recipe, interpreter, folder, work)
        environment, _ = await self.environments.make(lock, recipe, interpreter, work)
        return environment

    def file(self, name: str, content: str = "x", *, days: float = 0.0) -> Path:
        """A file that was used so many days ago."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return self.age(path, days)

    def folder(self, name: str, size_bytes: int = 10, *, days: float = 0.0) -> Path:
        self.file(f"{name}/content", "x" * size_bytes)
        return self.age(self.path / name, days)

    def age(self, path: Path, days: float) -> Path:
        then = time.time() - days * DAY_S
        os.utime(path, (then, then))
        return path


@pytest.fixture
async def folder(tmp_path: Path, index: PackageIndex) -> AsyncIterator[Folder]:
    async with open_database(f"sqlite:///{tmp_path}/builder.db") as database:
        await database.migrate("services.builder.migrations")
        data_dir = tmp_path / "data"
        programs = Programs(data_dir, tmp_path / "run")
        locks = Locks(data_dir, programs)
        environments = Environments(data_dir, programs, locks)
        yield Folder(data_dir, programs, locks, environments, Store(database), Users(), Caches(data_dir))


async def test_what_nobody_used_for_long_goes_and_what_is_young_stays(folder: Folder) -> None:
    kinds = ("image-environments", "bytecode", "pythons-of-bases")
    old = [folder.folder(f"{kind}/old", days=2) for kind in kinds]
    old += [folder.file(name, days=2) for name in ("layers/old.json", "packages/old.json")]
    young = [folder.folder(f"{kind}/young", days=0.5) for kind in kinds]
    young += [folder.file(name, days=0.5) for name in ("layers/young.json", "bases/pins.json")]
    foreseen = await folder.prune(dry_run=True)
    assert all(path.exists() for path in old + young)
    pruned = await folder.prune()
    assert not any(path.exists() for path in old) and all(path.exists() for path in young)
    assert (pruned.counts.total(), pruned.counts[Kind.LISTS]) == (5, 2)
    assert foreseen == pruned and pruned.size_bytes.total() > 0
    assert not list((folder.path / "tmp").iterdir())


async def test_nothing_goes_that_a_build_may_be_using_whatever_the_settings_say(folder: Folder) -> None:
    path = folder.folder("image-environments/used", days=0.02)
    await folder.prune(caches_keep_days=0, caches_most_bytes=1, build_timeout_s=3600)
    assert path.exists()
    await folder.prune(caches_keep_days=0, caches_most_bytes=1)
    assert not path.exists()


async def test_an_environment_goes_with_its_downloads_and_is_made_again(folder: Folder, index: PackageIndex) -> None:
    one = await folder.environment("tabulate==0.9.0\nbentoml==1.4.39\n")
    two = await folder.environment("cattrs\nbentoml==1.4.39\n")
    for environment in (one, two):
        folder.age(folder.environments.path(environment.digest), 3)
    folder.usage.found.add(two.digest)
    await folder.prune()
    assert not folder.environments.path(one.digest).exists()
    # As long as a deployment runs from it, it counts as used: replicas that still run after its end are no concern.
    folder.usage.found.clear()
    await folder.prune()
    assert folder.environments.find(two.digest) == two
    assert _there(folder, "tabulate/0.9.0"), (
        "a download counts as used when an environment was made of it, or taken away"
    )
    folder.usage.found.add(two.digest)
    with _later(folder):
        pruned = await folder.prune()
    assert (
        pruned.counts[Kind.DOWNLOADS] == 1 and not _there(folder, "tabulate/0.9.0") and _there(folder, "cattrs/23.1.2")
    )
    assert await folder.environment("tabulate==0.9.0\nbentoml==1.4.39\n") == one
    index.broken = True
    assert await folder.environment("cattrs\nbentoml==1.4.39\n") == two, "what was kept needs no index"


async def test_an_environment_stays_while_nobody_can_say_who_uses_it(folder: Folder) -> None:
    path = folder.folder(f"environments/{DIGEST}", days=2)
    folder.usage.away = True
    await folder.prune()
    assert path.exists()
    folder.usage.away = False
    await folder.prune()
    assert not path.exists()


async def test_the_longest_unused_goes_first_where_all_takes_too_much(folder: Folder) -> None:
    paths = [folder.folder(f"bytecode/{days}", 100_000, days=days / 100) for days in (40, 20, 30, 10)]
    used = folder.folder(f"environments/{DIGEST}", 100_000, days=0.9)
    folder.usage.found.add(f"sha256:{DIGEST}")
    await folder.prune(caches_most_bytes=350_000)
    assert [path.exists() for path in paths] == [False, True, False, True] and used.exists()


async def test_what_is_used_between_the_look_and_the_move_stays(folder: Folder) -> None:
    path = folder.folder("image-environments/used", days=2)
    caches = Caches(folder.path, moved=lambda aside: os.utime(aside))
    pruned = await folder.prune(caches=caches)
    assert (path / "content").exists() and not pruned.counts


async def test_a_crash_in_the_middle_leaves_the_rest_to_the_next_round(folder: Folder) -> None:
    paths = [folder.folder(f"bytecode/{name}", days=2) for name in "ab"]

    def die(_aside: Path) -> None:
        raise Killed

    with pytest.raises(Killed):
        await folder.prune(caches=Caches(folder.path, moved=die))
    assert len(list((folder.path / "tmp").iterdir())) == 1 and sum(path.exists() for path in paths) == 1
    await folder.prune()
    assert not any(path.exists() for path in paths) and not list((folder.path / "tmp").iterdir())


async def test_two_builders_of_a_folder_tidy_it_one_after_the_other(folder: Folder) -> None:
    folder.path.mkdir(exist_ok=True)
    with folder.caches.alone():
        with pytest.raises(Unavailable) as refused:
            await folder.prune()
        assert refused.value.reason == "CACHES_BUSY"
    await folder.prune()


async def test_locks_are_kept_longer_and_so_is_what_they_name(folder: Folder) -> None:
    lock = folder.file("locks/a.txt", f"mine @ shipped:{'a' * 64}/mine.whl\n", days=40)
    built = folder.file("built/b.json", f'{{"file": "shipped:{"b" * 64}/theirs.whl"}}', days=400)
    shipped = {name: folder.folder(f"shipped/{name * 64}", days=40) for name in "abc"}
    await folder.prune()
    assert lock.exists() and not built.exists()
    assert {name: path.exists() for name, path in shipped.items()} == {"a": True, "b": False, "c": False}
    await folder.prune(locks_keep_days=30)
    assert not lock.exists() and not shipped["a"].exists()


async def test_logs_of_builds_that_ended_go_and_so_does_what_killed_builds_left(folder: Folder) -> None:
    build = Build("b1", "u1", "organizations/default", "b/v1", "sha256:1", "users/admin", datetime.now(UTC))
    assert await folder.store.insert(build)
    waits, ended = (folder.file(f"logs/{name}.log", days=100) for name in ("b1", "b2"))
    young = folder.file("logs/b3.log", days=80)
    left, working = folder.folder("tmp/left", days=1), folder.folder("tmp/working")
    await folder.prune()
    assert [path.exists() for path in (waits, ended, young, left, working)] == [True, False, True, False, True]


async def test_what_several_have_in_common_is_counted_once(folder: Folder) -> None:
    folder.folder("environments/a", 100_000)
    folder.path.joinpath("image-environments/b").mkdir(parents=True)
    os.link(folder.path / "environments/a/content", folder.path / "image-environments/b/content")
    amounts = await asyncio.to_thread(folder.caches.amounts)
    assert amounts[Kind.ENVIRONMENTS].size_bytes >= 100_000
    assert (amounts[Kind.IMAGE_ENVIRONMENTS].count, amounts[Kind.IMAGE_ENVIRONMENTS].size_bytes) == (1, 0)


def _there(folder: Folder, package: str) -> bool:
    return any((folder.path / "cache" / "uv").glob(f"wheels-v*/index/*/{package}-py3-none-any"))


class _later:
    """Times of change cannot be set: for a while it is two days later."""

    def __init__(self, folder: Folder) -> None:
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> None:
        now = time.time
        self._patch.setattr("services.builder.pruning.time.time", lambda: now() + 2 * DAY_S)

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


async def test_what_builds_without_a_server_keep_is_tidied_once_a_day_and_not_while_one_is_at_work(
    tmp_path: Path,
) -> None:
    cache, old, said = tmp_path / "cache", time.time() - 40 * DAY_S, list[str]()
    for name in ("image-environments/old", "image-environments/new", "bytecode/old"):
        (cache / name).mkdir(parents=True)
        (cache / name / "file").write_bytes(b"x" * 5000)
    (cache / "locks").mkdir()
    (cache / "locks" / "old.txt").write_text("kept for a year")
    for path in [*cache.rglob("old"), cache / "locks" / "old.txt"]:
        os.utime(path, (old, old))

    def left() -> set[str]:
        return {
            str(path.relative_to(cache))
            for kind in ("image-environments", "bytecode", "locks")
            for path in (cache / kind).iterdir()
        }

    everything = left()
    found = await offline_caches.prune(cache, dry_run=True)
    assert found.counts == {Kind.IMAGE_ENVIRONMENTS: 1, Kind.BYTECODE: 1} and left() == everything
    async with offline_caches.used(cache, said.append), offline_caches.used(cache, said.append):
        await offline_caches.prune_daily(cache, said.append)
        with pytest.raises(Unavailable, match="A build uses"):
            await offline_caches.prune(cache)
    assert left() == everything and not said
    await offline_caches.prune_daily(cache, said.append)
    assert left() == {"image-environments/new", "locks/old.txt"}
    assert len(said) == 1 and said[0].startswith("Deleted 2 things")
    os.utime(cache / "image-environments" / "new", (old, old))
    await offline_caches.prune_daily(cache, said.append)
    assert left() == {"image-environments/new", "locks/old.txt"}
    os.utime(cache / ".pruned", (old, old))
    await offline_caches.prune_daily(cache, said.append)
    assert left() == {"locks/old.txt"}
