"""Bytes to a file and through a hash at once, in threads, while the next ones arrive.

Large parts go to the disk past the page cache (O_DIRECT) where the file system takes that. A push of many gigabytes
then neither drives everything else out of memory nor leaves a minute of dirty pages to the sync at its end, and the
disk works while the hash does. Measured: at most a tenth of the kernel's time per byte.
"""

import asyncio
import contextlib
import errno
import hashlib
import mmap
import os
import zlib
from concurrent.futures import Executor, Future, wait
from pathlib import Path

from services.content.blobs.source import Source
from services.content.files import storage_error

BATCH_BYTES = 4 << 20
"""Given to the threads at once; twice this is all that one sink holds. At 4 MiB the cost of handing over (0.1 ms) is
1/30 of the cost of hashing."""
BLOCK_BYTES = 4096
"""Alignment that O_DIRECT asks for, in memory and in the file."""
DIRECT_BYTES = 8 << 20
"""Smaller files stay in the page cache: they are soon read again, and disks like few large writes."""


class Sink:
    """Writes at `offset` of a file, computing the sha256 of what passes, or its CRC-32.

    One batch is written and hashed, each in a thread, while the next is read. The file is closed by a
    thread too, after the last write has ended, so that a caller who is cancelled cannot leave a late write
    to a descriptor that means another file by then.
    """

    def __init__(self, pool: Executor, path: Path, offset: int, size_bytes: int, *, create: bool, sha256: bool) -> None:
        self._pool = pool
        self._offset = offset
        self._sha256 = hashlib.sha256() if sha256 else None
        # Of the system's own pages: aligned for O_DIRECT, and given back when dropped.
        length = min(BATCH_BYTES, max(BLOCK_BYTES, size_bytes))
        self._batches = [memoryview(mmap.mmap(-1, length)) for _ in range(2 if size_bytes > length else 1)]
        self._announced = size_bytes
        self._running: list[Future[None]] = []
        self.size_bytes = 0
        self.crc32 = 0
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_CREAT | (os.O_EXCL if create else 0)
        self._fd = os.open(path, flags, 0o600)
        self._direct_fd = -1
        if size_bytes >= DIRECT_BYTES and offset % BLOCK_BYTES == 0:
            self._direct_fd = open_direct(path, os.O_WRONLY)

    @property
    def sha256_hex(self) -> str:
        """Of all that was taken, once `take` has returned; only when asked for."""
        assert self._sha256 is not None
        return self._sha256.hexdigest()

    async def take(self, source: Source) -> None:
        """Read what was announced, unless the source ends before, and wait until all is written and hashed.

        The next batch is read while the one before is written and hashed. Nothing is synced.
        """
        while left := self._announced - self.size_bytes:
            batch = self._batches[0][:left]
            filled = await source.readinto(batch)
            if filled:
                await self._pass_on(batch[:filled])
            if filled < len(batch):
                break
        await self._settle()

    def close(self) -> "Future[None]":
        """Close the file once no thread uses it; the result comes when that is so."""
        return self._pool.submit(_close, list(self._running), [self._fd, self._direct_fd])

    async def _pass_on(self, batch: memoryview) -> None:
        await self._settle()
        self._batches.reverse()
        start, self._offset = self._offset, self._offset + len(batch)
        self.size_bytes += len(batch)
        self._running = [
            self._pool.submit(self._write, batch, start),
            self._pool.submit(self._hash, batch),
        ]
        if len(self._batches) == 1:
            await self._settle()

    async def _settle(self) -> None:
        try:
            for future in self._running:
                await asyncio.wrap_future(future)
        except OSError as exc:
            raise storage_error(exc) from exc
        self._running = []

    def _hash(self, batch: memoryview) -> None:
        if self._sha256 is not None:
            self._sha256.update(batch)
        else:
            self.crc32 = zlib.crc32(batch, self.crc32)

    def _write(self, batch: memoryview, offset: int) -> None:
        if self._direct_fd >= 0 and offset % BLOCK_BYTES == 0:
            whole = len(batch) - len(batch) % BLOCK_BYTES
            written = 0
            while written < whole:
                try:
                    written += os.pwrite(self._direct_fd, batch[written:whole], offset + written)
                except OSError as exc:
                    if exc.errno != errno.EINVAL:
                        raise
                    break  # a file system that opens with O_DIRECT and then does not write so, or stopped half-way
            batch, offset = batch[written:], offset + written
        while batch:  # a signal or a disk that just ran full; the latter raises at the next turn
            written = os.pwrite(self._fd, batch, offset)
            batch, offset = batch[written:], offset + written


def open_direct(path: Path, flags: int) -> int:
    """A descriptor past the page cache, or -1 where there is none."""
    if hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):
            return os.open(path, flags | os.O_CLOEXEC | os.O_DIRECT)
    return -1


def _close(running: list[Future[None]], fds: list[int]) -> None:
    # Submitted after them to the same first-in-first-out pool: each runs or has run, so this cannot wait for ever.
    wait(running)
    for fd in fds:
        if fd >= 0:
            os.close(fd)
