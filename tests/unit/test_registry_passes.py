"""A blob's bytes that are read again, since the connection to the registry broke off."""

import contextlib
import hashlib
from collections.abc import AsyncIterator

import pytest

from ekiben.errors import DataLoss
from services.content.digest import Digest
from services.content.images import Again, Descriptor
from services.content.images.registry.passes import Content, Differs

CHUNKS = [bytes([number]) * 1000 for number in range(6)]
WHOLE = Digest(hashlib.sha256(b"".join(CHUNKS)).hexdigest())


class Source:
    """Chunks, others in each pass; how many passes were closed."""

    def __init__(self, *passes: list[bytes]) -> None:
        self._passes = list(passes)
        self.open = 0

    async def __call__(self) -> AsyncIterator[bytes]:
        self.open += 1
        try:
            for chunk in self._passes.pop(0) if len(self._passes) > 1 else self._passes[0]:
                yield chunk
        finally:
            self.open -= 1


async def take(content: Content, offset: int, chunks: int = 99) -> bytes:
    """A pass that breaks off after some chunks."""
    found = b""
    async with contextlib.aclosing(content.since(offset)) as passing:
        async for chunk in passing:
            found += chunk
            chunks -= 1
            if not chunks:
                break
    return found


def flipped(at: int) -> list[bytes]:
    return [*CHUNKS[:at], b"x" * 1000, *CHUNKS[at + 1 :]]


@pytest.mark.parametrize("known", [True, False])
async def test_the_digest_is_that_of_one_pass_however_often_it_broke_off(known: bool) -> None:
    content = Content(Again(Source(CHUNKS)), Descriptor("", WHOLE, 6000) if known else None)
    found = await take(content, 0, 2)
    assert not content.whole
    found = found[:1500] + await take(content, 1500, 1)
    found += await take(content, len(found))
    assert found == b"".join(CHUNKS) and content.whole
    assert (content.digest, content.size_bytes) == (WHOLE, 6000)


async def test_bytes_of_a_pass_that_broke_off_are_not_believed() -> None:
    # Cut in other places: what is compared does not depend on where chunks end.
    again = [b"".join(CHUNKS)[at : at + 700] for at in range(0, 6000, 700)]
    content = Content(Again(Source(flipped(1), again)), None)
    await take(content, 0, 3)
    with pytest.raises(Differs, match="other bytes"):
        await take(content, 2000)
    assert content.problem is None, "it is read once more, for a new session"
    content.forget()
    assert await take(content, 0) == b"".join(CHUNKS)
    assert (content.digest, content.size_bytes, content.whole) == (WHOLE, 6000, True)


async def test_a_later_pass_that_broke_off_earlier_is_compared_too() -> None:
    content = Content(Again(Source(CHUNKS, flipped(1), CHUNKS)), None)
    await take(content, 0, 4)
    await take(content, 500, 2)  # the registry has the wrong bytes of this one now
    with pytest.raises(Differs, match="other bytes"):
        await take(content, 2000)


async def test_a_source_that_ends_earlier_than_before_differs() -> None:
    content = Content(Again(Source(CHUNKS, CHUNKS[:2])), None)
    await take(content, 0, 3)
    with pytest.raises(Differs, match="ends earlier"):
        await take(content, 1000)


async def test_a_source_is_closed_when_a_pass_ends_in_its_middle() -> None:
    source = Source(CHUNKS)
    content = Content(Again(source), Descriptor("", WHOLE, 5999))
    for offset in (0, 0, 1000):
        await take(content, offset, 1)
        assert source.open == 0
    with pytest.raises(DataLoss):
        await take(content, 1000)
    assert source.open == 0 and isinstance(content.problem, DataLoss)
