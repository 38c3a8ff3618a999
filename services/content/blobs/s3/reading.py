"""Reading an object: several ranges at once, in order, in bounded memory; and checking it in the same pass."""

import asyncio
import contextlib
import io
from collections import deque
from typing import BinaryIO, cast

from ekiben.hashing import Hasher
from services.content.blobs import Check
from services.content.blobs.s3.bucket import Bucket, Found
from services.content.digest import Digest

WINDOW_BYTES = 4 << 20
AHEAD = 4
"""One connection gives a third of what four do; WINDOW_BYTES times this is all that one reader holds."""
_BLOCK_BYTES = 1 << 20
"""Of an archive of many small files, one request reads the headers of hundreds."""


class Windows:
    """The bytes of an object from `start` to `end`, a window at a time; close it when done."""

    def __init__(self, bucket: Bucket, found: Found, start: int = 0, end: int | None = None) -> None:
        self._bucket = bucket
        self._found = found
        self._next = start
        self._end = found.size_bytes if end is None else min(end, found.size_bytes)
        self._tasks: deque[asyncio.Task[bytes]] = deque()

    async def read(self) -> bytes:
        """The next window; empty at the end. Raises Missing where the object was removed or replaced."""
        while len(self._tasks) < AHEAD and self._next < self._end:
            upto = min(self._end, self._next + WINDOW_BYTES)
            self._tasks.append(asyncio.ensure_future(self._bucket.get_range(self._found, self._next, upto)))
            self._next = upto
        if not self._tasks:
            return b""
        data = await self._tasks[0]
        self._tasks.popleft()
        return data

    async def close(self) -> None:
        """End what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()


async def examine(bucket: Bucket, found: Found, check: Check | None) -> Digest:
    """Read an object once, hash it, and give it to `check` meanwhile; its digest.

    Raises:
        Whatever `check` raises.
        Missing: it was removed or replaced.
    """
    windows = Windows(bucket, found)
    hasher = Hasher()
    passing = Passing(windows, found.size_bytes, asyncio.get_running_loop(), hasher)

    def work() -> Digest:
        with hasher:  # In a thread of its own: the check hashes too, each file for itself.
            if check is not None:
                check(cast("BinaryIO", passing))
            passing.finish()
            return Digest.parse(hasher.digest())

    working = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(working)
    finally:
        passing.stop()
        # A thread cannot be cancelled: it is waited for, so that it never reads from what is closed.
        while not working.done():
            await asyncio.wait([working], timeout=0.05)
            await windows.close()
        await windows.close()
        with contextlib.suppress(BaseException):
            working.exception()


class Passing(io.RawIOBase):
    """An object that passes once, as a file of which a check reads headers: it may seek forward, and back to its start.

    Used in a thread, while the event loop `loop` reads ahead. Every byte goes to the hasher, in order.
    """

    def __init__(self, windows: Windows, size_bytes: int, loop: asyncio.AbstractEventLoop, hasher: Hasher) -> None:
        self._windows = windows
        self._size_bytes = size_bytes
        self._loop = loop
        self._hasher = hasher
        self._head = b""
        self._window = b""
        self._window_at = 0
        self._position = 0
        self._stopped = False

    def stop(self) -> None:
        """Let the next read fail."""
        self._stopped = True

    def finish(self) -> None:
        """Let the rest pass."""
        while self._advance():
            pass

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Forward, and back to the start."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; nothing passes before it is read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, fewer only at the end. Raises OSError going back to what has passed."""
        if size < 0:
            size = self._size_bytes - self._position
        pieces = []
        while size > 0 and (piece := self._here(size)):
            pieces.append(piece)
            self._position += len(piece)
            size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _here(self, size: int) -> bytes:
        while self._position >= self._window_at + len(self._window):
            if not self._advance():
                return b""
        if self._position >= self._window_at:
            start = self._position - self._window_at
            return self._window[start : start + size]
        if self._position < len(self._head):
            return self._head[self._position : self._position + size]
        raise OSError("what has passed cannot be read again")

    def _advance(self) -> bool:
        if self._stopped:
            raise ConnectionAbortedError("nobody waits for this check any more")
        window = asyncio.run_coroutine_threadsafe(self._windows.read(), self._loop).result()
        self._window_at += len(self._window)
        self._window = window
        self._head = self._head or window
        self._hasher.update(window)
        return bool(window)


class Seeking(io.RawIOBase):
    """An object as a file in which a thread may seek anywhere, a block at a time."""

    def __init__(self, bucket: Bucket, found: Found, loop: asyncio.AbstractEventLoop) -> None:
        self._bucket = bucket
        self._found = found
        self._loop = loop
        self._block = b""
        self._block_at = 0
        self._position = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Anywhere."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._found.size_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, fewer only at the end."""
        end = self._found.size_bytes if size < 0 else min(self._found.size_bytes, self._position + size)
        pieces = []
        while self._position < end:
            if not self._block_at <= self._position < self._block_at + len(self._block):
                upto = min(self._found.size_bytes, self._position + _BLOCK_BYTES)
                reading = self._bucket.get_range(self._found, self._position, upto)
                self._block = asyncio.run_coroutine_threadsafe(reading, self._loop).result()
                self._block_at = self._position
            start = self._position - self._block_at
            pieces.append(self._block[start : start + end - self._position])
            self._position += len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
