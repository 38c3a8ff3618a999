"""Bytes into a file, with their digest: reading, hashing, writing and syncing side by side, in bounded memory.

Each of the three has a thread of its own, and takes what waits for it in order. So neither the hash nor the disk waits
for the other, whichever is slower, and little is left to sync at the end.
"""

import asyncio
import hashlib
import os
from collections import deque
from collections.abc import AsyncIterable
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from typing import Any

from services.content.digest import Digest
from services.content.threads import ended

_AHEAD = 8
"""Chunks that wait to be hashed and written."""
_SYNC_BYTES = 32 << 20
"""What is written before the disk is told to begin: else all of it would be waited for at the end."""


async def keep(file: FileIO, chunks: AsyncIterable[bytes]) -> tuple[Digest, int]:
    """Write the chunks so that they last; their digest and size.

    Raises:
        OSError: the disk took them not, at whichever time it said so.
    """
    hashed, size, synced = hashlib.sha256(), 0, 0
    waiting: deque[tuple[Future[Any], ...]] = deque()
    syncing: Future[None] | None = None
    hasher, writer, syncer = lanes = [ThreadPoolExecutor(1, "keeping") for _ in range(3)]
    iterator = aiter(chunks)
    try:
        async for chunk in iterator:
            waiting.append((hasher.submit(hashed.update, chunk), writer.submit(_put, file, chunk)))
            size += len(chunk)
            if len(waiting) > _AHEAD:
                await _all(waiting[0])
                waiting.popleft()
            if size - synced >= _SYNC_BYTES and (syncing is None or syncing.done()):
                if syncing is not None:
                    syncing.result()  # what it raises no later sync would say again
                syncing, synced = syncer.submit(os.fdatasync, file.fileno()), size
        for each in waiting:
            await _all(each)
        if syncing is not None:
            await asyncio.wrap_future(syncing)
        syncing = syncer.submit(os.fsync, file.fileno())
        await asyncio.wrap_future(syncing)
    finally:
        for lane in lanes:
            lane.shutdown(wait=False, cancel_futures=True)
        try:
            if (close := getattr(iterator, "aclose", None)) is not None:
                await close()  # a source that is left in its middle has threads and connections of its own
        finally:  # once the file is closed, its number may be another file's
            working = [*(each for both in waiting for each in both), *([syncing] if syncing is not None else [])]
            await ended(asyncio.wrap_future(each) for each in working if not each.done())
    return Digest(hashed.hexdigest()), size


async def _all(futures: tuple[Future[Any], ...]) -> None:
    for each in futures:
        await asyncio.wrap_future(each)


def _put(file: FileIO, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) :]
