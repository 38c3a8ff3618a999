"""What a layout on disk holds, seen as a registry shows it: repositories with tags, manifests, blobs and referrers.

A reference `ORGANIZATION/REPOSITORY:TAG` of `index.json` is a tag of that repository; other references are in none. To
a repository belongs what its tags lead to, and what refers to that: nothing else can be had through it, whoever knows
the digest. An entry without a reference is an attachment when its manifest names a subject.

Only `index.json` ever changes, and it is renamed into place: what was read of it holds until its inode is another.
"""

import asyncio
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ekiben.errors import DataLoss, InvalidArgument, NotFound
from services.content.digest import Digest
from services.content.images import INDEX, REF_NAME, Descriptor, attached
from services.content.images.resolving import made_index

log = logging.getLogger(__name__)

_MAX_MANIFEST_BYTES = 4 << 20
_REMEMBERED = 50_000
"""Manifests whose links are kept in memory; a few hundred bytes each."""


@dataclass(frozen=True)
class Links:
    """What a manifest says of others."""

    media_type: str
    subject: Digest | None
    shown: Descriptor | None
    """With a subject: what names it in an answer of the referrers API."""
    manifests: Sequence[Descriptor]
    blobs: Sequence[Descriptor]


@dataclass(frozen=True)
class Repository:
    """One repository at one time."""

    tags: Mapping[str, Descriptor]
    """In the order of `tag_order`."""
    manifests: Mapping[Digest, Descriptor]
    blobs: Mapping[Digest, Descriptor]
    referrers: Mapping[Digest, Sequence[Descriptor]]
    """Digest of a subject → what refers to it, by digest."""
    made: Mapping[Digest, bytes] = field(default_factory=dict)
    """Indexes that are in no file: of a tag that names an image for each of several platforms."""


def tag_order(tag: str) -> tuple[str, str]:
    """Sort by this: "case-insensitive alphanumeric order", distribution-spec 1.1."""
    return tag.lower(), tag


@dataclass
class _Index:
    key: tuple[int, ...] = ()
    tags: Mapping[str, Mapping[str, Sequence[Descriptor]]] = field(default_factory=dict)
    untagged: Sequence[Descriptor] = ()
    opened: dict[str, Repository] = field(default_factory=dict)


class Repositories:
    """The repositories of a layout. Reads only; others may write to the layout meanwhile."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = _Index()
        self._links: dict[Digest, Links] = {}
        self._reading = asyncio.Lock()

    async def names(self, organization: str) -> list[str]:
        """The repositories of an organization, in order."""
        index = await self._current()
        return sorted(name for name in index.tags if name.partition("/")[0] == organization)

    async def get(self, name: str) -> Repository | None:
        """A repository; None where it has no tag.

        Raises:
            DataLoss: `index.json` cannot be read (LAYOUT_DAMAGED).
        """
        index = await self._current()
        if name not in index.tags:
            return None
        if name not in index.opened:
            async with self._reading:
                if name not in index.opened:
                    index.opened[name] = await asyncio.to_thread(self._open, index, name)
        return index.opened[name]

    async def manifest(self, repository: Repository, descriptor: Descriptor) -> bytes:
        """The bytes of one of its manifests.

        Raises:
            NotFound: the layout is not whole (MANIFEST_NOT_FOUND).
            DataLoss: these are other bytes (MANIFEST_DAMAGED).
        """
        made = repository.made.get(descriptor.digest)
        return made if made is not None else await asyncio.to_thread(self._read, descriptor.digest)

    def path(self, digest: Digest) -> Path:
        """Where a blob lies."""
        return self._folder / "blobs" / "sha256" / digest.hex

    async def _current(self) -> _Index:
        key = await asyncio.to_thread(self._key)
        if key != self._index.key:
            async with self._reading:
                key = await asyncio.to_thread(self._key)
                if key != self._index.key:
                    await self._reload(key)
        return self._index

    async def _reload(self, key: tuple[int, ...]) -> None:
        try:
            self._index = await asyncio.to_thread(self._load, key)
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as exc:
            # Not every tool renames it into place: what was read last is whole, and the next request looks again.
            log.warning(
                "index.json of the images cannot be read", extra={"folder": str(self._folder), "cause": str(exc)}
            )
            if not self._index.key:
                raise DataLoss(
                    f"The index of the images cannot be read: {exc}. Restore index.json in the builder's layout.",
                    reason="LAYOUT_DAMAGED",
                ) from exc

    def _key(self) -> tuple[int, ...]:
        try:
            status = (self._folder / "index.json").stat()
        except FileNotFoundError:
            return ()
        return status.st_ino, status.st_mtime_ns, status.st_size

    def _load(self, key: tuple[int, ...]) -> _Index:
        if not key:
            return _Index()
        tags: dict[str, dict[str, list[Descriptor]]] = defaultdict(lambda: defaultdict(list))
        untagged = []
        for entry in _descriptors(json.loads((self._folder / "index.json").read_bytes())["manifests"]):
            name, colon, tag = entry.annotations.get(REF_NAME, "").rpartition(":")
            if colon and "/" in name and tag:
                tags[name][tag].append(entry)
            elif REF_NAME not in entry.annotations:
                untagged.append(entry)
        return _Index(key, tags, untagged)

    def _open(self, index: _Index, name: str) -> Repository:
        made: dict[Digest, bytes] = {}
        tags = {}
        for tag, entries in sorted(index.tags[name].items(), key=lambda each: tag_order(each[0])):
            if len({entry.digest for entry in entries}) == 1:
                tags[tag] = entries[-1]
            else:
                content = made_index(entries)
                digest = Digest(hashlib.sha256(content).hexdigest())
                made[digest] = content
                tags[tag] = Descriptor(INDEX, digest, len(content))
        referring = defaultdict(list)
        for entry in index.untagged:
            if (links := self._links_of(entry)) is not None and links.subject is not None:
                referring[links.subject].append(entry)
        manifests: dict[Digest, Descriptor] = {}
        blobs: dict[Digest, Descriptor] = {}
        referrers: dict[Digest, list[Descriptor]] = defaultdict(list)
        waiting = [*tags.values()]
        while waiting:
            found = waiting.pop()
            if found.digest in manifests:
                continue
            links = self._links_of(found, made.get(found.digest))
            media_type = links.media_type if links else found.media_type
            manifests[found.digest] = Descriptor(media_type, found.digest, found.size_bytes)
            waiting += referring[found.digest]
            if links is None:
                continue
            waiting += links.manifests
            blobs |= {blob.digest: blob for blob in links.blobs}
            if links.subject is not None and links.shown is not None:
                referrers[links.subject].append(links.shown)
        for each in referrers.values():
            each.sort(key=lambda descriptor: descriptor.digest)
        return Repository(tags, manifests, blobs, dict(referrers), made)

    def _links_of(self, manifest: Descriptor, content: bytes | None = None) -> Links | None:
        """What a manifest links to; None for one that is not there or no manifest, which is logged."""
        if manifest.digest in self._links:
            return self._links[manifest.digest]
        try:
            links = _links(manifest, json.loads(content or self._read(manifest.digest)))
        except (NotFound, DataLoss, InvalidArgument, ValueError, AttributeError, TypeError, RecursionError) as exc:
            log.warning("a manifest cannot be served", extra={"digest": str(manifest.digest), "cause": str(exc)})
            return None
        if len(self._links) >= _REMEMBERED:
            self._links.clear()
        self._links[manifest.digest] = links
        return links

    def _read(self, digest: Digest) -> bytes:
        try:
            with self.path(digest).open("rb") as file:
                content = file.read(_MAX_MANIFEST_BYTES + 1)
        except FileNotFoundError:
            raise NotFound(
                f"Manifest {digest} is named, but its bytes are gone: build the image again.",
                reason="MANIFEST_NOT_FOUND",
                digest=digest,
            ) from None
        if hashlib.sha256(content).hexdigest() != digest.hex:
            raise DataLoss(
                f"Manifest {digest} is damaged where it lies: build the image again.",
                reason="MANIFEST_DAMAGED",
                digest=digest,
            )
        return content


def _links(manifest: Descriptor, content: dict[str, Any]) -> Links:
    config = content.get("config")
    media_type = str(content.get("mediaType") or manifest.media_type)
    subjects = _descriptors([content["subject"]] if content.get("subject") else ())
    named = Descriptor(media_type, manifest.digest, manifest.size_bytes)
    return Links(
        media_type,
        subjects[0].digest if subjects else None,
        attached(named, content) if subjects else None,
        tuple(_descriptors(content.get("manifests") or ())),
        tuple(_descriptors([*([config] if config else ()), *(content.get("layers") or ())])),
    )


def _descriptors(values: Iterable[Any]) -> list[Descriptor]:
    """Those that can be read: a digest of another algorithm names nothing that lies here."""
    found = []
    for value in values:
        try:
            found.append(Descriptor.from_json(value))
        except InvalidArgument as exc:
            log.warning("a descriptor is passed over", extra={"cause": exc.message})
    return found
