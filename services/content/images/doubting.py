"""A wrapper for stores that lost what they still claim to have.

A registry may answer that a blob is there, from its cache, and then refuse the manifest that names it. Behind this
wrapper the same work is done again: what is not believed to be there is sent, everything else is found as before.
"""

from collections.abc import AsyncIterable, AsyncIterator, Collection, Sequence

from services.content.digest import Digest
from services.content.images import Descriptor, Image, ImageStore, Platform


class DoubtingImageStore:
    """A store without certain blobs, until they are written; without any, where it is not known which are lost."""

    def __init__(self, store: ImageStore, lost: Collection[Digest]) -> None:
        self._store = store
        self._lost = frozenset(lost)
        self._written: set[Digest] = set()

    def _doubted(self, digest: Digest) -> bool:
        return digest not in self._written and (not self._lost or digest in self._lost)

    @property
    def name(self) -> str:
        """See ImageStore."""
        return self._store.name

    async def size(self, digest: Digest) -> int | None:
        """See ImageStore."""
        return None if self._doubted(digest) else await self._store.size(digest)

    async def write(self, chunks: AsyncIterable[bytes], expected: Descriptor | None = None) -> tuple[Digest, int]:
        """See ImageStore."""
        digest, size_bytes = await self._store.write(chunks, expected)
        self._written.add(digest)
        return digest, size_bytes

    async def mount(self, descriptor: Descriptor, origin: str) -> bool:
        """See ImageStore."""
        return not self._doubted(descriptor.digest) and await self._store.mount(descriptor, origin)

    def read(self, descriptor: Descriptor) -> AsyncIterator[bytes]:
        """See ImageStore."""
        return self._store.read(descriptor)

    async def find(self, reference: str) -> Descriptor:
        """See ImageStore."""
        return await self._store.find(reference)

    async def resolve(self, reference: str, platform: Platform) -> tuple[Descriptor, Image]:
        """See ImageStore."""
        return await self._store.resolve(reference, platform)

    async def references(self) -> Sequence[str]:
        """See ImageStore."""
        return await self._store.references()

    async def keep(self, manifest: bytes, media_type: str) -> Descriptor:
        """See ImageStore."""
        return await self._store.keep(manifest, media_type)

    async def tag(self, reference: str, manifest: bytes, media_type: str, platform: Platform | None) -> Descriptor:
        """See ImageStore."""
        return await self._store.tag(reference, manifest, media_type, platform)

    async def attach(self, manifest: bytes, media_type: str) -> Descriptor:
        """See ImageStore."""
        return await self._store.attach(manifest, media_type)

    async def referrers(self, subject: Digest) -> Sequence[Descriptor]:
        """See ImageStore."""
        return await self._store.referrers(subject)
