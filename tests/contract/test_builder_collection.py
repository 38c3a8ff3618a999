"""Deleting images while builds give them: what is deleted is what somebody looked at, and nothing newer."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ekiben import names
from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import FailedPrecondition
from services.builder.collection import Collection
from services.builder.domain import Build, Image, Output
from services.builder.gallery import Gallery
from services.builder.places import Place, build_tag, id_of, pin_of
from services.builder.settings import Settings
from services.builder.store import ImageRows, Store
from services.builder.usage import Usage
from services.content.digest import Digest
from services.content.images.layout import LayoutImageStore
from services.kernel.clock import ManualClock
from services.kernel.db import open_database
from services.kernel.identity import Principal
from tests.image_content import put_image

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
ORGANIZATION = "organizations/default"
CALLER = Principal("users/admin", ORGANIZATION, Role.ROLE_ADMIN)


@dataclass
class Users(Usage):
    """Who uses images, as a test says; asking takes as long as what happens meanwhile."""

    meanwhile: list[Callable[[], Awaitable[Any]]] = field(default_factory=list)
    found: list[list[str]] = field(default_factory=list)

    async def users(self, image: Image) -> list[str]:
        if self.meanwhile:
            await self.meanwhile.pop(0)()
        return self.found.pop(0) if self.found else []


@dataclass
class Images:
    """A layout with its rows, and builds that give images of one bento."""

    layout: Path
    place: Place
    store: Store
    rows: ImageRows
    collection: Collection
    gallery: Gallery
    usage: Users
    clock: ManualClock
    settings: Settings
    builds: int = 0

    async def build(self, content: bytes) -> Image:
        """What the worker does at a build's end: the references, the row, a look at the references."""
        return await self.end(await self.tagged(content))

    async def end(self, image: Image) -> Image:
        """The second half."""
        assert await self.store.succeed(image.build, "token", None, False, image.use_time, image)
        await self.place.restore(image)
        return image

    async def tagged(self, content: bytes) -> Image:
        """The first half of that."""
        self.builds += 1
        await self.clock.advance(1)
        build = Build(
            id=f"b{self.builds}",
            uid=f"u{self.builds}",
            organization=ORGANIZATION,
            bento="bentoRepositories/iris/bentos/v1",
            bento_digest="sha256:" + "b" * 64,
            creator=CALLER.user,
            create_time=self.clock.now(),
            force=True,
            output=Output.IMAGE,
        )
        assert await self.store.insert(build) and await self.store.lease("token", "w", self.clock.now())
        made_as = f"default/iris:{build_tag(build.id)}"
        made = await put_image(self.layout, made_as, {"content": content})
        image = id_of(made.digest)
        named = [f"default/iris:{pin_of(image)}", "default/iris:v1"]
        await LayoutImageStore(self.layout).move(named, made, away=[made_as])
        return Image(
            id=image,
            organization=ORGANIZATION,
            place="oci:here",
            digest=str(made.digest),
            media_type=made.media_type,
            bento=build.bento,
            bento_digest=build.bento_digest,
            repository="default/iris",
            tag="v1",
            platforms=("linux/amd64",),
            size_bytes=1,
            layers=(),
            base="base",
            models=(),
            build=build.id,
            create_time=self.clock.now(),
            use_time=self.clock.now(),
        )

    async def delete(self, image: Image) -> None:
        await self.gallery.delete(CALLER, names.Image(image.id), force=False)

    async def named(self) -> dict[str, str]:
        """Reference → id of the image that it names."""
        entries = await LayoutImageStore(self.layout).entries()
        return {each.annotations["org.opencontainers.image.ref.name"]: id_of(each.digest) for each in entries}

    def of(self, image: Image) -> dict[str, str]:
        """What names an image that is whole and the newest."""
        return {f"default/iris:{pin_of(image.id)}": image.id, "default/iris:v1": image.id}


@pytest.fixture
async def images(database_url: str, tmp_path: Path) -> AsyncIterator[Images]:
    async with open_database(database_url) as database:
        await database.migrate("services.builder.migrations")
        store, rows = Store(database), ImageRows(database, "oci:here")
        place, clock = Place(f"oci:{tmp_path / 'layout'}", "here"), ManualClock(NOW)
        settings = Settings(database_url="sqlite://", data_dir=tmp_path, images_keep_newest=0, images_keep_days=1)
        usage = Users()
        collection = Collection(place, store, rows, usage, settings, clock)
        gallery = Gallery(rows, place, usage, collection)
        yield Images(tmp_path / "layout", place, store, rows, collection, gallery, usage, clock, settings)


async def test_the_tag_of_an_image_that_came_meanwhile_stays(images: Images) -> None:
    old = await images.build(b"old")
    new: list[Image] = []

    async def build() -> None:
        new.append(await images.build(b"new"))

    images.usage.meanwhile.append(build)
    await images.delete(old)
    assert await images.named() == images.of(new[0])
    assert [image.id for image in await images.rows.all()] == [new[0].id]


async def test_the_tag_of_an_image_whose_row_is_still_to_come_stays(images: Images) -> None:
    old = await images.build(b"old")
    new: list[Image] = []

    async def build() -> None:
        new.append(await images.tagged(b"new"))

    images.usage.meanwhile.append(build)
    await images.delete(old)
    assert await images.named() == images.of(new[0])


async def test_an_image_that_was_built_again_meanwhile_is_deleted_only_if_nobody_uses_it_now(images: Images) -> None:
    image = await images.build(b"content")
    images.usage.meanwhile.append(lambda: images.build(b"content"))
    images.usage.found = [[], ["deployments/demo/revisions/1"]]
    with pytest.raises(FailedPrecondition) as refused:
        await images.delete(image)
    assert refused.value.reason == "IMAGE_IN_USE"
    assert await images.named() == images.of(image)
    await images.delete(image)
    assert await images.named() == {} and await images.rows.count() == 0


async def test_what_is_kept_no_longer_is_kept_if_it_was_built_again_meanwhile(images: Images) -> None:
    image = await images.build(b"content")
    await images.clock.advance(2 * 86400)
    images.usage.meanwhile.append(lambda: images.build(b"content"))
    found = await images.collection.collect()
    assert not found.images and await images.named() == images.of(image)
    await images.clock.advance(2 * 86400)
    assert [each.id for each in (await images.collection.collect()).images] == [image.id]
    assert await images.named() == {}


async def test_a_reference_is_taken_away_only_from_the_old_manifest_that_it_was_seen_with(images: Images) -> None:
    old, new = await images.build(b"old"), await images.build(b"new")
    store = LayoutImageStore(images.layout)
    await store.untag(["default/iris:v1"], [Digest.parse(old.digest)])
    await store.untag(["default/iris:v1"], [Digest.parse(new.digest)], before=0)
    assert (await images.named())["default/iris:v1"] == new.id
    await store.untag(["default/iris:v1"], [Digest.parse(new.digest)], before=float("inf"))
    assert "default/iris:v1" not in await images.named()


async def test_an_image_that_is_deleted_while_its_build_ends_is_whole(images: Images) -> None:
    image = await images.build(b"content")
    again = await images.tagged(b"content")
    assert await images.collection.delete(image)
    assert await images.named() == {}
    await images.end(again)
    assert await images.named() == images.of(image) and await images.rows.count() == 1


@dataclass(frozen=True)
class SlowPlace(Place):
    """A place where a build ends before references are taken away."""

    meanwhile: list[Callable[[], Awaitable[Any]]] = field(default_factory=list)

    async def untag(self, repository: str, tags: Iterable[str], digest: Digest) -> None:
        if self.meanwhile:
            await self.meanwhile.pop(0)()
        await super().untag(repository, tags, digest)


async def test_an_image_whose_build_ends_in_the_middle_of_its_deletion_is_whole(images: Images) -> None:
    place = SlowPlace(images.place.url, "here")
    collection = Collection(place, images.store, images.rows, images.usage, images.settings, images.clock)
    image = await images.build(b"content")
    place.meanwhile.append(lambda: images.build(b"content"))
    assert await collection.delete(image)
    assert await images.named() == images.of(image) and await images.rows.count() == 1


async def test_a_tag_goes_back_to_its_image_when_the_build_that_took_it_was_cancelled(images: Images) -> None:
    image = await images.build(b"content")
    cancelled = await images.tagged(b"other")
    assert await images.store.cancel(ORGANIZATION, cancelled.build, NOW)
    await images.collection.collect()
    assert (await images.named())["default/iris:v1"] == cancelled.id  # it is new: it might be about to write its row
    for path in (images.layout / "blobs" / "sha256").iterdir():
        os.utime(path, (0, 0))
    await images.collection.collect()
    assert await images.named() == images.of(image)
