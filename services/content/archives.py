"""The archives of models and bentos: checked before they are kept, unpacked where they run.

An archive is a tar, plain or gzipped, as a client sent it: names perhaps with a leading `./`, a bento with
`bento.yaml` and a model with `model.yaml` at its root.
"""

import asyncio
import contextlib
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from ekiben.errors import EkibenError
from services.content.digest import Digest
from services.content.fetching import Incoming, incoming, unavailable
from services.content.files import make_folder, storage_error, sync_folder
from services.content.tar import GzipSource, SeekableSource, Source, TarReader, refused

if TYPE_CHECKING:
    from ekiben.registry.v1 import registry_pb2_grpc

Kind = Literal["model", "bento"]
_DESCRIPTIONS = {"model": "model.yaml", "bento": "bento.yaml"}
_GZIP = b"\x1f\x8b"
_CHUNK_BYTES = 1 << 20


def check_archive(archive: Path | BinaryIO, kind: Kind) -> None:
    """Refuse an archive that is cut off, leads out of its folder, or holds anything but files and folders.

    Reads headers only (of a gzipped archive: everything). Blocks: call it in a thread.

    Raises:
        InvalidArgument: it is refused; the message says why (ARCHIVE_INVALID).
    """
    if isinstance(archive, Path):
        with archive.open("rb") as file:
            check_archive(file, kind)
        return
    end = archive.seek(0, os.SEEK_END)
    archive.seek(0)
    zipped = archive.read(2) == _GZIP
    archive.seek(0)
    source: Source = GzipSource(archive, end) if zipped else SeekableSource(archive)
    if not end:
        raise refused("it is empty")
    wanted = _DESCRIPTIONS[kind]
    found = False
    for member in TarReader(source):
        found = found or (member.path == wanted and not member.folder)
    if not found:
        raise refused(f"there is no {wanted} at its root, so it is no {kind}")


def unpack_archive(archive: Path, into: Path) -> None:
    """Unpack a checked archive into the folder `into`, which must not exist; all of it or nothing. Blocks."""
    with archive.open("rb") as file:
        zipped = file.read(2) == _GZIP
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        with _made_whole(into) as folder:
            _unpack(GzipSource(file, size) if zipped else SeekableSource(file), folder)


async def fetch_content(
    uploads: "registry_pb2_grpc.UploadsAsyncStub", blobs_address: str, resource: str, into: Path
) -> Digest:
    """Fetch the content of a model or a bento and unpack it as the folder `into`, unless that exists.

    The bytes are hashed and unpacked as they stream; `into` appears by a rename once they proved to be what the
    registry named. Returns the digest that the registry names for the resource at this moment.

    Args:
        uploads: stub of the registry's Uploads.
        blobs_address: the registry's bytes endpoint, `unix:/path` or `http://host:port`; not used
            for content that lies elsewhere.
        resource: `modelRepositories/…/models/…` or `bentoRepositories/…/bentos/…`.

    Raises:
        NotFound, FailedPrecondition: as SignDownload.
        DataLoss: other bytes than the digest says came (BLOB_CORRUPT).
        Unavailable: the bytes endpoint could not be reached or broke off (BLOBS_UNAVAILABLE).
        ResourceExhausted: no space to unpack it (STORAGE_FULL).
    """
    async with incoming(uploads, blobs_address, resource) as content:
        if into.exists():
            return content.digest
        unpacking = asyncio.create_task(asyncio.to_thread(_unpack_stream, content, into))
        try:
            await asyncio.shield(unpacking)
        except OSError as exc:
            raise unavailable(resource, exc) from exc
        finally:
            content.stop()
            await asyncio.wait([unpacking])
            unpacking.exception()
    return content.digest


def _unpack_stream(content: Incoming, into: Path) -> None:
    try:
        with _made_whole(into) as folder, content.checked() as source:
            _unpack(source, folder)
    except OSError as exc:
        raise storage_error(exc) from exc


@contextlib.contextmanager
def _made_whole(into: Path):  # type: ignore[no-untyped-def]
    """A folder beside `into` that is renamed to it at the end; one that appeared meanwhile is left."""
    make_folder(into.parent)
    folder = into.with_name(f".{into.name}.{secrets.token_hex(6)}")
    folder.mkdir(mode=0o700)
    try:
        yield folder
        try:
            folder.rename(into)
        except OSError:
            if not into.is_dir():
                raise
        sync_folder(into.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(source: Source, folder: Path) -> None:
    reader = TarReader(source)
    try:
        for member in reader:
            path = folder / member.path
            if member.folder:
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            # Nothing in `folder` is a link, since no member can be one: this writes below it.
            with open(path, "wb", buffering=0) as file:
                while data := reader.read(_CHUNK_BYTES):
                    file.write(data)
                os.fsync(file.fileno())
            path.chmod((member.mode & 0o755) | 0o600)
            with contextlib.suppress(OSError, OverflowError, ValueError):
                os.utime(path, (member.modify_time, member.modify_time))
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as exc:
        raise refused("one name is both a file and a folder") from exc
    except OSError as exc:
        raise storage_error(exc) from exc


__all__ = ["EkibenError", "Kind", "check_archive", "fetch_content", "unpack_archive"]
