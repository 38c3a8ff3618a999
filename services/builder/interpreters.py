"""The Pythons of this machine, and uv's: found by asking each of them, downloaded where that is allowed.

uv's own discovery is not used for it: a command of a version manager that cannot answer (pyenv's `python3.10` where
3.10 is not the selected version) makes it give up, though the interpreter itself lies in the next folder.
"""

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ekiben.errors import FailedPrecondition
from services.builder.settings import Settings
from services.builder.uv import Programs
from services.kernel.clock import Clock

log = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 10.0
"""An interpreter answers within 0.1 s; one on a cold network disk takes longer."""
_DOWNLOAD_PAUSE_S = 600.0
"""After a download failed it is not tried again for so long: each try costs builds some seconds."""
_NAME = re.compile(r"python3?(\.\d+)?")
_FOLDERS = (
    "/usr/bin",
    "/usr/local/bin",
    "/bin",
    "/opt/homebrew/bin",
    "~/.local/bin",
    "~/.pyenv/versions/*/bin",
    "~/.asdf/installs/python/*/bin",
    "~/.local/share/mise/installs/python/*/bin",
    "/opt/python*/bin",
    "/opt/python/*/bin",
    "/Library/Frameworks/Python.framework/Versions/*/bin",
)
_MANAGED = ("~/.local/share/uv/python/*/bin",)
_QUESTION = """
import importlib.util, json, platform, sys
has = lambda name: name in sys.builtin_module_names or importlib.util.find_spec(name) is not None
print(json.dumps({
    "version": platform.python_version(),
    "implementation": sys.implementation.name,
    "venv": sys.prefix != sys.base_prefix,
    "base": getattr(sys, "_base_executable", sys.executable),
    "platform": "-".join([sys.platform, platform.machine(), platform.libc_ver()[0] or "none"]),
    "complete": all(map(has, ["_ssl", "_sqlite3", "_ctypes", "zlib"])),
}))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python that answered."""

    path: str
    version: str
    """`3.11.7`."""
    platform: str
    """`linux-x86_64-glibc`: what the environments made with it run on."""
    managed: bool
    """Whether uv installed it."""
    complete: bool
    """Whether it has the modules that BentoML needs of it; one compiled without SQLite's headers lacks some."""

    @property
    def minor(self) -> str:
        """`3.11`."""
        return ".".join(self.version.split(".")[:2])


class Interpreters:
    """Finds the Python for a build. Answers are kept for as long as the file is the same."""

    def __init__(self, programs: Programs, settings: Settings, clock: Clock) -> None:
        self._programs = programs
        self._preference = settings.python_preference
        self._downloads = settings.python_downloads and self._preference != "only-system"
        self._timeout_s = settings.python_download_timeout_s
        self._clock = clock
        self._known: dict[tuple[str, int], Interpreter | None] = {}
        self._refused: dict[str, float] = {}

    async def find(self, wanted: str, say: Callable[[str], None]) -> Interpreter:
        """The interpreter for `3.11` or `3.11.7`: there already, or downloaded, or the same minor version.

        Raises:
            FailedPrecondition: there is none (PYTHON_NOT_FOUND); the message says what there is.
        """
        minor = ".".join(wanted.split(".")[:2])
        found = await asyncio.to_thread(self._installed, minor)
        exact = [one for one in found if one.version == wanted or one.minor == wanted]
        if not exact and self._downloads and await self._download(wanted, say):
            found = await asyncio.to_thread(self._installed, minor)
            exact = [one for one in found if one.version == wanted or one.minor == wanted]
        if exact:
            return self._best(exact)
        if found:
            near = self._best(found)
            say(f"Python {wanted} cannot be had; {near.version} of the same series is used.")
            return near
        versions = sorted({one.version for one in await asyncio.to_thread(self._installed, "")}, key=_key)
        there = ", ".join(versions) or "none"
        raise FailedPrecondition(
            f"The bento needs Python {wanted}, which is neither on this machine nor to be downloaded. "
            f"There is: {there}. Install it, or build the bento with one of these.",
            reason="PYTHON_NOT_FOUND",
            python_version=wanted,
            available=there,
        )

    async def nearest(self, wanted: str) -> Interpreter | None:
        """An interpreter of this machine of the same minor version, of the same version if there is one."""
        found = await asyncio.to_thread(self._installed, ".".join(wanted.split(".")[:2]))
        exact = [one for one in found if one.version == wanted]
        return self._best(exact or found) if found else None

    def _best(self, found: Iterable[Interpreter]) -> Interpreter:
        managed_first = self._preference in ("managed", "only-managed")
        return max(found, key=lambda one: (one.complete, one.managed is managed_first, _key(one.version)))

    def _installed(self, minor: str) -> list[Interpreter]:
        """Every usable interpreter of a minor version, of all when it is empty. Blocks."""
        found: dict[str, Interpreter] = {}
        for path, managed in self._candidates(minor):
            interpreter = self._ask(path, managed)
            if interpreter is not None and (not minor or interpreter.minor == minor):
                found.setdefault(str(Path(interpreter.path).resolve()), interpreter)
        return list(found.values())

    def _candidates(self, minor: str) -> Iterator[tuple[Path, bool]]:
        if self._preference != "only-system":
            install_dir = os.environ.get("UV_PYTHON_INSTALL_DIR")
            folders = [str(self._programs.pythons_dir / "*" / "bin"), *_MANAGED]
            yield from (
                (path, True) for path in _pythons([*folders, f"{install_dir}/*/bin"] if install_dir else folders, minor)
            )
        if self._preference != "only-managed":
            yield Path(getattr(sys, "_base_executable", sys.executable)), False
            pyenv = os.environ.get("PYENV_ROOT")
            folders = [*os.environ.get("PATH", "").split(os.pathsep), *_FOLDERS]
            if pyenv:
                folders.append(f"{pyenv}/versions/*/bin")
            yield from ((path, False) for path in _pythons(folders, minor))

    def _ask(self, path: Path, managed: bool) -> Interpreter | None:
        try:
            key = (str(path), path.stat().st_mtime_ns)
        except OSError:
            return None
        if key not in self._known:
            self._known[key] = _ask(path, managed)
        return self._known[key]

    async def _download(self, wanted: str, say: Callable[[str], None]) -> bool:
        if self._clock.monotonic() < self._refused.get(wanted, 0.0):
            return False
        say(f"Python {wanted} is not on this machine; downloading it.")
        self._programs.pythons_dir.mkdir(parents=True, exist_ok=True)
        try:
            async with asyncio.timeout(self._timeout_s):
                outcome = await self._programs.uv(
                    *("python", "install", "--no-bin", "--install-dir", self._programs.pythons_dir, wanted),
                    cwd=self._programs.pythons_dir,
                    env={"UV_HTTP_RETRIES": "1"},
                    line=say,
                )
        except TimeoutError:
            say(f"The download did not end within {self._timeout_s:.0f} s.")
        else:
            if outcome.returncode == 0:
                return True
            say(f"Python {wanted} could not be downloaded.")
        log.warning("a Python could not be downloaded", extra={"python_version": wanted})
        self._refused[wanted] = self._clock.monotonic() + _DOWNLOAD_PAUSE_S
        return False


def _pythons(folders: Iterable[str], minor: str) -> Iterator[Path]:
    for pattern in folders:
        if not pattern:
            continue
        path = Path(pattern).expanduser()
        # Only `*` is meant: a folder of PATH may hold any character.
        root, star, rest = str(path).partition("*")
        for folder in sorted(Path(root or "/").glob(f"*{rest}")) if star and Path(root).is_dir() else [path]:
            if minor and (version := re.search(r"(\d+\.\d+)(?:\.\d+)?/bin$", str(folder))) and version[1] != minor:
                continue
            names = [f"python{minor}", "python3", "python"] if minor else None
            for entry in sorted(folder.glob("python*")) if folder.is_dir() else []:
                if _NAME.fullmatch(entry.name) and (names is None or entry.name in names) and os.access(entry, os.X_OK):
                    yield entry


def _ask(path: Path, managed: bool) -> Interpreter | None:
    try:
        answer = subprocess.run(
            [str(path), "-I", "-S", "-c", _QUESTION],
            capture_output=True,
            timeout=_ANSWER_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=True,
            env={"PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        ).stdout
        said = json.loads(answer)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None  # a shim without a version behind it, Python 2, another architecture
    if said["implementation"] != "cpython" or _key(said["version"]) < (3, 7):
        return None
    if said["venv"]:
        base = Path(said["base"])
        return None if base.resolve() == path.resolve() else _ask(base, managed)
    return Interpreter(str(path.resolve()), said["version"], said["platform"], managed, said["complete"])


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
