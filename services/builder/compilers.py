"""The Python that compiles modules for an image: the base's own or its twin's, else one of this machine.

Taking the base's own makes bytecode depend on the base alone, not on which Pythons the building machine has. Its
interpreter is taken out of the base's layers and started by the base's own loader, without changing any root folder:
no rights are needed, and only modules are compiled by it. But it runs on this machine, with the builder's rights. So
that is for a base which the operator chose, as it was before any command ran: a base that a bento names, and what its
commands left, start nothing here.
"""

import asyncio
import contextlib
import json
import posixpath
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ekiben.errors import FailedPrecondition
from services.builder.base_files import below, members, opened, spooled
from services.builder.bases import BaseImage, Python
from services.builder.bytecode import Compiler
from services.builder.interpreters import Interpreters
from services.content.files import make_folder, touch, write_whole
from services.content.threads import in_thread

_LIBRARIES = re.compile(
    r"(?:usr/|usr/local/)?lib(?:64)?/(?:[a-z0-9_]+-linux-[a-z]+/)?"
    r"(?:ld-|libc[.-]|libm[.-]|libdl[.-]|librt[.-]|libutil[.-]|libpthread[.-]|libz\.|libexpat\.|libpython3|libcrypt)"
    r"[^/]*\.so[^/]*|(?:usr/)?lib(?:64)?"
)
_LOADER = re.compile(r"(?:usr/)?lib(?:64)?/(?:[a-z0-9_]+-linux-[a-z]+/)?ld-(?:linux|musl)-[^/]*\.so\.\d")
_STANDARD = re.compile(r"(?:[^/]+|(?:collections|encodings|importlib|json|re)/[^/]+)\.py")
_PROGRAM = b"\x7fELF"
_HERE = "{here}"
"""In what is remembered of an interpreter: the folder that it lies in."""
_UNUSABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)
_ANSWER_TIMEOUT_S = 20.0
_QUESTION = "import json, sys; print(sys.implementation.name, '%d.%d.%d' % sys.version_info[:3])"


async def find(
    base: BaseImage | None, python: Python, cache: Path, interpreters: Interpreters, say: Callable[[str], None]
) -> Compiler | None:
    """Who compiles for an image with this Python; None where nobody here can, and the image goes without bytecode.

    `base` is where that Python may be taken from and run here: the operator's own, or None. One with another Python
    than the image, whose commands brought it, is passed over.

    A base for another architecture has a twin under the same name for this one, as a rule, and equal versions of
    CPython compile alike on every architecture: so it does not matter which machine builds.
    """
    if base is not None and (own := await _of_base(base, python, cache / "pythons-of-bases")) is not None:
        return own
    if (near := await interpreters.nearest(python.version)) is not None:
        return Compiler([near.path], near.version)
    say(
        f"WARNING: neither the base's Python {python.version} nor another {python.minor} may run on this machine: the "
        "image holds no bytecode, and its first start takes some seconds longer."
    )
    return None


async def _of_base(base: BaseImage, python: Python, remembered: Path) -> Compiler | None:
    """The base's interpreter, or its twin's of the same version."""
    same = base.about.pythons.get(python.path) == python.version
    if same and (own := await _own(base, python, remembered)) is not None:
        return own
    if base.twin is not None and (twin := await base.twin()) is not None:
        with contextlib.suppress(FailedPrecondition):
            its = twin.about.python(python.version, twin.name)
            same = its.version == python.version != python.minor
            if same and (own := await _own(twin, its, remembered)) is not None:
                return own
    return None


async def _own(base: BaseImage, python: Python, remembered: Path) -> Compiler | None:
    """The base's interpreter below `remembered`, if it answers here."""
    folder = remembered / f"{base.key}-{python.path.strip('/').replace('/', '-')}"
    touch(folder)
    with contextlib.suppress(*_UNUSABLE):
        return await asyncio.to_thread(_kept, folder)
    make_folder(remembered)
    making = remembered / f".{secrets.token_hex(8)}"
    try:
        for layer in base.image.layers:
            async with spooled(layer, base.store) as spool:
                await asyncio.to_thread(_extract, spool, making, python)
        compiler = await asyncio.to_thread(_started, making, python)
        compiler = compiler or Compiler((), "", {})
        known = {
            "version": compiler.version,
            "env": {name: value.replace(str(making), _HERE) for name, value in compiler.env.items()},
            "argv": [each.replace(str(making), _HERE) for each in compiler.argv],
        }
        await asyncio.to_thread(write_whole, making / "compiler.json", json.dumps(known).encode())
        with contextlib.suppress(*_UNUSABLE):  # another build was first
            return await asyncio.to_thread(_kept, folder)
        with contextlib.suppress(OSError):
            await asyncio.to_thread(folder.rename, remembered / f"{making.name}-before")
        with contextlib.suppress(OSError):
            await in_thread(making.rename, folder)
        return await asyncio.to_thread(_kept, folder)
    finally:
        for each in (making, remembered / f"{making.name}-before"):
            await asyncio.to_thread(shutil.rmtree, each, ignore_errors=True)


def _kept(folder: Path) -> Compiler | None:
    """The interpreter in a folder; None where it does not run on this machine.

    It is found wherever the folder lies now: a cache may be moved, or be another one on another machine.

    Raises one of `_UNUSABLE` where it is to be made anew.
    """
    known = json.loads((folder / "compiler.json").read_text())
    if not known["version"]:
        return None
    argv = [str(each).replace(_HERE, str(folder)) for each in known["argv"]]
    env = {str(name): str(value).replace(_HERE, str(folder)) for name, value in known["env"].items()}
    if not Path(argv[0]).is_relative_to(folder) or not all(Path(each).is_file() for each in (argv[0], argv[-1])):
        raise FileNotFoundError(f"{folder} was made elsewhere, or is not whole")
    return Compiler(argv, known["version"], env)


def _extract(layer: IO[bytes], folder: Path, python: Python) -> None:
    """What a Python needs to compile: itself, its loader and libraries, some modules of its standard library."""
    standard = posixpath.join(posixpath.dirname(posixpath.dirname(python.path)), f"lib/python{python.minor}").strip("/")
    with opened(layer) as archive:
        for member in members(archive):
            name = posixpath.normpath(member.name).lstrip("/")
            inside = name.removeprefix(f"{standard}/")
            if not (
                name == python.path.strip("/")
                or _LIBRARIES.fullmatch(name)
                or (inside != name and _STANDARD.fullmatch(inside))
            ):
                continue
            path = folder / name
            if not below(folder, path.parent):
                continue
            if member.islnk() or member.issym():
                make_folder(path.parent)
                path.unlink(missing_ok=True)
                target = member.linkname if member.issym() else f"/{posixpath.normpath(member.linkname).lstrip('/')}"
                if target.startswith("/"):  # within the image, not on this machine
                    target = posixpath.relpath(target, posixpath.join("/", posixpath.dirname(name)))
                path.symlink_to(target)
            elif member.isfile() and (file := archive.extractfile(member)) is not None:
                make_folder(path.parent)
                path.unlink(missing_ok=True)
                with path.open("wb") as out:
                    shutil.copyfileobj(file, out, 1 << 20)
                path.chmod(0o755 if member.mode & 0o100 else 0o644)


def _started(folder: Path, python: Python) -> Compiler | None:
    """How to start it, if it answers."""
    found = folder / python.path.strip("/")
    if not found.is_file() or not below(folder, found):
        return None
    named = [path for path in folder.rglob("ld-*") if _LOADER.fullmatch(str(path.relative_to(folder)))]
    loaders = {folder / path.resolve().relative_to(folder.resolve()) for path in named if _is_program(folder, path)}
    libraries = sorted({str(path.parent) for path in folder.rglob("*.so*")})
    env = {"PYTHONHOME": str(folder / posixpath.dirname(posixpath.dirname(python.path)).strip("/"))}
    for loader in sorted(loaders):
        argv = [str(loader), "--library-path", ":".join(libraries), str(found)]
        try:
            loader.chmod(0o755)
            answer = subprocess.run(
                [*argv, "-S", "-s", "-B", "-c", _QUESTION],
                env=env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_ANSWER_TIMEOUT_S,
                check=True,
            ).stdout.decode()
        except (OSError, subprocess.SubprocessError, ValueError):
            continue  # of another architecture
        name, _, version = answer.strip().partition(" ")
        if name == "cpython" and version.startswith(f"{python.minor}."):
            return Compiler(argv, version, env)
    return None


def _is_program(folder: Path, path: Path) -> bool:
    """Whether it lies in the folder in the end, and is no script that another program would run."""
    if not below(folder, path) or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_PROGRAM)) == _PROGRAM
