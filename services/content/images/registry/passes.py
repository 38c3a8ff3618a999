"""A blob's bytes on their way out, read again from their beginning where the connection broke off."""

import hashlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator

from services.content.digest import Digest
from services.content.images import Descriptor
from services.content.images.registry.problems import Broken
from services.content.images.resolving import unexpected


class Differs(Broken):
    """The source gives other bytes than before, which the session has."""


class Content:
    """The bytes of a blob, hashed in each pass, and compared with what those before gave.

    A source finds out at the end of a pass that its bytes were wrong, and not at all in a pass that broke off.
    """

    def __init__(self, chunks: AsyncIterable[bytes], expected: Descriptor | None) -> None:
        self._chunks = chunks
        self._expected = expected
        self._hashed = hashlib.sha256()
        self._before: dict[int, bytes] = {}
        """How far each pass came that broke off, and the hash of all up to there."""
        self.again = not isinstance(chunks, AsyncIterator)
        self.size_bytes = 0
        self.begun = False
        self.whole = False
        self.problem: Exception | None = None
        """What the source itself raised: no fault of the connection, under whose name it would come out."""

    @property
    def digest(self) -> Digest:
        """Of all that has passed."""
        return Digest(self._hashed.hexdigest())

    def forget(self) -> None:
        """What was sent of it is gone: other bytes may come now."""
        self._before.clear()
        self._hashed, self.size_bytes = hashlib.sha256(), 0

    async def since(self, offset: int) -> AsyncGenerator[bytes, None]:
        """The bytes from an offset on.

        Raises:
            DataLoss: they are not what is expected (BLOB_DAMAGED).
            Differs: an earlier pass gave others.
        """
        self.begun, self.whole = True, False
        if self.size_bytes:
            self._before[self.size_bytes] = self._hashed.digest()
        self._hashed, self.size_bytes = hashlib.sha256(), 0
        iterator = aiter(self._chunks)
        try:
            async for chunk in iterator:
                position = self.size_bytes
                self._take(chunk)
                if self.size_bytes > offset:
                    yield chunk if position >= offset else chunk[offset - position :]
            if any(size > self.size_bytes for size in self._before):
                raise Differs("the source ends earlier than it did before")
            expected = self._expected
            if expected is not None and (self.digest, self.size_bytes) != (expected.digest, expected.size_bytes):
                raise unexpected(expected, self.digest)
        except Differs:
            raise
        except Exception as exc:
            self.problem = exc
            raise
        finally:
            if (close := getattr(iterator, "aclose", None)) is not None:
                await close()  # one that is left in its middle has threads and connections of its own
        self.whole = True

    def _take(self, chunk: bytes) -> None:
        rest, end = memoryview(chunk), self.size_bytes + len(chunk)
        for size in sorted(each for each in self._before if self.size_bytes < each <= end):
            self._hashed.update(rest[: size - self.size_bytes])
            rest, self.size_bytes = rest[size - self.size_bytes :], size
            if self._hashed.digest() != self._before[size]:
                raise Differs("the source gives other bytes than it did before")
        self._hashed.update(rest)
        self.size_bytes = end
