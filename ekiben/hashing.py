"""A digest computed beside whatever else is done with the bytes."""

import hashlib
import queue
import threading
from typing import Self

AHEAD = 2
"""Chunks that may wait to be hashed while one is."""


class Hasher:
    """sha256 of chunks in a thread of its own, so that hashing and writing take two cores rather than twice the time.

    Use as a context manager; `update` waits where the thread is behind.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._chunks: queue.Queue[bytes | memoryview] = queue.Queue(AHEAD)
        self._thread = threading.Thread(target=self._run, name="ekiben-hash", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def update(self, chunk: bytes | memoryview) -> None:
        """Take one more chunk; an empty one is nothing. Its bytes must stay until AHEAD + 1 more were taken."""
        if chunk:
            self._chunks.put(chunk)

    def digest(self) -> str:
        """`sha256:<hex>` of all chunks; no more may follow."""
        self._finish()
        return f"sha256:{self._hash.hexdigest()}"

    def _finish(self) -> None:
        if self._thread.is_alive():
            self._chunks.put(b"")
            self._thread.join()

    def _run(self) -> None:
        while chunk := self._chunks.get():
            self._hash.update(chunk)
