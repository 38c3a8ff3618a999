"""Blobs as files: `content/sha256/ab/abcd…`, and `uploads/<upload>/` for what is on its way.

One process owns the folder (a lock says so), so what is under way is known in memory. A blob is synced before it
is renamed to its digest, and its folder after that.
"""

import asyncio
import contextlib
import fcntl
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ParamSpec, TypeVar

from ekiben.errors import FailedPrecondition, InvalidArgument, NotFound
from services.content.blobs import MAX_PART_NUMBER, WHOLE, Blob, Check, Part
from services.content.blobs.ingest import Ingest, Record
from services.content.blobs.parts import incomplete, wrong_digest, wrong_size
from services.content.blobs.sink import Sink
from services.content.blobs.source import Source
from services.content.digest import Digest
from services.content.files import make_folder, storage_error, sync_folder

P = ParamSpec("P")
T = TypeVar("T")

_UPLOAD = re.compile(r"[A-Za-z0-9][-A-Za-z0-9]{0,63}")
_READ_BYTES = 1 << 20
_THREADS = 8
"""Enough to keep two cores busy with writes and hashes of several parts; more would only queue at the disk."""
RESERVE_BYTES = 64 << 20
"""Kept free: the database beside the blobs must still be able to write down that the disk is full."""


@contextlib.asynccontextmanager
async def open_filesystem(root: Path) -> AsyncIterator["FilesystemBlobStore"]:
    """Open the store in `root`, made when absent.

    Raises:
        FailedPrecondition: another process has it open (BLOBS_IN_USE).
    """
    make_folder(root)
    fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FailedPrecondition(
                f"The blobs in {str(root)!r} are in use by another process. Stop it first.",
                reason="BLOBS_IN_USE",
                path=root,
            ) from None
        with ThreadPoolExecutor(_THREADS, "blobs") as pool:
            yield FilesystemBlobStore(root, pool)
    finally:
        os.close(fd)


@contextlib.asynccontextmanager
async def read_filesystem(root: Path) -> AsyncIterator["FilesystemBlobStore"]:
    """Open the store in `root` to read beside the process that owns it: a file there is whole and never changes.

    Raises:
        NotFound: there is none (BLOBS_NOT_FOUND).
    """
    if not (root / "content").is_dir():
        raise NotFound(f"There are no blobs in {str(root)!r}.", reason="BLOBS_NOT_FOUND", path=root)
    with ThreadPoolExecutor(_THREADS, "blobs") as pool:
        yield FilesystemBlobStore(root, pool)


class FilesystemBlobStore:
    """The BlobStore of one machine. See the port for its promises."""

    reads_whole = False
    """Bytes are hashed as they come in."""

    def __init__(self, root: Path, pool: ThreadPoolExecutor) -> None:
        self._content = root / "content" / "sha256"
        self._uploads = root / "uploads"
        make_folder(self._content)
        make_folder(self._uploads)
        self._pool = pool
        self._ingests: dict[str, Ingest] = {}
        self._boot = _boot_id()

    # Reading

    def path(self, digest: Digest) -> Path:
        """Where the blob lies, or would."""
        return self._content / digest.hex[:2] / digest.hex

    async def read_url(self, digest: Digest, *, expire_time: datetime) -> None:
        """Files have no URL of their own."""

    async def stat(self, digest: Digest) -> Blob:
        """Size and age of a blob. Raises NotFound (BLOB_NOT_FOUND)."""
        try:
            status = await self._run(self.path(digest).stat)
        except FileNotFoundError:
            raise _no_blob(digest) from None
        return Blob(digest, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    async def read(self, digest: Digest, *, offset: int = 0, size_bytes: int | None = None) -> AsyncIterator[bytes]:
        """Stream a blob in chunks of at most 1 MiB. Raises NotFound (BLOB_NOT_FOUND)."""
        left = sys.maxsize if size_bytes is None else size_bytes
        try:
            file = await self._run(lambda: self.path(digest).open("rb", buffering=0))
        except FileNotFoundError:
            raise _no_blob(digest) from None
        with file:
            file.seek(offset)
            while chunk := await self._run(file.read, min(_READ_BYTES, left)):
                left -= len(chunk)
                yield chunk

    async def inspect(self, digest: Digest, check: Check) -> None:
        """Call `check` with the bytes of a blob. Raises NotFound (BLOB_NOT_FOUND)."""
        try:
            await self._run(_check, check, self.path(digest), 0, 0)
        except FileNotFoundError:
            raise _no_blob(digest) from None

    async def blobs(self) -> AsyncIterator[Blob]:
        """Every blob, in no order."""
        for shard in await self._run(lambda: list(self._content.iterdir())):
            for path, status in await self._run(_list_files, shard):
                yield Blob(Digest(path.name), status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    async def delete(self, digest: Digest) -> None:
        """Remove a blob; one that is not there is no error."""

        def remove() -> None:
            path = self.path(digest)
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                sync_folder(path.parent)

        await self._run(remove)

    # Writing

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
        """Keep one part, checked before it replaces an earlier one. See BlobWriter.write for the errors."""
        if not WHOLE <= number <= MAX_PART_NUMBER:
            raise InvalidArgument(
                f"Part number {number} is not between 0 and {MAX_PART_NUMBER:,}.", reason="PART_NUMBER_INVALID"
            )
        self._ask_for_space(size_bytes)
        ingest = self._ingest(upload)
        async with ingest.writing(number):
            make_folder(ingest.folder)
            record = await self._receive(ingest, number, source, size_bytes, digest, check)
            ingest.keep(record)
            with contextlib.suppress(FileNotFoundError):
                await ingest.hash_ahead()
            return Part(record.number, record.etag, record.size_bytes)

    async def _receive(
        self,
        ingest: Ingest,
        number: int,
        source: Source,
        size_bytes: int,
        digest: Digest | None,
        check: Check | None,
    ) -> Record:
        file, offset, own = ingest.place(number, size_bytes)
        path = ingest.folder / file
        ingest.hold(number)
        sink: Sink | None = None
        kept = False
        try:
            sink = Sink(self._pool, path, offset, size_bytes, create=own, sha256=number == WHOLE or digest is not None)
            await sink.take(source)
            if sink.size_bytes != size_bytes:
                raise wrong_size(size_bytes, str(sink.size_bytes))
            if await source.readinto(memoryview(bytearray(1))):
                raise wrong_size(size_bytes, "more")
            hexdigest = sink.sha256_hex if number == WHOLE or digest is not None else ""
            if digest is not None and hexdigest != digest.hex:
                raise wrong_digest(digest, Digest(hexdigest))
            if check is not None:
                await self._run(_check, check, path, offset, size_bytes)
            kept = True
            etag = f'"{hexdigest or f"{sink.crc32:08x}-{size_bytes:x}"}"'
            return Record(number, etag, size_bytes, file, offset, hexdigest if number == WHOLE else "", self._boot)
        except OSError as exc:
            raise storage_error(exc) from exc
        finally:
            # Shielded: whoever cancels may go, but the place is free only when no thread writes there.
            await asyncio.shield(asyncio.ensure_future(_end(ingest, number, sink, path if own and not kept else None)))

    async def write_url(
        self, upload: str, number: int, *, expire_time: datetime, size_bytes: int | None = None
    ) -> None:
        """Files have no URL of their own."""

    async def parts(self, upload: str) -> list[Part]:
        """The parts received so far, by number."""
        return self._ingest(upload).parts()

    @contextlib.asynccontextmanager
    async def assemble(
        self, upload: str, parts: Sequence[tuple[int, str]], *, check: Check | None = None
    ) -> AsyncIterator["FileAssembly"]:
        """Join parts. See BlobWriter.assemble."""
        ingest = self._ingest(upload)
        async with ingest.seal():
            if ingest.joined is not None and not self.path(Digest(ingest.joined.digest)).exists():
                ingest.drop_lost()
            records = ingest.listed(parts)
            if ingest.joined is not None and ingest.joined.is_of(records):
                joined = ingest.joined
                yield FileAssembly(self, ingest, records, None, Digest(joined.digest), joined.size_bytes)
                return
            if ingest.joined is not None:
                ingest.drop_lost()
                records = ingest.listed(parts)
            size_bytes = sum(record.size_bytes for record in records)
            try:
                path = await self._run(ingest.join, records)
                digest = Digest(records[0].digest or await ingest.sha256_of(records))
                if check is not None and records[0].number != WHOLE:
                    await self._run(_check, check, path, 0, size_bytes)
                await self._run(_sync, path)
            except OSError as exc:
                raise storage_error(exc) from exc
            yield FileAssembly(self, ingest, records, path, digest, size_bytes)

    async def discard(self, upload: str) -> None:
        """End writers of the upload and free its parts."""
        ingest = self._ingest(upload)
        async with ingest.seal(wait=True):
            ingest.records.clear()
            await self._run(lambda: shutil.rmtree(ingest.folder, ignore_errors=True))
            self._ingests.pop(upload, None)

    async def uploads(self) -> list[str]:
        """Uploads that hold anything."""
        on_disk = await self._run(lambda: [path.name for path in self._uploads.iterdir() if path.is_dir()])
        return sorted({*on_disk, *self._ingests})

    def _ingest(self, upload: str) -> Ingest:
        if _UPLOAD.fullmatch(upload) is None:
            raise NotFound(f"Upload {upload[:64]!r} does not exist.", reason="UPLOAD_NOT_FOUND", upload=upload[:64])
        ingest = self._ingests.get(upload)
        if ingest is None:
            ingest = Ingest(self._uploads / upload, self._boot)
            self._ingests[upload] = ingest
        return ingest

    def _ask_for_space(self, size_bytes: int) -> None:
        """Say no before the bytes are sent rather than after."""
        status = os.statvfs(self._uploads)
        if size_bytes + RESERVE_BYTES > status.f_bavail * status.f_frsize:
            raise storage_error(OSError(28, "no space left"))

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """In a thread. Waits for its end even when cancelled, so that nobody works on what a thread still uses."""
        future = asyncio.get_running_loop().run_in_executor(self._pool, lambda: function(*args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise


@dataclass(frozen=True)
class FileAssembly:
    """A joined file beside its parts; without a `path` it is the blob already."""

    store: FilesystemBlobStore
    ingest: Ingest
    records: Sequence[Record]
    path: Path | None
    digest: Digest
    size_bytes: int

    async def commit(self) -> Blob:
        """Rename the synced file to its digest, sync the folder. Of the upload's parts only what they were is left."""
        target = self.store.path(self.digest)

        def rename() -> os.stat_result:
            make_folder(target.parent)
            if self.path is not None:
                self.ingest.become(self.digest.hex, self.size_bytes, self.records)
                self.path.rename(target)
            sync_folder(target.parent)
            return target.stat()

        try:
            status = await self.store._run(rename)
        except FileNotFoundError:
            raise incomplete("The parts were used up by a blob that is gone", self.ingest.folder.name) from None
        except OSError as exc:
            raise storage_error(exc) from exc
        return Blob(self.digest, self.size_bytes, datetime.fromtimestamp(status.st_mtime, UTC))


async def _end(ingest: Ingest, number: int, sink: Sink | None, remove: Path | None) -> None:
    try:
        if sink is not None:
            await asyncio.wrap_future(sink.close())
        if remove is not None:
            remove.unlink(missing_ok=True)
    finally:
        await ingest.release(number)


def _check(check: Check, path: Path, offset: int, size_bytes: int) -> None:
    assert offset == 0
    with path.open("rb") as file:
        check(file)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _list_files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for path in folder.iterdir():
        if re.fullmatch("[0-9a-f]{64}", path.name):
            with contextlib.suppress(FileNotFoundError):
                found.append((path, path.stat()))
    return found


def _boot_id() -> str:
    """Names the time since the machine started. Elsewhere than on Linux a power loss is not told from a restart."""
    if sys.platform != "linux":
        return "unknown"
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _no_blob(digest: Digest) -> NotFound:
    return NotFound(f"Blob {digest} does not exist.", reason="BLOB_NOT_FOUND", digest=digest)
