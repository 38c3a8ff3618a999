"""The port for bytes by digest, and its promises.

The life of a blob:

1. *Parts are written* for an upload, in any order, at once, some of them twice. Nothing is visible. Part 0
   is the whole content in one piece; parts 1 to 10,000 are pieces of it. A part is there when `write` has
   returned, whole or not at all; writing a part again replaces it at once. Of files, a part counts until the
   machine restarts: what is not durable then is forgotten, not guessed.
2. *`assemble`* joins the parts that the caller lists, hashes, gives the result to the caller's check and makes
   it durable. While it is open the upload takes no more parts. Leaving it without `commit` makes nothing visible.
3. *`commit`* makes the blob visible under its digest; that takes no time to speak of. The caller writes the row
   that names it afterwards: a crash between the two leaves a blob without a name, which is garbage.
4. *`discard`* frees whatever an upload still holds.

A store never decides what is garbage: the owner of the names does, and calls `delete`.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Protocol

from services.content.blobs.source import Source
from services.content.digest import Digest

WHOLE = 0
"""The part number of content that is sent in one piece."""
MAX_PART_NUMBER = 10_000
"""As S3's, so that a store on S3 can keep parts where it keeps blobs."""

Check = Callable[[BinaryIO], None]
"""Called in a thread with the bytes, seekable; raises an EkibenError to refuse them."""


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored blob."""

    digest: Digest
    size_bytes: int
    modify_time: datetime


@dataclass(frozen=True, slots=True)
class Part:
    """A received part; `etag` is an HTTP entity tag, quotes included, and equal bytes have an equal one."""

    number: int
    etag: str
    size_bytes: int


class Assembly(Protocol):
    """Joined parts that are not visible yet."""

    @property
    def digest(self) -> Digest: ...
    @property
    def size_bytes(self) -> int: ...

    async def commit(self) -> Blob:
        """Make the blob visible, durably. A blob of the same digest that was there is replaced by its equal."""
        ...


class BlobReader(Protocol):
    """What is visible."""

    async def stat(self, digest: Digest) -> Blob:
        """Size and age of a blob. Raises NotFound (BLOB_NOT_FOUND)."""
        ...

    def read(self, digest: Digest, *, offset: int = 0, size_bytes: int | None = None) -> AsyncIterator[bytes]:
        """Stream a blob from `offset`, at most `size_bytes` of it, in chunks of at most 1 MiB.

        Raises NotFound (BLOB_NOT_FOUND).
        """
        ...

    async def inspect(self, digest: Digest, check: Check) -> None:
        """Call `check` with the bytes of a blob, of which it reads what it wants. Raises NotFound (BLOB_NOT_FOUND)."""
        ...

    def path(self, digest: Digest) -> Path | None:
        """Where the blob lies as a local file, for sendfile; None when it lies elsewhere."""
        ...

    async def read_url(self, digest: Digest, *, expire_time: datetime) -> str | None:
        """A URL at which the store itself serves the blob; None when the registry has to."""
        ...

    def blobs(self) -> AsyncIterator[Blob]:
        """Every blob, in no order; those added or deleted meanwhile may or may not appear."""
        ...

    async def delete(self, digest: Digest) -> None:
        """Remove a blob; one that is not there is no error. Readers that have it open keep it."""
        ...


class BlobWriter(Protocol):
    """What is on its way."""

    async def write(
        self,
        upload: str,
        number: int,
        source: Source,
        size_bytes: int,
        *,
        digest: Digest | None = None,
        check: Check | None = None,
    ) -> Part:
        """Keep one part of exactly `size_bytes` bytes, checked before it replaces an earlier one.

        A store that cannot look into what is not joined leaves `check` to `assemble`. S3 servers that keep what was cut
        off (versitygw) show it as a part, whose etag is not that of the bytes that were to be sent.

        Raises:
            InvalidArgument: more or fewer bytes (SIZE_MISMATCH), another digest than `digest` (DIGEST_MISMATCH).
            ResourceExhausted: no space left (STORAGE_FULL).
            FailedPrecondition: the upload is being assembled (UPLOAD_BUSY).
        """
        ...

    async def write_url(
        self, upload: str, number: int, *, expire_time: datetime, size_bytes: int | None = None
    ) -> str | None:
        """A URL at which the store itself takes the part; None when the registry has to.

        `size_bytes` is the part's, if that is known. What is sent there replaces the part until it is assembled.
        """
        ...

    async def parts(self, upload: str) -> list[Part]:
        """The parts received so far, by number."""
        ...

    def assemble(
        self, upload: str, parts: Sequence[tuple[int, str]], *, check: Check | None = None
    ) -> AbstractAsyncContextManager[Assembly]:
        """Join `(number, etag)` in the order given; none means the part WHOLE.

        A store may take no more parts of an upload from then on; assembling the same ones again is always possible.

        Raises:
            FailedPrecondition: a part is missing or has another etag (UPLOAD_INCOMPLETE), or another
                call assembles this upload (UPLOAD_BUSY).
            ResourceExhausted: no space left (STORAGE_FULL).
        """
        ...

    async def discard(self, upload: str) -> None:
        """End writers of the upload and free its parts. Nothing there is no error."""
        ...

    async def uploads(self) -> list[str]:
        """Uploads that hold anything."""
        ...


class BlobStore(BlobReader, BlobWriter, Protocol):
    """Both sides."""

    reads_whole: bool
    """Whether `assemble` reads all of the bytes once more, so that a check may too at no cost."""
