"""Bytes of a layer on their way to the disk."""

import asyncio
import hashlib
import io
import os
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


class Stuck:
    """Something that a thread is at until it is let, and which then looks whether the file is still open."""

    def __init__(self) -> None:
        self.entered, self.let = threading.Event(), threading.Event()
        self.after_close: list[bool] = []

    def __call__(self, file: io.FileIO) -> None:
        self.entered.set()
        assert self.let.wait(60)
        self.after_close.append(file.closed)


@pytest.mark.parametrize("where", ["write", "sync"])
async def test_whoever_is_cancelled_leaves_once_no_thread_has_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    stuck = Stuck()

    class File(io.FileIO):
        def write(self, data: "bytes | memoryview") -> int:  # type: ignore[override]
            if where == "write":
                stuck(self)
            return super().write(data)

    async def source() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield bytes(32 << 20)

    with File(tmp_path / "blob", "wb") as file:
        if where == "sync":
            monkeypatch.setattr(os, "fdatasync", lambda number: stuck(file))
        keeping = asyncio.create_task(keep(file, source()))
        assert await asyncio.to_thread(stuck.entered.wait, 60)
        for _ in range(2):  # whoever is impatient cancels again
            keeping.cancel()
            for _ in range(20):
                await asyncio.sleep(0)
            assert not keeping.done(), "the file would be closed now"
        stuck.let.set()
        with pytest.raises(asyncio.CancelledError):
            await keeping
        made = len(stuck.after_close)
    assert stuck.after_close == [False] and made == 1
