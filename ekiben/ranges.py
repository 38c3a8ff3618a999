"""A download in ranges that are fetched in parallel and handed over in order.

Memory is bounded by RANGE_BYTES times the ranges under way, whatever the size of the whole. Each worker keeps its
connection; a range that breaks off goes on where it broke, at a URL that is signed anew.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from ekiben.errors import EkibenError, PermissionDenied, Unavailable
from ekiben.signed import Getter, Stop, Stopped

RANGE_BYTES = 16 << 20
"""Fetched at once by one worker: at a gigabit a tenth of a second, so that asking for it does not show."""
WORKERS = 4
"""More than four connections brought nothing against any object store that was measured."""
_AHEAD = WORKERS + 1
"""Ranges fetched, or being fetched, that are not read yet."""


class Ranges:
    """Reads what is at signed URLs from `offset` to `size_bytes`, in order. A context manager."""

    def __init__(
        self,
        sign: Callable[[], str],
        size_bytes: int,
        *,
        offset: int = 0,
        stop: Stop,
        patience_s: float,
    ) -> None:
        self._sign, self._stop, self._patience_s = sign, stop, patience_s
        self._next, self._end = offset, size_bytes
        self._pool = ThreadPoolExecutor(WORKERS, "ekiben-get")
        self._own = threading.local()
        self._getters: list[Getter] = []
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._url = ""
        self._waiting: deque[Future[tuple[memoryview, EkibenError | None]]] = deque()
        self._error: EkibenError | None = None
        self._free: list[bytearray] = []
        self._here: memoryview | None = None
        self._read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._wake()
        self._pool.shutdown(cancel_futures=True)

    def _wake(self) -> None:
        """Wake who waits for a server."""
        self._closed.set()
        for getter in list(self._getters):
            getter.close()

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer as far as can be without an error, which the next call raises; no bytes mean the end."""
        filled = 0
        while filled < len(buffer) and (here := self._range(fresh=not filled)) is not None:
            count = min(len(buffer) - filled, len(here) - self._read)
            buffer[filled : filled + count] = here[self._read : self._read + count]
            filled, self._read = filled + count, self._read + count
        return filled

    def _range(self, *, fresh: bool) -> memoryview | None:
        """The range that is being read, or None at the end, or before an error while the buffer is not `fresh`."""
        if self._here is not None and self._read < len(self._here):
            return self._here
        if self._here is not None and isinstance(self._here.obj, bytearray):
            self._free.append(self._here.obj)
        self._here, self._read = None, 0
        while len(self._waiting) < _AHEAD and self._next < self._end and self._error is None:
            size = min(RANGE_BYTES, self._end - self._next)
            room = self._free.pop() if self._free else bytearray(min(RANGE_BYTES, self._end))
            self._waiting.append(self._pool.submit(self._fetch, self._next, memoryview(room)[:size]))
            self._next += size
        if self._error is not None:
            if fresh:
                raise self._error
            return None
        if self._waiting:
            with self._stop.ending(self._wake):
                self._here, self._error = self._waiting.popleft().result()
            if self._error is not None and not self._here:
                return self._range(fresh=fresh)
        return self._here

    def _fetch(self, offset: int, buffer: memoryview) -> tuple[memoryview, EkibenError | None]:
        """The range, or its beginning and what came then."""
        if not hasattr(self._own, "getter"):
            self._own.getter = Getter()
            self._getters.append(self._own.getter)
        done, pause_s, seen, refused, url = 0, 0.2, time.monotonic(), False, ""

        def passed(count: int) -> None:
            nonlocal done, pause_s, seen
            done, pause_s, seen = done + count, 0.2, time.monotonic()
            self._check()

        while done < len(buffer):
            self._check()
            try:
                url = self._signed(not_this=url)
                self._own.getter.fill(url, offset + done, buffer[done:], passed)
            except PermissionDenied as error:
                # A URL that expired while others were fetched; one that is new cannot have.
                if refused:
                    return buffer[:done], error
                refused = True
            except Unavailable as error:
                self._check()
                if time.monotonic() - seen > self._patience_s:
                    return buffer[:done], error
                self._closed.wait(pause_s)
                pause_s = min(pause_s * 2, 5.0)
        return buffer, None

    def _check(self) -> None:
        if self._closed.is_set() or self._stop.is_set():
            raise Stopped

    def _signed(self, *, not_this: str) -> str:
        """A URL for all workers; a new one where that which did not work is still the one."""
        with self._lock, contextlib.suppress(TimeoutError):
            if not self._url or self._url == not_this:
                self._url = self._sign()
            return self._url
        raise Unavailable("The registry did not sign a URL in time.", reason="SERVER_UNREACHABLE")
