"""The port through which images are shown to container engines, and its adapter for a layout on disk.

A shelf has repositories; a repository has tags, manifests, blobs and what refers to them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from aiohttp import web

from services.builder.repositories import Repositories, Repository
from services.builder.sending import send_blob
from services.content.digest import Digest
from services.content.images import Descriptor


@dataclass(frozen=True)
class Manifest:
    """A manifest as it was stored."""

    digest: Digest
    media_type: str
    content: bytes


class Shown(Protocol):
    """One repository.

    Methods raise NotFound and DataLoss for what is named and not whole, Unavailable where nobody can say now.
    """

    async def tags(self) -> Sequence[str]:
        """Its tags, in any order."""
        ...

    async def manifest(self, reference: str | Digest) -> Manifest | None:
        """What a tag or a digest names, whatever types the engine says to understand: nothing is translated."""
        ...

    async def send(
        self, request: web.Request, digest: Digest, headers: dict[str, str], count: Callable[[int], None]
    ) -> web.StreamResponse | None:
        """Answer with a blob, or the range that is asked for; None where there is no such blob."""
        ...

    async def referrers(self, digest: Digest) -> Sequence[Descriptor]:
        """What refers to a manifest, by digest."""
        ...


class Shelf(Protocol):
    """Where the images are."""

    async def names(self, organization: str) -> Sequence[str] | None:
        """The repositories of an organization, in order; None where they cannot be listed."""
        ...

    async def find(self, name: str) -> Shown | None:
        """A repository; None where it is known that there is none."""
        ...


class LayoutShelf:
    """The repositories of a layout on disk."""

    def __init__(self, repositories: Repositories) -> None:
        self._repositories = repositories

    async def names(self, organization: str) -> Sequence[str]:
        """See Shelf."""
        return await self._repositories.names(organization)

    async def find(self, name: str) -> Shown | None:
        """See Shelf."""
        found = await self._repositories.get(name)
        return _Shown(self._repositories, found) if found is not None else None


@dataclass(frozen=True)
class _Shown:
    """A repository as it was when it was asked for."""

    repositories: Repositories
    now: Repository

    async def tags(self) -> Sequence[str]:
        return list(self.now.tags)

    async def manifest(self, reference: str | Digest) -> Manifest | None:
        named = self.now.tags.get(reference) if isinstance(reference, str) else self.now.manifests.get(reference)
        if named is None:
            return None
        content = await self.repositories.manifest(self.now, named)
        return Manifest(named.digest, self.now.manifests[named.digest].media_type, content)

    async def send(
        self, request: web.Request, digest: Digest, headers: dict[str, str], count: Callable[[int], None]
    ) -> web.StreamResponse | None:
        blob = self.now.blobs.get(digest)
        if blob is None:
            return None
        return await send_blob(request, self.repositories.path(digest), blob, headers, count)

    async def referrers(self, digest: Digest) -> Sequence[Descriptor]:
        return self.now.referrers.get(digest, ())
