"""A command on this machine as a session: with a TTY of its own, or with pipes."""

import asyncio
import contextlib
import errno
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from ekiben.errors import FailedPrecondition
from services.deployer.runtimes.sessions import STDERR, STDOUT

_PIECE = 32 << 10
_LEADER = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
try:
    os.execvp(sys.argv[1], sys.argv[1:])
except OSError as exc:
    print(f"{sys.argv[1]}: {exc.strerror}", file=sys.stderr)
    sys.exit(127)
"""
"""Makes its standard input the TTY of a new session, so that Ctrl-C and Ctrl-Z mean what they should."""
_HANGUP_S = 2.0
"""Between SIGHUP, which shells pass on, and SIGKILL."""


class LocalSession:
    """See the module. Made by `run`."""

    def __init__(self, process: "subprocess.Popen[bytes]", outputs: Mapping[int, int], input: int, tty: bool) -> None:
        """`outputs`: STDOUT or STDERR by file descriptor; `input` is one, or the same as the first of a TTY."""
        self.exit_code: int | None = None
        self._process, self._input, self._tty = process, input, tty
        self._pieces: asyncio.Queue[tuple[int, bytes]] = asyncio.Queue()
        self._open = dict(outputs)
        self._room = asyncio.Event()
        loop = asyncio.get_running_loop()
        for descriptor in outputs:
            os.set_blocking(descriptor, False)
            loop.add_reader(descriptor, self._read, descriptor)

    async def send(self, data: bytes) -> None:
        """See Session."""
        view = memoryview(data)
        while view and self._input >= 0:
            try:
                view = view[os.write(self._input, view) :]
            except BlockingIOError:
                await _writable(self._input)
            except OSError:
                return  # It has ended, or reads no more.

    async def end_input(self) -> None:
        """See Session."""
        if self._tty:
            await self.send(b"\x04")
        elif self._input >= 0:
            os.close(self._input)
            self._input = -1

    async def resize(self, columns: int, rows: int) -> None:
        """See Session."""
        if self._tty:
            set_size(self._input, columns, rows)

    async def output(self) -> AsyncIterator[tuple[int, bytes]]:
        """See Session."""
        while True:
            kind, data = await self._pieces.get()
            if not data:
                break
            yield kind, data
            self._resume()
        self.exit_code = await asyncio.to_thread(self._process.wait)
        if self.exit_code < 0:
            self.exit_code = 128 - self.exit_code  # As shells have it.

    async def close(self) -> None:
        """Hang it up, with all that it started in its session, and wait for its end."""
        loop = asyncio.get_running_loop()
        for descriptor in self._open:
            loop.remove_reader(descriptor)
        for number in (signal.SIGHUP, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, _HANGUP_S)
        for descriptor in {*self._open, *([self._input] if self._input >= 0 else [])}:
            os.close(descriptor)
        self._input = -1

    def _read(self, descriptor: int) -> None:
        try:
            data = os.read(descriptor, _PIECE)
        except BlockingIOError:
            return
        except OSError as exc:
            if exc.errno != errno.EIO:  # How a TTY says that nobody has its other end open any more.
                raise
            data = b""
        kind = self._open[descriptor]
        if data:
            self._pieces.put_nowait((kind, data))
            if self._pieces.qsize() > 8:  # Whoever reads is behind: so must be the command.
                for each in self._open:
                    asyncio.get_running_loop().remove_reader(each)
            return
        asyncio.get_running_loop().remove_reader(descriptor)
        del self._open[descriptor]
        if descriptor != self._input:
            os.close(descriptor)
        if not self._open:
            self._pieces.put_nowait((kind, b""))

    def _resume(self) -> None:
        if self._pieces.qsize() <= 2:
            for descriptor in self._open:
                asyncio.get_running_loop().add_reader(descriptor, self._read, descriptor)


@asynccontextmanager
async def run(
    argv: Sequence[str], env: Mapping[str, str], cwd: Path, *, tty: bool, columns: int, rows: int
) -> AsyncIterator[LocalSession]:
    """Run a command in a session of its own while inside; left before its end, it is hung up.

    Raises:
        FailedPrecondition: it cannot be started (EXEC_FAILED).
    """
    ours: list[int] = []
    theirs: list[int] = []
    try:
        if tty:
            master, slave = pty.openpty()
            ours, theirs = [master], [slave]
            set_size(slave, columns or 80, rows or 24)
            process = await asyncio.to_thread(_start, argv, env, cwd, (slave, slave, slave), tty)
            outputs, input = {master: STDOUT}, master
        else:
            (stdin, input), (output, stdout), (error, stderr) = os.pipe(), os.pipe(), os.pipe()
            ours, theirs = [input, output, error], [stdin, stdout, stderr]
            os.set_blocking(input, False)
            process = await asyncio.to_thread(_start, argv, env, cwd, (stdin, stdout, stderr), tty)
            outputs = {output: STDOUT, error: STDERR}
    except OSError as exc:
        for descriptor in ours:
            os.close(descriptor)
        raise FailedPrecondition(
            f"{argv[0]!r} cannot be started there: {exc.strerror or exc}.", reason="EXEC_FAILED", command=argv[0]
        ) from exc
    finally:
        for descriptor in theirs:
            os.close(descriptor)
    session = LocalSession(process, outputs, input, tty)
    try:
        yield session
    finally:
        await asyncio.shield(session.close())


def set_size(descriptor: int, columns: int, rows: int) -> None:
    """Tell a TTY its size; whoever runs in it gets SIGWINCH."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _start(
    argv: Sequence[str], env: Mapping[str, str], cwd: Path, streams: tuple[int, int, int], tty: bool
) -> "subprocess.Popen[bytes]":
    stdin, stdout, stderr = streams
    command = [sys.executable, "-I", "-S", "-c", _LEADER, *argv] if tty else list(argv)
    return subprocess.Popen(
        command, env=dict(env), cwd=cwd, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=not tty
    )


async def _writable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_writer(descriptor, ready.cancel)
    try:
        await asyncio.wait([ready])
    finally:
        loop.remove_writer(descriptor)
