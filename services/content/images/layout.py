"""Images in an OCI image layout: a folder that podman, skopeo, containerd and umoci read.

    oci-layout, index.json          what the layout is, and which references there are
    blobs/sha256/<hex>              everything else

Several processes may write at once: blobs are renamed into place, and `index.json` is replaced under a lock.
Source: OCI image-spec 1.1, image-layout.md.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from ekiben.errors import DataLoss, InvalidArgument, NotFound
from services.content.digest import Digest
from services.content.files import make_folder, storage_error, sync_folder, write_whole
from services.content.images import INDEX, REF_NAME, Descriptor, Image, Platform

_CHUNK = 1 << 20
_MAX_MANIFEST_BYTES = 4 << 20


class LayoutImageStore:
    """An image layout; made when it is written to and not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._blobs = folder / "blobs" / "sha256"

    async def size(self, digest: Digest) -> int | None:
        """See ImageStore."""
        try:
            return (await asyncio.to_thread((self._blobs / digest.hex).stat)).st_size
        except FileNotFoundError:
            return None

    async def write(self, chunks: AsyncIterator[bytes]) -> tuple[Digest, int]:
        """See ImageStore."""
        await asyncio.to_thread(self._prepare)
        temporary = self._blobs / f".{secrets.token_hex(8)}"
        hashed, size = hashlib.sha256(), 0
        try:
            with open(temporary, "xb", buffering=0) as file:  # noqa: ASYNC230 - opened once, written in threads
                async for chunk in chunks:
                    await asyncio.to_thread(_take, file, hashed, chunk)
                    size += len(chunk)
                await asyncio.to_thread(os.fsync, file.fileno())
            digest = Digest(hashed.hexdigest())
            temporary.chmod(0o644)
            temporary.rename(self._blobs / digest.hex)
            await asyncio.to_thread(sync_folder, self._blobs)
        except OSError as exc:
            raise storage_error(exc) from exc
        finally:
            temporary.unlink(missing_ok=True)
        return digest, size

    async def read(self, descriptor: Descriptor) -> AsyncIterator[bytes]:
        """See ImageStore."""
        path = self._blobs / descriptor.digest.hex
        hashed, size = hashlib.sha256(), 0
        try:
            file = path.open("rb", buffering=0)
        except FileNotFoundError:
            raise NotFound(
                f"{self._folder} has no blob {descriptor.digest}: the layout is not whole.",
                reason="BLOB_NOT_FOUND",
                digest=descriptor.digest,
            ) from None
        with file:
            while chunk := await asyncio.to_thread(file.read, _CHUNK):
                hashed.update(chunk)
                size += len(chunk)
                yield chunk
        if hashed.hexdigest() != descriptor.digest.hex or size != descriptor.size_bytes:
            raise DataLoss(
                f"Blob {descriptor.digest} of {self._folder} is damaged. Copy the image there again.",
                reason="BLOB_DAMAGED",
                digest=descriptor.digest,
            )

    async def resolve(self, reference: str, platform: Platform) -> tuple[Descriptor, Image]:
        """See ImageStore. An empty reference means the only image of the layout."""
        entries = [Descriptor.from_json(each) for each in (await asyncio.to_thread(self._index))["manifests"]]
        named = [each for each in entries if not reference or each.annotations.get(REF_NAME) == reference]
        if not named or (not reference and len({each.digest for each in named}) > 1):
            there = sorted(each.annotations.get(REF_NAME, str(each.digest)) for each in entries)
            wanted = f"no image {reference!r}" if reference or not there else "several images; name one"
            raise NotFound(
                f"{self._folder} has {wanted}; it has: {', '.join(there) or 'nothing'}.",
                reason="IMAGE_NOT_FOUND",
                image=reference,
            )
        return await self._for_platform(named, platform, reference)

    async def tag(self, reference: str, manifest: bytes, media_type: str, platform: Platform) -> Descriptor:
        """See ImageStore."""

        async def whole() -> AsyncIterator[bytes]:
            yield manifest

        digest, size = await self.write(whole())
        named = {REF_NAME: reference} if reference else {}
        descriptor = Descriptor(media_type, digest, size, named, platform)
        await asyncio.to_thread(self._add, descriptor)
        return descriptor

    async def _for_platform(
        self, entries: list[Descriptor], platform: Platform, reference: str
    ) -> tuple[Descriptor, Image]:
        there = []
        for entry in entries:
            content = await self._json(entry)
            if entry.media_type == INDEX or "manifests" in content:
                inner = [Descriptor.from_json(each) for each in content["manifests"]]
                with contextlib.suppress(NotFound):
                    return await self._for_platform(inner, platform, reference)
                there += [str(each.platform) for each in inner]
                continue
            config = await self._json(Descriptor.from_json(content["config"]))
            found = Platform(str(config.get("os")), str(config.get("architecture")), str(config.get("variant") or ""))
            if (found.os, found.architecture) == (platform.os, platform.architecture):
                layers = [Descriptor.from_json(each) for each in content["layers"]]
                return entry, Image(config, layers, content.get("annotations") or {})
            there.append(str(found))
        raise NotFound(
            f"{self._folder} has no image {reference!r} for {platform}; it has: {', '.join(there)}.",
            reason="IMAGE_NOT_FOUND",
            image=reference,
            platform=platform,
        )

    async def _json(self, descriptor: Descriptor) -> dict[str, Any]:
        if descriptor.size_bytes > _MAX_MANIFEST_BYTES:
            raise InvalidArgument(f"Manifest {descriptor.digest} is too large.", reason="MANIFEST_INVALID")
        data = b"".join([chunk async for chunk in self.read(descriptor)])
        return _object(data, str(descriptor.digest))

    def _prepare(self) -> None:
        make_folder(self._blobs, 0o755)
        marker = self._folder / "oci-layout"
        if not marker.exists():
            write_whole(marker, b'{"imageLayoutVersion":"1.0.0"}', 0o644)

    def _index(self) -> dict[str, Any]:
        try:
            index = _object((self._folder / "index.json").read_bytes(), "index.json")
        except FileNotFoundError:
            return {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}
        if not isinstance(index.get("manifests"), list):
            raise InvalidArgument(f"{self._folder}/index.json lists no manifests.", reason="MANIFEST_INVALID")
        return index

    def _add(self, descriptor: Descriptor) -> None:
        reference = descriptor.annotations.get(REF_NAME)
        with self._locked():
            index = self._index()
            index["manifests"] = [
                each
                for each in index["manifests"]
                if (each.get("annotations") or {}).get(REF_NAME) != reference
                or (each.get("platform") or {}).get("architecture")
                not in (None, descriptor.platform and descriptor.platform.architecture)
            ]
            index["manifests"].append(descriptor.to_json())
            write_whole(self._folder / "index.json", json.dumps(index, indent=1).encode(), 0o644)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._folder / ".lock", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _take(file: Any, hashed: Any, chunk: bytes) -> None:
    hashed.update(chunk)
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) :]


def _object(data: bytes, name: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as exc:
        raise InvalidArgument(f"{name} is not JSON: {exc}.", reason="MANIFEST_INVALID") from exc
    if not isinstance(found, dict):
        raise InvalidArgument(f"{name} is not an object.", reason="MANIFEST_INVALID")
    return found
