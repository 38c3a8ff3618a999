"""A person at a terminal, for commands that read keys."""

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from tests.platform import Platform


class Keyboard:
    """A command of a platform on a TTY of 100 columns and 30 rows. A context manager, which ends it."""

    def __init__(self, command: Sequence[str], platform: Platform) -> None:
        self.seen = ""
        self._tty, slave = pty.openpty()
        self.resize(100, 30)
        env = platform.client_env() | {"TERM": "xterm"}
        self._process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True
        )
        os.close(slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._tty)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._tty, text.encode())

    def resize(self, columns: int, rows: int) -> None:
        """Draw the window larger or smaller. A TTY that is nobody's tells nobody, so the command is told."""
        fcntl.ioctl(self._tty, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if hasattr(self, "_process"):
            self._process.send_signal(28)

    def until(self, text: str, seconds: float = 60) -> None:
        """Read until the text was shown after what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} was not shown: {self.seen!r}"
            if not self._read():
                raise AssertionError(f"it ended before it showed {text!r}: {self.seen!r}")
        self.seen = self.seen.partition(text)[2]

    def ended(self, seconds: float = 60) -> int:
        """Its exit status."""
        end = time.monotonic() + seconds
        while self._read():
            assert time.monotonic() < end, f"it did not end: {self.seen!r}"
        return self._process.wait(seconds)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._tty], [], [], 0.5)
        if not ready:
            return True
        with contextlib.suppress(OSError):  # Nobody has it open any more.
            if data := os.read(self._tty, 65536):
                self.seen += data.decode(errors="replace")
                return True
        return False
