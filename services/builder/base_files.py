"""Reading a base image's layers, one on another, for the few files that say what the base is."""

import asyncio
import gzip
import posixpath
import re
import tarfile
import tempfile
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO, Any

import zstandard
from packageurl import PackageURL

from ekiben.errors import FailedPrecondition
from services.content.images import Descriptor, Readable

_PYTHON = re.compile(r"(?:.*/)?bin/python(3\.\d+)")
_TEXTS = ("etc/passwd", "etc/group")
_SHELLS = ("bin/bash", "usr/bin/bash", "usr/local/bin/bash")
_PACKAGES = ("var/lib/dpkg/status", "lib/apk/db/installed", "usr/lib/apk/db/installed")
"""Lists of what a distribution's package manager installed."""
_RELEASES = ("etc/os-release", "usr/lib/os-release")
_PATCHLEVEL = re.compile(r"(?:(.*)/)?include/python(3\.\d+)/patchlevel\.h")
_CONDA = re.compile(r"(?:(.*)/)?conda-meta/python-(3\.\d+\.\d+)-[^/]*\.json")
_UV = re.compile(r"cpython-(3\.\d+\.\d+)")
_GLIBC = re.compile(r"(?:usr/)?lib(?:64)?/(?:[a-z0-9_]+-linux-gnu[a-z]*/)?libc(?:\.so\.6|-(2\.\d+)\.so)")
_MUSL = re.compile(r"(?:usr/)?lib/ld-musl-[a-z0-9_]+\.so\.1")
_SAYS = re.compile(rb"GNU C Library [^\n]{0,80}version (2\.\d+)")
_MOST_BYTES = 16 << 20
"""Of a file that is read: a C library has 2 MiB, a list of packages up to some more."""
_MOST_HEADER_BYTES = 1 << 20
"""Of all that stands before a member: a path has 4,096 bytes, an attribute of a file at most 64 KiB."""


class BaseFiles:
    """What has been seen so far; layers are added lowest first."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        """`etc/passwd` and `etc/group`."""
        self.libc = ""
        """`glibc 2.36`, `musl`."""
        self._shells: set[str] = set()
        self._modes: dict[str, int] = {}
        """Of folders and Pythons."""
        self._links: dict[str, str] = {}
        self._venvs: set[str] = set()
        self._said: dict[tuple[str, str], str] = {}
        """(prefix, minor) → version, as what lies there says."""
        self._packaged: dict[str, dict[str, str]] = {}
        """List of packages → minor → version."""
        self._installed: dict[str, list[tuple[str, str, str]]] = {}
        """List of packages → name, version and architecture of each."""
        self._releases: dict[str, str] = {}

    @property
    def has_bash(self) -> bool:
        """Whether there is a bash in one of the usual places."""
        return bool(self._shells)

    @property
    def packages(self) -> list[str]:
        """The distribution's packages as package URLs, in order; those of dpkg and apk are found."""
        release = dict(re.findall(r'(?m)^(ID|VERSION_ID)="?([^"\n]*)"?$', "\n".join(self._releases.values())))
        distribution = release.get("ID") or "linux"
        told = "-".join(filter(None, (distribution, release.get("VERSION_ID"))))
        found = set()
        for listed, packages in self._installed.items():
            kind = "deb" if "dpkg" in listed else "apk"
            for name, version, architecture in packages:
                said = {"arch": architecture, "distro": told}
                found.add(PackageURL(kind, distribution, name, version, said).to_string())
        return sorted(found)

    def add(self, layer: IO[bytes]) -> None:
        """Read a layer: a tar, compressed or not. Blocks."""
        with opened(layer) as archive:
            for member in members(archive):
                name = posixpath.normpath(member.name).lstrip("/")
                folder, _, last = name.rpartition("/")
                if last == ".wh..wh..opq":
                    self._forget(folder, itself=False)
                elif last.startswith(".wh."):
                    self._forget(posixpath.join(folder, last.removeprefix(".wh.")))
                else:
                    self._take(name, member, archive)

    def pythons(self, envs: Mapping[str, str]) -> dict[str, str]:
        """Path → version of each Python that any user can run; `envs` are the image's own variables."""
        found = {}
        for name in sorted(self._modes.keys() | self._links.keys()):
            match = _PYTHON.fullmatch(name)
            target = self._resolve(name)
            if match is None or target not in self._modes or not self._open_to_all(target):
                continue
            prefix = posixpath.dirname(posixpath.dirname(name))
            if prefix in self._venvs:
                continue
            found[f"/{name}"] = self._version(match[1], name, target, envs)
        return found

    def _version(self, minor: str, name: str, target: str, envs: Mapping[str, str]) -> str:
        candidates = [
            *(match[1] for match in [_UV.search(target)] if match),
            *(self._said.get((posixpath.dirname(posixpath.dirname(each)), minor), "") for each in (target, name)),
        ]
        if target.startswith("usr/local/"):
            candidates.append(envs.get("PYTHON_VERSION", ""))  # python:3.11 and what is made from it
        elif target.startswith("usr/bin/"):
            candidates += [versions.get(minor, "") for versions in self._packaged.values()]
        return next((each for each in candidates if re.fullmatch(rf"{re.escape(minor)}\.\d+", each)), minor)

    def _take(self, name: str, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        self._links.pop(name, None)
        if member.isdir():
            self._modes[name] = member.mode
        elif _PYTHON.fullmatch(name):
            self._modes.pop(name, None)
            if member.issym():
                self._links[name] = member.linkname
            elif member.islnk():
                self._links[name] = "/" + posixpath.normpath(member.linkname).lstrip("/")
            else:
                self._modes[name] = member.mode
        elif name in _TEXTS and member.isfile():
            self.texts[name] = _read(archive, member).decode("utf-8", "replace")
        elif name in _SHELLS:
            self._shells.add(name)
        elif name in _PACKAGES and member.isfile():
            text = _read(archive, member).decode("utf-8", "replace")
            self._packaged[name], self._installed[name] = dict(_packaged(text)), list(_installed(text))
        elif name in _RELEASES and member.isfile():
            self._releases[name] = _read(archive, member).decode("utf-8", "replace")
        elif name.endswith("/pyvenv.cfg"):
            self._venvs.add(posixpath.dirname(name))
        elif match := _PATCHLEVEL.fullmatch(name):
            if member.isfile() and (said := re.search(rb'PY_VERSION\s+"([\d.]+)', _read(archive, member))):
                self._said[match[1] or "", match[2]] = said[1].decode()
        elif match := _CONDA.fullmatch(name):
            self._said[match[1] or "", ".".join(match[2].split(".")[:2])] = match[2]
        elif match := _GLIBC.fullmatch(name):
            if match[1]:
                self.libc = f"glibc {match[1]}"
            elif member.isfile() and (said := _SAYS.search(_read(archive, member))):
                self.libc = f"glibc {said[1].decode()}"
        elif _MUSL.fullmatch(name) and not self.libc:
            self.libc = "musl"
        elif member.issym() and name.count("/") < 3:
            self._links[name] = member.linkname  # folders such as /bin and /opt/python

    def _forget(self, name: str, *, itself: bool = True) -> None:
        """A layer that lies above took it away."""

        def gone(each: str) -> bool:
            return (itself and each == name) or each.startswith(f"{name}/" if name else "")

        for known in (self.texts, self._modes, self._links, self._packaged, self._installed, self._releases):
            for each in [each for each in known if gone(each)]:
                del known[each]
        self._shells = {each for each in self._shells if not gone(each)}
        self._venvs = {each for each in self._venvs if not gone(f"{each}/pyvenv.cfg")}

    def _resolve(self, name: str) -> str:
        """Where links lead in the end, with links among the folders followed too."""
        for _ in range(16):
            for end in range(1, name.count("/") + 2):
                part = "/".join(name.split("/")[:end])
                if part in self._links:
                    rest = name[len(part) :]
                    joined = posixpath.join("/", posixpath.dirname(part), self._links[part]) + rest
                    name = posixpath.normpath(joined).lstrip("/")
                    break
            else:
                break
        return name

    def _open_to_all(self, name: str) -> bool:
        """Whether any user may run it: Pythons of /root are for root."""
        above = name
        while above := posixpath.dirname(above):
            if not self._modes.get(above, 0o755) & 0o001:
                return False
        return bool(self._modes[name] & 0o001)


@asynccontextmanager
async def spooled(layer: Descriptor, store: Readable) -> AsyncIterator[IO[bytes]]:
    """A layer in a temporary file, for `opened`.

    Raises:
        FailedPrecondition: what the body reads is no tar, or compressed with something else than gzip or zstd
            (LAYER_UNSUPPORTED).
    """
    with tempfile.TemporaryFile() as spool:
        async for chunk in store.read(layer):
            await asyncio.to_thread(spool.write, chunk)
        spool.seek(0)
        try:
            yield spool
        except (tarfile.TarError, zstandard.ZstdError, zlib.error, gzip.BadGzipFile, EOFError) as exc:
            raise FailedPrecondition(
                f"Layer {layer.digest} of the base image ({layer.media_type}) is not readable: {exc}. Name a base with "
                "plain, gzip or zstd layers by --base.",
                reason="LAYER_UNSUPPORTED",
            ) from exc


def opened(spool: IO[bytes]) -> tarfile.TarFile:
    """The tar, plain or compressed, to be read once from its beginning to its end."""
    magic = spool.read(len(zstandard.FRAME_HEADER))
    spool.seek(0)
    if magic != zstandard.FRAME_HEADER:  # tarfile knows the others by itself
        return tarfile.open(fileobj=spool, mode="r:*", tarinfo=_Header)
    plain = zstandard.ZstdDecompressor().stream_reader(spool, read_across_frames=True)
    return tarfile.open(fileobj=plain, mode="r|", tarinfo=_Header)


def members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an archive that `opened` gave, of which none is remembered: there may be millions."""
    while (member := archive.next()) is not None:
        if member.size < 0:
            raise tarfile.TarError("a member has a negative size")  # it would be read again and again
        if sum(map(len, archive.pax_headers.values())) > _MOST_HEADER_BYTES:
            raise tarfile.TarError("its global headers have more than 1 MiB")
        archive.members = []  # type: ignore[attr-defined]
        yield member


class _Header(tarfile.TarInfo):
    """A member whose headers are not read beyond a bound: tarfile has each, and maps of sparse files, in memory."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Header":
        whole = tarfile_.fileobj
        if isinstance(whole, _Metered):
            return super().fromtarfile(tarfile_)  # the next of several headers before one member
        tarfile_.fileobj = _Metered(whole)  # type: ignore[assignment]  # it is only read from meanwhile
        try:
            return super().fromtarfile(tarfile_)
        except RecursionError:
            raise tarfile.TarError("a member has too many headers") from None
        finally:
            tarfile_.fileobj = whole


class _Metered:
    """What an archive is read from, while its headers are."""

    def __init__(self, whole: Any) -> None:
        self._whole = whole
        self._left = _MOST_HEADER_BYTES
        self.tell, self.seek = whole.tell, whole.seek

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._left:
            raise tarfile.TarError("the headers of a member have more than 1 MiB")
        self._left -= size
        return bytes(self._whole.read(size))


def below(folder: Path, path: Path) -> bool:
    """Whether a path, with the links on its way followed, lies in a folder: an archive may say otherwise."""
    return path.resolve().is_relative_to(folder.resolve())


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file: Any = archive.extractfile(member)
    return b"" if file is None else bytes(file.read(_MOST_BYTES))


def _installed(text: str) -> Iterator[tuple[str, str, str]]:
    """Name, version and architecture of what is installed, of a list of dpkg's or apk's."""
    for paragraph in text.split("\n\n"):
        fields = dict(re.findall(r"(?m)^(Package|Version|Architecture|Status|P|V|A): ?(.*)$", paragraph))
        name, version = fields.get("Package") or fields.get("P"), fields.get("Version") or fields.get("V")
        removed = not fields.get("Status", "installed").endswith("installed")  # dpkg keeps those with configuration
        if name and version and not removed:
            yield name, version, fields.get("Architecture") or fields.get("A") or ""


def _packaged(text: str) -> Iterator[tuple[str, str]]:
    """Minor → version of the Pythons in a list of packages, dpkg's or apk's."""
    for paragraph in text.split("\n\n"):
        fields = dict(re.findall(r"(?m)^(Package|Version|P|V): ?(.*)$", paragraph))
        name, version = fields.get("Package") or fields.get("P", ""), fields.get("Version") or fields.get("V", "")
        if (match := re.match(r"(3\.\d+)\.\d+", version)) and (
            name in ("python3", f"python{match[1]}-minimal", f"libpython{match[1]}-minimal")
        ):
            yield match[1], match[0]
