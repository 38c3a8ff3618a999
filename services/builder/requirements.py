"""Requirements files as pip and uv read them: logical lines, options, names. Pure.

Source: pip's "Requirements File Format"; PEP 508 for the requirements themselves.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement
from packaging.requirements import Requirement as Pep508
from packaging.utils import canonicalize_name

_COMMENT = re.compile(r"(^|\s+)#.*$")
_HASH = re.compile(r"\s+--hash[=\s]+(?P<hash>[a-z0-9]+:[0-9a-fA-F]+)")
_TRAILING_OPTION = re.compile(r"\s+--(?:global-option|install-option|config-settings?)\b.*$")
_URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_NAMED_URL = re.compile(
    r"^(?P<name>[A-Za-z0-9][-._A-Za-z0-9]*)\s*(?P<extras>\[[^\]]*\])?\s*@\s*(?P<url>\S+)(?P<rest>.*)$"
)
_ARCHIVE = re.compile(r"\.(whl|tar\.gz|tgz|zip|tar\.bz2)$")
_PATH = re.compile(r"[^\s@;]+/[^\s@;]*")

SHORT = {"-i": "--index-url", "-f": "--find-links", "-r": "--requirement", "-c": "--constraint", "-e": "--editable"}
WITHOUT_VALUE = {"--no-index", "--pre", "--prefer-binary", "--require-hashes", "--no-cache-dir", "--no-deps", "--quiet"}


@dataclass(frozen=True)
class Option:
    """A line such as `--index-url https://…`."""

    name: str
    """In its long form."""
    value: str = ""


@dataclass(frozen=True)
class Requirement:
    """A line which asks for a package."""

    text: str
    """As written, without comment and hashes."""
    name: str = ""
    """Canonical (PEP 503); empty for a bare path or URL whose name is not known before it is read."""
    specifier: str = ""
    """`==1.2`, `<3,>=2`; empty for none, or where it is a path or URL."""
    location: str = ""
    """URL or path that it is taken from; empty for one from an index."""
    extras: tuple[str, ...] = ()
    marker: str = ""
    hashes: tuple[str, ...] = ()
    """`sha256:<hex>` each; whoever wrote them accepts nothing else."""

    @property
    def pinned(self) -> str:
        """The version of `==version`, else empty."""
        match = re.fullmatch(r"===?\s*([^,*]+)", self.specifier)
        return match[1].strip() if match else ""

    @property
    def path(self) -> str:
        """The location where it is a path of the machine that wrote the line, else empty."""
        if self.location.startswith("file:"):
            return re.sub(r"^file:(//(localhost)?)?", "", self.location).split("#")[0]
        return "" if not self.location or "://" in self.location else self.location.split("#")[0]

    def at(self, location: str) -> "Requirement":
        """The same, taken from somewhere else."""
        extras = f"[{','.join(self.extras)}]" if self.extras else ""
        marker = f" ; {self.marker}" if self.marker else ""
        text = f"{self.name}{extras} @ {location}{marker}" if self.name else f"{location}{extras}"
        return Requirement(text, self.name, "", location, self.extras, self.marker, self.hashes)


def logical_lines(text: str) -> Iterator[str]:
    """The lines of a file with continuations joined, comments and blank lines left out."""
    joined: list[str] = []
    for raw in text.lstrip("\ufeff").splitlines():
        line = _COMMENT.sub("", raw).strip()
        goes_on = line.endswith("\\")
        joined.append(line.removesuffix("\\").strip())
        if not goes_on:
            whole, joined = " ".join(filter(None, joined)), []
            if whole:
                yield whole
    if any(joined):
        yield " ".join(filter(None, joined))


def parse(text: str) -> list[Option | Requirement]:
    """Options and requirements in their order."""
    return [_parse_line(line) for line in logical_lines(text)]


def _parse_line(line: str) -> Option | Requirement:
    if not line.startswith("-"):
        return parse_requirement(line)
    option = parse_option(line)
    # Nobody edits what an environment was made of: it has a copy.
    return parse_requirement(option.value) if option.name == "--editable" else option


def parse_option(line: str) -> Option:
    """`-i URL`, `--index-url=URL` or `--index-url URL`."""
    name, separator, value = line.partition("=") if re.match(r"--[a-z-]+=", line) else line.partition(" ")
    if not separator and name[:2] in SHORT and not name.startswith("--"):
        name, value = line[:2], line[2:]  # -ihttps://…
    return Option(SHORT.get(name, name), value.strip().strip("\"'"))


def parse_arguments(arguments: str) -> list[Option]:
    """The options of a command line, `pip_args` of a bento."""
    words = shlex.split(arguments)
    found: list[Option] = []
    while words:
        word = words.pop(0)
        name = SHORT.get(word, word)
        if "=" in word or name in WITHOUT_VALUE or not words or words[0].startswith("-"):
            found.append(parse_option(word))
        else:
            found.append(Option(name, words.pop(0)))
    return found


def parse_requirement(line: str) -> Requirement:
    """A requirement; what cannot be read is kept as text, so that the resolver says what is wrong with it."""
    hashes = tuple(match["hash"].lower() for match in _HASH.finditer(line))
    text = _TRAILING_OPTION.sub("", _HASH.sub("", line)).strip()
    if _URL.match(text) or text.startswith(("file:", ".", "/", "~")) or (_ARCHIVE.search(text) and " " not in text):
        location, extras = _without_extras(text)
        return Requirement(text, location=location, extras=extras, hashes=hashes)
    try:
        parsed = Pep508(text)
    except InvalidRequirement:
        match = _NAMED_URL.match(text)  # `name @ ./path`, which uv takes and PEP 508 does not
        if match is None:
            location, named = _without_extras(text)
            if _PATH.fullmatch(location):  # `libs/own`: a folder, as for pip
                return Requirement(text, location=location, extras=named, hashes=hashes)
            return Requirement(text, hashes=hashes)
        extras = tuple(part.strip() for part in (match["extras"] or "")[1:-1].split(",") if part.strip())
        return Requirement(text, canonicalize_name(match["name"]), "", match["url"], extras, "", hashes)
    return Requirement(
        text,
        canonicalize_name(parsed.name),
        str(parsed.specifier),
        parsed.url or "",
        tuple(sorted(parsed.extras)),
        str(parsed.marker or ""),
        hashes,
    )


def _without_extras(text: str) -> tuple[str, tuple[str, ...]]:
    match = re.fullmatch(r"(.+?)\s*\[([^\]]+)\]", text)
    if match is None:
        return text, ()
    return match[1], tuple(part.strip() for part in match[2].split(","))


def locked_versions(lock: str) -> dict[str, str]:
    """Each package of a lock and its version; a URL where it was taken from one."""
    found = {}
    for line in logical_lines(lock):
        if not line.startswith("-"):
            requirement = parse_requirement(line)
            found[requirement.name or requirement.text] = requirement.pinned or requirement.location
    return found


def all_hashed(lock: str) -> bool:
    """Whether each package of a lock has a hash, so that the installer may insist on them."""
    return all("--hash" in line for line in logical_lines(lock) if not line.startswith("-"))
