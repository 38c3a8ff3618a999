"""Running uv, and the Pythons of environments, as trees that end with the builder."""

import asyncio
import itertools
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from uv import find_uv_bin

from services.kernel import processes
from services.kernel.processes import ProcessSpec, SupervisedProcess

_POLL_S = 0.05
"""How soon a line of uv's reaches the log."""
_LOG_MAX_BYTES = 256 << 20
"""Never reached: the file is read from its beginning, and a rotation would hide what was not yet read."""

INHERITED = (
    *(
        "PATH",
        "HOME",
        "USER",
        "LANG",
        "LC_ALL",
        "TMPDIR",
        "NETRC",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE",
    ),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    *("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "CPATH", "LIBRARY_PATH", "LD_LIBRARY_PATH", "PKG_CONFIG_PATH"),
    *("CUDA_HOME", "CARGO_HOME", "RUSTUP_HOME", "MAKEFLAGS", "GIT_SSH_COMMAND", "SSH_AUTH_SOCK", "XDG_CONFIG_HOME"),
)
"""What uv, and the sources that it builds, get of the builder's own environment, besides `UV_…`. Sources run code of
whoever wrote the bento: nothing of the suite's settings may reach them."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    returncode: int
    text: str
    """What it printed, stderr and stdout as they came."""


class Programs:
    """Starts programs for builds. One per builder."""

    def __init__(self, data_dir: Path, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._cache_dir = data_dir / "cache" / "uv"
        self._pythons_dir = data_dir / "pythons"
        self._mark = processes.mark_of("builder", data_dir)
        self._numbers = itertools.count(1)
        self._uv = find_uv_bin()

    @property
    def cache_dir(self) -> Path:
        """uv's cache."""
        return self._cache_dir

    @property
    def pythons_dir(self) -> Path:
        """Where uv keeps the interpreters that it downloads."""
        return self._pythons_dir

    async def end_strays(self) -> int:
        """End what a killed builder left running, and forget its files. Before the first build only."""
        for process in await processes.adopt(self._run_dir):
            await process.kill()
        ended = await processes.end_strays(self._mark)
        for file in self._run_dir.glob("*"):
            file.unlink(missing_ok=True)
        return ended

    async def uv(
        self,
        *arguments: str | os.PathLike[str],
        cwd: Path,
        env: Mapping[str, str] | None = None,
        without: Collection[str] = (),
        line: Callable[[str], None] | None = None,
    ) -> Outcome:
        """Run uv to its end, with the builder's own `UV_…` variables but those in `without`; see `run`."""
        own = {name: value for name, value in os.environ.items() if name.startswith("UV_") and name not in without}
        fixed = {
            "UV_CACHE_DIR": str(self._cache_dir),
            "UV_PYTHON_INSTALL_DIR": str(self._pythons_dir),
            "UV_NO_PROGRESS": "1",
            "NO_COLOR": "1",
            "GIT_TERMINAL_PROMPT": "0",
        }
        argv = [self._uv, *(os.fspath(argument) for argument in arguments)]
        return await self.run(argv, cwd=cwd, env={**own, **(env or {}), **fixed}, line=line)

    async def run(
        self,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        line: Callable[[str], None] | None = None,
    ) -> Outcome:
        """Run a program to its end, giving each line of its output to `line` as it comes.

        Cancelling kills the program and everything it started before it returns.
        """
        name = f"{os.getpid()}-{next(self._numbers)}"
        output = self._run_dir / f"{name}.out"
        inherited = {variable: os.environ[variable] for variable in INHERITED if variable in os.environ}
        spec = ProcessSpec(
            id=name,
            argv=argv,
            env={"LANG": "C.UTF-8", **inherited, **(env or {})},
            cwd=cwd,
            log_file=output,
            mark=self._mark,
            log_max_bytes=_LOG_MAX_BYTES,
            stop_grace_s=2.0,
            orphan_grace_s=0.5,  # nobody adopts a build's program: the build begins anew
        )
        reader = _Reader(output, line)
        try:
            process = await processes.start(spec, self._run_dir)
            await _follow(process, reader)
        finally:
            output.unlink(missing_ok=True)
        return Outcome(process.returncode or 0, "\n".join(reader.lines))


async def _follow(process: SupervisedProcess, reader: "_Reader") -> None:
    ended = asyncio.ensure_future(process.wait())
    try:
        while not ended.done():
            await asyncio.wait([ended], timeout=_POLL_S)
            reader.read()
        reader.read()
    except BaseException:
        await asyncio.shield(process.kill())
        raise
    finally:
        await asyncio.wait([ended])


class _Reader:
    """Reads the file that the shim writes, and takes off the time before each line."""

    def __init__(self, path: Path, line: Callable[[str], None] | None) -> None:
        self.lines: list[str] = []
        self._path = path
        self._line = line
        self._offset = 0
        self._rest = b""

    def read(self) -> None:
        """Take what has come since."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for raw in lines:
            text = raw.decode("utf-8", "replace").partition(" ")[2]
            self.lines.append(text)
            if self._line is not None:
                self._line(text)
