"""An image in one file, for `docker load` and `podman load`: what `docker save` writes.

    blobs/sha256/<hex>            everything
    oci-layout, index.json        so that it is an OCI archive too, with what is attached to the image
    manifest.json                 Docker's own table of contents

Blobs go straight into a file beside, `.NAME.<random>.part`, one after the other, and the tag gives it its name: there
is a whole archive or none. A process that is killed leaves the part, which nobody reads: whoever writes an archive of
that name next takes it away, for it is locked no longer.
Source: moby's image/tarexport; OCI image-spec 1.1, image-layout.md.
"""

import asyncio
import contextlib
import errno
import fcntl
import glob
import hashlib
import io
import os
import re
import secrets
import tarfile
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ekiben.errors import FailedPrecondition, InvalidArgument, NotFound
from services.content.digest import Digest
from services.content.files import storage_error, sync_folder
from services.content.images import INDEX, REF_NAME, Descriptor, Image, Platform, attached, canonical
from services.content.images.resolving import INDEXES, damaged, for_platform, object_of, unexpected
from services.content.threads import in_thread

_CHUNK_BYTES = 1 << 20
_DOCKER_NAME = "io.containerd.image.name"
"""What containerd's importer reads in place of manifest.json's RepoTags."""
_TITLE = "org.opencontainers.image.title"


class ArchiveImageStore:
    """An archive that is written, once. Open it by `open_archive`."""

    def __init__(self, path: Path, file: io.FileIO) -> None:
        self._path = path
        self._file = file
        self._places: dict[Digest, tuple[int, int]] = {}
        """Where in the file a blob's bytes begin, and how many they are."""
        self._attached: dict[Digest, tuple[Digest, Descriptor]] = {}
        """By digest: what an attachment is attached to, and what names it."""
        self._writing = asyncio.Lock()
        self.whole = False
        """Whether the tag was given."""

    @property
    def name(self) -> str:
        """See ImageStore."""
        return f"docker-archive:{self._path}"

    async def size(self, digest: Digest) -> int | None:
        """See ImageStore."""
        return self._places[digest][1] if digest in self._places else None

    async def mount(self, descriptor: Descriptor, origin: str) -> bool:
        """See ImageStore."""
        return False

    async def write(self, chunks: AsyncIterable[bytes], expected: Descriptor | None = None) -> tuple[Digest, int]:
        """See ImageStore. One blob at a time: they lie one after the other."""
        if expected is not None and expected.digest in self._places:
            return expected.digest, expected.size_bytes
        async with self._writing:
            begun = self._file.seek(0, os.SEEK_END)
            try:
                digest, size = await self._append(chunks)
                if expected is not None and (digest, size) != (expected.digest, expected.size_bytes):
                    raise unexpected(expected, digest)
                if digest in self._places:
                    self._file.truncate(begun)
                    return digest, size
                os.pwrite(self._file.fileno(), _header(f"blobs/sha256/{digest.hex}", size), begun)
            except BaseException as exc:
                self._file.truncate(begun)
                if isinstance(exc, OSError):
                    raise storage_error(exc, self.name) from exc
                raise
            self._places[digest] = (begun + tarfile.BLOCKSIZE, size)
        return digest, size

    async def read(self, descriptor: Descriptor) -> AsyncIterator[bytes]:
        """See ImageStore."""
        if descriptor.digest not in self._places:
            raise NotFound(
                f"{self.name} has no blob {descriptor.digest}.", reason="BLOB_NOT_FOUND", digest=descriptor.digest
            )
        offset, size = self._places[descriptor.digest]
        hashed, end = hashlib.sha256(), offset + size
        while offset < end:
            chunk = await asyncio.to_thread(os.pread, self._file.fileno(), min(_CHUNK_BYTES, end - offset), offset)
            if not chunk:
                break
            hashed.update(chunk)
            offset += len(chunk)
            yield chunk
        if hashed.hexdigest() != descriptor.digest.hex or size != descriptor.size_bytes:
            raise damaged(self.name, descriptor.digest)

    async def keep(self, manifest: bytes, media_type: str) -> Descriptor:
        """See ImageStore."""
        return Descriptor(media_type, *await self.write(_one(manifest)))

    async def attach(self, manifest: bytes, media_type: str) -> Descriptor:
        """See ImageStore."""
        content = object_of(manifest, "The manifest")
        if not isinstance(content.get("subject"), dict):
            raise InvalidArgument("The manifest has no subject to be attached to.", reason="MANIFEST_INVALID")
        descriptor = attached(await self.keep(manifest, media_type), content)
        self._attached[descriptor.digest] = (Descriptor.from_json(content["subject"]).digest, descriptor)
        return descriptor

    async def referrers(self, subject: Digest) -> Sequence[Descriptor]:
        """See ImageStore."""
        return [descriptor for _, (of, descriptor) in sorted(self._attached.items()) if of == subject]

    async def find(self, reference: str) -> Descriptor:
        """See ImageStore: an archive is only written."""
        raise NotFound(
            f"{self.name} is written anew: it has no image {reference!r} yet.",
            reason="IMAGE_NOT_FOUND",
            image=reference,
        )

    async def resolve(self, reference: str, platform: Platform) -> tuple[Descriptor, Image]:
        """See ImageStore."""
        return await for_platform(self, [await self.find(reference)], platform, self.name)

    async def references(self) -> Sequence[str]:
        """See ImageStore."""
        return []

    async def tag(self, reference: str, manifest: bytes, media_type: str, platform: Platform | None) -> Descriptor:
        """See ImageStore: this ends the archive and gives it its name.

        Raises:
            FailedPrecondition: it is an index: such files hold one platform (IMAGE_UNSUPPORTED).
        """
        content = object_of(manifest, "The manifest")
        if media_type in INDEXES or "manifests" in content:
            raise FailedPrecondition(
                f"{self.name} holds an image for one platform, and this is for several. Name one by --platform, or "
                "write to oci:FOLDER or a registry.",
                reason="IMAGE_UNSUPPORTED",
                image=self.name,
            )
        named = _repo_tag(reference, content)
        names = {REF_NAME: named.rpartition(":")[2], _DOCKER_NAME: named} if named else {}
        kept = await self.keep(manifest, media_type)
        descriptor = Descriptor(media_type, kept.digest, kept.size_bytes, names, platform)
        entries = [descriptor, *(each for _, (_, each) in sorted(self._attached.items()))]
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [each.to_json() for each in entries]}
        table = [
            {
                "Config": _path_of(content["config"]),
                "RepoTags": [named] if named else None,
                "Layers": [_path_of(each) for each in content["layers"]],
            }
        ]
        await in_thread(self._end, {"index.json": canonical(index), "manifest.json": canonical(table)})
        return descriptor

    async def _append(self, chunks: AsyncIterable[bytes]) -> tuple[Digest, int]:
        """Write a blob at the end, behind room for its header: what it is called is known when it ended."""
        hashed, size = hashlib.sha256(), 0
        self._write(bytes(tarfile.BLOCKSIZE))
        async for chunk in chunks:
            await in_thread(self._take, hashed, chunk)  # or it would write behind what is cut off when it is cancelled
            size += len(chunk)
        self._write(bytes(-size % tarfile.BLOCKSIZE))
        return Digest(hashed.hexdigest()), size

    def _take(self, hashed: Any, chunk: bytes) -> None:
        hashed.update(chunk)
        self._write(chunk)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) or 0 :]

    def _end(self, files: dict[str, bytes]) -> None:
        try:
            self._file.seek(0, os.SEEK_END)
            for name, content in {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', **files}.items():
                self._write(_header(name, len(content)) + content + bytes(-len(content) % tarfile.BLOCKSIZE))
            self._write(bytes(2 * tarfile.BLOCKSIZE))
            os.fsync(self._file.fileno())
            Path(os.fsdecode(self._file.name)).rename(self._path)
            sync_folder(self._path.parent)
        except OSError as exc:
            raise storage_error(exc, self.name) from exc
        self.whole = True


@asynccontextmanager
async def open_archive(path: Path) -> AsyncIterator[ArchiveImageStore]:
    """An archive to write at `path`, in place of the file that is there; as it was, if it does not come to a tag.

    A link stays, and what it leads to is written.

    Raises:
        FailedPrecondition: there is no such folder, it may not be written to, or there is something that is no file: a
            device, say, would be taken away from all who use it (OUTPUT_NOT_WRITABLE).
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise _not_writable(path, os.strerror(errno.EISDIR))
    if os.path.lexists(path) and not path.is_file():
        raise _not_writable(path, "It is no regular file")
    try:
        _sweep(path)
        file = _begin(path)
    except OSError as exc:
        raise _not_writable(path, exc.strerror) from exc
    part = Path(os.fsdecode(file.name))
    store = ArchiveImageStore(path, file)
    try:
        yield store
    finally:
        file.close()
        if not store.whole:
            part.unlink(missing_ok=True)


def _begin(path: Path) -> io.FileIO:
    """A new file beside, locked for as long as it is written."""
    while True:
        file = io.FileIO(os.fspath(path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")), "x+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            swept = not os.path.lexists(file.name)
        except BlockingIOError:
            swept = True  # by somebody who has the lock
        except OSError:
            swept = False  # nobody has locks here
        if not swept:
            return file
        file.close()


def _sweep(path: Path) -> None:
    """Take away what others that were killed left beside; what somebody writes is locked."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if re.fullmatch(r"[0-9a-f]{12}\.part", part.name.removeprefix(f".{path.name}.")):
            with contextlib.suppress(OSError), part.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()


def _not_writable(path: Path, why: str | None) -> FailedPrecondition:
    return FailedPrecondition(
        f"{path} cannot be written: {why}. Name a file in a folder that is there and is yours.",
        reason="OUTPUT_NOT_WRITABLE",
        path=str(path),
    )


def _repo_tag(reference: str, manifest: dict[str, Any]) -> str:
    """`name:tag`, as Docker lists images. A tag alone gets the bento's name before it."""
    if ":" in reference:
        return reference
    title = str((manifest.get("annotations") or {}).get(_TITLE) or "").partition(":")[0].lower()
    title = title if re.fullmatch(r"[a-z0-9]+([._/-]+[a-z0-9]+)*", title) else ""
    return f"{title}:{reference}" if title and reference else ""


def _path_of(descriptor: Any) -> str:
    return f"blobs/sha256/{Descriptor.from_json(descriptor).digest.hex}"


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.GNU_FORMAT)  # one block, whatever the size


async def _one(chunk: bytes) -> AsyncIterator[bytes]:
    yield chunk
