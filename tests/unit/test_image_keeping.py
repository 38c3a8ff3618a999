"""Bytes of a layer on their way to the disk."""

import hashlib
import io
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.content.images.keeping import keep


class Held(io.FileIO):
    """A file that takes little at once, and nothing before it is let."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")
        self.let = threading.Event()
        self.written = 0

    def write(self, data: "bytes | memoryview") -> int:  # type: ignore[override]
        assert self.let.wait(60)
        count = super().write(data[:700])
        self.written += count
        return count


async def test_the_source_is_read_on_while_the_disk_takes_its_time_but_not_far(tmp_path: Path) -> None:
    chunks = [bytes([number]) * 1000 for number in range(40)]
    ahead = []
    with Held(tmp_path / "blob") as file:

        async def source() -> AsyncIterator[bytes]:
            for number, chunk in enumerate(chunks):
                if number == 6:
                    file.let.set()
                ahead.append(number * 1000 - file.written)
                yield chunk

        digest, size = await keep(file, source())
    content = b"".join(chunks)
    assert (digest.hex, size) == (hashlib.sha256(content).hexdigest(), len(content))
    assert (tmp_path / "blob").read_bytes() == content
    assert 6000 <= max(ahead) <= 10_000


async def test_a_source_is_closed_where_the_disk_fails(tmp_path: Path) -> None:
    closed = []

    async def source() -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(1 << 16)
        finally:
            closed.append(True)

    with io.FileIO("/dev/full", "wb") as file, pytest.raises(OSError, match="No space left"):
        await keep(file, source())
    assert closed == [True]
