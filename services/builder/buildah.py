"""The engine that runs commands by buildah: no daemon, and no container runtime, for commands run in a chroot.

As root of this machine, or in a user namespace where the builder is another user (that needs newuidmap and ranges in
/etc/subuid). Commands see the machine's network. Images that were used stay in a storage of the engine's own.

Source: buildah-build(1), buildah-pull(1).
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ekiben.errors import DeadlineExceeded, EkibenError, FailedPrecondition, ResourceExhausted
from services.builder import containerfiles, contexts
from services.builder.engine import Order, Outcome, write_image
from services.builder.images import platform_of
from services.builder.platforms import here
from services.builder.storages import Storage, lock
from services.builder.uv import Programs
from services.content.files import make_folder, write_whole
from services.content.images import LAYER, Platform, canonical
from services.content.images.layout import LayoutImageStore

log = logging.getLogger(__name__)

_STORAGES = 8
"""Each is used by one execution at a time, so that what a killed one left can be removed before the next."""
_IMAGES = 4
"""Kept unpacked in a storage, the last ones that commands ran on: a base is used again, what lies above it seldom."""
_LAST_LINES = 20
_STEP = re.compile(r"(?:\[\d+/\d+\] )?STEP \d+/\d+: (.*)")
_NOISE = re.compile(r"subprocess exited with status \d+|time=\S+ level=.*")
_EXIT = re.compile(r"exit status (\d+)")
_NOT_IN_OVERLAYS = re.compile(r"[:,\\\"]")
"""What options of a mount cannot hold."""
_WAIT_S = 0.2
_SWEEP_TIMEOUT_S = 20.0
"""A storage is swept within a second. A start does not wait for an engine that hangs."""


class BuildahEngine:
    """See Engine."""

    def __init__(self, folder: Path, programs: Programs, *, timeout_s: float = 3600.0) -> None:
        self._folder = folder
        self._programs = programs
        self._timeout_s = timeout_s

    def check(self, platforms: Sequence[Platform] = ()) -> None:
        """See Engine."""
        if shutil.which("buildah") is None:
            raise FailedPrecondition(
                "The bento runs commands while its image is built, and the program that runs them is not on this "
                "machine. Install buildah (Debian, Ubuntu: apt-get install buildah; Fedora: dnf install buildah).",
                reason="ENGINE_MISSING",
                program="buildah",
            )
        if _NOT_IN_OVERLAYS.search(str(self._folder)):
            raise FailedPrecondition(
                f"The bento runs commands while its image is built, and buildah can keep no image below "
                f"{self._folder}: no path of an overlay has a colon, a comma, a quote or a backslash. Name another "
                "folder for the cache.",
                reason="ENGINE_FAILED",
                path=str(self._folder),
            )
        mine = here()
        for wanted in platforms:
            if (wanted.os, wanted.architecture) != (mine.os, mine.architecture):
                raise FailedPrecondition(
                    f"The bento runs commands while its image is built. They can run for {mine}, not for {wanted}. "
                    "Build the image on a machine of that kind.",
                    reason="PLATFORM_NOT_EXECUTABLE",
                    platform=str(wanted),
                )

    async def sweep(self) -> None:
        """Take away what a killed builder left, its secrets above all; a storage in use is left alone.

        What does not work is logged: it is tried again before the storage is used.
        """
        for path in sorted(self._folder.glob("storage-*.lock")):
            if (file := lock(path)) is not None:
                with file:
                    try:
                        async with asyncio.timeout(_SWEEP_TIMEOUT_S):
                            await Storage(path.with_suffix(""), self._programs).clean()
                    except (EkibenError, OSError) as exc:
                        log.warning("what an execution left could not be taken away", extra={"error": str(exc)})

    @contextlib.asynccontextmanager
    async def run(self, order: Order, say: Callable[[str], None]) -> AsyncIterator[Outcome]:
        """See Engine."""
        self.check([platform_of(order.image)])
        async with self._storage() as storage, contextlib.AsyncExitStack() as folders:
            execution = _Execution(storage, self._programs, order, say)
            await execution.clean()
            try:
                mounted = {path: await folders.enter_async_context(each()) for path, each in order.folders.items()}
                async with asyncio.timeout(self._timeout_s):
                    outcome = await execution.run(mounted)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"The commands of the bento did not end within {self._timeout_s:.0f} s; then this was running: "
                    f"{execution.step or 'nothing yet'}",
                    reason="COMMANDS_TIMEOUT",
                    command=execution.step,
                ) from None
            else:
                yield outcome
            finally:
                await asyncio.shield(execution.clean())

    @contextlib.asynccontextmanager
    async def _storage(self) -> AsyncIterator[Path]:
        """A storage that nobody else uses meanwhile."""
        make_folder(self._folder)
        while True:
            for number in range(_STORAGES):
                if (file := lock(self._folder / f"storage-{number}.lock")) is not None:
                    with file:
                        yield self._folder / f"storage-{number}"
                    return
            await asyncio.sleep(_WAIT_S)


class _Execution(Storage):
    def __init__(self, folder: Path, programs: Programs, order: Order, say: Callable[[str], None]) -> None:
        super().__init__(folder, programs)
        self.step = ""
        """What runs, in the bento's own words."""
        self._order = order
        self._say = say
        self._written = False
        """Whether only the engine's own copying of layers is still to come."""
        self._last: deque[str] = deque(maxlen=_LAST_LINES)

    async def run(self, folders: Mapping[str, Path]) -> Outcome:
        """Run the order's script, with these folders to be seen."""
        await asyncio.to_thread(make_folder, self.work / "tmp")
        base = await self._base()
        order = self._order
        context = await self._context()
        containerfile = self.work / "Containerfile"
        lines = [*order.script.stages, f"FROM {base}", *order.script.instructions]
        await asyncio.to_thread(containerfile.write_text, "\n".join(lines) + "\n")
        options = [
            "--isolation",
            "chroot",
            "--network",
            "host",
            "--layers=false",
            "--format",
            "oci",
            "--pull-always=false",
        ]
        for number, secret in enumerate(order.secrets):
            file = self.work / "tmp" / f"secret-{number}"
            await asyncio.to_thread(_write_secret, file, secret.value)
            options += ["--secret", f"id={secret.name},src={file}"]
        for path, folder in sorted(folders.items()):
            options += ["--volume", f"{folder}:{path}:ro"]
        self.step = "the engine's own preparation"
        done = await self.buildah(
            "bud", *options, "-f", str(containerfile), "-t", "oci:out:made", str(context), line=self._take
        )
        if done.returncode:
            raise self._failure(done.text)
        return await asyncio.to_thread(self._read)

    async def _context(self) -> Path:
        """What the script copies from."""
        order, context = self._order, self.work / "context"
        laid = asyncio.ensure_future(asyncio.to_thread(contexts.lay_out, order.context, order.script.files, context))
        try:
            await asyncio.shield(laid)
        finally:
            await asyncio.wait([laid])  # so that nothing is written after the folder was taken away
        return context

    async def _base(self) -> str:
        """The image's id in the storage, brought there where it is not."""
        image = self._order.image
        known = hashlib.sha256(canonical(image.config)).hexdigest()
        if not (await self.buildah("inspect", "--type", "image", "--format", "{{.FromImageID}}", known)).returncode:
            await self._keep(known)
            return known
        layout = LayoutImageStore(self.work / "base")
        await write_image(image, self._order.store, layout, "base")
        # The storage names the image for the layout's path, so that must be short and plain: relative.
        done = await self.buildah("pull", "--quiet", "oci:base:base")
        await asyncio.to_thread(shutil.rmtree, self.work / "base")
        if done.returncode:
            raise self._failure(done.text)
        await self._keep(done.text.split()[-1])
        return done.text.split()[-1]

    async def _keep(self, image: str) -> None:
        """Remember that an image was used now, and let the storage keep the last few only: each is unpacked there."""
        file = self.folder / "used"
        used = file.read_text().split() if file.exists() else []
        used = [*(each for each in used if each != image), image]
        for each in used[:-_IMAGES]:
            await self.buildah("rmi", each)
        await asyncio.to_thread(write_whole, file, " ".join(used[-_IMAGES:]).encode(), durable=False)

    def _take(self, line: str) -> None:
        line = self._order.masked(line.rpartition("\r")[2])
        self._written = self._written or line.startswith("COMMIT ")
        if _NOISE.fullmatch(line) or (self._written and not line.startswith("Error: ")):
            return
        if step := _STEP.match(line):
            self.step = containerfiles.without_secrets(step[1]).removeprefix("RUN ")
            self._last.clear()
            line = containerfiles.without_secrets(line)
        elif line.startswith("Error: "):
            line = containerfiles.without_secrets(line.replace('\\"', '"'))
        else:
            self._last.append(line)
        self._say(line)

    def _failure(self, text: str) -> EkibenError:
        text = self._order.masked(text)
        if re.search(r"no space left on device|disk quota exceeded", text, re.IGNORECASE):
            return ResourceExhausted(
                "The disk is full, or its quota, where the engine keeps images. Free some space and build again.",
                reason="STORAGE_FULL",
            )
        begins = [each.start() for each in re.finditer(r"(?m)^(Error:|error )", text)]
        error = text[begins[-1] :].strip() if begins else ""  # with the lines of a command that has several
        code = _EXIT.search(error)
        said = "\n".join(self._last)
        if code and "building at STEP" in error and "RUN" in error:
            return FailedPrecondition(
                f"A command of the bento failed with exit code {code[1]}: {self.step}\n{said}".rstrip(),
                reason="COMMAND_FAILED",
                command=self.step,
                exit_code=code[1],
            )
        return FailedPrecondition(
            f"The engine that runs the bento's commands failed: {error.removeprefix('Error: ') or text[-500:].strip()}",
            reason="ENGINE_FAILED",
        )

    def _read(self) -> Outcome:
        """What the engine wrote, less what was there before it began."""
        blobs = self.work / "out" / "blobs" / "sha256"

        def read(digest: str) -> Any:
            return json.loads((blobs / digest.partition(":")[2]).read_bytes())

        index = json.loads((self.work / "out" / "index.json").read_bytes())
        manifest = read(index["manifests"][0]["digest"])
        config = read(manifest["config"]["digest"])
        below = list(self._order.image.config["rootfs"]["diff_ids"])
        if config["rootfs"]["diff_ids"][: len(below)] != below:
            raise FailedPrecondition(
                "The Dockerfile template ends on another image than it began with. Let the stage base-container be its "
                "last.",
                reason="TEMPLATE_UNSUPPORTED",
            )
        tars = [
            self._plain(blobs / each["digest"].partition(":")[2], each) for each in manifest["layers"][len(below) :]
        ]
        made = dict(config.get("config") or {})
        labels = {k: v for k, v in (made.get("Labels") or {}).items() if not k.startswith("io.buildah.")}
        return Outcome({**made, "Labels": labels}, tars)

    def _plain(self, blob: Path, descriptor: dict[str, Any]) -> Path:
        if descriptor["mediaType"] == LAYER:
            return blob
        raise FailedPrecondition(
            f"buildah wrote a layer of type {descriptor['mediaType']}; version 1.23 or later writes tars.",
            reason="ENGINE_FAILED",
        )


def _write_secret(file: Path, value: str) -> None:
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as target:
        target.write(value)
