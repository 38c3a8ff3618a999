"""From a bento's folders to an image in a store: layers that are there already are neither made nor sent again.

    base (by name) · users · Python environment · one layer for each model · the bento itself

What a layer holds is known by a key before the layer is made: the environment's digest, a model's digest or what its
files look like. Under that key `layers/<key>.json` remembers the layer, as long as the store has it.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.builder import bases, images
from services.builder.environment_layers import EnvironmentLayers
from services.builder.images import BENTO_PATH, HOME, Layer, Names
from services.builder.layers import USER, Entry, entries_of, gzip, tar
from services.content.digest import Digest
from services.content.files import make_folder, write_whole
from services.content.images import LAYER, LAYER_GZIP, MANIFEST, Descriptor, ImageStore, Platform


@dataclass(frozen=True)
class Model:
    """A model, on this machine or to be had."""

    tag: str
    key: str
    """The digest of its content, or anything else that changes with it."""
    folder: Callable[[], AbstractAsyncContextManager[Path]]
    """Has the model's files lie in a folder; entered only where its layer is not there already."""


@dataclass(frozen=True)
class Parts:
    """What an image is made of."""

    tag: str
    bento: Path
    environment: Path
    environment_digest: str
    python_version: str
    bentoml_version: str
    manifest: Mapping[str, Any]
    """bento.yaml."""
    models: Sequence[Model] = ()


class Assembler:
    """Makes images, and remembers their layers below `cache`."""

    def __init__(self, cache: Path, say: Callable[[str], None]) -> None:
        self._layers = cache / "layers"
        self._environments = EnvironmentLayers(cache)
        self._bases = cache / "bases"
        self._say = say

    async def assemble(
        self, parts: Parts, base_store: ImageStore, base_name: str, into: ImageStore, reference: str, platform: Platform
    ) -> Descriptor:
        """Make the image and have `reference` name it, last of all.

        A crash leaves blobs that nothing names; the next run takes them for its own.

        Raises:
            FailedPrecondition: the base does not fit (BASE_WITHOUT_PYTHON, BASE_WITHOUT_BASH).
            NotFound: there is no such base (IMAGE_NOT_FOUND).
            ResourceExhausted: STORAGE_FULL.
        """
        base_descriptor, base = await base_store.resolve(base_name, platform)
        self._say(f"Base image {base_name or base_descriptor.digest} for {images.platform_of(base)}.")
        about = await bases.look_into(base, base_store, self._bases)
        python = about.python(parts.python_version, base_name or str(base_descriptor.digest))
        for layer in base.layers:
            await self._copy(layer, base_store, into)
        layers = []
        if users := about.users():
            layers.append(await self._layer(into, f"users {base_descriptor.digest}", "the user bentoml", lambda: users))
        layers.append(
            await self._layer(
                into,
                f"environment {parts.environment_digest} {python}",
                f"Python environment {parts.environment_digest[:19]}",
                lambda: self._environments.entries(parts.environment, parts.environment_digest, python),
                packed=True,
            )
        )
        for model in sorted(parts.models, key=lambda model: model.tag):
            layers.append(await self._model(into, model))
        layers.append(
            await self._layer(
                into, f"bento {_looks(parts.bento)}", f"bento {parts.tag}", _of_bento(parts.bento), packed=True
            )
        )
        names = Names(
            parts.tag,
            parts.bentoml_version,
            tuple(sorted(model.tag for model in parts.models)),
            base_name,
            str(base_descriptor.digest),
        )
        config, image = images.image_of(base, layers, names, images.envs_of(parts.manifest))
        digest, size_bytes = await into.write(_of([config]))
        content = images.manifest_of(image, images.config_descriptor(digest, size_bytes))
        return await into.tag(reference, content, MANIFEST, images.platform_of(base))

    async def _copy(self, layer: Descriptor, source: ImageStore, into: ImageStore) -> None:
        if await into.size(layer.digest) == layer.size_bytes:
            return
        self._say(f"Copying layer {str(layer.digest)[:19]} of the base image ({layer.size_bytes >> 20} MiB).")
        await into.write(source.read(layer))

    async def _layer(
        self, into: ImageStore, key: str, what: str, entries: Callable[[], Iterable[Entry]], *, packed: bool = False
    ) -> Layer:
        """A layer, made unless the store has the one that is remembered under `key`."""
        known = await self._known(into, key, what, packed=packed)
        return known or await self._make(into, key, what, entries, packed=packed)

    async def _model(self, into: ImageStore, model: Model) -> Layer:
        """A model's layer; its files are not asked for where the store has it."""
        key, what = f"model {model.tag} {model.key}", f"model {model.tag}"
        if (known := await self._known(into, key, what, packed=False)) is not None:
            return known
        async with model.folder() as folder:
            return await self._make(into, key, what, _of_model(model.tag, folder), packed=False)

    def _remembered(self, key: str, *, packed: bool) -> Path:
        hashed = hashlib.sha256(f"{images.ASSEMBLER_VERSION} {packed} {key}".encode()).hexdigest()
        return self._layers / f"{hashed}.json"

    async def _known(self, into: ImageStore, key: str, what: str, *, packed: bool) -> Layer | None:
        try:
            known = json.loads(await asyncio.to_thread(self._remembered(key, packed=packed).read_text))
            digest, diff_id, size_bytes = Digest.parse(known["digest"]), Digest.parse(known["diff_id"]), known["size"]
            if await into.size(digest) != size_bytes:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        self._say(f"The layer of {what} is there already.")
        return Layer(Descriptor(LAYER_GZIP if packed else LAYER, digest, size_bytes), diff_id, what)

    async def _make(
        self, into: ImageStore, key: str, what: str, entries: Callable[[], Iterable[Entry]], *, packed: bool
    ) -> Layer:
        plain = _Hashing(tar(await asyncio.to_thread(lambda: list(entries()))))
        digest, size_bytes = await into.write(_of(gzip(plain) if packed else plain))
        diff_id = Digest(plain.hashed.hexdigest())
        make_folder(self._layers)
        known = {"digest": str(digest), "diff_id": str(diff_id), "size": size_bytes}
        await asyncio.to_thread(write_whole, self._remembered(key, packed=packed), json.dumps(known).encode())
        self._say(f"Made the layer of {what} ({size_bytes / (1 << 20):.1f} MiB).")
        return Layer(Descriptor(LAYER_GZIP if packed else LAYER, digest, size_bytes), diff_id, what)


class _Hashing:
    """Chunks on their way, and the digest of those that have passed."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.hashed = hashlib.sha256()
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self.hashed.update(chunk)
            yield chunk


async def _of(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    """Chunks that are made in a thread."""
    iterator = iter(chunks)
    while (chunk := await asyncio.to_thread(next, iterator, None)) is not None:
        yield chunk


def _of_model(tag: str, folder: Path) -> Callable[[], Iterable[Entry]]:
    repository, _, version = tag.partition(":")
    at = f"{BENTO_PATH.strip('/')}/models/{repository}"

    def entries() -> Iterator[Entry]:
        for above in (HOME, BENTO_PATH, f"{BENTO_PATH}/models", f"{BENTO_PATH}/models/{repository}"):
            yield Entry(above.strip("/"), owner=USER)
        yield from entries_of(folder, f"{at}/{version}", owner=USER)
        yield Entry(f"{at}/latest", data=version.encode(), owner=USER)

    return entries


def _of_bento(bento: Path) -> Callable[[], Iterable[Entry]]:
    def entries() -> Iterator[Entry]:
        yield Entry(HOME.strip("/"), owner=USER)
        for entry in entries_of(bento, BENTO_PATH.strip("/"), owner=USER, without=("models",)):
            script = f"/{entry.name}" == images.ENTRYPOINT
            yield Entry(entry.name, entry.path, entry.data, entry.link, entry.executable or script, entry.owner)

    return entries


def _looks(folder: Path) -> str:
    """The digest of every file: a bento's own files are few and small."""
    hashed = hashlib.sha256()
    for block in tar(entries_of(folder, "bento", without=("models",))):
        hashed.update(block)
    return hashed.hexdigest()
