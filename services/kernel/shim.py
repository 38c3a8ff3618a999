"""A small process that keeps one tree of processes: starts it, writes its log, ends all of it.

Run as `python -I -S shim.py FD` by `processes.start`; FD is the owner's socket, over which the specification comes as
one line of JSON (never by file or argument: it holds secrets). Standard library only, and one thread: PDEATHSIG follows
the thread that forked.

Why a process of its own: a tree must outlive a restart of its owner, and must not outlive the owner for good. Children
leave their process group (BentoML's workers each make a session), so a group cannot be killed as one: the shim is the
subreaper, to whom every orphan of the tree falls, and it kills descendants until none is left.

Lines on the socket are JSON. To the shim: `{"op": "own"}`, `{"op": "stop", "grace_s": 10}`, `{"op": "kill"}`.
From it: `{"event": "started", ...}`, `{"event": "error", "message": ...}`, `{"event": "exited", "returncode": n, ...}`.
"""

# pathlib would make every shim two megabytes larger.
# ruff: noqa: PTH102, PTH103, PTH105, PTH106, PTH108, PTH112, PTH118, PTH120, PTH208

import contextlib
import ctypes
import errno
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterable
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
MAX_LINE = 64 * 1024
"""Longest piece of output that becomes one line of the log; longer ones are split."""
PARTIAL_LINE_S = 1.0
"""A line without an end is written after this long without more of it, so that a hanging prompt is seen."""
LEFTOVER_GRACE_S = 2.0
"""Time between SIGTERM and SIGKILL for what is left once the main process has ended."""
KILL_PAUSE_S = 0.05
RESET_SIGNALS = (signal.SIGPIPE, signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGXFSZ)


def prctl(option: int, value: int) -> None:
    """Call prctl(2) where there is one; other systems have no such thing and go without."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot: with the pid, an identity. 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def descendants(root: int) -> list[int]:
    """Every living process below `root`, zombies left out."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        if len(fields) > 17:
            # Zombies are negative: walked through, but not alive.
            children.setdefault(int(fields[1]), []).append(-int(entry) if _has_ended(fields) else int(entry))
    found: list[int] = []
    queue = [root]
    while queue:
        for child in children.get(queue.pop(), ()):
            queue.append(abs(child))
            if child > 0:
                found.append(child)
    return found


class Cgroups:
    """The tree's own control group, in version 1 or 2, below the one the shim was started in.

    Made for every tree, limited or not: it finds processes that hide from everything else.
    """

    def __init__(self, name: str, memory_bytes: int, cpu_millicores: int) -> None:
        self.folders: list[str] = []
        self.note = ""
        missing = []
        unified, controllers = self._parents()
        if unified and not controllers:
            missing += self._version_2(unified, name, memory_bytes, cpu_millicores)
        else:
            missing += self._version_1(controllers, name, memory_bytes, cpu_millicores)
        if missing:
            self.note = f"no limit of {' and '.join(missing)}: the control groups of this machine cannot be written"

    @staticmethod
    def _parents() -> tuple[str, dict[str, str]]:
        mounts: dict[str, str] = {}
        with contextlib.suppress(OSError), open("/proc/self/mounts") as file:
            for line in file:
                _, point, kind, options = line.split()[:4]
                if kind == "cgroup2":
                    mounts.setdefault("", point)
                elif kind == "cgroup":
                    for option in options.split(","):
                        if option in ("memory", "cpu"):
                            mounts.setdefault(option, point)
        found: dict[str, str] = {}
        with contextlib.suppress(OSError), open("/proc/self/cgroup") as file:
            for line in file:
                _, names, path = line.rstrip("\n").split(":", 2)
                for controller in names.split(","):
                    if controller in mounts:
                        folder = mounts[controller] + path.rstrip("/")
                        found[controller] = folder if os.path.isdir(folder) else mounts[controller]
        return found.pop("", ""), found

    def _make(self, parent: str, name: str) -> str:
        folder = f"{parent}/{name}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        self.folders.append(folder)
        return folder

    def _version_1(self, parents: dict[str, str], name: str, memory: int, cpu: int) -> list[str]:
        missing = []
        try:
            folder = self._make(parents["memory"], name)
            if memory:
                write(f"{folder}/memory.limit_in_bytes", str(memory))
                with contextlib.suppress(OSError):
                    write(f"{folder}/memory.memsw.limit_in_bytes", str(memory))
        except (OSError, KeyError):
            missing += ["memory"] if memory else []
        if cpu:
            try:
                folder = self._make(parents["cpu"], name)
                write(f"{folder}/cpu.cfs_period_us", "100000")
                write(f"{folder}/cpu.cfs_quota_us", str(max(1000, cpu * 100)))
            except (OSError, KeyError):
                missing += ["CPU"]
        return missing

    def _version_2(self, parent: str, name: str, memory: int, cpu: int) -> list[str]:
        missing = []
        try:
            for controller in ("memory", "cpu"):
                with contextlib.suppress(OSError):
                    write(f"{parent}/cgroup.subtree_control", f"+{controller}")
            folder = self._make(parent, name)
        except OSError:
            return (["memory"] if memory else []) + (["CPU"] if cpu else [])
        if memory:
            try:
                write(f"{folder}/memory.max", str(memory))
                with contextlib.suppress(OSError):
                    write(f"{folder}/memory.swap.max", "0")
            except OSError:
                missing += ["memory"]
        if cpu:
            try:
                write(f"{folder}/cpu.max", f"{max(1000, cpu * 100)} 100000")
            except OSError:
                missing += ["CPU"]
        return missing

    def enter(self) -> None:
        """Move the calling process in; its children follow it."""
        for folder in self.folders:
            with contextlib.suppress(OSError):
                write(f"{folder}/cgroup.procs", str(os.getpid()))

    def members(self) -> list[int]:
        """Pids inside."""
        return cgroup_members(self.folders)

    def out_of_memory(self) -> bool:
        """Whether the kernel killed one of the tree for the memory limit."""
        for folder in self.folders:
            for file in ("memory.events", "memory.oom_control"):
                with contextlib.suppress(OSError), open(f"{folder}/{file}") as lines:
                    for line in lines:
                        key, _, value = line.strip().partition(" ")
                        if key == "oom_kill" and value != "0":
                            return True
        return False

    def remove(self) -> None:
        """Remove the groups; an occupied one is left for `processes.end_strays`."""
        remove_cgroups(self.folders)


def write(path: str, text: str) -> None:
    """Write a control file in one call."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def cgroup_members(folders: Iterable[str]) -> list[int]:
    """Pids in any of these control groups; a group that is gone has none."""
    found: set[int] = set()
    for folder in folders:
        with contextlib.suppress(OSError), open(f"{folder}/cgroup.procs") as file:
            found.update(int(line) for line in file)
    return sorted(found)


def remove_cgroups(folders: Iterable[str]) -> None:
    """Remove control groups; the kernel needs a moment after the last process, so ask a few times."""
    for folder in folders:
        for _ in range(20):
            try:
                os.rmdir(folder)
                break
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.02)


class RotatedLog:
    """Lines with their time, in a file that is renamed to `.1`, `.2`, … once it is full.

    A line is `2026-11-25T09:47:08.123456Z text`. A full disk loses lines, never blocks the writer, and is said
    in the log as soon as there is room.
    """

    def __init__(self, path: str, max_bytes: int, keep: int) -> None:
        self.path, self.max_bytes, self.keep = path, max_bytes, keep
        self.file = -1
        self.size = 0
        self.lost = 0
        self.partial = b""
        self.last = 0.0
        self._open()

    def _open(self) -> None:
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
            self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self.size = os.fstat(self.file).st_size

    def feed(self, data: bytes) -> None:
        """Take raw output."""
        self.last = time.monotonic()
        *lines, self.partial = (self.partial + data).split(b"\n")
        while len(self.partial) > MAX_LINE:
            lines.append(self.partial[:MAX_LINE])
            self.partial = self.partial[MAX_LINE:]
        self._write(lines)

    def flush(self) -> None:
        """Write what has no line end yet."""
        if self.partial:
            self._write([self.partial])
            self.partial = b""

    def say(self, text: str) -> None:
        """Write a line of the shim's own."""
        self._write([b"[ekiben] " + text.encode("utf-8", "replace")])

    def _write(self, lines: list[bytes]) -> None:
        if not lines:
            return
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06d}Z "
        head = stamp.encode()
        batch: list[bytes] = []
        length = 0
        for line in lines:
            data = head + line.rstrip(b"\r") + b"\n"
            if self.size + length >= self.max_bytes:
                self._put(head, batch)
                batch, length = [], 0
                if self.size >= self.max_bytes:
                    self._rotate()
            batch.append(data)
            length += len(data)
        self._put(head, batch)

    def _put(self, head: bytes, batch: list[bytes]) -> None:
        """Append whole lines; those that cannot be written are counted."""
        if not batch:
            return
        if self.file < 0:
            self._open()
        data = b"".join(batch)
        if self.lost:
            text = f"[ekiben] {self.lost} lines were lost: the log could not be written\n"
            data = head + text.encode() + data
        written = 0
        try:
            while written < len(data):
                written += os.write(self.file, data[written:])
            self.lost = 0
        except OSError:
            if written > 0:
                # Half a line is worse than none: the next good one would be glued to it.
                with contextlib.suppress(OSError):
                    os.ftruncate(self.file, self.size)
                written = 0
            self.lost += len(batch)
        self.size += written

    def _rotate(self) -> None:
        with contextlib.suppress(OSError):
            if self.file >= 0:
                os.close(self.file)
            self.file = -1
            for index in range(self.keep - 1, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{self.path}.{index}", f"{self.path}.{index + 1}")
            if self.keep > 0:
                os.replace(self.path, f"{self.path}.1")
            else:
                os.unlink(self.path)


class Shim:
    """The event loop: one selector over the log pipe, the sockets and the signals."""

    def __init__(self, owner: socket.socket, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.id: str = spec["id"]
        self.state = os.path.join(spec["state_dir"], self.id)
        self.selector = selectors.DefaultSelector()
        self.owners: dict[socket.socket, bytes] = {}
        self.strangers: dict[socket.socket, bytes] = {}
        self.log = RotatedLog(spec["log_file"], spec["log_max_bytes"], spec["log_keep"])
        self.cgroups = Cgroups(
            f"ekiben-{self.id}-{os.getpid()}", int(spec["memory_limit_bytes"]), int(spec["cpu_millicores"])
        )
        self.child = 0
        self.returncode: int | None = None
        self.orphan_at: float | None = None
        self.kill_at: float | None = None
        self.terminated_rest = False
        self.pipe = -1
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._keep(owner, self.owners)

    # Starting

    def start(self) -> None:
        """Listen, fork, tell the owner. Raises OSError when the program cannot be started."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.state + ".sock")
        self.listener.bind(self.state + ".sock")
        self.listener.listen(8)
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ, self._accept)
        waker, self.wake = socket.socketpair()  # Kept, or its descriptor would be closed and become a connection's.
        for end in (waker, self.wake):
            end.setblocking(False)
        signal.set_wakeup_fd(self.wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self.selector.register(waker, selectors.EVENT_READ, self._signalled)
        self.pipe, output = os.pipe()
        os.set_blocking(self.pipe, False)
        # The state comes before the fork: a shim that dies in between leaves a file, not an unknown process.
        self._write_state()
        failed, failure = os.pipe()
        self.child = os.fork()
        if self.child == 0:
            self._exec(output, failure)
        os.close(output)
        os.close(failure)
        reason = os.read(failed, 4096).decode("utf-8", "replace")
        os.close(failed)
        if reason:
            os.waitpid(self.child, 0)
            raise OSError(reason)
        self.selector.register(self.pipe, selectors.EVENT_READ, self._output)
        self._write_state()
        if self.cgroups.note:
            self.log.say(self.cgroups.note)
        self._tell(self._status())

    def _exec(self, output: int, failure: int) -> None:
        spec = self.spec
        try:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != spec["shim_pid"]:
                os._exit(127)  # The shim died before the line above.
            signal.set_wakeup_fd(-1)
            for number in RESET_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            self.cgroups.enter()
            os.setsid()
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(spec["cwd"])
            os.umask(0o077)
            os.execvpe(spec["argv"][0], spec["argv"], spec["env"])
        except BaseException as exc:
            os.write(failure, f"{spec['argv'][0]}: {getattr(exc, 'strerror', None) or exc}".encode())
        finally:
            os._exit(127)

    def _status(self) -> dict[str, Any]:
        return {
            "event": "started",
            "id": self.id,
            "pid": self.child,
            "shim": os.getpid(),
            "note": self.cgroups.note,
            "log_file": self.spec["log_file"],
        }

    def _write_state(self) -> None:
        state = {
            "id": self.id,
            "mark": self.spec["mark"],
            "shim": os.getpid(),
            "shim_ticks": start_ticks(os.getpid()),
            "pid": self.child,
            "log_file": self.spec["log_file"],
            "cgroups": self.cgroups.folders,
        }
        temporary = f"{self.state}.json.tmp"
        with open(temporary, "w") as file:
            json.dump(state, file)
        os.replace(temporary, self.state + ".json")

    # The loop

    def run(self) -> None:
        """Until the whole tree has ended."""
        while True:
            for key, _ in self.selector.select(self._timeout()):
                key.data(key.fileobj)
            self._reap()
            now = time.monotonic()
            if self.log.partial and now - self.log.last > PARTIAL_LINE_S:
                self.log.flush()
            if self.orphan_at is not None and now >= self.orphan_at:
                self.orphan_at = None
                self.log.say("nobody owns this process any more; ending it")
                self.stop(self.spec["stop_grace_s"])
            if self.returncode is not None:
                self._end_rest()
                if not self._living():
                    break
            elif self.kill_at is not None and now >= self.kill_at:
                self._kill(self._living())
                self.kill_at = now + KILL_PAUSE_S
        self._finish()

    def _timeout(self) -> float | None:
        now = time.monotonic()
        due = [at for at in (self.orphan_at, self.kill_at) if at is not None]
        if self.log.partial:
            due.append(self.log.last + PARTIAL_LINE_S)
        if self.returncode is not None:
            due.append(now + KILL_PAUSE_S)
        return max(0.0, min(due) - now + 0.001) if due else None

    def stop(self, grace_s: float) -> None:
        """SIGTERM for the main process; SIGKILL for all once the grace is over. A later call can only hasten it."""
        at = time.monotonic() + max(0.0, grace_s)
        self.kill_at = at if self.kill_at is None else min(at, self.kill_at)
        if self.returncode is None and grace_s > 0:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.child, signal.SIGTERM)

    def _end_rest(self) -> None:
        now = time.monotonic()
        rest = self._living()
        if not self.terminated_rest:
            self.terminated_rest = True
            until = now + LEFTOVER_GRACE_S
            self.kill_at = until if self.kill_at is None else min(until, self.kill_at)
            for pid in rest:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGTERM)
        elif self.kill_at is not None and now >= self.kill_at:
            self._kill(rest)

    def _living(self) -> list[int]:
        own = os.getpid()
        inside = [pid for pid in self.cgroups.members() if pid != own and start_ticks(pid) and not is_zombie(pid)]
        return sorted({*descendants(own), *inside})

    @staticmethod
    def _kill(pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.child:
                self.returncode = os.waitstatus_to_exitcode(status)

    def _finish(self) -> None:
        with contextlib.suppress(OSError):
            self._output(self.pipe)
        self.log.flush()
        oom = self.cgroups.out_of_memory()
        if oom:
            self.log.say("the kernel ended a process of this tree: it used more memory than its limit")
        self.cgroups.remove()
        for suffix in (".json", ".sock"):
            with contextlib.suppress(OSError):
                os.unlink(self.state + suffix)
        self._tell({"event": "exited", "returncode": self.returncode, "out_of_memory": oom})

    # What comes in

    def _output(self, pipe: int) -> None:
        # At most 1 MiB at a time, so that a chatty process cannot keep the shim from its other duties.
        for _ in range(16):
            try:
                data = os.read(pipe, 65536)
            except BlockingIOError:
                return
            if not data:
                with contextlib.suppress(KeyError):
                    self.selector.unregister(pipe)
                return
            self.log.feed(data)

    def _signalled(self, waker: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            if signal.SIGTERM in waker.recv(4096):
                self.stop(self.spec["stop_grace_s"])

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            self._keep(connection, self.strangers)

    def _keep(self, connection: socket.socket, group: dict[socket.socket, bytes]) -> None:
        connection.setblocking(False)
        group[connection] = b""
        self.selector.register(connection, selectors.EVENT_READ, self._command)

    def _command(self, connection: socket.socket) -> None:
        group = self.owners if connection in self.owners else self.strangers
        try:
            data = connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost(connection)
            return
        *lines, rest = (group[connection] + data).split(b"\n")
        group[connection] = rest
        for line in lines:
            try:
                command = json.loads(line)
                operation = command["op"]
            except (ValueError, KeyError, TypeError):
                continue
            if operation == "own":
                if connection in self.strangers:
                    self.owners[connection] = self.strangers.pop(connection)
                self.orphan_at = None
                self._send(connection, self._status())
            elif operation == "stop":
                self.stop(float(command.get("grace_s", self.spec["stop_grace_s"])))
            elif operation == "kill":
                self.stop(0)

    def _lost(self, connection: socket.socket) -> None:
        self.selector.unregister(connection)
        connection.close()
        self.strangers.pop(connection, None)
        if self.owners.pop(connection, None) is not None and not self.owners:
            self.orphan_at = time.monotonic() + self.spec["orphan_grace_s"]

    def _tell(self, event: dict[str, Any]) -> None:
        for owner in list(self.owners):
            self._send(owner, event)

    @staticmethod
    def _send(connection: socket.socket, event: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(event).encode() + b"\n")


def is_zombie(pid: int) -> bool:
    """Whether a process has ended, and given back its ports and files, and waits for its parent to notice."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return _has_ended(file.read().rpartition(b")")[2].split())
    except (OSError, IndexError, ValueError):
        return True


def _has_ended(fields: list[bytes]) -> bool:
    # The main thread is a zombie while others still end, and what they share is open until then: Envoy's port.
    return fields[0] == b"Z" and int(fields[17]) <= 1


def receive(owner: socket.socket) -> dict[str, Any]:
    """Read the specification: one line."""
    data = b""
    while not data.endswith(b"\n"):
        chunk = owner.recv(65536)
        if not chunk:
            raise ConnectionError("the owner left before it said what to start")
        data += chunk
    spec: dict[str, Any] = json.loads(data)
    return spec


def main(descriptor: int) -> int:
    """Keep one tree. Gives 0, or 1 when it could not be started."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    owner = socket.socket(fileno=descriptor)
    os.set_inheritable(descriptor, False)
    spec = receive(owner)
    spec["shim_pid"] = os.getpid()
    os.umask(0o077)
    os.chdir("/")
    shim = Shim(owner, spec)
    try:
        shim.start()
    except OSError as exc:
        message = str(exc) if exc.errno is None else f"{exc.strerror} ({errno.errorcode.get(exc.errno, exc.errno)})"
        shim.log.say(f"could not start: {message}")
        shim.cgroups.remove()
        for suffix in (".json", ".json.tmp", ".sock"):
            with contextlib.suppress(OSError):
                os.unlink(shim.state + suffix)
        shim._tell({"event": "error", "message": message})
        return 1
    shim.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
