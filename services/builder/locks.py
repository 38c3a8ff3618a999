"""Locks: what a recipe resolves to, made by uv, kept by the digest of what they were made from.

data_dir/locks/<inputs>.txt          a lock
data_dir/shipped/<digest>/<file>     archives and source folders that bentos brought along, by content
"""

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ekiben.errors import EkibenError, FailedPrecondition
from services.builder import bento as bentos
from services.builder import failures, requirements
from services.builder.domain import Step
from services.builder.interpreters import Interpreter
from services.builder.recipe import Recipe
from services.builder.targets import Target
from services.builder.uv import Outcome, Programs
from services.content.files import touch, write_whole
from services.content.threads import in_thread

_TRY_WITHOUT = ("REQUIREMENT_UNSATISFIABLE", "REQUIREMENT_NOT_FOUND", "BUILD_BACKEND_FAILED", "WHEEL_NOT_FOUND")
_LIKE = "like.txt"
_DEFAULTS = ("UV_DEFAULT_INDEX", "UV_INDEX_URL")


async def _silent(step: Step, done: int, of: int) -> None:
    """Reports to nobody."""


@dataclass(frozen=True)
class Work:
    """What a build brings to each step."""

    directory: Path
    """Its own folder below tmp."""
    say: Callable[[str], None] = lambda text: None
    """Writes a line of the log."""
    report: Callable[[Step, int, int], Awaitable[None]] = _silent
    """Says that a step has done so many of so many parts."""
    env: Mapping[str, str] = field(default_factory=dict)
    """The values of its secrets."""
    organization: str = ""
    """Whose build it is."""

    def scope(self, recipe: Recipe) -> str:
        """Who alone may have what this resolves to: empty, all may, unless a secret could have opened the index."""
        return self.organization if self.env or recipe.has_variables else ""


@dataclass(frozen=True)
class Lock:
    """A recipe resolved for one Python and platform."""

    text: str
    """A requirements file, with a hash for whatever an index knows one of; the bento's own files are
    `shipped:<digest>/<file>`."""

    @property
    def packages(self) -> dict[str, str]:
        """Each package and its version."""
        return requirements.locked_versions(self.text)


class Locks:
    """Makes locks, and finds those that are there."""

    def __init__(self, data_dir: Path, programs: Programs) -> None:
        self._programs = programs
        self._locks = data_dir / "locks"
        self._shipped = data_dir / "shipped"
        for directory in (self._locks, self._shipped):
            directory.mkdir(parents=True, exist_ok=True)

    async def make(
        self,
        recipe: Recipe,
        python: Interpreter | Target,
        bento: Path,
        work: Work,
        *,
        fresh: bool = False,
        like: Lock | None = None,
    ) -> Lock:
        """The lock of a recipe: the one made before for an equal recipe unless `fresh`, else resolved now.

        What secrets may have helped to resolve is found again by builds of the same organization only.

        For an interpreter of this machine what has no wheel may be built from its source; for a target elsewhere
        there are wheels only. Versions of `like` are kept where the requirements allow them.

        Raises:
            EkibenError: it cannot be resolved; reasons are those of `failures`.
        """
        inputs = recipe.digest(*_parts(python), *_index_settings(work.env), scope=work.scope(recipe))
        path = self._locks / f"{inputs}.txt"
        locations = await in_thread(self._keep_shipped, recipe, bento, work.directory)
        if not fresh and (known := await asyncio.to_thread(_known, path)) is not None:
            work.say("The lock of an equal recipe is used.")
            return Lock(known)
        if like is not None:
            await asyncio.to_thread((work.directory / _LIKE).write_text, self.located(like))
        text = await self._resolve(recipe, python, work, locations)
        for name, location in locations.items():
            text = text.replace(
                location.as_uri(), f"shipped:{recipe.shipped[name] if recipe.shipped else ''}/{location.name}"
            )
        text = _narrow(text, recipe)
        await asyncio.to_thread(write_whole, path, text.encode())
        return Lock(text)

    def located(self, lock: Lock) -> str:
        """The lock's text with the bento's own files as they lie here."""
        return re.sub(
            r"shipped:([0-9a-f]{64}/\S+)", lambda match: (self._shipped / match[1]).absolute().as_uri(), lock.text
        )

    def file(self, name: str) -> Path:
        """Where `shipped:<digest>/<file>` lies."""
        return self._shipped / name.removeprefix("shipped:")

    def has_file(self, name: str) -> bool:
        """Whether it is there."""
        touch(self.file(name).parent)
        return self.file(name).exists()

    def keep_file(self, path: Path, directory: Path) -> str:
        """Keep a file as those that bentos bring along; its name, `shipped:<digest>/<file>`. Blocks.

        A crash leaves a part below `directory` only, a build's own folder.
        """
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        self._keep(digest, path, directory, path.parent)
        return f"shipped:{digest}/{path.name}"

    async def _resolve(
        self, recipe: Recipe, python: Interpreter | Target, work: Work, locations: Mapping[str, Path]
    ) -> str:
        """The lock with the first of the recipe's extras that goes with its requirements, else without."""

        async def try_with(extra: str) -> str:
            try:
                return await self._compile(recipe, extra, python, work, locations)
            except EkibenError as error:
                if error.reason not in _TRY_WITHOUT:
                    raise
            return ""

        first, *others = recipe.extras or ("",)
        if not first:
            return await self._compile(recipe, "", python, work, locations)
        if text := await try_with(first):
            return text
        work.say(f"Trying without {first}, which is for the spans of replicas.")
        bare = await self._compile(recipe, "", python, work, locations)  # what is wrong is the bento's own
        for extra in others:
            work.say(f"Trying with {extra} instead.")
            if text := await try_with(extra):
                return text
        work.say(
            f"WARNING: {first} does not go with this bento's requirements; its replicas send no spans of their own."
        )
        return bare

    async def _compile(
        self, recipe: Recipe, extra: str, python: Interpreter | Target, work: Work, locations: Mapping[str, Path]
    ) -> str:
        wanted = [*recipe.requirements, extra]
        options = Target.options_of(recipe.options) if isinstance(python, Target) else recipe.options
        lines = [*options, *(_located(requirement, locations) for requirement in wanted)]
        (work.directory / "requirements.in").write_text("\n".join(lines) + "\n")
        (work.directory / "constraints.txt").write_text("\n".join(recipe.constraints) + "\n")
        lock = work.directory / "lock.txt"
        lock.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):  # uv keeps what its output file has
            shutil.copyfile(work.directory / _LIKE, lock)
        outcome = await run_uv(
            self._programs,
            *("pip", "compile", "requirements.in", "--output-file", "lock.txt", *_arguments(python)),
            *("--no-header", "--no-annotate", "--generate-hashes", "--no-python-downloads"),
            *(("--constraints", "constraints.txt") if recipe.constraints else ()),
            *flags(recipe),
            work=work,
            recipe=recipe,
        )
        if outcome.returncode != 0:
            target = str(python) if isinstance(python, Target) else ""
            raise failures.to_error(failures.parse(outcome.text, doing="resolving the requirements", target=target))
        return lock.read_text()

    def _keep_shipped(self, recipe: Recipe, bento: Path, directory: Path) -> dict[str, Path]:
        """Copy what the bento brings along to where locks may name it for ever."""
        shipped = (recipe.shipped or {}).items()
        return {name: self._keep(digest, bento / name, directory, bento) for name, digest in shipped}

    def _keep(self, digest: str, source: Path, directory: Path, bento: Path) -> Path:
        """A file or folder by its content and its name: other bentos may have the same under another one."""
        target = (self._shipped / digest / source.name).absolute()
        touch(target.parent)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=directory) as making:
                made = Path(making) / source.name
                if source.is_dir():
                    bentos.copy_folder(source, made, bento)
                else:
                    shutil.copy2(source, made)
                target.parent.mkdir(exist_ok=True)
                try:
                    made.rename(target)
                except OSError:
                    if not target.exists():  # else another build was first
                        raise
        return target


def _known(path: Path) -> str | None:
    touch(path)
    try:
        return path.read_text()
    except FileNotFoundError:
        return None


def _parts(python: Interpreter | Target) -> tuple[str, ...]:
    """What a lock depends on besides its recipe."""
    return ("wheels", python.key) if isinstance(python, Target) else (python.version, python.platform)


def _arguments(python: Interpreter | Target) -> tuple[str, ...]:
    """What tells uv for which Python to resolve."""
    if isinstance(python, Target):
        running = getattr(
            sys, "_base_executable", sys.executable
        )  # what is built from source here tells only its dependencies
        return ("--python", running, *python.resolving)
    return ("--python", python.path)


async def run_uv(
    programs: Programs, *arguments: str | os.PathLike[str], work: Work, recipe: Recipe | None = None
) -> Outcome:
    """Run uv for a build: its output in the build's log, its secrets in the environment."""

    def line(text: str) -> None:
        # The resolver prints the lock that it also writes.
        if not re.match(r"\s*--hash=|[a-z0-9][-._a-z0-9\[\],]*(==\S+| @ \S+)( ;.*)?( \\)?$|\s*$", text):
            work.say(text)

    # uv lets its variables win over what a requirements file says. The builder's are defaults, though: an index
    # that the bento names goes first, and one that a secret names before both.
    named = recipe is not None and any(option.startswith(("--index-url", "--no-index")) for option in recipe.options)
    without = _DEFAULTS if named else ()
    scope = work.scope(recipe) if recipe is not None else ""
    return await programs.uv(*arguments, cwd=work.directory, env=work.env, without=without, scope=scope, line=line)


async def new_venv(programs: Programs, python: str, folder: Path, work: Work) -> Outcome:
    """Make an empty virtual environment, in the place of whatever is there."""
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
    arguments = ("venv", "--relocatable", "--no-project", "--no-python-downloads", "--python", python, folder)
    return await run_uv(programs, *arguments, work=work)


def flags(recipe: Recipe) -> list[str]:
    """What a requirements file cannot say."""
    found = ["--prerelease", "allow"] if recipe.prerelease else []
    for host in recipe.insecure_hosts:
        found += ["--allow-insecure-host", host]
    return found


def _located(requirement: str, locations: Mapping[str, Path]) -> str:
    return re.sub(r"shipped:([^\s\[;]+)", lambda match: locations[match[1]].as_uri(), requirement)


def _index_settings(env: Mapping[str, str]) -> list[str]:
    """What of the environment decides which packages there are, without credentials."""
    found = {**os.environ, **env}
    names = ("UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_EXCLUDE_NEWER")
    return [f"{name}={re.sub(r'://[^/@ ]+@', '://', found[name])}" for name in names if found.get(name)]


def _narrow(lock: str, recipe: Recipe) -> str:
    """The lock with only those hashes that the bento itself demands, where it does."""
    if not recipe.hashes:
        return lock
    blocks = re.split(r"(?m)^(?=\S)", lock)
    narrowed = []
    for block in blocks:
        name = requirements.parse_requirement(block.split("\\")[0].strip()).name if block.strip() else ""
        demanded = recipe.hashes.get(name)
        if demanded:
            head, *hashes = [line.strip(" \\\n") for line in block.splitlines() if line.strip()]
            kept = [line for line in hashes if line.removeprefix("--hash=") in demanded]
            if not kept:
                raise FailedPrecondition(
                    f"No file of {head} has a hash that the bento's requirements demand.",
                    reason="REQUIREMENT_HASH_MISMATCH",
                    requirement=head,
                )
            block = " \\\n    ".join([head, *kept]) + "\n"
        narrowed.append(block)
    return "".join(narrowed)
