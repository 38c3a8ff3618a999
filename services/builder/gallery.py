"""Use cases over images that are there: look at them, delete them."""

from collections.abc import Sequence
from datetime import datetime

from ekiben import names
from ekiben.errors import NotFound
from services.builder.domain import Image
from services.builder.places import Place, pin_of
from services.builder.store import ImageRows
from services.kernel.identity import Principal


class Gallery:
    """The images of all organizations in the platform's place, as callers see them."""

    def __init__(self, rows: ImageRows, place: Place) -> None:
        self._rows = rows
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

    async def delete(self, caller: Principal, name: names.Image) -> None:
        """Delete an image: what it was called is gone at once, its layers go as garbage. Raises as `get`.

        A crash in the middle leaves references without a row, which the collector removes.
        """
        image = await self.get(caller, name)
        await self._rows.delete(image.organization, image.id)
        await self._place.untag(image.repository, [tag for tag in (image.tag, pin_of(image.id)) if tag])

    def location(self, image: Image) -> str:
        """Where other programs find it."""
        return self._place.location(image.repository, image.id)
