"""From a bento's folders to an image in a store: layers that are there already are neither made nor sent again.

    base (by name) · users · Python environment · one layer for each model · the bento itself

Where a bento runs commands, their layer comes above the users, and another above the environment; in bentos before
1.4, above the bento.

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

from ekiben.errors import InvalidArgument
from services.builder import bases, images
from services.builder.commands import NO_COMMANDS, Commands
from services.builder.compression import Method, Packed, at_most_for_weights, for_weights
from services.builder.engine import Secret, on_top
from services.builder.environment_layers import EnvironmentLayers
from services.builder.executions import Executions
from services.builder.images import BENTO_PATH, HOME, Layer, Names
from services.builder.layers import USER, Entry, entries_of, tar
from services.builder.runs import Runs
from services.content.digest import Digest
from services.content.files import make_folder, write_whole
from services.content.images import MANIFEST, Descriptor, ImageStore, Platform


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
    commands: Commands = NO_COMMANDS
    secrets: Sequence[Secret] = ()
    """What the commands get."""


class Assembler:
    """Makes images, and remembers their layers below `cache`."""

    def __init__(
        self,
        cache: Path,
        say: Callable[[str], None],
        compression: Method = Method.GZIP,
        executions: Executions | None = None,
    ) -> None:
        self._layers = cache / "layers"
        self._environments = EnvironmentLayers(cache)
        self._bases = cache / "bases"
        self._say = say
        self._compression = compression
        self._executions = executions

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
        for layer in base.layers:
            await self._copy(layer, base_store, into)
        layers = []
        if users := [*about.users(), *(_folders_of_user() if parts.commands else ())]:
            key = f"users {len(users)} {base_descriptor.digest}"
            layers.append(await self._layer(into, key, "the user bentoml", lambda: users))
        envs = images.envs_of(parts.manifest)
        runs = self._runs(parts, into, base_store)
        below = base
        if parts.commands.before is not None and runs is not None:
            made, configuration = await runs.before(on_top(base, layers))
            layers += await self._executed(made, into)
            below = on_top(base, (), configuration)
            about = await bases.look_into(on_top(base, layers), runs.store, self._bases)
        python = about.python(parts.python_version, base_name or str(base_descriptor.digest))
        layers.append(
            await self._layer(
                into,
                f"environment {parts.environment_digest} {python}",
                f"Python environment {parts.environment_digest[:19]}",
                lambda: self._environments.entries(parts.environment, parts.environment_digest, python),
            )
        )
        bento = await self._layer(into, f"bento {_looks(parts.bento)}", f"bento {parts.tag}", _of_bento(parts.bento))
        configuration = images.configuration_of(below, envs)
        after: list[Layer] = []
        if parts.commands.after is not None and runs is not None:
            there = [*layers, *([bento] if parts.commands.on_bento else [])]
            after, configuration = await runs.after(on_top(below, there), configuration)
            after = await self._executed(after, into)
        models = [await self._model(into, model) for model in sorted(parts.models, key=lambda model: model.tag)]
        if parts.commands.on_bento:
            layers += [*models, bento, *after]
        else:
            layers += [*after, *models, bento]
        names = Names(
            parts.tag,
            parts.bentoml_version,
            tuple(sorted(model.tag for model in parts.models)),
            base_name,
            str(base_descriptor.digest),
        )
        config, image = images.image_of(base, layers, names, configuration)
        digest, size_bytes = await into.write(_of([config]))
        content = images.manifest_of(image, images.config_descriptor(digest, size_bytes))
        return await into.tag(reference, content, MANIFEST, images.platform_of(base))

    def _runs(self, parts: Parts, into: ImageStore, base_store: ImageStore) -> Runs | None:
        if self._executions is None:
            return None
        models = {model.tag: model.folder for model in parts.models}
        return Runs(self._executions, parts.commands, parts.secrets, parts.bento, models, into, base_store)

    async def _executed(self, made: Sequence[Layer], into: ImageStore) -> list[Layer]:
        assert self._executions is not None
        for layer in made:
            await self._copy(layer.descriptor, self._executions.store, into)
        return list(made)

    async def _copy(self, layer: Descriptor, source: ImageStore, into: ImageStore) -> None:
        if await into.size(layer.digest) == layer.size_bytes:
            return
        self._say(f"Copying layer {str(layer.digest)[:19]} of what is below ({layer.size_bytes >> 20} MiB).")
        await into.write(source.read(layer))

    async def _layer(self, into: ImageStore, key: str, what: str, entries: Callable[[], Iterable[Entry]]) -> Layer:
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
        async with model.folder() as folder:
            found = await asyncio.to_thread(lambda: list(_of_model(model.tag, folder)()))
            method = await asyncio.to_thread(for_weights, self._compression, found)
            return await self._make(into, remembered, what, Packed(found, method))

    def _remembered(self, key: str, method: Method) -> Path:
        hashed = hashlib.sha256(f"{images.ASSEMBLER_VERSION} {method.made_by} {key}".encode()).hexdigest()
        return self._layers / f"{hashed}.json"

    async def _known(self, into: ImageStore, remembered: Path, what: str) -> Layer | None:
        try:
            known = json.loads(await asyncio.to_thread(remembered.read_text))
            descriptor, diff_id = Descriptor.from_json(known["descriptor"]), Digest.parse(known["diff_id"])
            if await into.size(descriptor.digest) != descriptor.size_bytes:
                return None
        except (OSError, ValueError, KeyError, TypeError, InvalidArgument):
            return None
        self._say(f"The layer of {what} is there already.")
        return Layer(descriptor, diff_id, what)

    async def _make(self, into: ImageStore, remembered: Path, what: str, packed: Packed) -> Layer:
        digest, size_bytes = await into.write(_of(packed))
        descriptor = Descriptor(packed.media_type, digest, size_bytes, packed.annotations)
        diff_id = packed.diff_id(digest)
        make_folder(self._layers)
        known = {"descriptor": descriptor.to_json(), "diff_id": str(diff_id)}
        await asyncio.to_thread(write_whole, remembered, json.dumps(known).encode())
        self._say(f"Made the layer of {what} ({size_bytes / (1 << 20):.1f} MiB, {packed.method}).")
        return Layer(descriptor, diff_id, what)


async def _of(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
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


def _folders_of_user() -> list[Entry]:
    """What BentoML's images have before any command runs, so that commands find where they are."""
    return [Entry(HOME.strip("/"), owner=USER), Entry(BENTO_PATH.strip("/"), owner=USER)]


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
