"""Packages that are built from source for an image: in its base, by the engine, each once.

    cache/built/<key>.json      which file, among those that bentos brought along, was built of what

Wheels are the rule: they are the same on every machine and every day. A package is built only where somebody named it,
and what is built is kept, so that the next image has the same.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from uv import find_uv_bin

from ekiben.errors import EkibenError, FailedPrecondition
from services.builder import containerfiles
from services.builder.bases import BaseImage
from services.builder.commands import Script
from services.builder.engine import Engine, Order, Secret
from services.builder.images import EVERY_BENTO
from services.builder.locks import Lock, Locks, Work
from services.builder.recipe import Recipe
from services.builder.requirements import parse_requirement
from services.builder.targets import Target
from services.content.files import make_folder, write_whole
from services.content.threads import in_thread

_VERSION = 1
_AT = "/ekiben"
_DEFAULTS = ("UV_DEFAULT_INDEX", "UV_INDEX_URL")
_NEEDED = re.compile(r"UV_(DEFAULT_INDEX|INDEX.*|EXTRA_INDEX_URL|FIND_LINKS|INSECURE_HOST|HTTP_\w+|EXCLUDE_NEWER)")
_CERTIFICATES = "/ekiben-certificates.pem"
_SHIPPED = re.compile(r"shipped:([0-9a-f]{64}/\S+)")


@dataclass(frozen=True)
class Sources:
    """Builds from source for one base and target."""

    cache: Path
    engine: Engine | None
    locks: Locks
    recipe: Recipe
    manifest: Mapping[str, Any]
    """bento.yaml: the compiler that BentoML has in every image is installed for the build, and is not in this one."""
    base: BaseImage
    python: str
    """Where the base has its interpreter."""
    target: Target
    work: Work

    async def build(self, lock: Lock) -> Lock:
        """The lock with wheels in the place of the target's sources, by their hashes.

        A crash leaves nothing that counts; another build does it again.

        Raises:
            FailedPrecondition: there is no engine (ENGINE_MISSING), or a package cannot be built (SOURCE_BUILD_FAILED).
            EkibenError: those of `Engine.run`.
        """
        blocks = re.split(r"(?m)^(?=\S)", lock.text)
        wanted = {name: block for block in blocks if (name := _name(block)) in self.target.sources}
        built = {name: found for name, block in wanted.items() if (found := await self._known(block))}
        if missing := {name: block for name, block in wanted.items() if name not in built}:
            built |= await self._run(missing)
        lines = []
        for block in blocks:
            if (file := built.get(_name(block))) is not None:
                digest = file.removeprefix("shipped:").partition("/")[0]
                block = f"{_name(block)} @ {file} \\\n    --hash=sha256:{digest}\n"
            lines.append(block)
        return Lock("".join(lines))

    def _remembered(self, block: str) -> Path:
        made_in = [self.base.key, self.python, self._compiler(), self.work.scope(self.recipe)]
        content = [_VERSION, block, self.target.key, *made_in]
        return self.cache / "built" / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()}.json"

    async def _known(self, block: str) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            file = str(json.loads(await asyncio.to_thread(self._remembered(block).read_text))["file"])
            return file if self.locks.has_file(file) else ""
        return ""

    async def _run(self, missing: Mapping[str, str]) -> dict[str, str]:
        names = ", ".join(sorted(missing))
        if self.engine is None:
            raise FailedPrecondition(
                f"{names} would be built from source, and nothing here runs commands. Use `ekiben images build`, or "
                "versions that have wheels.",
                reason="ENGINE_MISSING",
            )
        self.work.say(f"Building {names} from source in {self.base.name}.")
        context = self.work.directory / f"sources-{self.target.platform.architecture}"
        await asyncio.to_thread(self._lay_out, context, missing)
        secrets = self._secrets()
        given = [each.name for each in secrets]
        instructions = (
            *(f"RUN {command}" for command in self._compiler()),
            f"COPY . {_AT}/",
            f"RUN {containerfiles.with_secrets(self._command(missing), given)}",
        )
        seen = {"/usr/local/bin/uv": lambda: contextlib.nullcontext(Path(find_uv_bin()))}
        if (trusted := _certificates()) is not None:
            seen[_CERTIFICATES] = lambda: contextlib.nullcontext(trusted)
        order = Order(
            self.base.image, self.base.store, Script(instructions, files=(".",)), context, secrets, folders=seen
        )
        try:
            async with self.engine.run(order, self.work.say) as outcome:
                wheels = self.work.directory / f"wheels-{self.target.platform.architecture}"
                found = await asyncio.to_thread(_wheels, outcome.tars, missing, wheels)
        except EkibenError as error:
            if error.reason != "COMMAND_FAILED":
                raise
            raise FailedPrecondition(
                f"{names} cannot be built from source in {self.base.name}: {error.message} What it needs of the system "
                "belongs into system_packages of the bento's image.",
                reason="SOURCE_BUILD_FAILED",
                requirement=names,
            ) from error
        if lost := sorted(missing.keys() - found.keys()):
            raise FailedPrecondition(
                f"Building {', '.join(lost)} from source left no wheel. The log has all that was printed.",
                reason="SOURCE_BUILD_FAILED",
                requirement=", ".join(lost),
            )
        kept = {}
        await asyncio.to_thread(make_folder, self.cache / "built")
        for name, wheel in found.items():
            kept[name] = await in_thread(self.locks.keep_file, wheel, self.work.directory)
            content = json.dumps({"file": kept[name], "package": name}).encode()
            await asyncio.to_thread(write_whole, self._remembered(missing[name]), content)
        return kept

    def _lay_out(self, context: Path, missing: Mapping[str, str]) -> None:
        shutil.rmtree(context, ignore_errors=True)
        context.mkdir()
        text = "".join(missing.values())
        for shipped in set(_SHIPPED.findall(text)):
            source = self.locks.file(f"shipped:{shipped}")
            target = context / "shipped" / shipped
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, target)
        text = _SHIPPED.sub(rf"file://{_AT}/shipped/\1", text)
        (context / "requirements.txt").write_text("\n".join([*self.target.options_of(self.recipe.options), text]))

    def _command(self, missing: Mapping[str, str]) -> str:
        hashed = all("--hash" in block for block in missing.values())
        arguments = [
            *("uv", "pip", "install", "--python", f"{_AT}/venv/bin/python", "--cache-dir", f"{_AT}/cache"),
            *("--link-mode", "copy", "--no-deps", "--no-progress", "--color", "never"),
            *(part for name in sorted(missing) for part in ("--no-binary", name)),
            *(("--require-hashes",) if hashed else ()),
            *(part for host in self.recipe.insecure_hosts for part in ("--allow-insecure-host", host)),
            *("-r", f"{_AT}/requirements.txt"),
        ]
        venv = ["uv", "venv", "--quiet", "--cache-dir", f"{_AT}/cache", "--python", self.python, f"{_AT}/venv"]
        trusting = f"export SSL_CERT_FILE={_CERTIFICATES}; " if _certificates() is not None else ""
        return f"{trusting}{shlex.join(venv)} && {shlex.join(arguments)}"

    def _compiler(self) -> list[str]:
        image = self.manifest.get("image")
        commands = (image.get("commands") or ()) if isinstance(image, Mapping) else ()
        return list(dict.fromkeys(str(each).strip() for each in commands if EVERY_BENTO.fullmatch(str(each).strip())))

    def _secrets(self) -> list[Secret]:
        """Where packages come from, and the build's own secrets: what uv gets on this machine."""
        named = any(option.startswith(("--index-url", "--no-index")) for option in self.recipe.options)
        own = {name: value for name, value in os.environ.items() if _NEEDED.fullmatch(name)}
        found = {name: value for name, value in own.items() if not (named and name in _DEFAULTS)} | dict(self.work.env)
        return [Secret(name, found[name]) for name in sorted(found) if found[name]]


def _certificates() -> Path | None:
    """The authorities that uv trusts on this machine, where they are not uv's own: those of a company's proxy."""
    named = os.environ.get("SSL_CERT_FILE", "")
    return Path(named).absolute() if named and Path(named).is_file() else None


def named_by(options: Sequence[str]) -> set[str]:
    """The packages of which a bento's requirements say that they are to be built: `--no-binary a,b`."""
    values = [option.split(None, 1)[1] for option in options if option.startswith("--no-binary ")]
    names = {name.strip() for value in values for name in re.split(r"[,\s]+", value)}
    return {str(canonicalize_name(name)) for name in names if name and not name.startswith(":")}


def _name(block: str) -> str:
    return parse_requirement(block.split("\\")[0].strip()).name if block.strip() else ""


def _wheels(tars: Sequence[Path], names: Mapping[str, str], folder: Path) -> dict[str, Path]:
    """The wheels of packages that uv left in its cache, taken out of what the run changed."""
    found: dict[str, Path] = {}
    folder.mkdir(exist_ok=True)
    for name, member, archive in _members(tars, names):
        file = archive.extractfile(member)
        if file is not None:
            path = folder / member.name.rpartition("/")[2]
            with path.open("wb") as out:
                shutil.copyfileobj(file, out, 1 << 20)
            found[name] = path
    return found


def _members(tars: Sequence[Path], names: Mapping[str, str]) -> Iterator[tuple[str, tarfile.TarInfo, tarfile.TarFile]]:
    for path in tars:
        with tarfile.open(path) as archive:
            for member in archive:
                parts = member.name.removeprefix("./").split("/")
                if member.isfile() and parts[-1].endswith(".whl") and parts[:2] == [_AT.strip("/"), "cache"]:
                    name = str(canonicalize_name(parts[-1].split("-")[0]))
                    if name in names:
                        yield name, member, archive
