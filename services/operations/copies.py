"""Bytes by digest on their way to a vault and back, several at once, each verified."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from ekiben.errors import DataLoss, NotFound
from services.content.blobs import WHOLE, BlobReader, BlobStore
from services.content.blobs.checked import read_verified
from services.content.blobs.source import Chunks
from services.content.digest import Digest
from services.operations.snapshots import blob_path
from services.operations.vaults import Vault

T = TypeVar("T")

_AT_ONCE = 4
"""Enough to keep two cores hashing, or a bucket busy; memory is a mebibyte or two for each."""

Progress = Callable[[int, int], None]
"""Told how many more blobs and bytes have passed."""


def no_progress(blobs: int, size_bytes: int) -> None:
    """Say nothing."""


@dataclass
class Copied:
    """What a copy of blobs came to."""

    copied: int = 0
    copied_bytes: int = 0
    there: int = 0
    damaged: list[str] = field(default_factory=list)
    """Digests that could not be copied: their bytes are missing, or other bytes."""


async def to_vault(
    blobs: BlobReader, vault: Vault, wanted: AsyncIterator[tuple[str, int]], progress: Progress = no_progress
) -> Copied:
    """Copy blobs that the vault lacks; `wanted` gives hex digests in order, with sizes.

    What is damaged at its source is told, and not copied: a vault holds under a digest only what has it.
    """
    done = Copied()
    shard, there = "", dict[str, int]()

    async def one(item: tuple[str, int]) -> None:
        digest, size = item
        try:
            await vault.write(blob_path(digest), read_verified(blobs, Digest(digest)))
        except (DataLoss, NotFound):
            done.damaged.append(digest)
            return
        done.copied += 1
        done.copied_bytes += size
        progress(1, size)

    async def missing() -> AsyncIterator[tuple[str, int]]:
        nonlocal shard, there
        async for digest, size in wanted:
            if digest[:2] != shard:
                shard, there = digest[:2], await vault.sizes(f"blobs/sha256/{digest[:2]}")
            if there.get(blob_path(digest)) == size:
                done.there += 1
                progress(1, size)
            else:
                yield digest, size

    await at_once(missing(), one)
    return done


async def from_vault(
    vault: Vault, blobs: BlobStore, wanted: AsyncIterator[tuple[str, int]], progress: Progress = no_progress
) -> Copied:
    """Copy blobs that the store lacks out of a vault; one that is missing or damaged there is told."""
    done = Copied()

    async def one(item: tuple[str, int]) -> None:
        hexdigest, size = item
        digest = Digest(hexdigest)
        try:
            if (await blobs.stat(digest)).size_bytes == size:
                done.there += 1
                progress(1, size)
                return
        except NotFound:
            pass
        if not await put(blobs, digest, size, vault.read(blob_path(hexdigest))):
            done.damaged.append(hexdigest)
            return
        done.copied += 1
        done.copied_bytes += size
        progress(1, size)

    await at_once(wanted, one)
    return done


async def put(blobs: BlobStore, digest: Digest, size: int, chunks: AsyncIterator[bytes]) -> bool:
    """Store bytes under their digest, durably; False when they are missing or have another."""
    upload = f"restore-{digest.hex[:40]}"
    try:
        await blobs.write(upload, WHOLE, Chunks(chunks), size, digest=digest)
        async with blobs.assemble(upload, []) as assembly:
            if assembly.digest != digest:
                return False
            await assembly.commit()
    except (DataLoss, NotFound):
        return False
    except Exception as exc:
        if getattr(exc, "reason", "") in ("DIGEST_MISMATCH", "SIZE_MISMATCH"):
            return False
        raise
    finally:
        await blobs.discard(upload)
    return True


async def verify(vault: Vault, wanted: AsyncIterator[tuple[str, int]], *, deep: bool) -> list[str]:
    """Hex digests of blobs that a vault lacks or, when `deep`, holds damaged."""
    bad: list[str] = []
    shard, there = "", dict[str, int]()

    async def one(item: tuple[str, int]) -> None:
        digest, _ = item
        sha256 = hashlib.sha256()
        async for chunk in vault.read(blob_path(digest)):
            sha256.update(chunk)
        if sha256.hexdigest() != digest:
            bad.append(digest)

    async def present() -> AsyncIterator[tuple[str, int]]:
        nonlocal shard, there
        async for digest, size in wanted:
            if digest[:2] != shard:
                shard, there = digest[:2], await vault.sizes(f"blobs/sha256/{digest[:2]}")
            if there.get(blob_path(digest)) != size:
                bad.append(digest)
            elif deep:
                yield digest, size

    await at_once(present(), one)
    return sorted(bad)


async def at_once(items: AsyncIterator[T], work: Callable[[T], Awaitable[None]]) -> None:
    """Do the work of all items, a few at a time. The first error ends all of it, and is raised."""
    running: set[asyncio.Task[None]] = set()
    try:
        async for item in items:
            if len(running) >= _AT_ONCE:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                _raise(done)
            running.add(asyncio.ensure_future(work(item)))
        if running:
            done, running = await asyncio.wait(running)
            _raise(done)
    finally:
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)


def _raise(tasks: Iterable["asyncio.Task[None]"]) -> None:
    for task in tasks:
        task.result()
