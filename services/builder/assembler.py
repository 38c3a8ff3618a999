"""From a bento's folders to an image in a store: layers that are there already are neither made nor sent again.

    base (by name) · users · Python environment · one layer for each model · the bento itself

Where a bento runs commands, the base is one with the user and their layers, and those that need the environment have a
layer above it; in bentos before 1.4, above the bento.

What a layer holds is known by a key before the layer is made: the environment's digest, a model's digest or what its
files look like. Under that key `layers/<key>.json` remembers the layer, as long as the store has it.
"""

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ekiben.errors import InvalidArgument
from services.builder import environment_layers, images
from services.builder.bases import BaseImage
from services.builder.bytecode import Bytecode, Compiler
from services.builder.compression import Method, Packed, at_most_for_weights, for_weights
from services.builder.domain import ASSEMBLER_VERSION
from services.builder.engine import Stores, on_top
from services.builder.image_environments import ImageEnvironment
from services.builder.images import BENTO_PATH, HOME, Layer, Names
from services.builder.layers import USER, Entry, OutOfOrder, entries_of, tar, tar_of_stream
from services.builder.recipe import hub_models
from services.builder.runs import Runs
from services.builder.tally import TALLY
from services.content.digest import Digest
from services.content.files import make_folder, touch, write_whole
from services.content.images import INDEX, MANIFEST, Again, Descriptor, ImageStore, Platform, Readable
from services.content.images.copying import beside, copy_blob, together

_PLACES = 8
"""Stores that are remembered of a layer, the last ones."""


@dataclass(frozen=True)
class Model:
    """A model, on this machine or to be had."""

    tag: str
    key: str
    """The digest of its content, or anything else that changes with it."""
    folder: Callable[[], AbstractAsyncContextManager[Path]]
    """Has the model's files lie in a folder; entered only where its layer is not there already."""
    stream: Callable[[], AbstractAsyncContextManager["Streamed"]] | None = None
    """The same files one after another, where they need not lie anywhere for that."""


@dataclass(frozen=True)
class Streamed:
    """A model's files, on their way here."""

    entries: Iterable[Entry]
    """By their paths in the model, in the order in which they come. For one thread, once."""
    stop: Callable[[], None]
    """Makes a thread that waits for the next one end soon."""


@dataclass(frozen=True)
class Parts:
    """What an image is made of."""

    tag: str
    bento: Path
    environment: ImageEnvironment
    compiler: Compiler | None
    """Who compiles its modules; None leaves that to their first import."""
    manifest: Mapping[str, Any]
    """bento.yaml."""
    models: Sequence[Model] = ()
    apart: bool = False
    """Whether models stay out of the image, which has places for them; see `Assembler.models`."""
    runs: Runs | None = None
    """Of the bento's commands, if it has any."""


class Assembler:
    """Makes images, and remembers their layers below `cache`."""

    def __init__(self, cache: Path, say: Callable[[str], None], compression: Method = Method.GZIP) -> None:
        self._layers = cache / "layers"
        self._bytecode = Bytecode(cache)
        self._say = say
        self._compression = compression

    async def assemble(self, parts: Parts, base: BaseImage, into: ImageStore) -> tuple[bytes, Platform]:
        """Have all that the image is made of in `into`; its manifest, which is not there yet, and what it runs on.

        A crash leaves blobs that nothing names; the next run takes them for its own.

        Raises:
            FailedPrecondition: the base does not fit (BASE_WITHOUT_PYTHON, BASE_WITHOUT_BASH).
            ResourceExhausted: STORAGE_FULL.
        """
        python = base.about.python(parts.environment.target.python, base.name).path
        try:
            async with beside(together(self._copy(layer, base.store, into) for layer in base.image.layers)):
                return await self._assemble(parts, base, python, into)
        except BaseException:
            self._bytecode.stop()  # a thread is left behind, and what that waits for
            raise

    async def _assemble(self, parts: Parts, base: BaseImage, python: str, into: ImageStore) -> tuple[bytes, Platform]:
        environment = parts.environment
        key = environment_layers.key_of(environment, python, parts.compiler)
        layers = []
        if users := base.about.users():
            layers.append(await self.layer(into, f"users {base.descriptor.digest}", "the user bentoml", lambda: users))
        layers.append(
            await self.layer(
                into,
                key,
                f"Python environment {environment.digest[:19]}",
                lambda: environment_layers.entries(environment, python, parts.compiler, self._bytecode),
            )
        )
        apart = sorted(model.tag for model in parts.models) if parts.apart else []
        key = " ".join([f"bento {_looks(parts.bento)}", *(["for", *apart] if apart else [])])
        bento = await self.layer(into, key, f"bento {parts.tag}", _of_bento(parts.bento, apart))
        on_bento = parts.runs is not None and parts.runs.commands.on_bento
        configuration = images.configuration_of(base.image, images.envs_of(parts.manifest))
        if hub_models(parts.manifest):
            configuration = images.without_hub(configuration)
        after: list[Layer] = []
        if parts.runs is not None and parts.runs.commands.after is not None:
            below = on_top(base.image, [*layers, bento] if on_bento else layers)
            after, source, configuration = await parts.runs.after(below, Stores(into, rest=base.store), configuration)
            for made in after:
                await self._copy(made.descriptor, source, into)
        models = [await self._model(into, model) for model in _sorted(parts.models) if not parts.apart]
        layers += [*models, bento, *after] if on_bento else [*after, *models, bento]
        names = Names(
            parts.tag,
            environment.bentoml_version,
            tuple(sorted(model.tag for model in parts.models)),
            base.reference,
            str(base.descriptor.digest),
            environment.digest,
        )
        config, image = images.image_of(base.image, layers, names, configuration)
        digest, size_bytes = await into.write(_of([config]))
        content = images.manifest_of(image, images.config_descriptor(digest, size_bytes))
        return content, images.platform_of(base.image)

    async def models(
        self, models: Sequence[Model], platforms: Sequence[Platform], into: ImageStore
    ) -> list[Descriptor]:
        """Have each model in `into` as an image that is mounted into a bento's; what names each in the bento's index.

        Its layer is the same as in an image that has the model.
        """
        made = []
        for model in _sorted(models):
            layer = await self._model(into, model)
            manifests = []
            for platform in platforms:
                config, manifest_of = images.model_of(layer, platform)
                digest, size_bytes = await into.write(_of([config]))
                manifest = manifest_of(images.config_descriptor(digest, size_bytes))
                manifests.append((await into.keep(manifest, MANIFEST), platform))
            named, media_type = manifests[0][0], MANIFEST
            if len(manifests) > 1:
                index = images.index_of([replace(each, platform=platform) for each, platform in manifests])
                named, media_type = await into.keep(index, INDEX), INDEX
            annotations = {images.MODEL: model.tag}
            made.append(Descriptor(media_type, named.digest, named.size_bytes, annotations, images.NOWHERE))
        return made

    async def _copy(self, layer: Descriptor, source: Readable, into: ImageStore) -> None:
        if await copy_blob(layer, source, into):
            self._say(f"Copied layer {str(layer.digest)[:19]} of what is below ({layer.size_bytes >> 20} MiB).")

    async def layer(self, into: ImageStore, key: str, what: str, entries: Callable[[], Iterable[Entry]]) -> Layer:
        """A layer of code, made unless the store has the one that is remembered under `key`."""
        remembered = self._remembered(key, self._compression)
        if (known := await self._known(into, remembered, what)) is not None:
            return known
        found = await asyncio.to_thread(lambda: list(entries()))
        return await self._make(into, remembered, what, Packed(found, self._compression))

    async def _model(self, into: ImageStore, model: Model) -> Layer:
        """A model's layer; its files are not asked for where the store has it."""
        what = f"model {model.tag}"
        remembered = self._remembered(f"{what} {model.key}", at_most_for_weights(self._compression))
        if (known := await self._known(into, remembered, what)) is not None:
            return known
        if model.stream is not None and at_most_for_weights(self._compression) is Method.NONE:
            with contextlib.suppress(OutOfOrder):
                digest, size_bytes = await into.write(Again(lambda: _streamed(model)))
                packed = Packed((), Method.NONE)  # that nothing packs
                return await self._made(into, remembered, what, packed, digest, size_bytes)
        async with model.folder() as folder:
            found = await asyncio.to_thread(lambda: list(_of_model(model.tag, folder)()))
            method, dense = await asyncio.to_thread(for_weights, self._compression, found)
            return await self._make(into, remembered, what, Packed(found, method, dense))

    def _remembered(self, key: str, method: Method) -> Path:
        hashed = hashlib.sha256(f"{ASSEMBLER_VERSION} {method.made_by()} {key}".encode()).hexdigest()
        return self._layers / f"{hashed}.json"

    async def _known(self, into: ImageStore, remembered: Path, what: str) -> Layer | None:
        touch(remembered)
        try:
            known = json.loads(await asyncio.to_thread(remembered.read_text))
            layer = Layer(Descriptor.from_json(known["descriptor"]), Digest.parse(known["diff_id"]), what)
            places = [str(each) for each in known.get("places") or ()]
        except (OSError, ValueError, KeyError, TypeError, InvalidArgument, AttributeError):
            return None
        if await into.size(layer.descriptor.digest) != layer.descriptor.size_bytes:
            for place in places:
                if await into.mount(layer.descriptor, place):
                    break
            else:
                return None
        if into.name not in places:
            await asyncio.to_thread(_remember, remembered, layer, [into.name, *places])
        TALLY.count(layer.descriptor.size_bytes, made=False)
        self._say(f"The layer of {what} is there already.")
        return layer

    async def _make(self, into: ImageStore, remembered: Path, what: str, packed: Packed) -> Layer:
        digest, size_bytes = await into.write(Again(lambda: _of(packed)))
        return await self._made(into, remembered, what, packed, digest, size_bytes)

    async def _made(
        self, into: ImageStore, remembered: Path, what: str, packed: Packed, digest: Digest, size_bytes: int
    ) -> Layer:
        descriptor = Descriptor(packed.media_type, digest, size_bytes, packed.annotations)
        layer = Layer(descriptor, packed.diff_id(digest), what)
        await asyncio.to_thread(_remember, remembered, layer, [into.name])
        TALLY.count(size_bytes, made=True)
        self._say(f"Made the layer of {what} ({size_bytes / (1 << 20):.1f} MiB, {packed.method}).")
        return layer


def _remember(remembered: Path, layer: Layer, places: Sequence[str]) -> None:
    """Write down a layer, and in which stores it was seen: another repository of a registry may have it from there."""
    make_folder(remembered.parent)
    known = {
        "descriptor": layer.descriptor.to_json(),
        "diff_id": str(layer.diff_id),
        "places": list(places[:_PLACES]),
    }
    write_whole(remembered, json.dumps(known).encode())


async def _of(chunks: Iterable[bytes]) -> AsyncGenerator[bytes, None]:
    """Chunks that are made in a thread, the next one while this one is hashed and written."""
    iterator = iter(chunks)
    ahead = asyncio.ensure_future(asyncio.to_thread(next, iterator, None))
    try:
        while (chunk := await ahead) is not None:
            ahead = asyncio.ensure_future(asyncio.to_thread(next, iterator, None))
            yield chunk
    finally:
        await asyncio.wait([ahead])
        if not ahead.cancelled():
            ahead.exception()  # whoever left early has an error of his own


async def _streamed(model: Model) -> AsyncIterator[bytes]:
    """The layer of a model whose files come one after another."""
    assert model.stream is not None
    async with model.stream() as streamed:
        chunks = _of(tar_of_stream(_of_stream(model.tag, streamed.entries)))
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            streamed.stop()
            await chunks.aclose()


def _of_stream(tag: str, files: Iterable[Entry]) -> Iterator[Entry]:
    """What `_of_model` gives."""
    repository, _, version = tag.partition(":")
    at = f"{BENTO_PATH.strip('/')}/models/{repository}"
    latest = Entry(f"{at}/latest", data=version.encode(), owner=USER)
    if version == "latest":
        raise OutOfOrder(version)  # whatever that becomes, it is no row of names
    yield Entry(HOME.strip("/").partition("/")[0])
    for above in (HOME, BENTO_PATH, f"{BENTO_PATH}/models", f"{BENTO_PATH}/models/{repository}"):
        yield Entry(above.strip("/"), owner=USER)
    if version > "latest":
        yield latest
    yield Entry(f"{at}/{version}", owner=USER)
    for each in files:
        if each.name:
            yield replace(each, name=f"{at}/{version}/{each.name}", owner=USER)
    if version < "latest":
        yield latest


def _sorted(models: Sequence[Model]) -> Sequence[Model]:
    return sorted(models, key=lambda model: model.tag)


def _of_model(tag: str, folder: Path) -> Callable[[], Iterable[Entry]]:
    repository, _, version = tag.partition(":")
    at = f"{BENTO_PATH.strip('/')}/models/{repository}"

    def entries() -> Iterator[Entry]:
        for above in (HOME, BENTO_PATH, f"{BENTO_PATH}/models", f"{BENTO_PATH}/models/{repository}"):
            yield Entry(above.strip("/"), owner=USER)
        # As they come from the registry, to which no links can be sent.
        yield from entries_of(folder, f"{at}/{version}", owner=USER, follow=True)
        yield Entry(f"{at}/latest", data=version.encode(), owner=USER)

    return entries


def _of_bento(bento: Path, apart: Sequence[str] = ()) -> Callable[[], Iterable[Entry]]:
    """The bento's own files; and of models that are mounted, the places, and which is the latest."""

    def entries() -> Iterator[Entry]:
        yield Entry(HOME.strip("/"), owner=USER)
        for entry in entries_of(bento, BENTO_PATH.strip("/"), owner=USER, without=("models",)):
            script = f"/{entry.name}" == images.ENTRYPOINT
            yield Entry(entry.name, entry.path, entry.data, entry.link, entry.executable or script, entry.owner)
        at, latest = f"{BENTO_PATH.strip('/')}/models", {tag.partition(":")[0]: tag.partition(":")[2] for tag in apart}
        if apart:
            yield Entry(at, owner=USER)
        for repository, version in latest.items():
            yield Entry(f"{at}/{repository}", owner=USER)
            yield Entry(f"{at}/{repository}/latest", data=version.encode(), owner=USER)
        for tag in apart:
            yield Entry(f"{at}/{tag.replace(':', '/', 1)}", owner=USER)

    return entries


def _looks(folder: Path) -> str:
    """The digest of every file: a bento's own files are few and small."""
    hashed = hashlib.sha256()
    for block in tar(entries_of(folder, "bento", without=("models",))):
        hashed.update(block)
    return hashed.hexdigest()
