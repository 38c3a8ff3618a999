"""The parts of one upload on disk, and how they become one file without being copied.

A client sends the parts of a large archive at once and out of order, all but the last of one size. So a part
is written straight to its place in one sparse file (`slot-<size>`), as if all had the size of the first to come;
if they have, joining is a truncation. A part that cannot be written there (it is there already, it is longer, or
its twin is under way) gets a file of its own and is copied when the upload is joined. Each received part has a small
record, `part-<number>.json`, renamed into place when its bytes are written: that rename is what replaces a part.

As parts come in, those from the first on are hashed in order, so that little is left to hash at the end: BentoML's
client gives the request that joins 60 seconds, whatever the size.

When the joined file has become a blob, `joined.json` says which parts it was made of: joining the same ones again, by a
client that did not hear of it or a registry that was killed before it named the blob, finds the blob instead of them.

Nothing here is synced. A record counts only within the boot of the machine in which it was written, so a loss
of power loses parts, and never takes unwritten bytes for written ones.
"""

import asyncio
import contextlib
import hashlib
import json
import mmap
import os
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from services.content.blobs import WHOLE, Part
from services.content.blobs.parts import busy, listed
from services.content.blobs.sink import BLOCK_BYTES, DIRECT_BYTES, open_direct
from services.content.files import write_whole

_MAX_SPARSE_BYTES = 8 << 40  # ext4 ends at 16 TiB
_COPY_BYTES = 4 << 20
_JOINED = "joined.json"


@dataclass(frozen=True, slots=True)
class Record:
    """Where a received part lies: `size_bytes` from `offset` of `file`; `digest` (hex) only of the whole."""

    number: int
    etag: str
    size_bytes: int
    file: str
    offset: int
    digest: str
    boot: str


@dataclass(frozen=True, slots=True)
class Joined:
    """What became of the upload: the blob of this digest (hex), made of these `[number, etag]` in order."""

    digest: str
    size_bytes: int
    parts: list[list[int | str]]

    def is_of(self, records: "Sequence[Record]") -> bool:
        """Whether it was made of exactly these parts."""
        return self.parts == [[record.number, record.etag] for record in records]


@dataclass
class Prefix:
    """How far the parts are hashed: exactly `done`, in this order."""

    done: list[Record] = field(default_factory=list)
    sha256: "hashlib._Hash" = field(default_factory=hashlib.sha256)


class Ingest:
    """The state of one upload. Used on the event loop by one process; methods without `async` are short."""

    def __init__(self, folder: Path, boot: str) -> None:
        self.folder = folder
        self._boot = boot
        self.records: dict[int, Record] = {}
        self.joined: Joined | None = None
        self._slot_bytes = 0
        self._writing: dict[int, int] = {}
        self._scopes: set[asyncio.Timeout] = set()
        self._idle = asyncio.Condition()
        self._sealed = False
        self._prefix = Prefix()
        self._hashing = asyncio.Lock()
        if folder.is_dir():
            self._load()

    def _load(self) -> None:
        for path in self.folder.glob("part-*.json"):
            with contextlib.suppress(ValueError, TypeError, OSError):
                record = Record(**json.loads(path.read_bytes()))
                if record.boot == self._boot:
                    self.records[record.number] = record
        with contextlib.suppress(ValueError, TypeError, OSError):
            self.joined = Joined(**json.loads((self.folder / _JOINED).read_bytes()))
        for path in self.folder.glob("slot-*"):
            self._slot_bytes = max(self._slot_bytes, int(path.name.removeprefix("slot-")))

    def parts(self) -> list[Part]:
        """What was received, by number."""
        return [Part(r.number, r.etag, r.size_bytes) for _, r in sorted(self.records.items())]

    def place(self, number: int, size_bytes: int) -> tuple[str, int, bool]:
        """Where a part goes: (file, offset, whether the file is its own)."""
        if number != WHOLE and size_bytes and number not in self.records and not self._writing.get(number):
            if size_bytes > self._slot_bytes:
                self._slot_bytes = size_bytes
            offset = (number - 1) * self._slot_bytes
            if offset + size_bytes <= _MAX_SPARSE_BYTES:
                return f"slot-{self._slot_bytes}", offset, False
        return f"own-{number:05d}-{secrets.token_hex(6)}", 0, True

    @contextlib.asynccontextmanager
    async def writing(self, number: int) -> AsyncIterator[None]:
        """Held while a part is received. `seal` ends it early, as FailedPrecondition (UPLOAD_BUSY)."""
        if self._sealed:
            raise busy(self.folder.name)
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._scopes.add(scope)
                try:
                    yield
                finally:
                    self._scopes.discard(scope)
        except TimeoutError:
            if scope.expired():
                raise busy(self.folder.name) from None
            raise

    def hold(self, number: int) -> None:
        """Bytes of this part may be written by a thread from now on."""
        self._writing[number] = self._writing.get(number, 0) + 1

    async def release(self, number: int) -> None:
        """No thread writes these bytes any more."""
        self._writing[number] -= 1
        if not self._writing[number]:
            del self._writing[number]
        async with self._idle:
            self._idle.notify_all()

    @contextlib.asynccontextmanager
    async def seal(self, *, wait: bool = False) -> AsyncIterator[None]:
        """Take no parts, end those under way, and wait until no thread writes.

        Raises:
            FailedPrecondition: sealed by another call and not `wait` (UPLOAD_BUSY).
        """
        async with self._idle:
            if self._sealed and not wait:
                raise busy(self.folder.name)
            await self._idle.wait_for(lambda: not self._sealed)
            self._sealed = True
        try:
            for scope in list(self._scopes):
                scope.reschedule(asyncio.get_running_loop().time())
            async with self._idle:
                await self._idle.wait_for(lambda: not self._writing)
            yield
        finally:
            self._sealed = False
            async with self._idle:
                self._idle.notify_all()

    def keep(self, record: Record) -> None:
        """Let a written part count, in place of an earlier one."""
        path = self.folder / f"part-{record.number:05d}.json"
        write_whole(path, json.dumps(asdict(record)).encode(), durable=False)
        earlier = self.records.get(record.number)
        self.records[record.number] = record
        if earlier is not None:
            if any(done.number == record.number for done in self._prefix.done):
                self._prefix = Prefix()
            if earlier.file.startswith("own-") and earlier.file != record.file:
                (self.folder / earlier.file).unlink(missing_ok=True)

    def listed(self, wanted: Sequence[tuple[int, str]]) -> list[Record]:
        """The records of the parts that the caller lists. Raises FailedPrecondition (UPLOAD_INCOMPLETE)."""
        return listed(self.records, wanted, self.folder.name)

    def become(self, digest: str, size_bytes: int, records: Sequence[Record]) -> None:
        """Write down that the joined file is about to become a blob."""
        self.joined = Joined(digest, size_bytes, [[record.number, record.etag] for record in records])
        write_whole(self.folder / _JOINED, json.dumps(asdict(self.joined)).encode(), durable=False)

    def drop_lost(self) -> None:
        """Forget that there was a blob, and the parts whose bytes went into it."""
        self.joined = None
        (self.folder / _JOINED).unlink(missing_ok=True)
        for number, record in list(self.records.items()):
            if not (self.folder / record.file).exists():
                del self.records[number]
                (self.folder / f"part-{number:05d}.json").unlink(missing_ok=True)

    async def hash_ahead(self) -> None:
        """Hash the parts that are there from the first on, unless another call does."""
        if self._hashing.locked() or WHOLE in self.records:
            return
        async with self._hashing:
            while (following := self.records.get(len(self._prefix.done) + 1)) is not None and not self._sealed:
                await self._hash_one(self._prefix, following)

    async def sha256_of(self, records: Sequence[Record]) -> str:
        """Hex digest of the parts in this order, going on from what was hashed ahead."""
        async with self._hashing:
            prefix = self._prefix
            if prefix.done != list(records[: len(prefix.done)]):
                prefix = Prefix()
            for record in records[len(prefix.done) :]:
                await self._hash_one(prefix, record)
            return prefix.sha256.hexdigest()

    async def _hash_one(self, prefix: Prefix, record: Record) -> None:
        sha256 = prefix.sha256.copy()  # a thread whose caller was cancelled spoils a copy only
        path = self.folder / record.file
        if record.size_bytes:
            await asyncio.to_thread(_hash_extent, sha256, path, record.offset, record.size_bytes)
        if self.records.get(record.number) is record:
            prefix.sha256 = sha256
            prefix.done.append(record)

    def join(self, records: Sequence[Record]) -> Path:
        """One file of these parts in order. Blocks; in a thread, while sealed. Can be repeated after a failure."""
        if len(records) == 1 and records[0].offset == 0 and records[0].file.startswith("own-"):
            return self.folder / records[0].file
        ends = list(_ends(records))
        total = ends[-1]
        base = self._base(records, ends)
        path = self.folder / (base or f"joined-{secrets.token_hex(6)}")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            for record, end in zip(records, ends, strict=True):
                if record.size_bytes and record.file != base:
                    _copy(self.folder / record.file, record.offset, fd, end - record.size_bytes, record.size_bytes)
            os.ftruncate(fd, total)
        except BaseException:
            if base is None:
                path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        return path

    @staticmethod
    def _base(records: Sequence[Record], ends: Sequence[int]) -> str | None:
        """The slot file that already has its parts in their final places, if there is one."""
        held: dict[str, int] = {}
        for record, end in zip(records, ends, strict=True):
            if not record.size_bytes or not record.file.startswith("slot-"):
                continue
            in_place = record.offset == end - record.size_bytes
            held[record.file] = held.get(record.file, 0) + record.size_bytes if in_place else -(1 << 62)
        best = max(held, key=lambda file: held[file], default=None)
        return best if best is not None and held[best] > 0 else None


def _ends(records: Sequence[Record]) -> Iterator[int]:
    end = 0
    for record in records:
        end += record.size_bytes
        yield end


def _hash_extent(sha256: "hashlib._Hash", path: Path, offset: int, size_bytes: int) -> None:
    """Hash what lies in a file, past the page cache if it was written so."""
    direct = offset % BLOCK_BYTES == 0 and size_bytes >= DIRECT_BYTES
    fd = open_direct(path, os.O_RDONLY) if direct else -1
    if fd < 0:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        buffer = memoryview(mmap.mmap(-1, _COPY_BYTES))
        while size_bytes:
            got = min(os.preadv(fd, [buffer], offset), size_bytes)
            if not got:
                raise OSError(f"{path} ends {size_bytes} bytes early")
            sha256.update(buffer[:got])
            offset, size_bytes = offset + got, size_bytes - got
    finally:
        os.close(fd)


def _copy(source: Path, source_offset: int, fd: int, offset: int, size_bytes: int) -> None:
    """In the kernel; without any copying on file systems that share extents."""
    with source.open("rb", buffering=0) as file:
        while size_bytes:
            if hasattr(os, "copy_file_range"):
                copied = os.copy_file_range(file.fileno(), fd, min(size_bytes, 1 << 30), source_offset, offset)
            else:  # not Linux
                copied = os.pwrite(fd, os.pread(file.fileno(), min(size_bytes, _COPY_BYTES), source_offset), offset)
            if not copied:
                raise OSError(f"{source} ends {size_bytes} bytes early")
            source_offset, offset, size_bytes = source_offset + copied, offset + copied, size_bytes - copied
