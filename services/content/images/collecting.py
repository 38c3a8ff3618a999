"""What a layout holds and nothing names any more: found, and removed without harm to images that are being made.

Whoever makes an image writes blobs, or asks for them, long before a manifest names them. Both make a blob *new*, and
only what is older than a grace period goes. That alone would leave a moment between the look and the removal; so both
naming a manifest and removing blobs happen with the index locked, and a manifest is named only if all of it is still
there. The worst that can come of a race is that the maker sends a layer again.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.content.digest import Digest
from services.content.images import REF_NAME
from services.content.images.layout import LayoutImageStore
from services.content.images.resolving import MAX_MANIFEST_BYTES

_BATCH = 64
"""Blobs that go while the index is locked once: builders wait for no more than that."""
_UNFINISHED_S = 6 * 3600
"""No chunk of a blob takes that long: whoever wrote it is gone."""
_ATTACHED_BY_TAG = re.compile(r".*:sha256-([0-9a-f]{64})(?:\.[a-z]+)?")
"""Source: OCI distribution-spec 1.1, "Referrers Tag Schema"; cosign's `.sig` and `.att`."""


@dataclass(frozen=True)
class Blob:
    """A file below `blobs`."""

    digest: Digest
    size_bytes: int
    written: float
    """Seconds since the epoch: when it was written, or asked for by one who wanted to use it."""


@dataclass(frozen=True)
class Contents:
    """What a layout holds."""

    blobs: int
    size_bytes: int
    garbage_blobs: int
    """Blobs that no reference leads to, those that are new included."""
    garbage_bytes: int
    shared_bytes: int
    """Bytes that would be there besides, had each reference's image its own copy of every layer."""


@dataclass(frozen=True)
class _Links:
    blobs: tuple[tuple[str, int], ...] = ()
    """Digest and size of configuration and layers."""
    manifests: tuple[tuple[str, int], ...] = ()
    """Of the images that an index lists."""
    subject: str = ""


@dataclass
class _Reached:
    blobs: set[str] = field(default_factory=set)
    entries: list[dict[str, Any]] = field(default_factory=list)
    """Those of `index.json` that stay."""


class LayoutCollector:
    """Looks through a layout and removes its garbage. All methods block; one object at a time in one thread."""

    def __init__(self, folder: Path) -> None:
        self._store = LayoutImageStore(folder)
        self._blobs = folder / "blobs" / "sha256"
        self._links: dict[str, _Links] = {}
        """By digest: content under a digest never changes."""

    def garbage(self, before: float) -> list[Blob]:
        """What `collect` would remove now."""
        reached = self._reach(before)
        return [blob for blob in self._old(before) if blob.digest.hex not in reached.blobs]

    def collect(self, before: float) -> list[Blob]:
        """Remove what no reference leads to and was written or asked for before that time; what was removed.

        Attachments go with what they are attached to. A crash in the middle leaves garbage for the next time.
        """
        if not self._blobs.is_dir():
            return []  # nothing was ever written, and there is nothing to lock
        found = self.garbage(before)  # reads the manifests while nobody has to wait
        removed: list[Blob] = []
        for begin in range(0, max(1, len(found)), _BATCH):
            with self._store.locked():
                reached = self._reach(before)
                index = self._store.index()
                if len(reached.entries) < len(index["manifests"]):
                    self._store.put_index({**index, "manifests": reached.entries})
                for blob in found[begin : begin + _BATCH]:
                    if blob.digest.hex not in reached.blobs and self._remove(blob, before):
                        removed.append(blob)
        self._remove_unfinished(min(before, time.time() - _UNFINISHED_S))
        return removed

    def contents(self) -> Contents:
        """What is there."""
        reached, blobs = self._reach(0), self._old(float("inf"))
        garbage = [blob for blob in blobs if blob.digest.hex not in reached.blobs]
        apart = {}
        for entry in reached.entries:
            hexed = _hex(entry)
            apart[hexed] = sum(dict(self._parts(hexed)).values()) + int(entry.get("size") or 0)
        held = sum(blob.size_bytes for blob in blobs) - sum(blob.size_bytes for blob in garbage)
        return Contents(
            len(blobs),
            sum(blob.size_bytes for blob in blobs),
            len(garbage),
            sum(blob.size_bytes for blob in garbage),
            max(0, sum(apart.values()) - held),
        )

    def _old(self, before: float) -> list[Blob]:
        found = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self._blobs) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue  # removed meanwhile, by another builder
                if status.st_mtime < before:
                    found.append(Blob(Digest(entry.name), status.st_size, status.st_mtime))
        return found

    def _reach(self, before: float) -> _Reached:
        """What references lead to. An attachment stays with its subject, and while it is new: that may come yet."""
        reached, attached = _Reached(), []
        for entry in self._store.index()["manifests"]:
            hexed, name = _hex(entry), (entry.get("annotations") or {}).get(REF_NAME) or ""
            match = _ATTACHED_BY_TAG.fullmatch(name)
            subject = match[1] if match else "" if name else self._links_of(hexed).subject
            if subject and not self._is_new(hexed, before):
                attached.append((entry, subject))
            else:
                self._take(entry, reached)
        while True:
            joined = [each for each in attached if each[1] in reached.blobs]
            if not joined:
                return reached
            attached = [each for each in attached if each[1] not in reached.blobs]
            for entry, _ in joined:
                self._take(entry, reached)

    def _take(self, entry: dict[str, Any], reached: _Reached) -> None:
        reached.entries.append(entry)
        hexed = _hex(entry)
        reached.blobs |= {hexed, *(part for part, _ in self._parts(hexed))}

    def _parts(self, hexed: str) -> Iterable[tuple[str, int]]:
        """Digest and size of everything that a manifest leads to."""
        links = self._links_of(hexed)
        yield from links.blobs
        for part, size in links.manifests:
            yield part, size
            yield from self._parts(part)

    def _links_of(self, hexed: str) -> _Links:
        if (known := self._links.get(hexed)) is not None:
            return known
        try:
            path = self._blobs / hexed
            content = path.read_bytes() if path.stat().st_size <= MAX_MANIFEST_BYTES else b""
        except FileNotFoundError:
            return _Links()
        links = self._links[hexed] = _read(content)
        return links

    def _is_new(self, hexed: str, before: float) -> bool:
        try:
            return (self._blobs / hexed).stat().st_mtime >= before
        except FileNotFoundError:
            return False

    def _remove(self, blob: Blob, before: float) -> bool:
        path = self._blobs / blob.digest.hex
        if self._is_new(blob.digest.hex, before):
            return False
        path.unlink(missing_ok=True)
        self._links.pop(blob.digest.hex, None)
        return True

    def _remove_unfinished(self, before: float) -> None:
        """What writers left that were killed."""
        try:
            for entry in os.scandir(self._blobs):
                if entry.name.startswith(".") and entry.stat().st_mtime < before:
                    Path(entry.path).unlink(missing_ok=True)
        except FileNotFoundError:
            return


def _read(content: bytes) -> _Links:
    """The links of a manifest; none for what is no manifest, or not readable: nothing could be done with it either."""
    if not content.startswith(b"{"):
        return _Links()
    try:
        manifest = json.loads(content)
        blobs, subject = [manifest.get("config"), *(manifest.get("layers") or ())], manifest.get("subject")
        return _Links(_sizes(blobs), _sizes(manifest.get("manifests") or ()), _hex(subject) if subject else "")
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError, OverflowError):
        return _Links()


def _sizes(descriptors: Iterable[Any]) -> tuple[tuple[str, int], ...]:
    return tuple((_hex(each), int(each.get("size") or 0)) for each in descriptors if each)


def _hex(descriptor: dict[str, Any]) -> str:
    return str(descriptor["digest"]).removeprefix("sha256:")
