"""The port for running commands in an image: it gives what they changed, as layers above the image's own."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from services.builder.commands import Script
from services.builder.images import Layer, history_of, platform_of
from services.content.images import CONFIG, MANIFEST, Descriptor, Image, ImageStore, Platform, Readable, canonical
from services.content.images.layout import LayoutImageStore


@dataclass(frozen=True)
class Secret:
    """A value that commands get and images do not."""

    name: str
    """Of the variable."""
    value: str = field(repr=False)
    version: str = ""
    """Another one has the commands run again; where it is empty, another value does."""
    public: bool = False
    """Whether it is written in bento.yaml for everybody to read."""


@dataclass(frozen=True)
class Order:
    """What to run, on what."""

    image: Image
    store: Readable
    """Has the image's layers."""
    script: Script
    context: Path
    """The folder that the script copies from."""
    secrets: Sequence[Secret] = ()
    folders: Mapping[str, Callable[[], AbstractAsyncContextManager[Path]]] = field(default_factory=dict)
    """Folders that commands see, read-only, by path in the image; none of them is in the difference."""
    without: Collection[str] = ()
    """Names that are left out of the difference."""

    def masked(self, text: str) -> str:
        """The text without secrets, longest first; shorter than four characters are ordinary words."""
        values = [each.value for each in self.secrets if not each.public]
        hidden = {line for value in values for line in (value, *value.splitlines()) if len(line) > 3}
        for line in sorted(hidden, key=len, reverse=True):
            text = text.replace(line, "…")
        return text


@dataclass(frozen=True)
class Outcome:
    """What a script left."""

    configuration: Mapping[str, Any]
    """The member `config` of the image's configuration."""
    tars: Sequence[Path]
    """The layers above the image's own, lowest first, not compressed."""


class Engine(Protocol):
    """Runs scripts in images of this machine's platform, as root of the image."""

    def check(self, platforms: Sequence[Platform] = ()) -> None:
        """Whether it is here at all, and can run for these platforms.

        Raises:
            FailedPrecondition: it is not (ENGINE_MISSING; the message says what to install), or cannot
                (PLATFORM_NOT_EXECUTABLE).
        """
        ...

    def run(self, order: Order, say: Callable[[str], None]) -> AbstractAsyncContextManager[Outcome]:
        """Run a script; `say` takes the lines that it prints, and neither these nor errors hold a secret.

        The outcome's files are there until the context ends. Cancelling ends every process of the script, and takes
        its mounts away. What a killed engine left goes before the next run in the same place.

        Raises:
            FailedPrecondition: a command failed (COMMAND_FAILED), the engine did (ENGINE_FAILED), or the image is for
                another platform than this machine's (PLATFORM_NOT_EXECUTABLE).
            DeadlineExceeded: COMMANDS_TIMEOUT.
            ResourceExhausted: STORAGE_FULL.
        """
        ...


def on_top(image: Image, layers: Sequence[Layer], configuration: Mapping[str, Any] | None = None) -> Image:
    """An image with more layers, and with another member `config`."""
    config = {
        **image.config,
        "config": dict(image.config.get("config") or {} if configuration is None else configuration),
        "rootfs": {
            "type": "layers",
            "diff_ids": [*image.config["rootfs"]["diff_ids"], *(str(each.diff_id) for each in layers)],
        },
        "history": history_of(image, layers),
    }
    return Image(config, [*image.layers, *(each.descriptor for each in layers)], image.annotations)


async def write_image(image: Image, source: Readable, into: LayoutImageStore, reference: str) -> None:
    """An image with all its layers in a layout."""
    for layer in image.layers:
        if await into.size(layer.digest) != layer.size_bytes:
            await into.write(source.read(layer))
    digest, size_bytes = await into.write(chunks_of([canonical(image.config)]))
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": Descriptor(CONFIG, digest, size_bytes).to_json(),
        "layers": [layer.to_json() for layer in image.layers],
    }
    await into.tag(reference, canonical(manifest), MANIFEST, platform_of(image))


class Stores:
    """Several stores read as one: for an image whose layers do not all lie in one of them."""

    def __init__(self, *stores: ImageStore, rest: Readable) -> None:
        self.name = rest.name
        self._stores = stores
        self._rest = rest

    async def read(self, descriptor: Descriptor) -> AsyncIterator[bytes]:
        """See ImageStore."""
        source = self._rest
        for store in self._stores:
            if await store.size(descriptor.digest) == descriptor.size_bytes:
                source = store
                break
        async for chunk in source.read(descriptor):
            yield chunk


async def chunks_of(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    """Chunks that are made in a thread."""
    iterator = iter(chunks)
    while (chunk := await asyncio.to_thread(next, iterator, None)) is not None:
        yield chunk
