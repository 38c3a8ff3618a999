"""What must be known of a base image: where its Pythons lie, and its users. Read from its layers once, then remembered.

The base is used by name: none of its bytes are changed, and a registry that has them is not sent them again.
"""

import asyncio
import json
import re
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from ekiben.errors import FailedPrecondition
from services.builder.layers import USER, Entry
from services.content.files import make_folder, write_whole
from services.content.images import Descriptor, Image, Readable

_PYTHON = re.compile(r"(?:usr/local/bin|usr/bin|opt/conda/bin)/python(3\.\d+)")
_KEPT = ("etc/passwd", "etc/group")
_SHELL = ("bin/bash", "usr/bin/bash", "usr/local/bin/bash")


@dataclass(frozen=True)
class Base:
    """What the layers of a base image hold."""

    pythons: Mapping[str, str] = field(default_factory=dict)
    """`3.11` → `/usr/local/bin/python3.11`."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Text of `etc/passwd` and `etc/group`."""
    has_bash: bool = False

    def python(self, version: str, name: str) -> str:
        """Where the Python of `3.11` or `3.11.7` is.

        Raises:
            FailedPrecondition: the base has none (BASE_WITHOUT_PYTHON), or no bash for BentoML's entry point
                (BASE_WITHOUT_BASH).
        """
        minor = ".".join(version.split(".")[:2])
        if minor not in self.pythons:
            there = ", ".join(sorted(self.pythons)) or "none"
            raise FailedPrecondition(
                f"The base image {name} has no Python {minor} (it has: {there}). Name another with --base.",
                reason="BASE_WITHOUT_PYTHON",
                python_version=minor,
            )
        if not self.has_bash:
            raise FailedPrecondition(
                f"The base image {name} has no bash, which BentoML's entry point needs. Name another with --base.",
                reason="BASE_WITHOUT_BASH",
            )
        return self.pythons[minor]

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


async def look_into(image: Image, store: Readable, remembered: Path) -> Base:
    """Read the layers of a base, lowest first, or what was remembered of them. Plain, gzip and zstd are read.

    Raises:
        FailedPrecondition: a layer is no tar, or compressed with something else (LAYER_UNSUPPORTED).
    """
    key = image.layers[-1].digest.hex if image.layers else "empty"
    file = remembered / f"{key}.json"
    try:
        return Base(**json.loads(await asyncio.to_thread(file.read_text)))
    except (OSError, ValueError, TypeError):
        pass
    found: dict[str, Any] = {"pythons": {}, "files": {}, "has_bash": False}
    for layer in image.layers:
        await _add(layer, store, found)
    base = Base(**found)
    make_folder(remembered)
    await asyncio.to_thread(write_whole, file, json.dumps(asdict(base)).encode())
    return base


async def _add(layer: Descriptor, store: Readable, found: dict[str, Any]) -> None:
    with tempfile.TemporaryFile() as spool:
        async for chunk in store.read(layer):
            await asyncio.to_thread(spool.write, chunk)
        spool.seek(0)
        try:
            await asyncio.to_thread(_scan, spool, found)
        except (tarfile.TarError, zstandard.ZstdError, EOFError, OSError) as exc:
            raise FailedPrecondition(
                f"Layer {layer.digest} of the base image ({layer.media_type}) is not readable: {exc}. Name a base with "
                "plain, gzip or zstd layers by --base.",
                reason="LAYER_UNSUPPORTED",
            ) from exc


def _opened(spool: Any) -> tarfile.TarFile:
    magic = spool.read(len(zstandard.FRAME_HEADER))
    spool.seek(0)
    if magic != zstandard.FRAME_HEADER:  # tarfile knows the others by itself
        return tarfile.open(fileobj=spool, mode="r:*")
    plain = zstandard.ZstdDecompressor().stream_reader(spool, read_across_frames=True)
    return tarfile.open(fileobj=plain, mode="r|")


def _scan(spool: Any, found: dict[str, Any]) -> None:
    with _opened(spool) as archive:
        for member in archive:
            name = member.name.removeprefix("./").lstrip("/")
            if match := _PYTHON.fullmatch(name):
                found["pythons"].setdefault(match[1], f"/{name}")
            elif name in _KEPT and member.isfile() and (file := archive.extractfile(member)) is not None:
                found["files"][name] = file.read(1 << 20).decode("utf-8", "replace")
            elif name in _SHELL:
                found["has_bash"] = True
