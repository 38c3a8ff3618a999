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
from collections.abc import AsyncIterable, AsyncIterator, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ekiben.errors import DataLoss, InvalidArgument, NotFound
from services.content.digest import Digest
from services.content.files import make_folder, storage_error, sync_folder, write_whole
from services.content.images import INDEX, MANIFEST, REF_NAME, BlobsMissing, Descriptor, Image, Platform, attached
from services.content.images.keeping import keep
from services.content.images.resolving import (
    MANIFESTS,
    MAX_MANIFEST_BYTES,
    damaged,
    for_platform,
    made_index,
    object_of,
    read_json,
    unexpected,
)

_CHUNK = 1 << 20


class LayoutImageStore:
    """An image layout; made when it is written to and not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._blobs = folder / "blobs" / "sha256"
        self._known: dict[Digest, tuple[Digest | None, Descriptor]] = {}
        """By digest of a manifest: what it is attached to, and what names it. Content by digest never changes."""
        self._made: dict[Digest, bytes] = {}
        """Indexes that are in no file: of references that name images for several platforms."""

    @property
    def name(self) -> str:
        """See ImageStore."""
        return f"oci:{self._folder}"

    async def size(self, digest: Digest) -> int | None:
        """See ImageStore. Who asks is about to use it: it counts as new for `collecting`."""
        return await asyncio.to_thread(self._size, self._blobs / digest.hex)

    async def write(self, chunks: AsyncIterable[bytes], expected: Descriptor | None = None) -> tuple[Digest, int]:
        """See ImageStore."""
        await asyncio.to_thread(self._prepare)
        temporary = self._blobs / f".{secrets.token_hex(8)}"
        try:
            with open(temporary, "xb", buffering=0) as file:  # noqa: ASYNC230 - opened once, written in threads
                digest, size = await keep(file, chunks)
            if expected is not None and (digest, size) != (expected.digest, expected.size_bytes):
                raise unexpected(expected, digest)
            temporary.chmod(0o644)
            temporary.rename(self._blobs / digest.hex)
            await asyncio.to_thread(sync_folder, self._blobs)
        except OSError as exc:
            raise storage_error(exc, self.name) from exc
        finally:
            temporary.unlink(missing_ok=True)
        return digest, size

    async def read(self, descriptor: Descriptor) -> AsyncIterator[bytes]:
        """See ImageStore."""
        if (made := self._made.get(descriptor.digest)) is not None:
            yield made
            return
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
            raise damaged(str(self._folder), descriptor.digest)

    async def resolve(self, reference: str, platform: Platform) -> tuple[Descriptor, Image]:
        """See ImageStore. An empty reference means the only image of the layout."""
        return await for_platform(
            self, await self._named(reference), platform, f"{self._folder}:{reference}".rstrip(":")
        )

    async def find(self, reference: str) -> Descriptor:
        """See ImageStore; as `resolve`. For images of several platforms under one name it is an index of them all."""
        named = await self._named(reference)
        if len({each.digest for each in named}) == 1:
            return named[-1]
        content = made_index(named)
        found = Descriptor(INDEX, Digest(hashlib.sha256(content).hexdigest()), len(content))
        self._made[found.digest] = content
        return found

    async def attach(self, manifest: bytes, media_type: str) -> Descriptor:
        """See ImageStore. Attached manifests stand in `index.json` without a name, as oras keeps them."""
        if not isinstance(object_of(manifest, "The manifest").get("subject"), dict):
            raise InvalidArgument("The manifest has no subject to be attached to.", reason="MANIFEST_INVALID")
        digest, size = await self.write(_one(manifest))
        descriptor = attached(Descriptor(media_type, digest, size), json.loads(manifest))
        await asyncio.to_thread(self._add, descriptor)
        return descriptor

    async def referrers(self, subject: Digest) -> Sequence[Descriptor]:
        """See ImageStore."""
        found = {}
        for entry in await self.entries():
            if entry.media_type in (MANIFEST, INDEX) and REF_NAME not in entry.annotations:
                of, descriptor = await self._subject(entry)
                if of == subject:
                    found[entry.digest] = descriptor
        return [found[digest] for digest in sorted(found)]

    async def keep(self, manifest: bytes, media_type: str) -> Descriptor:
        """See ImageStore."""
        return Descriptor(media_type, *await self.write(_one(manifest)))

    async def references(self) -> Sequence[str]:
        """See ImageStore."""
        return sorted({each.annotations[REF_NAME] for each in await self.entries() if REF_NAME in each.annotations})

    async def mount(self, descriptor: Descriptor, origin: str) -> bool:
        """See ImageStore. Files are copied, so that damage to one layout is not damage to another."""
        return False

    async def entries(self) -> list[Descriptor]:
        """What `index.json` names, with and without references."""
        return [Descriptor.from_json(each) for each in (await asyncio.to_thread(self.index))["manifests"]]

    async def _named(self, reference: str) -> list[Descriptor]:
        """Those entries that a reference or a digest names: several where each is for another platform."""
        entries = [
            each
            for each in await self.entries()
            if REF_NAME in each.annotations or (not each.artifact_type and (await self._subject(each))[0] is None)
        ]
        if reference.startswith("sha256:"):
            named = [each for each in entries if str(each.digest) == reference][:1] or await self._kept(reference)
        else:
            named = [each for each in entries if not reference or each.annotations.get(REF_NAME) == reference]
        if not named or (not reference and len({each.digest for each in named}) > 1):
            if not await asyncio.to_thread((self._folder / "index.json").is_file):
                raise NotFound(
                    f"There is no image layout in {self._folder}: it has no index.json.",
                    reason="IMAGE_NOT_FOUND",
                    image=reference,
                )
            there = sorted(each.annotations.get(REF_NAME, str(each.digest)) for each in entries)
            wanted = f"no image {reference!r}" if reference or not there else "several images; name one"
            raise NotFound(
                f"{self._folder} has {wanted}; it has: {', '.join(there) or 'nothing'}.",
                reason="IMAGE_NOT_FOUND",
                image=reference,
            )
        return named

    async def _kept(self, digest: str) -> list[Descriptor]:
        """A manifest that has no entry of its own, as those that an index lists."""
        if (made := self._made.get(Digest.parse(digest))) is not None:
            return [Descriptor(INDEX, Digest.parse(digest), len(made))]
        size = await self.size(Digest.parse(digest))
        if size is None or size > MAX_MANIFEST_BYTES:
            return []
        try:
            content = await read_json(self, Descriptor("", Digest.parse(digest), size))
        except InvalidArgument:
            return []  # a layer, or something else that is no manifest
        kind = str(content.get("mediaType") or (INDEX if "manifests" in content else MANIFEST))
        return [Descriptor(kind, Digest.parse(digest), size)] if {"config", "manifests"} & content.keys() else []

    async def _subject(self, entry: Descriptor) -> tuple[Digest | None, Descriptor]:
        """What an entry is attached to, if it is; remembered, since a layout lists all its attachments at once."""
        if entry.digest not in self._known:
            try:
                manifest = await read_json(self, entry)
                subject = manifest.get("subject")
                of = Descriptor.from_json(subject).digest if isinstance(subject, dict) else None
                self._known[entry.digest] = (of, attached(entry, manifest))
            except (NotFound, DataLoss, InvalidArgument):
                return None, entry  # one that is damaged keeps nobody from the others
        return self._known[entry.digest]

    async def tag(self, reference: str, manifest: bytes, media_type: str, platform: Platform | None) -> Descriptor:
        """See ImageStore."""
        digest, size = await self.write(_one(manifest))
        named = {REF_NAME: reference} if reference else {}
        descriptor = Descriptor(media_type, digest, size, named, platform)
        await asyncio.to_thread(self._add, descriptor)
        return descriptor

    async def move(self, references: Collection[str], to: Descriptor, *, away: Collection[str] = ()) -> None:
        """Let references name one manifest that is kept, and others nothing, in one step.

        Whatever they named before, for whichever platform, is not named by them any more.
        """
        await asyncio.to_thread(self._move, references, to, {*references, *away})

    def _move(self, references: Collection[str], to: Descriptor, replaced: Collection[str]) -> None:
        with self.locked():
            self._check_whole(to)
            index = self.index()
            kept = [each for each in index["manifests"] if _named(each) not in replaced]
            kept += [replace(to, annotations={REF_NAME: reference}).to_json() for reference in references]
            self.put_index({**index, "manifests": kept})

    @staticmethod
    def _size(path: Path) -> int | None:
        with contextlib.suppress(OSError):  # a layout that is only read may not be touched, and is not collected
            os.utime(path)
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return None

    def _check_whole(self, descriptor: Descriptor) -> None:
        """Raise BlobsMissing where something that a manifest needs is not here. Call it with the index locked."""
        missing, waiting = [], [descriptor]
        while waiting:
            each = waiting.pop()
            path = self._blobs / each.digest.hex
            if not path.exists():
                missing.append(each.digest)
            elif each.media_type in MANIFESTS:
                content = object_of(path.read_bytes(), str(each.digest))
                parts = [content.get("config"), *(content.get("layers") or ()), *(content.get("manifests") or ())]
                waiting += [Descriptor.from_json(part) for part in parts if part and not part.get("urls")]
        if missing:
            raise BlobsMissing(self.name, missing)

    def _prepare(self) -> None:
        make_folder(self._blobs, 0o755)
        marker = self._folder / "oci-layout"
        if not marker.exists():
            write_whole(marker, b'{"imageLayoutVersion":"1.0.0"}', 0o644)

    def index(self) -> dict[str, Any]:
        """What `index.json` says. Blocks."""
        try:
            index = object_of((self._folder / "index.json").read_bytes(), "index.json")
        except (FileNotFoundError, NotADirectoryError):
            return {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}
        if not isinstance(index.get("manifests"), list):
            raise InvalidArgument(f"{self._folder}/index.json lists no manifests.", reason="MANIFEST_INVALID")
        return index

    def _add(self, descriptor: Descriptor) -> None:
        with self.locked():
            if not descriptor.artifact_type:
                self._check_whole(descriptor)
            index = self.index()
            index["manifests"] = [each for each in index["manifests"] if not _replaces(descriptor, each)]
            index["manifests"].append(descriptor.to_json())
            self.put_index(index)

    async def restore(self, references: Collection[str], to: Descriptor) -> None:
        """Let those of the references that name nothing name a manifest that is kept; the others stay as they are."""
        await asyncio.to_thread(self._restore, references, to)

    def _restore(self, references: Collection[str], to: Descriptor) -> None:
        with self.locked():
            index = self.index()
            there = {_named(each) for each in index["manifests"]}
            missing = [reference for reference in references if reference not in there]
            if missing:
                self._check_whole(to)
                named = [replace(to, annotations={REF_NAME: reference}).to_json() for reference in missing]
                self.put_index({**index, "manifests": [*index["manifests"], *named]})

    async def untag(
        self, references: Collection[str], of: Collection[Digest] | None = None, *, before: float | None = None
    ) -> None:
        """Let references name nothing any more; what they named is garbage unless others name it.

        A reference that was moved since somebody looked stays: one that names something else than manifests `of`
        those digests, or, with `before`, a manifest that was written since that time.
        """
        digests = None if of is None else {str(digest) for digest in of}
        await asyncio.to_thread(self._remove, frozenset(references), digests, before)

    def _remove(self, references: Collection[str], digests: Collection[str] | None, before: float | None) -> None:
        def goes(entry: dict[str, Any]) -> bool:
            if _named(entry) not in references or (digests is not None and entry["digest"] not in digests):
                return False
            return before is None or not self.is_new(Digest.parse(entry["digest"]), before)

        if not self._folder.is_dir():
            return
        with self.locked():
            index = self.index()
            kept = [each for each in index["manifests"] if not goes(each)]
            if len(kept) < len(index["manifests"]):
                self.put_index({**index, "manifests": kept})

    def is_new(self, digest: Digest, before: float) -> bool:
        """Whether a blob was written, or asked for, at that time or since. Blocks."""
        try:
            return (self._blobs / digest.hex).stat().st_mtime >= before
        except FileNotFoundError:
            return False

    def put_index(self, index: dict[str, Any]) -> None:
        """Replace `index.json`. Call it with the index locked. Blocks."""
        try:
            write_whole(self._folder / "index.json", json.dumps(index, indent=1).encode(), 0o644)
        except OSError as exc:
            raise storage_error(exc, self.name) from exc

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone with `index.json` and with what it names, among all processes. Blocks."""
        with open(self._folder / ".lock", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _named(entry: dict[str, Any]) -> str | None:
    return (entry.get("annotations") or {}).get(REF_NAME)


def _replaces(descriptor: Descriptor, entry: dict[str, Any]) -> bool:
    """Whether an entry of `index.json` gives way to another: one of its name and platform, or the same attachment."""
    if descriptor.artifact_type or entry.get("artifactType"):
        return bool(entry.get("digest") == str(descriptor.digest))
    if (entry.get("annotations") or {}).get(REF_NAME) != descriptor.annotations.get(REF_NAME):
        return False
    if descriptor.platform is None:
        return True  # an index, or what is for no platform: the name is its alone
    there, wanted = entry.get("platform") or {}, descriptor.platform
    if there.get("architecture") is None:
        return True
    same = (there.get("os"), there["architecture"]) == (wanted.os, wanted.architecture)
    # One without a variant may be for any of them (arm64 and arm64/v8 are the same), and would be found in its place.
    return same and (not wanted.variant or there.get("variant") in (None, "", wanted.variant))


async def _one(chunk: bytes) -> AsyncIterator[bytes]:
    yield chunk
