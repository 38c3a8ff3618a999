"""Every statement on images. One implementation for SQLite and PostgreSQL."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from services.builder.domain import Image, ImageLayer
from services.builder.store.tables import images
from services.kernel.db import AsyncConnection, Database, insert_into

_ALL_BUT_LAYERS = [column for column in images.c if column.name != "layers"]


class ImageRows:
    """The rows of images in one place: those that lie elsewhere are not seen. Each method is one transaction."""

    def __init__(self, database: Database, place: str) -> None:
        self._database = database
        self._here = images.c.place == place

    async def get(self, organization: str, image: str) -> Image | None:
        """One image, or None."""
        query = sa.select(images).where(images.c.organization == organization, images.c.id == image, self._here)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).mappings().first()
        return _image(row) if row is not None else None

    async def list(
        self, organization: str, bento: str, before: tuple[datetime, str] | None, limit: int
    ) -> Sequence[Image]:
        """At most `limit` images without their layers, newest first, from after the position `before`."""
        query = sa.select(*_ALL_BUT_LAYERS).where(images.c.organization == organization, self._here)
        if bento:
            query = query.where(images.c.bento == bento)
        if before is not None:
            query = query.where(
                sa.or_(
                    images.c.create_time < before[0],
                    sa.and_(images.c.create_time == before[0], images.c.id < before[1]),
                )
            )
        query = query.order_by(images.c.create_time.desc(), images.c.id.desc()).limit(limit)
        async with self._database.read() as connection:
            return [_image(row) for row in (await connection.execute(query)).mappings()]

    async def all(self) -> Sequence[Image]:
        """Every image of every organization without its layers, by repository, newest first."""
        query = sa.select(*_ALL_BUT_LAYERS).where(self._here)
        query = query.order_by(images.c.repository, images.c.use_time.desc(), images.c.id)
        async with self._database.read() as connection:
            return [_image(row) for row in (await connection.execute(query)).mappings()]

    async def count(self) -> int:
        """How many images there are, of all organizations."""
        async with self._database.read() as connection:
            query = sa.select(sa.func.count()).select_from(images).where(self._here)
            return int((await connection.execute(query)).scalar_one())

    async def pulled(self, found: Iterable[tuple[str, str]], now: datetime, *, unless_since: datetime) -> None:
        """Images of these repositories and digests were used now; those that were used since then stay as they are."""
        async with self._database.transaction() as connection:
            for repository, digest in sorted(found):
                named = (images.c.repository == repository, images.c.digest == digest, self._here)
                await connection.execute(
                    images.update().where(*named, images.c.use_time < unless_since).values(use_time=now)
                )

    async def delete(self, organization: str, image: str, *, used: datetime | None = None) -> bool:
        """Forget an image. False where there is none, or where it was used again since `used`."""
        gone = images.delete().where(images.c.organization == organization, images.c.id == image, self._here)
        if used is not None:
            gone = gone.where(images.c.use_time == used)
        async with self._database.transaction() as connection:
            return (await connection.execute(gone)).rowcount == 1


async def put_image(connection: AsyncConnection, dialect: str, image: Image) -> None:
    """Keep an image, and give it its tag, which another of the bento may have had. One that is there is used again."""
    await connection.execute(
        images.update()
        .where(
            images.c.place == image.place,
            images.c.repository == image.repository,
            images.c.tag == image.tag,
            images.c.id != image.id,
        )
        .values(tag=None)
    )
    row = {
        "organization": image.organization,
        "id": image.id,
        "place": image.place,
        "digest": image.digest,
        "media_type": image.media_type,
        "bento": image.bento,
        "bento_digest": image.bento_digest,
        "repository": image.repository,
        "tag": image.tag,
        "platforms": json.dumps(list(image.platforms)),
        "size_bytes": image.size_bytes,
        "layers": json.dumps([_layer(layer) for layer in image.layers]),
        "base": image.base,
        "models": json.dumps(list(image.models)),
        "build": image.build,
        "create_time": image.create_time,
        "use_time": image.use_time,
    }
    insert = insert_into(dialect, images).values(**row)
    again = {"tag": image.tag, "build": image.build, "use_time": image.use_time}
    await connection.execute(
        insert.on_conflict_do_update(index_elements=[images.c.organization, images.c.id, images.c.place], set_=again)
    )


def _layer(layer: ImageLayer) -> dict[str, Any]:
    found = asdict(layer)
    # A release from before there were these knows no layer that has them.
    return {name: value for name, value in found.items() if value or name not in ("model", "image")}


def _image(row: Any) -> Image:
    return Image(
        id=row["id"],
        organization=row["organization"],
        place=row["place"],
        digest=row["digest"],
        media_type=row["media_type"],
        bento=row["bento"],
        bento_digest=row["bento_digest"],
        repository=row["repository"],
        tag=row["tag"] or "",
        platforms=tuple(json.loads(row["platforms"])),
        size_bytes=row["size_bytes"],
        layers=tuple(ImageLayer(**layer) for layer in json.loads(row.get("layers") or "[]")),
        base=row["base"],
        models=tuple(json.loads(row["models"])),
        build=row["build"],
        create_time=row["create_time"],
        use_time=row["use_time"],
    )
