"""Where the bytes of a part come from."""

from collections.abc import AsyncIterator
from typing import Protocol


class Source(Protocol):
    """Bytes, put where they are wanted: a copy less for each than bytes handed over."""

    async def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer; how many bytes. Fewer than it has room for mean the end, as do none.

        The buffer is the caller's again when this returns, also by being cancelled.
        """
        ...


class Chunks:
    """The chunks of an iterator as a source."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    async def readinto(self, buffer: memoryview) -> int:
        """See Source."""
        filled = 0
        while filled < len(buffer):
            if not self._rest:
                try:
                    self._rest = memoryview(await anext(self._chunks))
                except StopAsyncIteration:
                    break
                continue
            taken = min(len(self._rest), len(buffer) - filled)
            buffer[filled : filled + taken] = self._rest[:taken]
            self._rest = self._rest[taken:]
            filled += taken
        return filled
