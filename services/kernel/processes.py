"""Supervised trees of processes: replicas, builds, Envoy.

Each tree has a *shim* (see `shim.py`), a small process which writes its log and ends all of it. The one who holds the
connection to the shim owns the tree. When the owner vanishes the shim waits `orphan_grace_s` for another to `adopt` it,
then ends the tree. When the shim itself is killed the main process dies with it (PDEATHSIG), and `wait`, `stop` or
`end_strays` end what is left: every process of a tree carries `EKIBEN_PROCESS=<mark>/<id>` in its environment.

A mark must belong to one owner on the machine; derive it from a data directory, see `mark_of`.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ekiben.errors import FailedPrecondition, Unavailable
from services.kernel import shim

SHIM = Path(shim.__file__)
MARK = "EKIBEN_PROCESS"
SHIM_MARK = "EKIBEN_SHIM"
START_TIMEOUT_S = 15.0
"""A shim answers within 0.1 s; on a machine that is swapping it takes longer."""
SHIM_LATE_S = 15.0
"""So long after the grace a shim that has not ended its tree hangs: stopped by a person, or out of memory."""
LOST = -9
"""Return code of a tree whose shim was killed."""
MAX_SOCKET_PATH = 107
"""Longest path of a Unix socket on Linux, sun_path less its final NUL."""


@dataclass(frozen=True)
class ProcessSpec:
    """What to run, and how it ends."""

    id: str
    """Unique for its mark and state directory; part of file names, so letters, digits, `-`, `_` and `.`."""
    argv: Sequence[str]
    env: Mapping[str, str]
    """The whole environment: nothing of the owner's is added but the mark."""
    cwd: Path
    log_file: Path
    """stdout and stderr, each line after its time; see `shim.RotatedLog`."""
    mark: str
    log_max_bytes: int = 8 << 20
    log_keep: int = 3
    """How many full files are kept beside the current one."""
    stop_grace_s: float = 10.0
    """Between SIGTERM and SIGKILL, where `stop` is not told otherwise, and for orphans."""
    orphan_grace_s: float = 10.0
    """How long the tree lives without an owner."""
    memory_limit_bytes: int = 0
    """Of the tree; 0 for none. Without writable control groups there is no limit, see `SupervisedProcess.note`."""
    cpu_millicores: int = 0
    """Of the tree in thousandths of a core; 0 for no limit."""


class SupervisedProcess(asyncio.Protocol):
    """One tree, as its owner sees it."""

    def __init__(self, id: str, mark: str, cgroups: Sequence[str] = ()) -> None:
        self.id = id
        self.mark = mark
        self.pid = 0
        """Of the main process."""
        self.shim_pid = 0
        self.log_file = Path()
        self.note = ""
        """Which limits could not be set, and why; else empty."""
        self.returncode: int | None = None
        """Of the main process once the tree has ended: negative for a signal, `LOST` when the shim was killed."""
        self.out_of_memory = False
        """Whether the kernel killed one of the tree for its memory limit."""
        self.shim_lost = False
        """Whether the shim was killed, so that the return code is not known."""
        self._cgroups = cgroups
        self._child: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ended = asyncio.Event()
        self._detached = False
        self._lost = False

    def __repr__(self) -> str:
        return f"SupervisedProcess({self.id!r}, pid={self.pid}, returncode={self.returncode})"

    async def wait(self) -> int:
        """Wait until the whole tree has ended. Gives `returncode`."""
        await self._ended.wait()
        if self._lost:
            await asyncio.to_thread(self._end_lost)
            self._lost = False
        if self._child is not None:
            await asyncio.to_thread(self._child.wait)
        assert self.returncode is not None
        return self.returncode

    async def stop(self, grace_s: float | None = None) -> int:
        """SIGTERM for the main process, after the grace SIGKILL for the tree; wait for the end.

        A shim that does not do it in time is killed, and the tree with it.
        """
        if grace_s is None:
            self._send({"op": "stop"})
            return await self.wait()
        self._send({"op": "stop", "grace_s": grace_s})
        return await self._end_within(grace_s + SHIM_LATE_S)

    async def kill(self) -> None:
        """SIGKILL for the tree; wait for the end."""
        self._send({"op": "kill"})
        await self._end_within(SHIM_LATE_S)

    def detach(self) -> None:
        """Leave the tree to the next owner, who has `orphan_grace_s` to `adopt` it."""
        self._detached = True
        if self._transport is not None:
            self._transport.close()
        if self._child is not None:
            self._child.returncode = 0  # Another process will reap it; keeps Popen from complaining.

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._event(json.loads(line))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._started.done():
            self._started.set_exception(Unavailable("The shim of a process ended early.", reason="PROCESS_LOST"))
            self._started.exception()
        if self.returncode is None and not self._detached:
            self.returncode, self.shim_lost, self._lost = LOST, True, True
        self._ended.set()

    def _event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "started":
            self.pid, self.shim_pid, self.note = event["pid"], event["shim"], event["note"]
            self.log_file = Path(event["log_file"])
            if not self._started.done():
                self._started.set_result(None)
        elif kind == "error":
            self.returncode = 127
            if not self._started.done():
                self._started.set_exception(
                    FailedPrecondition(f"Cannot start {event['message']}.", reason="PROCESS_NOT_STARTED")
                )
        elif kind == "exited":
            self.returncode, self.out_of_memory = event["returncode"], event["out_of_memory"]
            self._ended.set()

    def _send(self, command: dict[str, Any]) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(json.dumps(command).encode() + b"\n")

    async def _end_within(self, limit_s: float) -> int:
        try:
            async with asyncio.timeout(limit_s):
                await self._ended.wait()
        except TimeoutError:
            # It is the one that was started: had it ended, its connection would have, and the wait with it.
            with contextlib.suppress(OSError):
                os.kill(self.shim_pid, signal.SIGKILL)
        return await self.wait()

    def _end_lost(self) -> None:
        _end(lambda mark, id: mark == self.mark and id == self.id, self._cgroups, {self.pid})
        shim.remove_cgroups(self._cgroups)

    async def _ready(self) -> None:
        async with asyncio.timeout(START_TIMEOUT_S):
            await self._started


async def start(spec: ProcessSpec, state_dir: Path) -> SupervisedProcess:
    """Start a tree; returns once the program runs.

    Cancelling leaves nothing behind: the shim loses its owner before it was told what to start, or ends the tree.

    Raises:
        FailedPrecondition: the program cannot be started (PROCESS_NOT_STARTED), with the reason in words.
        Unavailable: the shim ended (PROCESS_LOST).
    """
    check_socket_path(state_dir / f"{spec.id}.sock")
    mine, its = socket.socketpair()
    try:
        child = await asyncio.to_thread(_launch, its, spec, state_dir)
    except BaseException:
        mine.close()
        raise
    finally:
        its.close()
    mine.setblocking(False)
    loop = asyncio.get_running_loop()
    process = SupervisedProcess(spec.id, spec.mark)
    process._child = child
    try:
        await loop.create_connection(lambda: process, sock=mine)
        assert process._transport is not None
        process._transport.write(_message(spec, state_dir))
        await process._ready()
    except BaseException:
        # Closing the connection before "stop" would leave the tree its orphan grace.
        process._send({"op": "kill"})
        if process._transport is None:
            mine.close()
        else:
            process._transport.close()
        raise
    state = await asyncio.to_thread(_read_state, state_dir / f"{spec.id}.json")
    process._cgroups = state.get("cgroups", ())
    return process


async def adopt(state_dir: Path) -> list[SupervisedProcess]:
    """Become the owner of every live shim that a former owner left; forget the dead ones.

    What a dead shim left running, and what cannot be adopted, is for `end_strays`.
    """
    found: list[SupervisedProcess] = []
    for file in sorted(state_dir.glob("*.json")):
        state = await asyncio.to_thread(_read_state, file)
        process = await _adopt_one(file, state) if state else None
        if process is not None:
            found.append(process)
        elif not _shim_lives(state):
            await asyncio.to_thread(_forget, file, state)
    return found


async def _adopt_one(file: Path, state: dict[str, Any]) -> SupervisedProcess | None:
    if not _shim_lives(state):
        return None
    process = SupervisedProcess(state["id"], state["mark"], state["cgroups"])
    try:
        await asyncio.get_running_loop().create_unix_connection(lambda: process, str(file.with_suffix(".sock")))
        process._send({"op": "own"})
        await process._ready()
    except (OSError, TimeoutError, Unavailable):
        return None
    return process


async def end_strays(mark: str, keep: Collection[str] = ()) -> int:
    """SIGKILL each process with this mark whose id is not in `keep`, and its shim. Gives how many, shims not counted.

    A shim that lives but was not adopted has lost its state or its socket, or hangs: nobody will ever command it, and
    what it keeps holds ports and memory until its orphan grace is over, or for ever.
    """
    return await asyncio.to_thread(_end_strays, mark, frozenset(keep))


def mark_of(owner: str, directory: Path) -> str:
    """A mark that no other owner on this machine has: `deployer-3f2a…`."""
    return f"{owner}-{hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:12]}"


def check_socket_path(path: Path) -> None:
    """Raises FailedPrecondition (PATH_TOO_LONG) where no Unix socket can have this path."""
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise FailedPrecondition(
            f"The path {path} is too long for a Unix socket. Use a shorter run directory.",
            reason="PATH_TOO_LONG",
            path=str(path),
        )


def _launch(its: socket.socket, spec: ProcessSpec, state_dir: Path) -> subprocess.Popen[bytes]:
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(SHIM), str(its.fileno())],
        env={SHIM_MARK: f"{spec.mark}/{spec.id}", "LANG": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(its.fileno(),),
        start_new_session=True,
    )


def _message(spec: ProcessSpec, state_dir: Path) -> bytes:
    return (
        json.dumps(
            {
                "id": spec.id,
                "argv": [str(word) for word in spec.argv],
                "env": {**spec.env, MARK: f"{spec.mark}/{spec.id}"},
                "cwd": str(spec.cwd),
                "log_file": str(spec.log_file.absolute()),
                "log_max_bytes": spec.log_max_bytes,
                "log_keep": spec.log_keep,
                "stop_grace_s": spec.stop_grace_s,
                "orphan_grace_s": spec.orphan_grace_s,
                "memory_limit_bytes": spec.memory_limit_bytes,
                "cpu_millicores": spec.cpu_millicores,
                "mark": spec.mark,
                "state_dir": str(state_dir.absolute()),
            }
        ).encode()
        + b"\n"
    )


def _read_state(file: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        state: dict[str, Any] = json.loads(file.read_text())
        return state
    return {}


def _shim_lives(state: Mapping[str, Any]) -> bool:
    pid, ticks = state.get("shim", 0), state.get("shim_ticks", 0)
    return ticks != 0 and _lives(pid, ticks)


def _forget(file: Path, state: Mapping[str, Any]) -> None:
    for pid in shim.cgroup_members(state.get("cgroups", ())):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    shim.remove_cgroups(state.get("cgroups", ()))
    for suffix in (".json", ".sock"):
        file.with_suffix(suffix).unlink(missing_ok=True)


def _end_strays(mark: str, keep: Collection[str]) -> int:
    # Seen before the shims are killed: what dies with them has no environment to be known by while it dies.
    seen = {pid for pid, of, id in _marked(MARK) if of == mark and id not in keep}
    for pid, of, id in _marked(SHIM_MARK):
        if of == mark and id not in keep:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    return _end(lambda of, id: of == mark and id not in keep, dying=seen)


def _marked(variable: str) -> list[tuple[int, str, str]]:
    """Pid, mark and id of every process that has the variable."""
    found = []
    needle = variable.encode() + b"="
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            with open(f"/proc/{entry.name}/environ", "rb") as file:
                environment = file.read()
        except OSError:
            continue
        if needle not in environment:
            continue
        for item in environment.split(b"\0"):
            if item.startswith(needle):
                mark, _, id = item[len(needle) :].decode("utf-8", "replace").rpartition("/")
                found.append((int(entry.name), mark, id))
    return found


def _end(selected: Callable[[str, str], bool], cgroups: Sequence[str] = (), dying: Collection[int] = ()) -> int:
    """Kill until none is left: a process may fork between being seen and being killed.

    Returns once ports and files are given back, those of `dying` too, which are waited for and not killed.
    """
    ended: set[int] = set()
    waited = {pid: shim.start_ticks(pid) for pid in dying}
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        pids = {pid for pid, mark, id in _marked(MARK) if selected(mark, id)} | set(shim.cgroup_members(cgroups))
        pids = {pid for pid in pids if not shim.is_zombie(pid)}
        for pid in pids:
            waited.setdefault(pid, shim.start_ticks(pid))
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        ended |= pids
        waited = {pid: ticks for pid, ticks in waited.items() if ticks and _lives(pid, ticks)}
        if not waited and not pids:
            break
        time.sleep(0.02)
    return len(ended.union(dying))


def _lives(pid: int, ticks: int) -> bool:
    return shim.start_ticks(pid) == ticks and not shim.is_zombie(pid)
