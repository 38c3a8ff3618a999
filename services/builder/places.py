"""Where the platform keeps its images, and what they are called there.

An image has two references in the repository of its bento, `ORGANIZATION/BENTO_REPOSITORY`: the bento's version, which
moves when the bento gets another image, and `IMAGE-<id>`, which never moves. While it is made it is `BUILD-<build>`.
One that leaves its models to images of their own is `CODE-<version>`. No version has capital letters, so they never
meet.
"""

import hashlib
import re
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ekiben import names
from services.builder.domain import Image
from services.content import open_images
from services.content.digest import Digest
from services.content.files import make_folder
from services.content.images import BlobsMissing, Descriptor, ImageStore, Platform
from services.content.images.layout import LayoutImageStore
from services.kernel.leases import id_kept_in

if TYPE_CHECKING:
    from services.content.images.registry.store import RegistryImageStore

_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
"""Source: OCI distribution-spec 1.1, "Pulling manifests", of which a name's components are made."""
_ID_LENGTH = 20
"""Hexadecimal digits of an image's digest: enough that no two images of a place have one id."""


def id_of(digest: Digest | str) -> str:
    """The id of the image with this digest."""
    return str(digest).removeprefix("sha256:")[:_ID_LENGTH]


def pin_of(image: str) -> str:
    """The tag of an image that never moves, by its id."""
    return f"IMAGE-{image}"


def tag_of(bento: str, *, models_apart: bool) -> str:
    """What the newest image of a bento's version is called; of one without its models `CODE-<version>`, since whoever
    names a version means all of it."""
    return f"CODE-{bento}" if models_apart else bento


def build_tag(build: str) -> str:
    """The tag of what a build made until its image has those that stay."""
    return f"BUILD-{build}"


def is_unfinished(tag: str) -> bool:
    """Whether a tag names an image that a build is still at."""
    return tag.startswith("BUILD-")


def repository_of(organization: str, bento: names.Bento) -> str:
    """`default/iris` for a bento of the organization of that resource name.

    BentoML allows names which OCI does not (`a..b`, `a-_b`): such a one is written with hyphens and a part of its
    digest.
    """
    name = bento.repository
    if _COMPONENT.fullmatch(name) is None:
        plain = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
        name = f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:10]}"
    return f"{names.Organization.parse(organization).organization}/{name}"


@dataclass(frozen=True)
class Place:
    """A layout on disk that holds every image, or a prefix of an OCI registry."""

    url: str
    """`oci:FOLDER` or `docker://HOST[/PREFIX]`."""
    id: str = ""
    """Of a layout, kept in it: another folder is another place, and one is the same for all that have it."""

    @classmethod
    def at(cls, url: str, data_dir: Path, site: str) -> "Place":
        """The place of a builder with this folder, whose id is `site`; a layout is made where there is none. Blocks.

        Raises:
            OSError: the folder of the layout cannot be made, or is not to be written.
        """
        place = cls(url)
        if place.layout is None:
            return place
        make_folder(place.layout, 0o755)
        # That in the builder's own folder went by the builder's id before layouts had one.
        own = place.layout.resolve() == (data_dir / "images").resolve()
        return cls(url, id_kept_in(place.layout / ".place", first=site if own else ""))

    @property
    def name(self) -> str:
        """By which rows say where an image is."""
        return f"oci:{self.id}" if self.layout is not None else self.url

    @property
    def layout(self) -> Path | None:
        """The folder of the layout; None for a registry."""
        return Path(self.url.removeprefix("oci:")) if self.url.startswith("oci:") else None

    def open(
        self, repository: str, say: Callable[[str], None] = lambda text: None
    ) -> AbstractAsyncContextManager[tuple[ImageStore, str]]:
        """The store for images of a repository, as `open_images` gives it."""
        return open_images(self.url if self.layout is not None else f"{self.url.rstrip('/')}/{repository}", say)

    async def untag(self, repository: str, tags: Iterable[str], digest: Digest) -> None:
        """Let tags that name this image name nothing any more. What a registry has without a tag it collects itself.

        Raises:
            FailedPrecondition: the registry takes no tags away (TAGS_NOT_DELETABLE).
        """
        if self.layout is not None:
            references = [self.reference(repository, tag) for tag in tags]
            await LayoutImageStore(self.layout).untag(references, [digest])
            return
        async with self._registry(repository) as registry:
            await registry.untag(tags, digest)

    async def restore(self, image: Image) -> None:
        """Let an image's tags that name nothing name it, as its row says.

        Raises:
            BlobsMissing: it is not there any more, or not whole.
        """
        tags, digest = [tag for tag in (pin_of(image.id), image.tag) if tag], Digest.parse(image.digest)
        if self.layout is None:
            async with self._registry(image.repository) as registry:
                await registry.restore(tags, digest)
            return
        store = LayoutImageStore(self.layout)
        size_bytes = await store.size(digest)
        if size_bytes is None:
            raise BlobsMissing(store.name, [digest])
        platform = Platform.parse(image.platforms[0]) if len(image.platforms) == 1 else None
        references = [self.reference(image.repository, tag) for tag in tags]
        await store.restore(references, Descriptor(image.media_type, digest, size_bytes, platform=platform))

    @asynccontextmanager
    async def _registry(self, repository: str) -> "AsyncIterator[RegistryImageStore]":
        from services.content.images.registry.store import RegistryImageStore  # here: layouts need no HTTP library

        async with self.open(repository) as (store, _):
            assert isinstance(store, RegistryImageStore)
            yield store

    def reference(self, repository: str, tag: str) -> str:
        """What a tag of a repository is called in its store: a layout has all repositories."""
        return f"{repository}:{tag}" if self.layout is not None else tag

    async def has(self, repository: str, image: str) -> bool:
        """Whether an image is there by its id. Of a registry that is not asked: true."""
        if self.layout is None:
            return True
        named = await LayoutImageStore(self.layout).references()
        return self.reference(repository, pin_of(image)) in named

    def location(self, repository: str, image: str) -> str:
        """Where other programs find an image, whatever its version's tag names by now."""
        return f"{self.url.rstrip('/')}{':' if self.layout is not None else '/'}{repository}:{pin_of(image)}"
