"""Images from one store to another: every platform, with what is attached, nothing twice.

Blobs first, then manifests by digest, what is attached to them, and the tag last: a copy that is killed leaves blobs
that nobody names, and the next one finds them there.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from ekiben.errors import InvalidArgument, NotFound
from services.content.digest import Digest
from services.content.images import Again, BlobsMissing, Descriptor, ImageStore, Platform, Readable
from services.content.images.resolving import (
    INDEXES,
    MANIFESTS,
    MAX_MANIFEST_BYTES,
    for_platform,
    object_of,
    platform_of,
)

T = TypeVar("T")
_PARALLEL = 4
_DEPTH = 4
_COSIGN = (".sig", ".att", ".sbom")
"""What cosign before version 3 adds to `sha256-<hex>` for the tags of what it attaches."""


async def together(jobs: Iterable[Coroutine[Any, Any, T]], parallel: int = _PARALLEL) -> list[T]:
    """The results of all, in their order, `parallel` at a time. The first error ends the others, and is raised."""
    free, waiting = asyncio.Semaphore(parallel), list(jobs)

    async def bounded(job: Coroutine[Any, Any, T]) -> T:
        async with free:
            return await job

    tasks = [asyncio.ensure_future(bounded(job)) for job in waiting]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for job in waiting:
            job.close()  # those that were never begun
        raise


@asynccontextmanager
async def beside(job: Coroutine[Any, Any, Any]) -> AsyncIterator[None]:
    """Have a job done while inside. It is waited for at the end, and ended when what is inside fails."""
    task = asyncio.ensure_future(job)
    try:
        yield
        await task
    except BaseException:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise


async def copy_blob(descriptor: Descriptor, source: Readable, into: ImageStore) -> bool:
    """Have a blob in another store: as it is there, mounted, or sent. Whether its bytes were sent."""
    if await into.size(descriptor.digest) == descriptor.size_bytes or await into.mount(descriptor, source.name):
        return False
    await into.write(Again(lambda: source.read(descriptor)), descriptor)
    return True


async def copy_image(
    source: ImageStore,
    named: str,
    into: ImageStore,
    reference: str,
    *,
    platform: Platform | None = None,
    attachments: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Descriptor:
    """Copy an image, byte for byte; what names it in `into`.

    Args:
        named: the reference or the digest in `source`.
        reference: the reference in `into`.
        platform: only this one, of an image for several.
        attachments: also what is attached to it (signatures, bills of material, provenance).
        say: takes lines for people.

    Raises:
        NotFound: no such image, or none for the platform (IMAGE_NOT_FOUND).
        BlobsMissing: the store does not keep what it was given.
    """
    if platform is None:
        descriptor = await source.find(named)
    else:
        descriptor, _ = await for_platform(source, [await source.find(named)], platform, f"{source.name}:{named}")
    return await _Copy(source, named, into, reference, attachments, say).run(descriptor)


class _Copy:
    def __init__(
        self,
        source: ImageStore,
        named: str,
        into: ImageStore,
        reference: str,
        attachments: bool,
        say: Callable[[str], None],
    ) -> None:
        self._source = source
        self._named = named
        self._into = into
        self._reference = reference
        self._attachments = attachments
        self._say = say
        self._done: set[Digest] = set()

    async def run(self, descriptor: Descriptor) -> Descriptor:
        content = await self._read(descriptor)
        manifest = object_of(content, str(descriptor.digest))
        blobs = await self._parts(descriptor, manifest, _DEPTH)
        runs_on = None if descriptor.media_type in INDEXES else await platform_of(self._source, manifest)
        if self._attachments:
            await self._copy_attachments(descriptor.digest, _DEPTH)
            await self._copy_signatures(descriptor.digest)
        return await self._put(partial(self._into.tag, self._reference, content, descriptor.media_type, runs_on), blobs)

    async def _parts(self, descriptor: Descriptor, manifest: dict[str, Any], depth: int) -> Sequence[Descriptor]:
        """Copy what a manifest names; the blobs among it."""
        if descriptor.media_type in INDEXES or "manifests" in manifest:
            for entry in manifest.get("manifests") or ():
                child = Descriptor.from_json(entry)
                if child.media_type not in MANIFESTS:
                    raise InvalidArgument(
                        f"Index {descriptor.digest} lists {child.media_type}, which is no image.",
                        reason="MANIFEST_INVALID",
                    )
                await self._manifest(child, depth - 1)
            return ()
        blobs = [
            Descriptor.from_json(each) for each in (manifest.get("config"), *(manifest.get("layers") or ())) if each
        ]
        # Layers that may not be passed on are fetched from where they were published.
        blobs = [
            each for each in blobs if "foreign" not in each.media_type and "nondistributable" not in each.media_type
        ]
        await together(self._blob(each) for each in {each.digest: each for each in blobs}.values())
        return blobs

    async def _manifest(self, descriptor: Descriptor, depth: int) -> None:
        if depth < 0:
            raise InvalidArgument(f"Index {descriptor.digest} is nested too deep.", reason="MANIFEST_INVALID")
        if descriptor.digest in self._done:
            return
        content = await self._read(descriptor)
        blobs = await self._parts(descriptor, object_of(content, str(descriptor.digest)), depth)
        await self._put(partial(self._into.keep, content, descriptor.media_type), blobs)
        self._done.add(descriptor.digest)
        if self._attachments:
            await self._copy_attachments(descriptor.digest, depth)
            await self._copy_signatures(descriptor.digest)

    async def _copy_attachments(self, subject: Digest, depth: int) -> None:
        for attached in await self._source.referrers(subject) if depth else ():
            if attached.digest in self._done:
                continue
            self._done.add(attached.digest)
            content = await self._read(attached)
            blobs = await self._parts(attached, object_of(content, str(attached.digest)), depth - 1)
            await self._put(partial(self._into.attach, content, attached.media_type), blobs)
            await self._copy_attachments(attached.digest, depth - 1)

    async def _copy_signatures(self, subject: Digest) -> None:
        """What cosign before version 3 attached: under tags of the same repository, which layouts name in full."""
        for suffix in _COSIGN:
            name = f"sha256-{subject.hex}{suffix}"
            try:
                descriptor = await self._source.find(_beside(self._named, name))
            except NotFound:
                continue
            content = await self._read(descriptor)
            blobs = await self._parts(descriptor, object_of(content, str(descriptor.digest)), 1)
            there = _beside(self._reference, name)
            await self._put(partial(self._into.tag, there, content, descriptor.media_type, None), blobs)

    async def _put(self, put: Callable[[], Awaitable[T]], blobs: Sequence[Descriptor]) -> T:
        """Put a manifest; blobs that are lost by then, though the store had said to have them, are sent once more."""
        try:
            return await put()
        except BlobsMissing as exc:
            lost = [each for each in blobs if each.digest in exc.digests] or blobs
            self._say(f"{self._into.name} lost {len(lost)} blobs that it said to have: sending them again.")
            await together(self._send(each) for each in lost)
            return await put()

    async def _blob(self, descriptor: Descriptor) -> None:
        if await copy_blob(descriptor, self._source, self._into):
            self._say(f"Copied {str(descriptor.digest)[:19]} ({descriptor.size_bytes / (1 << 20):.1f} MiB).")

    async def _send(self, descriptor: Descriptor) -> None:
        await self._into.write(Again(lambda: self._source.read(descriptor)), descriptor)

    async def _read(self, descriptor: Descriptor) -> bytes:
        if descriptor.size_bytes > MAX_MANIFEST_BYTES:
            raise InvalidArgument(f"Manifest {descriptor.digest} is too large.", reason="MANIFEST_INVALID")
        return b"".join([chunk async for chunk in self._source.read(descriptor)])


def _beside(reference: str, name: str) -> str:
    """The reference of another tag in the repository of this one."""
    repository, colon, _ = reference.rpartition(":") if not reference.startswith("sha256:") else ("", "", "")
    return f"{repository}{colon}{name}"
