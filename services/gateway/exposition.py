"""Prometheus' text format: read from several sources, put together, each family once. Pure.

Source: Prometheus' exposition formats, "Text format details", version 0.0.4.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

_NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|Inf|NaN)"
_SAMPLE = re.compile(rf"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{{(.*)\}})?\s+({_NUMBER})(?:\s+-?\d+)?\s*$")
_LABELS = re.compile(r'(?:\s*[a-zA-Z_][a-zA-Z0-9_]*\s*=\s*"(?:[^"\\]|\\[\\"n])*"\s*(?:,|$))*\s*')
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*,?')
_UNESCAPE = re.compile(r"\\(.)")
_SUFFIXES = {
    "histogram": ("_bucket", "_sum", "_count"),
    "summary": ("_sum", "_count"),
    "counter": ("_total", "_created"),
    "gauge": (),
    "untyped": (),
}


@dataclass
class Family:
    """All samples of one name."""

    name: str
    type: str = "untyped"
    help: str = ""
    samples: list[tuple[str, str, str]] = field(default_factory=list)
    """Name, labels as written between the braces, value."""


def parse(text: str) -> Iterator[Family]:
    """The families of one source. Lines that cannot be read are left out, and so are comments."""
    family: Family | None = None
    families: dict[str, Family] = {}
    # Not `splitlines`: a label's value, such as a path that a caller chose, may hold any other end of a line.
    for line in text.split("\n"):
        if line.startswith(("# HELP ", "# TYPE ")):
            kind, name, rest = [*line[2:].split(" ", 2), ""][:3]
            family = families.setdefault(name, Family(name))
            if kind == "HELP":
                family.help = rest
            elif rest.strip() in _SUFFIXES:
                family.type = rest.strip()
        elif line and not line.startswith("#") and (sample := _SAMPLE.match(line)):
            name, labels, value = sample[1], sample[2] or "", sample[3]
            if not _LABELS.fullmatch(labels):  # Prometheus would refuse the whole page for it.
                continue
            if family is None or not _belongs(name, family):
                family = families.get(name) or families.setdefault(name, Family(name))
            family.samples.append((name, labels.rstrip(", "), value))
    yield from families.values()


def labelled(families: Iterable[Family], labels: Mapping[str, str]) -> Iterator[Family]:
    """The families with labels added to each sample; a source's own label of such a name becomes `exported_NAME`."""
    added = format_labels(labels)
    for family in families:
        samples = []
        for name, own, value in family.samples:
            kept = own
            if own and any(f"{label}=" in own for label in labels):
                kept = ",".join(
                    f'{"exported_" if label in labels else ""}{label}="{text}"' for label, text in _LABEL.findall(own)
                )
            samples.append((name, f"{kept},{added}" if kept else added, value))
        yield Family(family.name, family.type, family.help, samples)


def merge(sources: Iterable[Iterable[Family]]) -> list[Family]:
    """Every family once, by name. A family that sources type differently keeps the first's; the others' is left out."""
    merged: dict[str, Family] = {}
    for families in sources:
        for family in families:
            if not family.samples and family.type == "untyped":
                continue
            into = merged.setdefault(family.name, Family(family.name, family.type, family.help))
            if into.type == family.type:
                into.samples += family.samples
                into.help = into.help or family.help
    return [merged[name] for name in sorted(merged)]


def write(families: Iterable[Family]) -> bytes:
    """The text. A sample that was there before (the same name and labels) is left out."""
    lines: list[str] = []
    for family in families:
        if not family.samples:
            continue
        lines.append(f"# HELP {family.name} {family.help or family.name}")
        lines.append(f"# TYPE {family.name} {family.type}")
        seen: set[tuple[str, str]] = set()
        for name, labels, value in family.samples:
            if (name, labels) not in seen:
                seen.add((name, labels))
                lines.append(f"{name}{{{labels}}} {value}" if labels else f"{name} {value}")
    return ("\n".join(lines) + "\n").encode()


def labels_of(text: str) -> list[tuple[str, str]]:
    """The labels between the braces of a sample, values unescaped."""
    return [
        (name, _UNESCAPE.sub(lambda found: {"n": "\n"}.get(found[1], found[1]), value))
        for name, value in _LABEL.findall(text)
    ]


def format_labels(labels: Mapping[str, str]) -> str:
    """Labels as they are written between the braces."""
    return ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items())


def _belongs(name: str, family: Family) -> bool:
    return name == family.name or name in {family.name + suffix for suffix in _SUFFIXES[family.type]}


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
