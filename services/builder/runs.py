"""The two times that a bento's commands run: on the base, and on what was assembled."""

import asyncio
import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from uv import find_uv_bin

from services.builder.bases import BaseImage, look_into
from services.builder.commands import Commands, Script
from services.builder.engine import Order, Secret, Stores, on_top
from services.builder.executions import Executions
from services.builder.images import BENTO_PATH, HOME, Layer
from services.builder.layers import USER, Entry
from services.content.images import Image, Readable

Folder = Callable[[], AbstractAsyncContextManager[Path]]


class Runs:
    """The runs of one image."""

    def __init__(
        self,
        executions: Executions,
        commands: Commands,
        secrets: Sequence[Secret],
        bento: Path,
        models: Mapping[str, Folder],
    ) -> None:
        self.commands = commands
        self._executions = executions
        self._secrets = secrets
        self._bento = bento
        self._models = models

    async def prepare(self, base: BaseImage, remembered: Path) -> BaseImage:
        """The base with the user bentoml, and with what comes before the environment: it takes the base's place."""
        users = [*base.about.users(), *(Entry(each.strip("/"), owner=USER) for each in (HOME, BENTO_PATH))]
        store = Stores(self._executions.store, rest=base.store)
        image = on_top(base.image, [await self._executions.put(users, "the user bentoml")])
        if (script := self.commands.before) is not None:
            layers, left = await self._run(image, store, script, "the bento's commands", {})
            image = on_top(image, layers, left if script.configures else None)
        about = await look_into(image, store, remembered)
        return replace(base, store=store, image=image, about=about)

    async def after(
        self, image: Image, store: Readable, final: Mapping[str, Any]
    ) -> tuple[list[Layer], Readable, dict[str, Any]]:
        """Run what comes after the environment. Gives layers, where they are, and the configuration of the bento's
        image, which would be `final` without them."""
        script = self.commands.after
        assert script is not None
        below = image.config.get("config") or {}
        # As root, whose home is not the bento's: caches of commands would stay there.
        envs = [each for each in final["Env"] if not each.startswith("HOME=")]
        started = {key: value for key, value in final.items() if key != "Entrypoint"}
        started |= {"Env": envs, "User": below.get("User") or "root"}
        folders = dict(self._seen()) if self.commands.on_bento else {}
        if await asyncio.to_thread(runs_uv, script, self._bento):
            folders["/usr/local/bin/uv"] = lambda: contextlib.nullcontext(Path(find_uv_bin()))
        what = "the bento's commands on its environment"
        layers, left = await self._run(on_top(image, (), started), store, script, what, folders)
        if not script.configures:
            return layers, self._executions.store, dict(final)
        envs = [each for each in left.get("Env") or () if not each.startswith("HOME=")]
        return layers, self._executions.store, {**left, "Env": [*envs, f"HOME={HOME}"]}

    def _seen(self) -> Mapping[str, Folder]:
        found = {}
        for tag, folder in self._models.items():
            repository, _, version = tag.partition(":")
            found[f"{BENTO_PATH}/models/{repository}/{version}"] = folder
        return found

    async def _run(
        self, image: Image, store: Readable, script: Script, what: str, folders: Mapping[str, Folder]
    ) -> tuple[list[Layer], Mapping[str, Any]]:
        # Files of the bento that were copied for the commands come with the bento's own layer.
        copied = () if script.configures else [each for name in script.files for each in self._files(name)]
        order = Order(image, store, script, self._bento, self._secrets, folders, frozenset(copied))
        return await self._executions.execute(order, what)

    def _files(self, name: str) -> list[str]:
        path = self._bento / name
        found = [path] if path.is_file() else [each for each in path.rglob("*") if not each.is_dir()]
        return [f"{BENTO_PATH.strip('/')}/{each.relative_to(self._bento).as_posix()}" for each in found]


def runs_uv(script: Script, bento: Path) -> bool:
    """Whether a script may run uv, which BentoML's images have once the environment is there. Blocks."""
    files = [bento / name for name in script.files if name.startswith("env/docker/")]
    texts = [path.read_text(errors="replace") for path in files if path.is_file()]
    return any(re.search(r"\buv\b", each) for each in (*script.instructions, *texts))
