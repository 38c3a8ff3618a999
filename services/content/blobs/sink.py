"""Bytes to a file and through a hash at once, in threads, while the next ones arrive."""

import asyncio
import hashlib
import os
import zlib
from concurrent.futures import Executor, Future, wait
from pathlib import Path

from services.content.files import storage_error

BATCH_BYTES = 2 << 20
"""Given to the threads at once. Twice this and a socket's buffer is all that one sink holds; at 2 MiB the cost of
handing over (0.1 ms) is a tenth of the cost of hashing."""
_MAX_BUFFERS = 1024  # IOV_MAX of Linux


class Sink:
    """Writes at `offset` of a file, computing the CRC-32 and, when asked, the sha256 of what passes.

    One batch is written and hashed, each in a thread, while the next is gathered. The file is closed by a
    thread too, after the last write has ended, so that a caller who is cancelled cannot leave a late write
    to a descriptor that means another file by then.
    """

    def __init__(self, pool: Executor, path: Path, offset: int, *, create: bool, sha256: bool) -> None:
        flags = os.O_WRONLY | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else os.O_CREAT)
        self._pool = pool
        self._fd = os.open(path, flags, 0o600)
        self._offset = offset
        self._sha256 = hashlib.sha256() if sha256 else None
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        self._running: list[Future[None]] = []
        self.size_bytes = 0
        self.crc32 = 0

    @property
    def sha256_hex(self) -> str:
        """Of all that was fed, once `finish` has returned; only when asked for."""
        assert self._sha256 is not None
        return self._sha256.hexdigest()

    async def feed(self, chunk: bytes) -> None:
        """Take the next bytes; waits while the batch before is still being written."""
        self._gathered.append(chunk)
        self._gathered_bytes += len(chunk)
        self.size_bytes += len(chunk)
        if self._gathered_bytes >= BATCH_BYTES:
            await self._pass_on()

    async def finish(self) -> None:
        """Wait until all is written and hashed; nothing is synced."""
        if self._gathered:
            await self._pass_on()
        await self._settle()

    def close(self) -> "Future[None]":
        """Close the file once no thread uses it; the result comes when that is so."""
        return self._pool.submit(_close, list(self._running), self._fd)

    async def _pass_on(self) -> None:
        await self._settle()
        batch, self._gathered = self._gathered, []
        start, self._offset = self._offset, self._offset + self._gathered_bytes
        self._gathered_bytes = 0
        self._running = [
            self._pool.submit(_write, self._fd, batch, start),
            self._pool.submit(self._hash, batch),
        ]

    async def _settle(self) -> None:
        try:
            for future in self._running:
                await asyncio.wrap_future(future)
        except OSError as exc:
            raise storage_error(exc) from exc
        self._running = []

    def _hash(self, batch: list[bytes]) -> None:
        for chunk in batch:
            if self._sha256 is not None:
                self._sha256.update(chunk)
            else:
                self.crc32 = zlib.crc32(chunk, self.crc32)


def _write(fd: int, batch: list[bytes], offset: int) -> None:
    buffers = batch if len(batch) <= _MAX_BUFFERS else [b"".join(batch)]
    wanted = sum(len(buffer) for buffer in buffers)
    written = os.pwritev(fd, buffers, offset)
    while written < wanted:  # a signal or a disk that just ran full; the latter raises at the next turn
        rest = b"".join(buffers)[written:]
        written += os.pwrite(fd, rest, offset + written)


def _close(running: list[Future[None]], fd: int) -> None:
    # Submitted after them to the same first-in-first-out pool: each runs or has run, so this cannot wait for ever.
    wait(running)
    os.close(fd)
