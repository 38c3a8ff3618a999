"""Locks and environments on disk: made by uv, found again by digest, whole or not there.

    data_dir/locks/<inputs>.txt          a lock, by the digest of what it was resolved from
    data_dir/shipped/<digest>/<file>     archives that bentos brought along, by content
    data_dir/environments/<digest>/      an environment; `complete.json` in it says what it is
    data_dir/tmp/<build>-…/              what is being made; swept at the start

An environment is relocatable (its scripts find their interpreter from where they lie), so it is made below tmp and
renamed into its place: there is no moment at which a reader finds a part of it.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ekiben.errors import EkibenError, FailedPrecondition
from services.builder import failures, requirements
from services.builder.domain import Environment, Step
from services.builder.interpreters import Interpreter
from services.builder.recipe import Recipe, environment_digest
from services.builder.uv import Outcome, Programs

MARKER = "complete.json"
_POLL_S = 0.25
_PAUSES_S = (0.5, 2.0, 5.0, 10.0)
"""Before asking an index again that does not know what it knew: seen for some seconds with a release of the hour."""
_TRY_WITHOUT = ("REQUIREMENT_UNSATISFIABLE", "REQUIREMENT_NOT_FOUND", "BUILD_BACKEND_FAILED")
_DEFAULTS = ("UV_DEFAULT_INDEX", "UV_INDEX_URL")

_CHECK = """
import importlib, sys
import bentoml
# Imported so that they are compiled now, beside the build, and not while the first replica starts.
for name in ("bentoml_cli.cli", "bentoml_cli._internal.start", "_bentoml_impl.server.app",
             "_bentoml_impl.server.serving", "bentoml_cli.worker.http_api_server", "_bentoml_impl.worker.service",
             "uvicorn", "starlette.applications", "opentelemetry.exporter.otlp.proto.http.trace_exporter"):
    try:
        importlib.import_module(name)
    except BaseException:
        pass
print("BentoML", bentoml.__version__, "on Python", sys.version.split()[0])
"""


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


class Environments:
    """Makes locks and environments, and finds those that are there."""

    def __init__(self, data_dir: Path, programs: Programs, *, compile_bytecode: bool = False) -> None:
        self._programs = programs
        self._compile_bytecode = compile_bytecode
        self._environments = data_dir / "environments"
        self._locks = data_dir / "locks"
        self._shipped = data_dir / "shipped"
        for directory in (self._environments, self._locks, self._shipped):
            directory.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where the environment is or will be."""
        return (self._environments / digest.removeprefix("sha256:")).absolute()

    def find(self, digest: str) -> Environment | None:
        """The environment, if it is there and its interpreter too. A few file system calls."""
        path = self.path(digest)
        try:
            found = json.loads((path / MARKER).read_text())
            (path / "bin" / "python").stat()  # follows the link to the interpreter, which may be gone
        except (OSError, ValueError):
            return None
        return Environment(
            digest, found["python_version"], found["bentoml_version"], found["package_count"], found["size_bytes"]
        )

    async def lock(
        self, recipe: Recipe, interpreter: Interpreter, bento: Path, work: Work, *, fresh: bool = False
    ) -> Lock:
        """The lock of a recipe: the one made before for an equal recipe unless `fresh`, else resolved now.

        Raises:
            EkibenError: it cannot be resolved; reasons are those of `failures`.
        """
        inputs = recipe.digest(interpreter.version, interpreter.platform, *_index_settings(work.env))
        path = self._locks / f"{inputs}.txt"
        locations = await asyncio.to_thread(self._keep_shipped, recipe, bento)
        if not fresh and path.exists():
            work.say("The lock of an equal recipe is used.")
            return Lock(await asyncio.to_thread(path.read_text))
        text = await self._resolve(recipe, interpreter, work, locations)
        for name, location in locations.items():
            text = text.replace(
                location.as_uri(), f"shipped:{recipe.shipped[name] if recipe.shipped else ''}/{location.name}"
            )
        text = _narrow(text, recipe)
        await asyncio.to_thread(_write_whole, path, text)
        return Lock(text)

    async def make(
        self, lock: Lock, recipe: Recipe, interpreter: Interpreter, work: Work, *, verify: bool = False
    ) -> tuple[Environment, bool]:
        """The environment of a lock, and whether it was there. With `verify`, one whose files changed is made anew.

        Raises:
            EkibenError: it cannot be made; reasons are those of `failures`.
        """
        digest = environment_digest(lock.text, interpreter.version, interpreter.platform)
        async with self._turn(digest):
            found = await asyncio.to_thread(self.find, digest)
            if found is not None and verify and not await asyncio.to_thread(self._unchanged, digest):
                work.say("The environment's files have changed since it was made; it is made anew.")
                found = None
            if found is not None:
                return found, True
            made = work.directory / "environment"
            await asyncio.to_thread(shutil.rmtree, made, ignore_errors=True)
            await self._install(lock, recipe, interpreter, work, made)
            await work.report(Step.CHECKING, 0, 0)
            await self._check(made, work)
            environment = await asyncio.to_thread(self._finish, made, digest, lock, interpreter, recipe)
        return environment, False

    async def _resolve(
        self, recipe: Recipe, interpreter: Interpreter, work: Work, locations: Mapping[str, Path]
    ) -> str:
        """The lock with the first of the recipe's extras that goes with its requirements, else without."""
        for extra in recipe.extras:
            try:
                return await self._compile(recipe, extra, interpreter, work, locations)
            except EkibenError as error:
                if error.reason not in _TRY_WITHOUT:
                    raise
                work.say(f"Trying without {extra}, which is for the spans of replicas.")
        text = await self._compile(recipe, "", interpreter, work, locations)
        if recipe.extras:
            work.say(
                f"WARNING: {recipe.extras[-1]} does not go with this bento's requirements. It is left out: "
                "its replicas send no spans of their own."
            )
        return text

    async def _compile(
        self, recipe: Recipe, extra: str, interpreter: Interpreter, work: Work, locations: Mapping[str, Path]
    ) -> str:
        wanted = [*recipe.requirements, extra]
        lines = [*recipe.options, *(_located(requirement, locations) for requirement in wanted)]
        (work.directory / "requirements.in").write_text("\n".join(lines) + "\n")
        (work.directory / "constraints.txt").write_text("\n".join(recipe.constraints) + "\n")
        outcome = await self._uv(
            *("pip", "compile", "requirements.in", "--output-file", "lock.txt", "--python", interpreter.path),
            *("--no-header", "--no-annotate", "--generate-hashes", "--no-python-downloads"),
            *(("--constraints", "constraints.txt") if recipe.constraints else ()),
            *_flags(recipe),
            work=work,
            recipe=recipe,
        )
        if outcome.returncode != 0:
            raise failures.to_error(failures.parse(outcome.text, doing="resolving the requirements"))
        return (work.directory / "lock.txt").read_text()

    async def _install(self, lock: Lock, recipe: Recipe, interpreter: Interpreter, work: Work, made: Path) -> None:
        outcome = await self._uv(
            *("venv", "--relocatable", "--no-project", "--no-python-downloads", "--python", interpreter.path, made),
            work=work,
        )
        if outcome.returncode != 0:
            raise failures.to_error(failures.parse(outcome.text, doing="making the environment"))
        packages = lock.packages
        text = re.sub(
            r"shipped:([0-9a-f]{64}/\S+)", lambda match: (self._shipped / match[1]).absolute().as_uri(), lock.text
        )
        lines = [*recipe.options, text]
        (work.directory / "sync.txt").write_text("\n".join(lines) + "\n")
        async with _counted(self._programs.cache_dir, packages, work):
            cached = await asyncio.to_thread(_cached, self._programs.cache_dir, packages) == len(packages)
            # With everything in the cache the index need not be asked, and may be away.
            outcome = await self._sync(lock, recipe, work, made, *(("--offline",) if cached else ()))
            if outcome.returncode != 0 and cached:
                outcome = await self._sync(lock, recipe, work, made)
            for pause_s in _PAUSES_S:
                failure = failures.parse(outcome.text, doing="installing the packages")
                if outcome.returncode == 0 or failure.reason not in _TRY_WITHOUT[:2]:
                    break
                # It was there when the lock was made. An index of many servers forgets a new release for a while.
                work.say(
                    f"The index does not know {failure.metadata.get('requirement', 'a package')} now; asking again."
                )
                await asyncio.sleep(pause_s)
                outcome = await self._sync(lock, recipe, work, made, "--refresh")
        if outcome.returncode != 0:
            raise failures.to_error(failures.parse(outcome.text, doing="installing the packages"))

    async def _sync(self, lock: Lock, recipe: Recipe, work: Work, made: Path, *arguments: str) -> Outcome:
        return await self._uv(
            *("pip", "sync", "sync.txt", "--python", str(made / "bin" / "python"), *arguments),
            *(("--require-hashes",) if requirements.all_hashed(lock.text) else ()),
            *(("--compile-bytecode",) if self._compile_bytecode else ()),
            *_flags(recipe),
            work=work,
            recipe=recipe,
        )

    async def _check(self, made: Path, work: Work) -> None:
        """Import BentoML, so that what cannot start fails here, with its reason."""
        home = work.directory / "home"
        home.mkdir(exist_ok=True)
        outcome = await self._programs.run(
            [str(made / "bin" / "python"), "-I", "-c", _CHECK],
            cwd=work.directory,
            env={"BENTOML_HOME": str(home), "HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"},
            line=work.say,
        )
        if outcome.returncode != 0:
            lines = [line for line in outcome.text.splitlines() if line.strip()]
            said = lines[-1].strip() if lines else f"exit status {outcome.returncode}"
            raise FailedPrecondition(
                f"BentoML cannot be imported in the environment: {said}", reason="ENVIRONMENT_BROKEN", said=said
            )

    def _finish(self, made: Path, digest: str, lock: Lock, interpreter: Interpreter, recipe: Recipe) -> Environment:
        packages = lock.packages
        (made / "lock.txt").write_text(lock.text)
        files, size_bytes = _measure(made)
        environment = Environment(
            digest, interpreter.version, packages.get("bentoml") or recipe.bentoml_version, len(packages), size_bytes
        )
        if "://" in environment.bentoml_version or environment.bentoml_version.startswith("shipped:"):
            environment = Environment(digest, interpreter.version, recipe.bentoml_version, len(packages), size_bytes)
        content = {
            "digest": digest,
            "python_version": environment.python_version,
            "bentoml_version": environment.bentoml_version,
            "package_count": environment.package_count,
            "size_bytes": size_bytes,
            "file_count": files,
            "platform": interpreter.platform,
        }
        _write_whole(made / MARKER, json.dumps(content, indent=2) + "\n")
        place = self.path(digest)
        if place.exists():  # broken: its interpreter is gone, or its files changed
            place.rename(made.with_name("replaced"))
        made.rename(place)
        _sync_folder(self._environments)
        return environment

    def _unchanged(self, digest: str) -> bool:
        path = self.path(digest)
        found = json.loads((path / MARKER).read_text())
        return _measure(path) == (found["file_count"], found["size_bytes"])

    def _keep_shipped(self, recipe: Recipe, bento: Path) -> dict[str, Path]:
        """Copy what the bento brings along to where locks may name it for ever."""
        kept = {}
        for name, digest in (recipe.shipped or {}).items():
            folder = self._shipped / digest
            target = (folder / Path(name).name).absolute()
            if not target.exists():
                making = folder.with_name(f".{digest}-{os.getpid()}")
                shutil.rmtree(making, ignore_errors=True)
                making.mkdir()
                source = bento / name
                copy = shutil.copytree if source.is_dir() else shutil.copy2
                copy(source, making / target.name)
                with contextlib.suppress(OSError):  # another build was first
                    making.rename(folder)
                shutil.rmtree(making, ignore_errors=True)
            kept[name] = target
        return kept

    async def _uv(self, *arguments: str | os.PathLike[str], work: Work, recipe: Recipe | None = None) -> Outcome:
        def line(text: str) -> None:
            # The resolver prints the lock that it also writes.
            if not re.match(r"\s*--hash=|[a-z0-9][-._a-z0-9\[\],]*(==\S+| @ \S+)( ;.*)?( \\)?$|\s*$", text):
                work.say(text)

        # uv lets its variables win over what a requirements file says. The builder's are defaults, though: an index
        # that the bento names goes first, and one that a secret names before both.
        named = recipe is not None and any(
            option.startswith(("--index-url", "--no-index")) for option in recipe.options
        )
        without = _DEFAULTS if named else ()
        return await self._programs.uv(*arguments, cwd=work.directory, env=work.env, without=without, line=line)

    @contextlib.asynccontextmanager
    async def _turn(self, digest: str) -> AsyncIterator[None]:
        """Alone with this environment, among all builders that share the folder. Ends with the process."""
        path = self._environments / f".{digest.removeprefix('sha256:')}.lock"
        with open(path, "wb") as file:  # noqa: ASYNC230 - an empty file of our own folder
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(_POLL_S)
            yield


@contextlib.asynccontextmanager
async def _counted(cache_dir: Path, packages: Mapping[str, str], work: Work) -> AsyncIterator[None]:
    """Report how many of the packages are in uv's cache, while the body runs."""

    async def count() -> None:
        while True:
            done = await asyncio.to_thread(_cached, cache_dir, packages)
            await work.report(Step.INSTALLING, done, len(packages))
            await asyncio.sleep(_POLL_S)

    counting = asyncio.ensure_future(count())
    try:
        yield
    finally:
        counting.cancel()
        await asyncio.wait([counting])
        if not counting.cancelled() and (error := counting.exception()) is not None:
            raise error


def _cached(cache_dir: Path, packages: Mapping[str, str]) -> int:
    """How many packages uv's cache holds ready to be linked. Reads the layout of its cache; 0 if that ever changes."""
    roots = [root for kind in cache_dir.glob("wheels-v*") for root in [kind / "pypi", *kind.glob("index/*")]]
    done = 0
    for name, version in packages.items():
        for root in roots:
            with contextlib.suppress(OSError):
                if any(entry.name.startswith(f"{version}-") and entry.is_dir() for entry in os.scandir(root / name)):
                    done += 1
                    break
    return done


def _located(requirement: str, locations: Mapping[str, Path]) -> str:
    return re.sub(r"shipped:([^\s\[;]+)", lambda match: locations[match[1]].as_uri(), requirement)


def _flags(recipe: Recipe) -> list[str]:
    flags = ["--prerelease", "allow"] if recipe.prerelease else []
    for host in recipe.insecure_hosts:
        flags += ["--allow-insecure-host", host]
    return flags


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


def _measure(path: Path) -> tuple[int, int]:
    """Files and bytes of an environment, without what Python writes by itself and the marker."""
    files = size_bytes = 0
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            if name != MARKER:
                files += 1
                size_bytes += Path(folder, name).lstat().st_size
    return files, size_bytes


def _write_whole(path: Path, text: str) -> None:
    making = path.with_name(f".{path.name}-{os.getpid()}")
    with open(making, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    making.rename(path)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
