"""What is attached to an image when the store fails at any step, or the builder dies there."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ekiben.errors import ResourceExhausted
from services.builder.attesting import Attestor, Part
from services.builder.images import index_of
from services.content.attestations import keys, verification
from services.content.attestations.keys import TrustedKey
from services.content.attestations.verification import Trust
from services.content.images import CONFIG, INDEX, LAYER, MANIFEST, Descriptor, Platform, canonical
from services.content.images.layout import LayoutImageStore
from services.kernel.clock import SYSTEM

KEY = keys.generate()
TRUST = Trust([TrustedKey("ours", KEY.public_key())])


class Failing:
    """A store whose nth change fails, and every one after it: as one that is full, or whose caller was killed."""

    def __init__(self, store: LayoutImageStore, changes: int) -> None:
        self._store, self._left = store, changes

    def __getattr__(self, name: str) -> Any:
        found: Callable[..., Any] = getattr(self._store, name)
        if name not in ("write", "attach", "keep", "tag"):
            return found

        async def change(*arguments: Any) -> Any:
            if self._left == 0:
                raise ResourceExhausted("Full.", reason="STORAGE_FULL")
            self._left -= 1
            return await found(*arguments)

        return change


async def bytes_of(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def image(
    store: LayoutImageStore, environment: Path, architecture: str = "amd64"
) -> tuple[Descriptor, bytes, Part]:
    config = canonical(
        {"os": "linux", "architecture": architecture, "rootfs": {"type": "layers", "diff_ids": []}, "history": []}
    )
    digest, size = await store.write(bytes_of(config))
    layer, layer_size = await store.write(bytes_of(b"layer"))
    manifest = canonical(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": Descriptor(CONFIG, digest, size).to_json(),
            "layers": [Descriptor(LAYER, layer, layer_size).to_json()],
            "annotations": {"dev.ekiben.bento": "x:1", "org.opencontainers.image.base.digest": f"sha256:{'ab' * 32}"},
        }
    )
    kept = await store.keep(manifest, MANIFEST)
    return kept, manifest, Part(kept, manifest, environment, f"sha256:{'cd' * 32}", "bentoml==1\n", "3.11")


async def attest(store: Any, cache: Path, made: tuple[Descriptor, bytes, Part]) -> None:
    named, manifest, part = made
    await Attestor(cache, key=KEY).attest(store, named, [part], "x:1", lambda _: None)
    await store.tag("v", manifest, MANIFEST, None)


async def said(store: LayoutImageStore, named: Descriptor) -> Sequence[tuple[str, str]]:
    found = await verification.attested(store, named.digest, TRUST, SYSTEM.now())
    return sorted((each.kind, str(each.digest)) for each in found)


async def test_a_build_that_dies_while_it_attaches_leaves_no_unsigned_tag_and_the_next_one_the_same(
    tmp_path: Path,
) -> None:
    whole = LayoutImageStore(tmp_path / "whole")
    made = await image(whole, tmp_path / "environment")
    await attest(whole, tmp_path / "cache", made)
    expected = await said(whole, made[0])
    assert [kind for kind, _ in expected] == ["provenance", "sbom", "sbom", "signature"]
    failed = 0
    while True:
        store = LayoutImageStore(tmp_path / f"layout-{failed}")
        made = await image(store, tmp_path / "environment")
        try:
            await attest(Failing(store, failed), tmp_path / "cache", made)
            break
        except ResourceExhausted:
            assert await store.references() == []
        await attest(store, tmp_path / "cache", made)
        assert await said(store, made[0]) == expected
        failed += 1
    assert failed > 8


async def test_an_index_is_signed_and_so_is_each_of_its_images_which_have_bills_of_their_own(tmp_path: Path) -> None:
    store = LayoutImageStore(tmp_path / "layout")
    made = [await image(store, tmp_path / "environment", each) for each in ("amd64", "arm64")]
    listed = [
        replace(kept, platform=Platform("linux", each))
        for (kept, _, _), each in zip(made, ("amd64", "arm64"), strict=True)
    ]
    index = index_of(listed)
    named = await store.keep(index, INDEX)
    attestor = Attestor(tmp_path / "cache", key=KEY)
    await attestor.attest(store, named, [part for _, _, part in made], "x:1", lambda _: None)
    await store.tag("v", index, INDEX, None)
    assert [kind for kind, _ in await said(store, named)] == ["signature"]
    for each, (kept, _, _) in zip(("amd64", "arm64"), made, strict=True):
        assert [kind for kind, _ in await said(store, kept)] == ["provenance", "sbom", "sbom", "signature"]
        for reference in ("v", str(kept.digest)):
            platform = Platform("linux", each)
            assert (await verification.verify(store, reference, platform, TRUST, SYSTEM.now())).digest == kept.digest
