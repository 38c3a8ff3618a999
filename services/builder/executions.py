"""Commands that were run in an image are not run again: what they left is remembered.

layers/                 their layers, as an OCI layout
scripts/<key>.json      what a script left: on which image, with which files and secrets, is in the key
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import secrets as tokens
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ekiben.errors import FailedPrecondition, InvalidArgument
from services.builder.compression import ANNOTATION, Method, Packed
from services.builder.differences import Difference, searched
from services.builder.engine import Engine, Order, Secret, chunks_of
from services.builder.images import Layer
from services.builder.layers import CHUNK_BYTES, Entry, entries_of, tar
from services.builder.lazy_layers import in_order
from services.content.digest import Digest
from services.content.files import make_folder, write_whole
from services.content.images import LAYER_GZIP, Descriptor, canonical
from services.content.images.layout import LayoutImageStore

_VERSION = 2
"""Grows when the same script gives another layer."""
_KEPT_S = 30 * 86400.0
"""How long what a script left is kept after its last use."""
_UNNAMED_KEPT_S = 86400.0
"""How long a layer may wait for the file that names it: a build takes hours at most."""
_KEPT_CONFIGURATION = (
    *("User", "Env", "WorkingDir", "Entrypoint", "Cmd", "ExposedPorts", "Labels", "Volumes", "StopSignal"),
)


class Executions:
    """What scripts made of images, kept in a folder as a store of their layers and a file for each script.

    A crash leaves a layer that nobody names. Two that run the same script at once both run it; one result is kept.
    """

    def __init__(self, folder: Path, engine: Engine, say: Callable[[str], None], *, again: bool = False) -> None:
        self.store = LayoutImageStore(folder / "layers")
        """Has the layers of what was executed, not those of the image below."""
        self._folder = folder
        self._engine = engine
        self._say = say
        self._again = again
        self._ran: set[Path] = set()

    async def execute(self, order: Order, what: str) -> tuple[list[Layer], Mapping[str, Any]]:
        """The layers that a script puts on an image, and the configuration that it leaves.

        Raises:
            EkibenError: those of `Engine.run`, and FailedPrecondition (SECRET_IN_IMAGE).
        """
        remembered = self._folder / "scripts" / f"{await asyncio.to_thread(self._key, order)}.json"
        if (not self._again or remembered in self._ran) and (known := await self._known(remembered)) is not None:
            self._say(f"The layer of {what} is there already.")
            return known
        self._say(f"Running {what}.")
        async with self._engine.run(order, self._say) as outcome:
            layers = [await self._keep(each, order, what) for each in outcome.tars]
        left = outcome.configuration
        configuration = {key: left[key] for key in _KEPT_CONFIGURATION if left.get(key)}
        self._check(configuration, order.secrets)
        make_folder(remembered.parent)
        content = {
            "configuration": configuration,
            "layers": [{"descriptor": each.descriptor.to_json(), "diff_id": str(each.diff_id)} for each in layers],
            "what": what,
        }
        await asyncio.to_thread(write_whole, remembered, json.dumps(content).encode())
        self._ran.add(remembered)
        await asyncio.to_thread(self._prune)
        size_bytes = sum(each.descriptor.size_bytes for each in layers)
        self._say(f"Made the layer of {what} ({size_bytes / (1 << 20):.1f} MiB).")
        return layers, configuration

    async def put(self, entries: Sequence[Entry], what: str) -> Layer:
        """A layer of a few small files, below commands."""
        packed = Packed(entries, Method.GZIP)
        digest, size_bytes = await self.store.write(chunks_of(packed))
        return Layer(Descriptor(LAYER_GZIP, digest, size_bytes, packed.annotations), packed.diff_id(digest), what)

    def _prune(self) -> None:
        """Forget scripts that nobody used for long, and layers that no script left.

        A layer that is being used is new, or its script was touched when it was found.
        """
        now, named = time.time(), set()
        for file in (self._folder / "scripts").glob("*.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                if now - file.stat().st_mtime > _KEPT_S:
                    file.unlink()
                else:
                    named |= {each["descriptor"]["digest"] for each in json.loads(file.read_text())["layers"]}
        for blob in (self._folder / "layers" / "blobs" / "sha256").iterdir():
            with contextlib.suppress(OSError):
                if f"sha256:{blob.name}" not in named and now - blob.stat().st_mtime > _UNNAMED_KEPT_S:
                    blob.unlink()

    async def _known(self, remembered: Path) -> tuple[list[Layer], Mapping[str, Any]] | None:
        try:
            content = json.loads(await asyncio.to_thread(remembered.read_text))
            layers = [
                Layer(Descriptor.from_json(each["descriptor"]), Digest.parse(each["diff_id"]), content["what"])
                for each in content["layers"]
            ]
            configuration = dict(content["configuration"])
        except (OSError, ValueError, KeyError, TypeError, InvalidArgument):
            return None
        for layer in layers:
            if await self.store.size(layer.descriptor.digest) != layer.descriptor.size_bytes:
                return None
        await asyncio.to_thread(os.utime, remembered)  # what is used is not pruned
        return layers, configuration

    async def _keep(self, path: Path, order: Order, what: str) -> Layer:
        hashed = hashlib.sha256()

        def plain() -> Iterable[bytes]:
            secrets = {each.name: each.value for each in order.secrets if not each.public}
            without = {*order.without, *(each.strip("/") for each in order.folders)}
            for chunk in Difference(path, without, secrets).chunks():
                hashed.update(chunk)
                yield chunk

        digest, size_bytes = await self.store.write(chunks_of(in_order(plain(), Method.GZIP.pack)))
        descriptor = Descriptor(LAYER_GZIP, digest, size_bytes, {ANNOTATION: Method.GZIP.made_by()})
        return Layer(descriptor, Digest(hashed.hexdigest()), what)

    def _check(self, configuration: Mapping[str, Any], secrets: Sequence[Secret]) -> None:
        text = json.dumps(configuration, ensure_ascii=False)
        for name, value in searched({each.name: each.value for each in secrets if not each.public}).items():
            if json.dumps(value, ensure_ascii=False)[1:-1] in text:  # as it is written there, with its quotes escaped
                raise FailedPrecondition(
                    f"The commands leave the value of {name} in the image's configuration. Do not set it by ENV "
                    "or LABEL.",
                    reason="SECRET_IN_IMAGE",
                    secret=name,
                )

    def _key(self, order: Order) -> str:
        config = order.image.config
        content = {
            "version": [_VERSION, Method.GZIP.made_by()],
            "layers": config["rootfs"]["diff_ids"],
            "config": config.get("config") or {},
            "script": [order.script.stages, order.script.instructions],
            "files": {name: _digest(order.context, name) for name in sorted(order.script.files)},
            "secrets": [[each.name, each.version or self._seal(each.value)] for each in order.secrets],
            "folders": sorted(order.folders),
            "without": sorted(order.without),
        }
        return hashlib.sha256(canonical(content)).hexdigest()

    def _seal(self, value: str) -> str:
        """What changes with a secret, and tells nobody anything of it: its key never leaves this folder."""
        file = self._folder / "key"
        if not file.exists():
            make_folder(self._folder)
            write_whole(file, tokens.token_bytes(32))
        return hmac.digest(file.read_bytes(), value.encode(), "sha256").hex()


def _digest(context: Path, name: str) -> str:
    """Of a file or a folder, of what is executable and of links; empty where there is none."""
    path = context / name
    if not path.exists():
        return ""
    hashed = hashlib.sha256()
    if path.is_dir():
        for block in tar(entries_of(path, "x")):
            hashed.update(block)
    else:
        hashed.update(b"x" if path.stat().st_mode & 0o100 else b"-")
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                hashed.update(chunk)
    return hashed.hexdigest()
