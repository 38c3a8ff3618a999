"""Python environments for images: made for the base's Python and platform, whatever this machine is.

    data_dir/image-environments/<digest>/     `lib/python3.N/site-packages`, `bin`; `complete.json` says what it is

Nothing of them runs here, nor does anything while they are made: wheels are unpacked by uv, which links them out of the
cache that local replicas' environments are made from too. So the machine needs no Python of the bento's version.
"""

import asyncio
import contextlib
import fcntl
import json
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from services.builder import failures, requirements
from services.builder.domain import Step
from services.builder.locks import Lock, Locks, Work, flags, new_venv, run_uv
from services.builder.recipe import Recipe, environment_digest
from services.builder.targets import Target
from services.builder.uv import Outcome, Programs
from services.content.files import make_folder, sync_folder, touch, write_whole
from services.content.threads import in_thread

MARKER = "complete.json"
_POLL_S = 0.1


@dataclass(frozen=True)
class ImageEnvironment:
    """An environment as it lies on this machine."""

    path: Path
    digest: str
    """Equal for equal locks and targets."""
    target: Target
    lock: Lock
    bentoml_version: str


class ImageEnvironments:
    """Makes environments for images, and finds those that are there."""

    def __init__(self, data_dir: Path, programs: Programs, locks: Locks) -> None:
        self._programs = programs
        self.locks = locks
        self._folder = (data_dir / "image-environments").absolute()

    async def make(
        self,
        recipe: Recipe,
        target: Target,
        bento: Path,
        work: Work,
        *,
        like: Lock | None = None,
        build: Callable[[Lock], Awaitable[Lock]] | None = None,
    ) -> ImageEnvironment:
        """The environment of a recipe for a target.

        `like` is a lock whose versions are kept where they can be; `build` puts wheels in the place of the target's
        sources.

        A crash leaves a part below `work.directory` only.

        Raises:
            EkibenError: it cannot be made; reasons are those of `failures`.
        """
        await work.report(Step.RESOLVING, 0, 0)
        lock = await self.locks.make(recipe, target, bento, work, like=like)
        if build is not None and target.sources:
            lock = await build(lock)
        digest = environment_digest(lock.text, target.python, target.name, work.scope(recipe))
        path = self._folder / digest.removeprefix("sha256:")
        version = lock.packages.get("bentoml", "")
        version = version if version and "://" not in version and "shipped:" not in version else recipe.bentoml_version
        found = ImageEnvironment(path, digest, target, lock, version)
        async with self._turn(digest):
            await asyncio.to_thread(touch, path)
            if not (path / MARKER).is_file():
                await work.report(Step.INSTALLING, 0, 0)
                made = work.directory / f"image-environment-{target.platform.architecture}"
                await self._install(lock, recipe, target, work, made)
                content = {"digest": digest, "target": target.key, "bentoml_version": version}
                await in_thread(_finish, made, path, content)
        return found

    async def _install(self, lock: Lock, recipe: Recipe, target: Target, work: Work, made: Path) -> None:
        lines = [*target.options_of(recipe.options), self.locks.located(lock)]
        (work.directory / "sync.txt").write_text("\n".join(lines) + "\n")
        # With everything in the cache the index need not be asked, and may be away.
        outcome = await self._sync(lock, recipe, target, replace(work, say=_unheard), made, "--offline")
        if outcome.returncode != 0:
            outcome = await self._sync(lock, recipe, target, work, made)
        if outcome.returncode != 0:
            doing = f"installing the packages for {target}"
            raise failures.to_error(failures.parse(outcome.text, doing=doing, target=str(target)))

    async def _sync(
        self, lock: Lock, recipe: Recipe, target: Target, work: Work, made: Path, *arguments: str
    ) -> Outcome:
        """Install all of it into an empty environment: what a uv that was killed left of a package counts for another
        as the whole."""
        # Which Python makes the folders does not matter: they are renamed for the target's when the layer is made.
        outcome = await new_venv(self._programs, getattr(sys, "_base_executable", sys.executable), made, work)
        if outcome.returncode != 0:
            return outcome
        return await run_uv(
            self._programs,
            *("pip", "sync", "sync.txt", "--python", str(made / "bin" / "python"), *target.arguments, *arguments),
            *(("--require-hashes",) if requirements.all_hashed(lock.text) else ()),
            *flags(recipe),
            work=work,
            recipe=recipe,
        )

    @contextlib.asynccontextmanager
    async def _turn(self, digest: str) -> AsyncIterator[None]:
        """Alone with this environment, among all that share the folder. Ends with the process."""
        await asyncio.to_thread(make_folder, self._folder)
        with open(self._folder / f".{digest.removeprefix('sha256:')}.lock", "wb") as file:  # noqa: ASYNC230 - empty
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(_POLL_S)
            yield


def _unheard(_line: str) -> None:
    """Says nothing."""


def _finish(made: Path, path: Path, content: dict[str, str]) -> None:
    write_whole(made / MARKER, (json.dumps(content, indent=2) + "\n").encode())
    if path.exists():  # without its marker: somebody removed files there
        shutil.rmtree(path)
    made.rename(path)
    sync_folder(path.parent)
