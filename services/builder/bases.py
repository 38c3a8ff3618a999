"""What must be known of a base: its Pythons, its C library, its users. Read from its layers once, then remembered.

The base is used by name: none of its bytes are changed, and a registry that has them is not sent them again.
"""

import asyncio
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ekiben.errors import FailedPrecondition
from services.builder.base_files import BaseFiles, spooled
from services.builder.layers import USER, Entry
from services.content.files import make_folder, write_whole
from services.content.images import Descriptor, Image, ImageStore, Platform, Readable
from services.content.images.resolving import for_platform

_FORMAT = 3
"""Of what is remembered; grows with its members."""
_USUAL_FOLDERS = ("/usr/local/bin", "/usr/bin", "/opt/conda/bin")


@dataclass(frozen=True)
class Python:
    """An interpreter in a base."""

    path: str
    """`/usr/local/bin/python3.11`."""
    version: str
    """`3.11.9`; `3.11` where nothing in the image tells more."""

    @property
    def minor(self) -> str:
        """`3.11`."""
        return ".".join(self.version.split(".")[:2])


@dataclass(frozen=True)
class Base:
    """What the layers of a base image hold."""

    pythons: Mapping[str, str] = field(default_factory=dict)
    """Path → version, those that user 1034 can run."""
    search: tuple[str, ...] = _USUAL_FOLDERS
    """Folders in whose order Pythons are preferred: the image's own PATH first."""
    libc: str = ""
    """`glibc 2.36`, `musl`; empty where none was found."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Text of `etc/passwd` and `etc/group`."""
    has_bash: bool = False
    packages: tuple[str, ...] = ()
    """The distribution's packages, as package URLs."""

    def python(self, version: str, name: str) -> Python:
        """The Python for `3.11` or `3.11.7`: the one of that minor version which the image's PATH finds first.

        Raises:
            FailedPrecondition: the base has none (BASE_WITHOUT_PYTHON), or no bash for BentoML's entry point
                (BASE_WITHOUT_BASH).
        """
        minor = ".".join(version.split(".")[:2])
        known = [Python(path, found) for path, found in self.pythons.items()]
        fitting = [one for one in known if one.minor == minor]
        if not fitting:
            there = ", ".join(sorted({one.minor for one in known}, key=lambda each: int(each.split(".")[1]))) or "none"
            raise FailedPrecondition(
                f"The base image {name} has no Python {minor} that user {USER} can run (it has: {there}). Name another "
                "with --base.",
                reason="BASE_WITHOUT_PYTHON",
                python_version=minor,
            )
        if not self.has_bash:
            raise FailedPrecondition(
                f"The base image {name} has no bash, which BentoML's entry point needs. Name another with --base, or "
                "have the bento install it (system_packages; on Alpine a command: apk add bash).",
                reason="BASE_WITHOUT_BASH",
            )
        order = [*self.search, *_USUAL_FOLDERS]

        def rank(one: Python) -> tuple[int, str]:
            folder = str(PurePosixPath(one.path).parent)
            return order.index(folder) if folder in order else len(order), one.path

        return min(fitting, key=rank)

    def users(self) -> list[Entry]:
        """`etc/passwd` and `etc/group` with the user `bentoml`, where the base has no such user."""
        lines = {
            "etc/passwd": f"bentoml:x:{USER}:{USER}:BentoML:/home/bentoml:/bin/bash\n",
            "etc/group": f"bentoml:x:{USER}:\n",
        }
        found = []
        for name, line in lines.items():
            text = self.files.get(name) or (
                "root:x:0:0:root:/root:/bin/sh\n" if name == "etc/passwd" else "root:x:0:\n"
            )
            if not re.search(r"^bentoml:", text, re.MULTILINE):
                ending = "" if text.endswith("\n") else "\n"
                found.append(Entry(name, data=f"{text}{ending}{line}".encode()))
        return found


@dataclass(frozen=True)
class BaseImage:
    """A base, and the store that it is read from."""

    store: Readable
    name: str
    """As somebody named it, `oci:python-3.11`."""
    reference: str
    """What images made of it say that it is: the same on every machine, so no folder of this one."""
    descriptor: Descriptor
    """Of its manifest."""
    image: Image
    about: Base
    ours: bool = False
    """Whether the operator chose it, and not a bento: then its Python may run on this machine."""
    twin: "Callable[[], Awaitable[BaseImage | None]] | None" = None
    """Finds what the same name stands for on this machine's platform, where this one is for another."""

    @property
    def key(self) -> str:
        """Equal for bases in which the same files lie."""
        return key_of(self.image)


async def open_base(
    store: ImageStore, what: str | Descriptor, name: str, platform: Platform, remembered: Path
) -> BaseImage:
    """Find a base for a platform, by a reference or by what that stood for, and look into it.

    Raises:
        NotFound: there is no such base (IMAGE_NOT_FOUND).
        FailedPrecondition: a layer of it cannot be read (LAYER_UNSUPPORTED), or its configuration (BASE_DAMAGED).
    """
    if isinstance(what, Descriptor):
        descriptor, image = await for_platform(store, [what], platform, name)
    else:
        descriptor, image = await store.resolve(what, platform)
    _check(image, name)
    transport, _, rest = name.partition(":")
    told = rest.removeprefix("//") if transport == "docker" else rest.partition(":")[2]
    return BaseImage(store, name, told, descriptor, image, await look_into(image, store, remembered))


def _check(image: Image, name: str) -> None:
    """Refuse a base whose configuration is not what containers are started by: an image on it would be neither."""
    config = image.config

    def of(value: Any, kind: type[list[Any]] | type[dict[str, Any]], parts: type = object) -> bool:
        return value is None or (isinstance(value, kind) and all(isinstance(part, parts) for part in value))

    said, tree = config.get("config"), config.get("rootfs")
    digests = tree.get("diff_ids") if isinstance(tree, dict) else None
    wrong = [
        what
        for what, right in (
            ("config", of(said, dict)),
            ("config.Env", not isinstance(said, dict) or of(said.get("Env"), list, str)),
            ("config.Labels", not isinstance(said, dict) or of(said.get("Labels"), dict, str)),
            ("history", of(config.get("history"), list, dict)),
            ("rootfs", digests is not None and of(digests, list, str) and len(digests) == len(image.layers)),
        )
        if not right
    ]
    if wrong:
        raise FailedPrecondition(
            f"The base image {name} cannot be built on: its configuration has no usable {', '.join(wrong)}. Make that "
            "image again, or name another with --base.",
            reason="BASE_DAMAGED",
            image=name,
        )


async def look_into(image: Image, store: Readable, remembered: Path) -> Base:
    """Read the layers of a base, lowest first, or what was remembered of them. Plain, gzip and zstd are read.

    Raises:
        FailedPrecondition: a layer is no tar, or compressed with something else (LAYER_UNSUPPORTED).
    """
    file = remembered / f"{key_of(image)}.json"
    try:
        known = json.loads(await asyncio.to_thread(file.read_text))
        return Base(**{**known, "search": tuple(known["search"]), "packages": tuple(known["packages"])})
    except (OSError, ValueError, TypeError, KeyError):
        pass
    files = BaseFiles()
    for layer in image.layers:
        async with spooled(layer, store) as spool:
            await asyncio.to_thread(files.add, spool)
    config = image.config.get("config") or {}
    envs = dict(each.split("=", 1) for each in config.get("Env") or () if "=" in each)
    search = tuple(folder for folder in envs.get("PATH", "").split(":") if folder) or _USUAL_FOLDERS
    base = Base(files.pythons(envs), search, files.libc, files.texts, files.has_bash, tuple(files.packages))
    make_folder(remembered)
    await asyncio.to_thread(write_whole, file, json.dumps(asdict(base)).encode())
    return base


def key_of(image: Image) -> str:
    """What changes with an image's layers and its variables; the uppermost layer alone may lie on different others."""
    config = image.config.get("config") or {}
    content = [_FORMAT, [str(layer.digest) for layer in image.layers], config.get("Env")]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
