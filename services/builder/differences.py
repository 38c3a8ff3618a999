"""What commands changed in an image, as a layer that depends on what they did and not on when.

A container engine writes the difference as a tar with the times of this minute, in the order of a folder. It is written
anew: names in order, no times, and without what package managers leave for themselves.
"""

import re
import tarfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ekiben.errors import FailedPrecondition
from services.builder.layers import CHUNK_BYTES

_LEFT_OUT = re.compile(
    r"(var/log/(apt|yum|dnf)/|var/cache/(apt|apk|yum|dnf|ldconfig)/|var/lib/apt/lists/|root/\.cache/(pip|uv)/|run/secrets/).*"
    r"|var/log/(dpkg|alternatives|bootstrap|yum|dnf)\.log|run/secrets|etc/\.pwd\.lock"
)
_PLACEHOLDER = ("etc/hosts", "etc/resolv.conf", "etc/hostname", "run/.containerenv")
"""Files that an engine mounts its own on, and for that makes where a base has none: left out where they are empty."""
SHORTEST_SECRET = 8
"""Shorter values occur by chance in any program."""
_PYC_WITH_TIME = 0
"""Flags of bytecode that names the time of its source. Source: PEP 552."""


@dataclass
class Difference:
    """The layer of one tar, to be read once."""

    path: Path
    """The engine's tar, not compressed."""
    without: Collection[str] = ()
    """Names that are left out: another layer has them."""
    secrets: Mapping[str, str] = field(default_factory=dict)
    """Values, by name, that must not be in any file, name, link or attribute."""
    _sources: set[str] = field(default_factory=set)
    _searched: Mapping[str, str] = field(default_factory=dict)

    def chunks(self) -> Iterator[bytes]:
        """The layer's tar in pieces of about 1 MiB.

        Raises:
            FailedPrecondition: the value of a secret is in it (SECRET_IN_IMAGE).
        """
        self._searched = searched(self.secrets)
        with tarfile.open(self.path, "r:") as archive:
            members = {each.name: each for each in archive}
            kept = [name for name, each in members.items() if self._kept(each)]
            self._sources = {_plain(name) for name in kept if name.endswith(".py")}
            waiting: list[bytes] = []
            size = 0
            for info, content in _in_order(members, kept):
                for block in self._blocks(archive, info, content):
                    waiting.append(block)
                    size += len(block)
                    if size >= CHUNK_BYTES:
                        yield b"".join(waiting)
                        waiting, size = [], 0
            yield b"".join([*waiting, bytes(2 * tarfile.BLOCKSIZE)])

    def _kept(self, info: tarfile.TarInfo) -> bool:
        name = _plain(info.name)
        if name in _PLACEHOLDER and not info.size:
            return False
        return bool(name) and not _LEFT_OUT.fullmatch(name) and name not in self.without

    def _blocks(self, archive: tarfile.TarFile, info: tarfile.TarInfo, content: tarfile.TarInfo) -> Iterator[bytes]:
        shown = tarfile.TarInfo(_plain(info.name))
        shown.type, shown.mode, shown.linkname = info.type, info.mode, info.linkname
        shown.uid, shown.gid, shown.devmajor, shown.devminor = info.uid, info.gid, info.devmajor, info.devminor
        shown.mtime, shown.size = 0, info.size
        # Capabilities of programs are kept; times in fractions of a second are not.
        shown.pax_headers = {k: v for k, v in sorted(info.pax_headers.items()) if k.startswith("SCHILY.xattr.")}
        for text in (shown.name, shown.linkname, *shown.pax_headers.values()):
            self._search(text.encode("utf-8", "surrogateescape"), shown.name)
        yield shown.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        if not info.isreg():
            return
        file = archive.extractfile(content)
        assert file is not None
        tail = b""
        overlap = max((len(value.encode()) for value in self._searched.values()), default=0)
        stale = _source_of(shown.name) in self._sources
        while chunk := file.read(CHUNK_BYTES):
            chunk, stale = _settled(chunk) if stale else chunk, False
            self._search(tail + chunk, shown.name)
            tail = chunk[-overlap:] if overlap else b""
            yield chunk
        yield bytes(-info.size % tarfile.BLOCKSIZE)

    def _search(self, data: bytes, name: str) -> None:
        for secret, value in self._searched.items():
            if value.encode() in data:
                for each in self._searched.values():
                    name = name.replace(each, "…")
                raise FailedPrecondition(
                    f"The commands leave the value of {secret} in the image, in /{name}. "
                    "Remove it in the command that uses it.",
                    reason="SECRET_IN_IMAGE",
                    secret=secret,
                    file=f"/{name}",
                )


def searched(secrets: Mapping[str, str]) -> dict[str, str]:
    """What to look for, by name: a shell gives its variable no newline of the end, and programs take no spaces."""
    stripped = {name: value.strip() for name, value in secrets.items()}
    return {name: value for name, value in stripped.items() if len(value) >= SHORTEST_SECRET}


def _settled(bytecode: bytes) -> bytes:
    """Bytecode of a source that has lost its time: else Python would compile it at each start."""
    if int.from_bytes(bytecode[4:8], "little") != _PYC_WITH_TIME or len(bytecode) < 16:
        return bytecode
    return bytecode[:8] + bytes(4) + bytecode[12:]


def _source_of(bytecode: str) -> str:
    folder, _, name = bytecode.rpartition("/__pycache__/")
    return f"{folder}/{name.split('.', 1)[0]}.py" if name.endswith(".pyc") else ""


def _in_order(
    members: Mapping[str, tarfile.TarInfo], kept: Collection[str]
) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo]]:
    """What is kept, by name, each with the member that has its content: of several names of one file the first one that
    is kept has it, whichever has it in the tar. uv links packages out of its cache, which is left out."""
    names: dict[str, list[str]] = {}
    for each in members.values():
        if each.islnk():
            names.setdefault(each.linkname, [each.linkname]).append(each.name)
    of = {name: target for target, linked in names.items() for name in linked if target in members}
    first: dict[str, str] = {}
    for name in sorted(kept, key=_order):
        target = of.get(name)
        if target is None:
            yield members[name], members[name]
        elif first.setdefault(target, name) == name:
            yield _renamed(members[target], name), members[target]
        else:
            yield _linked(members[target], name, first[target]), members[target]


def _order(name: str) -> list[str]:
    return _plain(name).split("/")


def _plain(name: str) -> str:
    return name.removeprefix("./").strip("/")


def _renamed(info: tarfile.TarInfo, name: str) -> tarfile.TarInfo:
    return info.replace(name=name, deep=False)


def _linked(info: tarfile.TarInfo, name: str, target: str) -> tarfile.TarInfo:
    link = info.replace(name=name, linkname=_plain(target), deep=False)
    link.type, link.size = tarfile.LNKTYPE, 0
    return link
