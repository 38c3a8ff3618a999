"""A registry that fails, as seen by the image store: finished, or a clear error; never a broken image under a tag."""

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ekiben.errors import (
    DataLoss,
    EkibenError,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from services.content.images import MANIFEST, Again, BlobsMissing, Descriptor
from services.content.images.copying import copy_image
from services.content.images.layout import LayoutImageStore
from services.content.images.registry.options import RegistryOptions
from services.content.images.registry.store import RegistryImageStore, open_registry
from tests.image_stores import AMD64, described, manifest, of, put, read
from tests.oci_proxy import FaultyRegistry, faulty_registry
from tests.oci_registry import OciRegistry

MIB = 1 << 20
LARGE = os.urandom(12 * MIB)
"""A piece and a half of those that an upload goes on with."""


def large() -> Again:
    return Again(lambda: of(*(LARGE[at : at + MIB] for at in range(0, len(LARGE), MIB))))


@dataclass
class Case:
    proxy: FaultyRegistry
    store: RegistryImageStore
    repository: str


@pytest.fixture
async def case(oci_registry: OciRegistry) -> AsyncIterator[Case]:
    async with faulty_registry(oci_registry) as proxy:
        options = RegistryOptions(insecure=frozenset({proxy.host}), attempts=4, backoff_s=0.02, stall_s=10)
        repository = oci_registry.new_repository()
        async with open_registry(f"{proxy.host}/{repository}", options) as (store, _):
            await store.size(described(b"").digest)  # who is there is known from here on
            yield Case(proxy, store, repository)


def once(*faults: tuple[str, str]) -> Callable[[str, int], str]:
    """Each fault for the first request of its operation that comes."""
    waiting = list(faults)

    def choose(operation: str, count: int) -> str:
        for each in waiting:
            if each[0] == operation:
                waiting.remove(each)
                return each[1]
        return ""

    return choose


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("fault", [f"cut:{3 * MIB}", "cut:0", "500", "after:cut", "after:500", "429:0", "503", "cut"])
async def test_an_upload_that_breaks_off_is_finished(case: Case, fault: str, known: bool) -> None:
    expected = described(LARGE)
    case.proxy.choose = once(("PUT upload" if known else "PATCH upload", fault))
    written = await case.store.write(large(), expected if known else None)
    assert written == (expected.digest, len(LARGE))
    assert sum(case.proxy.faults.values()) == 1
    assert await read(case.store, expected) == LARGE
    sent = case.proxy.received["PUT upload"] + case.proxy.received["PATCH upload"]
    if fault.startswith("cut:3"):
        assert sent <= len(LARGE) + MIB, "what had arrived was sent again"


async def test_pieces_are_confirmed_one_by_one_however_often_it_breaks_off(case: Case) -> None:
    case.proxy.choose = once(
        ("PUT upload", f"cut:{MIB}"), ("PATCH upload", f"cut:{MIB}"), ("PATCH upload", "after:cut"), ("GET upload", "503"),
        ("PATCH upload", "500"), ("PATCH upload", "after:500"), ("GET upload", "cut"),
    )  # fmt: skip
    expected = described(LARGE)
    assert await case.store.write(large(), expected) == (expected.digest, len(LARGE))
    assert sum(case.proxy.faults.values()) == 7
    assert await read(case.store, expected) == LARGE


async def test_what_a_source_gave_otherwise_before_it_broke_off_is_in_no_blob(case: Case) -> None:
    case.proxy.choose = once(("PATCH upload", f"cut:{3 * MIB}"))
    passes, left_open = 0, 0

    async def source() -> AsyncIterator[bytes]:
        nonlocal passes, left_open
        passes, left_open = passes + 1, left_open + 1
        begins = b"damaged" if passes == 1 else LARGE[:7]
        try:
            for at in range(0, len(LARGE), MIB):
                assert left_open == 1, "two passes at once"
                yield LARGE[at : at + MIB] if at else begins + LARGE[7:MIB]
        finally:
            left_open -= 1

    written = await case.store.write(Again(source))
    assert written == (described(LARGE).digest, len(LARGE))
    assert (case.proxy.seen["POST uploads"], passes, left_open) == (2, 3, 0)
    assert await read(case.store, described(LARGE)) == LARGE


async def test_a_session_that_is_forgotten_is_begun_anew(case: Case, oci_registry: OciRegistry) -> None:
    def choose(operation: str, count: int) -> str:
        if operation == "PUT upload" and count == 1:
            return f"cut:{3 * MIB}"
        if operation == "GET upload" and count == 1:
            uploads = oci_registry.folder / "docker/registry/v2/repositories" / case.repository / "_uploads"
            for each in uploads.iterdir():
                each.rename(each.with_name(f"{each.name}-gone"))
        return ""

    case.proxy.choose = choose
    expected = described(LARGE)
    assert await case.store.write(large(), expected) == (expected.digest, len(LARGE))
    assert case.proxy.seen["POST uploads"] == 2
    assert await read(case.store, expected) == LARGE


@pytest.mark.parametrize("status", ["400", "404", "405"])
async def test_a_registry_that_cannot_tell_how_far_it_is_gets_all_of_it_again(case: Case, status: str) -> None:
    faults = once(("PUT upload", f"cut:{3 * MIB}"))
    case.proxy.choose = lambda operation, count: status if operation == "GET upload" else faults(operation, count)
    expected = described(LARGE)
    assert await case.store.write(large(), expected) == (expected.digest, len(LARGE))
    assert (case.proxy.seen["POST uploads"], case.proxy.seen["GET upload"]) == (2, 1)
    assert await read(case.store, expected) == LARGE


async def test_a_registry_that_is_slow_is_waited_for_while_it_gets_on(oci_registry: OciRegistry) -> None:
    async with faulty_registry(oci_registry) as proxy:
        options = RegistryOptions(insecure=frozenset({proxy.host}), attempts=1, stall_s=1, answer_s=60)
        async with open_registry(f"{proxy.host}/{oci_registry.new_repository()}", options) as (store, _):
            proxy.choose = lambda operation, count: "slow:0.1" if operation in ("PUT upload", "GET blob") else ""
            content = os.urandom(3 * MIB // 2)  # in pieces of 64 KiB, longer than nothing may move
            expected = described(content)
            await store.write(Again(lambda: of(content[:MIB], content[MIB:])), expected)
            assert await read(store, expected) == content


async def test_a_registry_that_takes_no_bytes_is_given_up_in_words_and_nothing_is_tagged(case: Case) -> None:
    before = await put(case.store, "v1", b"before")
    made, _ = await manifest(case.store, of(b"after"))
    case.proxy.choose = lambda operation, count: "503" if operation.startswith(("PUT", "PATCH")) else ""
    with pytest.raises(Unavailable, match=r"injected.*then try again") as caught:
        await case.store.write(large(), described(LARGE))
    assert caught.value.reason == "REGISTRY_UNAVAILABLE"
    with pytest.raises(Unavailable):
        await case.store.tag("v1", made, MANIFEST, AMD64)
    case.proxy.choose = lambda operation, count: "429:0"
    with pytest.raises(ResourceExhausted) as refused:
        await case.store.find("v1")
    assert (refused.value.reason, refused.value.retry_after_s) == ("REGISTRY_BUSY", 0.0)
    case.proxy.choose = lambda operation, count: ""
    assert (await case.store.find("v1")).digest == before.digest


async def test_what_cannot_be_had_again_fails_at_once_and_small_things_always_can(case: Case) -> None:
    case.proxy.choose = once(("PUT upload", "cut:3"))
    small = b"small enough"
    assert await case.store.write(of(small)) == (described(small).digest, len(small))
    case.proxy.choose = once(("PATCH upload", f"cut:{MIB}"))
    with pytest.raises(Unavailable, match="does not take a blob"):
        await case.store.write(of(*(LARGE[at : at + MIB] for at in range(0, len(LARGE), MIB))))
    assert await case.store.size(described(LARGE).digest) is None


async def test_a_registry_that_hangs_is_left_after_a_while(oci_registry: OciRegistry) -> None:
    async with faulty_registry(oci_registry) as proxy:
        options = RegistryOptions(
            insecure=frozenset({proxy.host}), attempts=2, backoff_s=0.01, stall_s=0.2, answer_s=0.2
        )
        async with open_registry(f"{proxy.host}/{oci_registry.new_repository()}", options) as (store, _):
            proxy.choose = lambda operation, count: "hang"
            with pytest.raises(Unavailable, match="in time"):
                await store.size(described(b"").digest)
            proxy.choose = lambda operation, count: "hang" if operation == "PUT upload" else ""
            with pytest.raises(Unavailable):
                await store.write(large(), described(LARGE))


async def test_whoever_waits_for_a_busy_registry_is_told(case: Case) -> None:
    told: asyncio.Queue[str] = asyncio.Queue()
    options = replace(case.store._client.options, say=told.put_nowait)
    async with open_registry(f"{case.proxy.host}/{case.repository}", options) as (store, _):
        case.proxy.choose = once(("HEAD blob", "429:100"))
        asking = asyncio.create_task(store.size(described(b"").digest))
        line = await asyncio.wait_for(told.get(), 60)
        asking.cancel()
        assert re.fullmatch(rf"{case.proxy.host} is busy; again in 1[0-2]\d s\.", line)


async def test_an_answer_that_comes_by_drops_is_given_up(case: Case) -> None:
    await put(case.store, "v1", b"content")
    options = replace(case.store._client.options, attempts=1, whole_s=0.2)
    async with open_registry(f"{case.proxy.host}/{case.repository}", options) as (store, _):
        case.proxy.choose = lambda operation, count: "slow:5" if operation == "GET manifest" else ""
        with pytest.raises(Unavailable, match="not whole after"):
            await store.resolve("v1", AMD64)


@pytest.mark.parametrize("fault", [f"half:{5 * MIB}", "half:0", "500", "cut", "429:0"])
async def test_a_download_that_breaks_off_goes_on_where_it_was(case: Case, fault: str) -> None:
    expected = described(LARGE)
    await case.store.write(large(), expected)
    case.proxy.choose = once(("GET blob", fault), ("GET blob", fault))
    assert await read(case.store, expected) == LARGE
    assert case.proxy.seen["GET blob"] == 3


async def test_damage_at_the_registry_is_told(case: Case, oci_registry: OciRegistry) -> None:
    content = os.urandom(2 * MIB)
    expected = described(content)
    await case.store.write(of(content), expected)
    file = oci_registry.blob(str(expected.digest))
    for damaged in (content[:-1] + b"?", content + b"more"):
        file.write_bytes(damaged)
        with pytest.raises(DataLoss, match="damaged"):
            await read(case.store, expected)
    file.write_bytes(content[:-5])
    with pytest.raises(DataLoss, match="damaged"):
        await read(case.store, expected)
    tagged = await put(case.store, "v1", b"image")
    file = oci_registry.blob(str(tagged.digest))
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(DataLoss, match="damaged"):
        await case.store.find(str(tagged.digest))


async def test_a_manifest_whose_blob_is_lost_takes_no_tag(case: Case, oci_registry: OciRegistry) -> None:
    before = await put(case.store, "v1", b"before")
    made, layer = await manifest(case.store, of(os.urandom(100)))
    lose(case, oci_registry, layer)
    with pytest.raises(BlobsMissing, match="Nothing was tagged") as caught:
        await case.store.tag("v1", made, MANIFEST, AMD64)
    assert caught.value.digests == (layer.digest,)
    assert (await case.store.find("v1")).digest == before.digest


def lose(case: Case, registry: OciRegistry, layer: Descriptor) -> None:
    registry.blob(str(layer.digest)).unlink()


async def test_a_copy_sends_a_lost_blob_once_more_and_then_gives_up(
    case: Case, oci_registry: OciRegistry, tmp_path: Path
) -> None:
    layout = LayoutImageStore(tmp_path / "layout")
    content = os.urandom(1000)
    await put(layout, "v1", content)
    layer = described(content)
    times = 1

    def choose(operation: str, count: int) -> str:
        nonlocal times
        if operation == "PUT manifest" and times:
            times -= 1
            lose(case, oci_registry, layer)
        return ""

    case.proxy.choose = choose
    copied = await copy_image(layout, "v1", case.store, "v1")
    assert await read(case.store, layer) == content
    assert (await case.store.find("v1")).digest == copied.digest
    times = 2
    await put(layout, "v2", content, annotations={"a": "b"})
    with pytest.raises(BlobsMissing):
        await copy_image(layout, "v2", case.store, "v1")
    assert (await case.store.find("v1")).digest == copied.digest


async def test_a_copy_that_is_cancelled_in_its_middle_leaves_no_tag_and_the_next_finds_what_was_sent(
    case: Case, tmp_path: Path
) -> None:
    layout = LayoutImageStore(tmp_path / "layout")
    await put(layout, "v1", LARGE)
    arrived = asyncio.Event()

    def choose(operation: str, count: int) -> str:
        if operation == "PUT manifest":
            arrived.set()
            return "hang"
        return ""

    case.proxy.choose = choose
    copying = asyncio.ensure_future(copy_image(layout, "v1", case.store, "v1"))
    await asyncio.wait_for(arrived.wait(), 60)
    copying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copying
    assert await case.store.references() == []
    case.proxy.choose = lambda operation, count: ""
    case.proxy.received.clear()
    await copy_image(layout, "v1", case.store, "v1")
    assert case.proxy.received["PUT upload"] == 0
    assert await case.store.references() == ["v1"]


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        ("507", ResourceExhausted, "REGISTRY_FULL"),
        ("403", PermissionDenied, "REGISTRY_REFUSED"),
        ("405", FailedPrecondition, "REGISTRY_REFUSED"),
        ("404", NotFound, "REPOSITORY_NOT_FOUND"),
    ],
)
async def test_what_will_not_change_is_not_asked_again(
    case: Case, status: str, error: type[EkibenError], reason: str
) -> None:
    case.proxy.choose = lambda operation, count: status if operation == "POST uploads" else ""
    with pytest.raises(error, match="injected") as caught:
        await case.store.write(large(), described(LARGE))
    assert (caught.value.reason, case.proxy.seen["POST uploads"]) == (reason, 1)


@pytest.mark.parametrize("fault", ["after:cut", "after:500", "500", "cut", "429:0"])
async def test_a_tag_whose_answer_is_lost_is_put_again(case: Case, fault: str) -> None:
    case.proxy.choose = once(
        ("PUT manifest", fault), ("HEAD blob", fault), ("GET manifest", fault), ("GET tags", fault)
    )
    made = await put(case.store, "v1", b"content")
    assert await case.store.size(described(b"content").digest) == 7
    assert (await case.store.find("v1")).digest == made.digest
    assert await case.store.references() == ["v1"]
    assert sum(case.proxy.faults.values()) == 4


async def test_writers_of_one_list_of_attachments_lose_none_of_each_others(case: Case) -> None:
    """distribution lists no attachments: a tag does, which everybody replaces whole."""
    image = await put(case.store, "v1", b"content")
    stores = [case.store]
    options = case.store._client.options
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(3):
            opened = open_registry(f"{case.proxy.host}/{case.repository}", options)
            stores.append((await stack.enter_async_context(opened))[0])
        made = [
            await manifest(store, of(bytes([number])), subject=image.to_json(), artifactType="application/x-note")
            for number, store in enumerate(stores)
        ]
        await asyncio.gather(*(store.attach(each, MANIFEST) for store, (each, _) in zip(stores, made, strict=True)))
        assert len(await case.store.referrers(image.digest)) == 4
