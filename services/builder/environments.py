"""Environments on disk: locks installed by uv, found again by digest, whole or not there.

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
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from ekiben.errors import FailedPrecondition
from services.builder import failures, requirements
from services.builder.domain import Environment, Step
from services.builder.interpreters import Interpreter
from services.builder.locks import Lock, Locks, Work, flags, new_venv, run_uv
from services.builder.recipe import Recipe, environment_digest
from services.builder.uv import Outcome, Programs
from services.content.files import touch, write_whole
from services.content.threads import in_thread

MARKER = "complete.json"
_POLL_S = 0.25
_PAUSES_S = (0.5, 2.0, 5.0, 10.0)
"""Before asking an index again that does not know what it knew: seen for some seconds with a release of the hour."""
_FORGOTTEN = ("REQUIREMENT_UNSATISFIABLE", "REQUIREMENT_NOT_FOUND")

_CHECK = """
import importlib, json, sys
import bentoml
# Imported so that they are compiled now, beside the build, and not while the first replica starts.
for name in ("bentoml_cli.cli", "bentoml_cli._internal.start", "_bentoml_impl.server.app",
             "_bentoml_impl.server.serving", "bentoml_cli.worker.http_api_server", "_bentoml_impl.worker.service",
             "uvicorn", "starlette.applications"):
    try:
        importlib.import_module(name)
    except BaseException:
        pass
# What is there need not work: an exporter of one year does not import the protobuf of another.
exports = []
for kind, name in (("traces", "opentelemetry.exporter.otlp.proto.http.trace_exporter"),
                   ("monitors", "bentoml._internal.monitoring.otlp")):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
    except BaseException as error:
        said = str(error).strip().splitlines()
        print("WARNING: replicas send no", kind + ":", type(error).__name__, "when importing", name + ":", *said[:1])
    else:
        exports.append(kind)
with open(sys.argv[1], "w") as file:
    json.dump(exports, file)
print("BentoML", bentoml.__version__, "on Python", sys.version.split()[0])
"""


class Environments:
    """Makes environments, and finds those that are there."""

    def __init__(self, data_dir: Path, programs: Programs, locks: Locks, *, compile_bytecode: bool = False) -> None:
        self._programs = programs
        self._locks = locks
        self._compile_bytecode = compile_bytecode
        self._environments = data_dir / "environments"
        self._environments.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where the environment is or will be."""
        return (self._environments / digest.removeprefix("sha256:")).absolute()

    def find(self, digest: str) -> Environment | None:
        """The environment, if it is there and its interpreter too: then it counts as used now. A few system calls."""
        path = self.path(digest)
        touch(path)  # before it is looked at: see `caches`
        try:
            found = json.loads((path / MARKER).read_text())
            (path / "bin" / "python").stat()  # follows the link to the interpreter, which may be gone
        except (OSError, ValueError):
            return None
        return Environment(
            digest, found["python_version"], found["bentoml_version"], found["package_count"], found["size_bytes"]
        )

    async def make(
        self, lock: Lock, recipe: Recipe, interpreter: Interpreter, work: Work, *, verify: bool = False
    ) -> tuple[Environment, bool]:
        """The environment of a lock, and whether it was there. With `verify`, one whose files changed is made anew.

        Raises:
            EkibenError: it cannot be made; reasons are those of `failures`.
        """
        scope = work.scope(recipe)
        digest = environment_digest(lock.text, interpreter.version, interpreter.platform, scope)
        async with self._turn(digest):
            found = await asyncio.to_thread(self.find, digest)
            if found is not None and verify and not await asyncio.to_thread(self._unchanged, digest):
                work.say("The environment's files have changed since it was made; it is made anew.")
                found = None
            if found is not None:
                return found, True
            made = work.directory / "environment"
            await self._install(lock, recipe, interpreter, work, made)
            await work.report(Step.CHECKING, 0, 0)
            exports = await self._check(made, work)
            environment = await in_thread(self._finish, made, digest, lock, interpreter, recipe, exports)
        return environment, False

    async def _install(self, lock: Lock, recipe: Recipe, interpreter: Interpreter, work: Work, made: Path) -> None:
        packages = lock.packages
        lines = [*recipe.options, self._locks.located(lock)]
        (work.directory / "sync.txt").write_text("\n".join(lines) + "\n")
        cache_dir = self._programs.cache_dir(work.scope(recipe))
        async with _counted(cache_dir, packages, work):
            cached = await asyncio.to_thread(_cached, cache_dir, packages) == len(packages)
            # With everything in the cache the index need not be asked, and may be away.
            outcome = await self._sync(lock, recipe, interpreter, work, made, *(("--offline",) if cached else ()))
            if outcome.returncode != 0 and cached:
                outcome = await self._sync(lock, recipe, interpreter, work, made)
            for pause_s in _PAUSES_S:
                failure = failures.parse(outcome.text, doing="installing the packages")
                if outcome.returncode == 0 or failure.reason not in _FORGOTTEN:
                    break
                # It was there when the lock was made. An index of many servers forgets a new release for a while.
                work.say(
                    f"The index does not know {failure.metadata.get('requirement', 'a package')} now; asking again."
                )
                await asyncio.sleep(pause_s)
                outcome = await self._sync(lock, recipe, interpreter, work, made, "--refresh")
        if outcome.returncode != 0:
            raise failures.to_error(failures.parse(outcome.text, doing="installing the packages"))

    async def _sync(
        self, lock: Lock, recipe: Recipe, interpreter: Interpreter, work: Work, made: Path, *arguments: str
    ) -> Outcome:
        """Install all of it into an empty environment: what a uv that was killed left of a package counts for another
        as the whole."""
        outcome = await new_venv(self._programs, interpreter.path, made, work)
        if outcome.returncode != 0:
            raise failures.to_error(failures.parse(outcome.text, doing="making the environment"))
        return await run_uv(
            self._programs,
            *("pip", "sync", "sync.txt", "--python", str(made / "bin" / "python"), *arguments),
            *(("--require-hashes",) if requirements.all_hashed(lock.text) else ()),
            *(("--compile-bytecode",) if self._compile_bytecode else ()),
            *flags(recipe),
            work=work,
            recipe=recipe,
        )

    async def _check(self, made: Path, work: Work) -> list[str]:
        """Import BentoML, so that what cannot start fails here, with its reason; what replicas can export with it."""
        home = work.directory / "home"
        home.mkdir(exist_ok=True)
        exports = work.directory / "exports.json"
        outcome = await self._programs.run(
            [str(made / "bin" / "python"), "-I", "-c", _CHECK, str(exports)],
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
        found: list[str] = json.loads(await asyncio.to_thread(exports.read_text))
        return found

    def _finish(
        self, made: Path, digest: str, lock: Lock, interpreter: Interpreter, recipe: Recipe, exports: list[str]
    ) -> Environment:
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
            # Read by the runtime: what BentoML may be told to send over OTLP/HTTP, of `traces` and `monitors`.
            "exports": exports,
        }
        write_whole(made / MARKER, (json.dumps(content, indent=2) + "\n").encode())
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


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
