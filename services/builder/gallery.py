"""Use cases over images that are there: look at them, delete them."""

from collections.abc import Sequence
from datetime import datetime

from ekiben import names
from ekiben.errors import FailedPrecondition, NotFound
from services.builder.collection import Collection
from services.builder.domain import Image
from services.builder.places import Place
from services.builder.store import ImageRows
from services.builder.usage import Usage
from services.kernel.identity import Principal

_SHOWN = 5


class Gallery:
    """The images of all organizations in the platform's place, as callers see them."""

    def __init__(self, rows: ImageRows, place: Place, usage: Usage, collection: Collection) -> None:
        self._rows = rows
        self._usage = usage
        self._collection = collection
        self._place = place

    async def get(self, caller: Principal, name: names.Image) -> Image:
        """One image. Raises NotFound (IMAGE_NOT_FOUND)."""
        image = await self._rows.get(caller.organization, name.image)
        if image is None:
            raise NotFound(f"Image {name} does not exist.", reason="IMAGE_NOT_FOUND", image=str(name))
        return image

    async def list(
        self, caller: Principal, bento: str, before: tuple[datetime, str] | None, limit: int
    ) -> Sequence[Image]:
        """At most `limit` images without their layers, newest first, from after the position `before`."""
        return await self._rows.list(caller.organization, bento, before, limit)

    async def delete(self, caller: Principal, name: names.Image, *, force: bool) -> None:
        """Delete an image: what it was called is gone at once, its layers go as garbage.

        Raises:
            NotFound: IMAGE_NOT_FOUND.
            FailedPrecondition: `force` is not set, and a deployment uses it (IMAGE_IN_USE) or the registry where it is
                takes no tags away (TAGS_NOT_DELETABLE).
        """
        while not await self._delete(await self.get(caller, name), name, force):
            pass  # it was used again after it was looked at: what uses it is asked anew

    async def _delete(self, image: Image, name: names.Image, force: bool) -> bool:
        users = [] if force else await self._usage.users(image)
        if users:
            shown = ", ".join(users[:_SHOWN]) + (f" and {len(users) - _SHOWN} more" if len(users) > _SHOWN else "")
            raise FailedPrecondition(
                f"Image {name} is used by {shown}. Update or delete that first, or delete the image with force.",
                reason="IMAGE_IN_USE",
                violations=[(user, "uses it") for user in users[:_SHOWN]],
                image=str(name),
                used_by=shown,
            )
        return await self._collection.delete(image, force=force)

    @property
    def place(self) -> str:
        """Where they all are."""
        return self._place.url

    def location(self, image: Image) -> str:
        """Where other programs find it."""
        return self._place.location(image.repository, image.id)
