"""Running uv, and the Pythons of environments, as trees that end with the builder."""

import asyncio
import hashlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from uv import find_uv_bin

from services.kernel import processes
from services.kernel.processes import ProcessSpec, SupervisedProcess

_POLL_S = 0.05
"""How soon a line of uv's reaches the log."""
_LOG_MAX_BYTES = 16 << 20
"""What a program may be ahead of its reader on the disk: one that prints faster than that loses lines, never the
last."""
_KEPT_CHARS = 1 << 20
"""Of what it printed, the end: why it failed stands there."""
_CHUNK_BYTES = 1 << 20

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
    """The end of what it printed, stderr and stdout as they came."""


class Programs:
    """Starts programs for builds. One per builder."""

    def __init__(self, data_dir: Path, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._caches = data_dir / "cache"
        self._pythons_dir = data_dir / "pythons"
        self._mark = processes.mark_of("builder", data_dir)
        self._numbers = itertools.count(1)
        self._uv = find_uv_bin()

    def cache_dir(self, scope: str = "") -> Path:
        """uv's cache, everybody's or that of an organization: in it uv finds, without asking, what a login opened."""
        return self._caches / (f"uv-of-{hashlib.sha256(scope.encode()).hexdigest()[:16]}" if scope else "uv")

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
        scope: str = "",
        cache_dir: Path | None = None,
        line: Callable[[str], None] | None = None,
    ) -> Outcome:
        """Run uv to its end, with the builder's own `UV_…` variables but those in `without`; see `run`.

        `scope` says whose cache it works with, unless `cache_dir` is one.
        """
        own = {name: value for name, value in os.environ.items() if name.startswith("UV_") and name not in without}
        fixed = {
            "UV_CACHE_DIR": str(cache_dir or self.cache_dir(scope)),
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
            log_keep=0,
            stop_grace_s=2.0,
            orphan_grace_s=0.5,  # nobody adopts a build's program: the build begins anew
        )
        reader = _Reader(output, line)
        try:
            process = await processes.start(spec, self._run_dir)
            await _follow(process, reader)
        finally:
            reader.close()
            output.unlink(missing_ok=True)
        return Outcome(process.returncode or 0, "\n".join(reader.lines))


async def _follow(process: SupervisedProcess, reader: "_Reader") -> None:
    ended = asyncio.ensure_future(process.wait())
    try:
        while not ended.done():
            await asyncio.wait([ended], timeout=_POLL_S)
            # Others have their turn between two chunks, and so has who cancels.
            while reader.read() and not ended.done():  # noqa: ASYNC110
                await asyncio.sleep(0)
        while reader.read():  # noqa: ASYNC110
            await asyncio.sleep(0)
    except BaseException:
        await asyncio.shield(process.kill())
        raise
    finally:
        await asyncio.wait([ended])


class _Reader:
    """Reads the file that the shim writes, and takes off the time before each line. Keeps the last of them."""

    def __init__(self, path: Path, line: Callable[[str], None] | None) -> None:
        self.lines: deque[str] = deque()
        self._chars = 0
        self._path = path
        self._line = line
        self._file: BinaryIO | None = None
        self._rest = b""

    def read(self) -> bool:
        """Take some of what has come since; whether there was any."""
        if self._file is None and not self._open():
            return False
        # Asked before it is read: nothing comes to a file any more that has given way to another.
        ended = self._was_replaced()
        data = self._some()
        if not data and ended and self._open():
            data = self._some()
        *lines, self._rest = (self._rest + data).split(b"\n")
        for raw in lines:
            self._take(raw.decode("utf-8", "replace").partition(" ")[2])
        return bool(data)

    def close(self) -> None:
        """Read no more."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _take(self, text: str) -> None:
        self.lines.append(text)
        self._chars += len(text) + 1
        while self._chars > _KEPT_CHARS:
            self._chars -= len(self.lines.popleft()) + 1
        if self._line is not None:
            self._line(text)

    def _some(self) -> bytes:
        return self._file.read(_CHUNK_BYTES) if self._file is not None else b""

    def _open(self) -> bool:
        try:
            file = open(self._path, "rb", buffering=0)  # noqa: SIM115 - kept until `close`
        except FileNotFoundError:
            return False
        self.close()
        self._file = file
        return True

    def _was_replaced(self) -> bool:
        assert self._file is not None
        try:
            return not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return True
