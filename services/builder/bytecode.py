"""Bytecode of installed packages for where they will lie in an image, remembered for each package.

Modules are compiled as `unchecked-hash`: without times, and never compared with their sources. So what is remembered is
known by what the sources hold, not by what a package says of itself. What is written depends on the sources, on where
they will lie and on the version of the Python that compiles, and on nothing else: hashing is not randomized, and each
file is compiled in a process that has imported nothing but what compiling needs.
"""

import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from services.builder.images import VENV
from services.content.files import make_folder, touch
from services.kernel import processes

_FORMAT = 2
_STALE_S = 86_400.0
"""What a killed build left is removed after a day: no build takes as long."""
_SCRIPT = """
import importlib.util, json, marshal, os, sys
with open(sys.argv[1]) as file:
    jobs = json.load(file)
workers = int(sys.argv[2])
def work(number):
    for source, name, target in jobs[number::workers]:
        try:
            with open(source, "rb") as file:
                text = file.read()
            code = compile(text, name, "exec", dont_inherit=True, optimize=0)
        except Exception:
            continue  # a file that is no Python of this version is left as a source
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb") as file:
            file.write(importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little"))
            file.write(importlib.util.source_hash(text) + marshal.dumps(code))
children = []
for number in range(1, workers):
    child = os.fork()
    if not child:
        try:
            work(number)
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
    children.append(child)
work(0)
if any([os.waitpid(child, 0)[1] for child in children]):
    sys.exit("a worker failed")
"""


@dataclass(frozen=True)
class Compiler:
    """A Python that can run here."""

    argv: Sequence[str]
    version: str
    """`3.11.2`. Another release of the same minor version may compile some functions otherwise."""
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """A module's bytecode."""

    name: str
    """Relative to site-packages: `numpy/__pycache__/_globals.cpython-311.pyc`."""
    path: Path


class Bytecode:
    """What was compiled, below `cache`/bytecode, for each package and version of Python."""

    def __init__(self, cache: Path) -> None:
        self._folder = cache / "bytecode"
        # The builder's own: at its start it ends what a killed one left, see `Programs.end_strays`.
        self._env = {processes.MARK: f"{processes.mark_of('builder', cache)}/bytecode"}
        self._turn = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def of(self, site_packages: Path, compiler: Compiler) -> list[Compiled]:
        """The bytecode of all that is installed there, compiled where it was not before. Blocks; uses all cores.

        Raises:
            OSError: the compiler failed or was stopped, or files cannot be written.
        """
        make_folder(self._folder)
        self._sweep()
        minor = ".".join(compiler.version.split(".")[:2])
        inside = f"{VENV}/lib/python{minor}/site-packages"
        tag = f"cpython-{minor.replace('.', '')}"
        found: dict[str, list[str]] = {}
        for record in sorted(site_packages.glob("*.dist-info/RECORD")):
            modules = _modules(record, site_packages)
            content = [_FORMAT, compiler.version, inside, [(name, digest) for name, digest in modules]]
            key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
            found[key] = [name for name, _ in modules]
        for key in found:
            touch(self._folder / key)
        missing = [key for key in found if not (self._folder / key).is_dir()]
        if missing:
            with tempfile.TemporaryDirectory(prefix=".", dir=self._folder) as fresh:
                jobs = [
                    (str(site_packages / name), f"{inside}/{name}", f"{fresh}/{key}/{_cached(name, tag)}")
                    for key in missing
                    for name in found[key]
                ]
                self._run(compiler, jobs, Path(fresh))
                for key in missing:
                    (Path(fresh) / key).mkdir(exist_ok=True)
                    with contextlib.suppress(OSError):  # another build was first
                        (Path(fresh) / key).rename(self._folder / key)
        compiled = [
            Compiled(_cached(name, tag), self._folder / key / _cached(name, tag))
            for key, names in found.items()
            for name in names
        ]
        return sorted((each for each in compiled if each.path.is_file()), key=lambda each: each.name)

    def stop(self) -> None:
        """End what compiles, from another thread: nobody waits for it any more. `of` raises, then and later."""
        with self._turn:
            self._stopped = True
            if self._running is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._running.pid, signal.SIGKILL)

    def _run(self, compiler: Compiler, jobs: Sequence[tuple[str, str, str]], folder: Path) -> None:
        (folder / "jobs.json").write_text(json.dumps(jobs))
        (folder / "compile.py").write_text(_SCRIPT)
        options = ["-S", "-s", "-B", "-W", "ignore", str(folder / "compile.py"), str(folder / "jobs.json")]
        workers = str(max(1, min(8, len(os.sched_getaffinity(0)))))
        with self._turn:
            if self._stopped:
                raise OSError("modules are not compiled: the build has ended")
            running = self._running = subprocess.Popen(
                [*compiler.argv, *options, workers],
                env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", **compiler.env, **self._env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                process_group=0,
            )
        with running:
            assert running.stderr is not None
            said = running.stderr.read().decode("utf-8", "replace").strip()
            os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT)
            with self._turn:  # from here on the number may be another's
                self._running = None
                running.wait()
        if running.returncode:
            raise OSError(f"modules cannot be compiled: {said[-400:]}")

    def _sweep(self) -> None:
        for folder in self._folder.glob(".*"):
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > _STALE_S:
                    shutil.rmtree(folder, ignore_errors=True)


def _modules(record: Path, site_packages: Path) -> list[tuple[str, str]]:
    """Each module of a package, below site-packages, and the digest of what lies there.

    The digests that RECORD names are whatever its author wrote: nobody checks them, and two packages may name one.
    """
    root = site_packages.resolve()

    def digests() -> Iterator[tuple[str, str]]:
        with open(record, newline="", encoding="utf-8") as file:
            names = {row[0] for row in csv.reader(file) if row and row[0].endswith(".py")}
        for name in sorted(names):
            path = site_packages / name
            # A name of a file elsewhere would have that compiled, and the bytecode written beside it.
            here = os.path.normpath(name) == name and not name.startswith(("/", ".."))
            if here and path.is_file() and path.resolve().is_relative_to(root):
                with path.open("rb") as source:
                    yield name, hashlib.file_digest(source, "sha256").hexdigest()

    return list(digests())


def _cached(name: str, tag: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/__pycache__/{file.removesuffix('.py')}.{tag}.pyc".lstrip("/")
