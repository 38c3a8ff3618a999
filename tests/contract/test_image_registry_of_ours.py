"""The images that the builder serves, as our own client finds them: by the referrers API, by pages, by tokens."""

import base64
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from yarl import URL

from ekiben.errors import FailedPrecondition, NotFound, Unauthenticated
from services.builder.repositories import Repositories
from services.builder.shelves import LayoutShelf
from services.content.images import REF_NAME
from services.content.images.copying import copy_image
from services.content.images.layout import LayoutImageStore
from services.content.images.registry.options import RegistryOptions
from services.content.images.registry.store import RegistryImageStore, open_registry
from tests.fixtures_distribution import Served, serving
from tests.image_content import add_entries, put_image, put_referrer
from tests.image_stores import of


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    layout = tmp_path / "images"
    async with serving(LayoutShelf(Repositories(layout)), layout) as served:
        yield served


@pytest.fixture
async def store(served: Served, tmp_path: Path) -> AsyncIterator[RegistryImageStore]:
    async with opened(served, tmp_path, "viewer") as (store, _):
        yield store


def opened(served: Served, folder: Path, token: str):  # type: ignore[no-untyped-def]
    host = URL(served.url).authority
    (folder / "logins.json").write_text(
        json.dumps({"auths": {host: {"auth": base64.b64encode(f"any:{token}".encode()).decode()}}})
    )
    options = RegistryOptions((folder / "logins.json",), insecure=frozenset({host}), attempts=2, backoff_s=0.01)
    return open_registry(f"{host}/default/summarizer", options)


async def test_an_image_and_what_is_attached_are_copied_out(
    served: Served, store: RegistryImageStore, tmp_path: Path
) -> None:
    image = await put_image(served.layout, "default/summarizer:v1", {"weights": os.urandom(3 << 20)})
    attached = [await put_referrer(served.layout, image, "application/x-note", str(i).encode()) for i in range(3)]
    found = await store.referrers(image.digest)
    assert [each.digest for each in found] == sorted(each.digest for each in attached)
    assert {each.artifact_type for each in found} == {"application/x-note"}
    target = LayoutImageStore(tmp_path / "copy")
    copied = await copy_image(store, "v1", target, "copied")
    assert copied.digest == image.digest
    assert len(await target.referrers(image.digest)) == 3


async def test_tags_come_page_by_page(served: Served, store: RegistryImageStore) -> None:
    image = await put_image(served.layout, "default/summarizer:v1")
    entry = image.to_json()
    names = [f"tag-{number:04}" for number in range(2300)]
    add_entries(served.layout, [{**entry, "annotations": {REF_NAME: f"default/summarizer:{name}"}} for name in names])
    assert await store.references() == [*names, "v1"]


async def test_who_may_not_and_what_cannot_be_is_said(
    served: Served, store: RegistryImageStore, tmp_path: Path
) -> None:
    await put_image(served.layout, "default/summarizer:v1")
    with pytest.raises(FailedPrecondition, match="refuses to take"):
        await store.write(of(b"read only"))
    with pytest.raises(NotFound, match="no image 'v2'"):
        await store.find("v2")
    async with opened(served, tmp_path, "revoked") as (stranger, _):
        with pytest.raises(Unauthenticated, match="docker login"):
            await stranger.find("v1")
    async with opened(served, tmp_path, "stranger") as (stranger, _):
        with pytest.raises(NotFound):
            await stranger.find("v1")
