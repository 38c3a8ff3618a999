"""The language in which lists are searched, parsed; pure. `docs/search.md` describes it for users.

fraud label:team=risk,team=audit -label:stage=old creator:@me sort:size-desc
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from ekiben.errors import InvalidArgument

MAX_CHARS = 4096
MAX_TERMS = 50
"""Each costs the database a condition."""


class Subject(StrEnum):
    """What is listed."""

    MODEL_REPOSITORIES = "model repositories"
    BENTO_REPOSITORIES = "bento repositories"
    MODELS = "models"
    BENTOS = "bentos"

    @property
    def versions(self) -> bool:
        """Whether versions are listed, rather than repositories."""
        return self in (Subject.MODELS, Subject.BENTOS)

    @property
    def sorts(self) -> tuple[str, ...]:
        """The fields that `sort:` takes."""
        return ("created_at", "build_at", "size") if self.versions else ("created_at", "updated_at")

    @property
    def flags(self) -> tuple[str, ...]:
        """The words that `is:` and `not:` take."""
        states = ("ready", "pending", "uploading", "failed", "external")
        return (*states, "dev") if self is Subject.BENTOS else states if self is Subject.MODELS else ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of terms."""
        keys = ["in", "label", "-label", "creator", "last_updater", "sort"]
        if self is Subject.MODELS:
            keys.append("module")
        if self.flags:
            keys += ["is", "not"]
        return tuple(keys)


@dataclass(frozen=True)
class Label:
    """Some of `alternatives` must be there, or none of them when not `wanted`. A value of None: whatever it is."""

    alternatives: tuple[tuple[str, str | None], ...]
    wanted: bool


@dataclass(frozen=True)
class Search:
    """All that must hold, and the order. Several creators (or updaters, or modules) are alternatives."""

    words: tuple[str, ...] = ()
    fields: tuple[str, ...] = ("name", "description")
    labels: tuple[Label, ...] = ()
    creators: tuple[str, ...] = ()
    updaters: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    flags: tuple[tuple[str, bool], ...] = ()
    sort: str = "created_at"
    descending: bool = True


_TOKEN = re.compile(r'\s*((?:[^\s"]|"(?:[^"\\]|\\.)*")+)')
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_TERM = re.compile(r"(-?[A-Za-z_]+):(.*)", re.DOTALL)


def parse(text: str, subject: Subject, *, caller: str = "") -> Search:
    """Read a filter. `caller` (`users/…`) is who `@me` is.

    Raises:
        InvalidArgument: it is not understood; the message says what is (FILTER_INVALID).
    """
    if len(text) > MAX_CHARS:
        raise _invalid(f"it has {len(text):,} characters, more than {MAX_CHARS:,}")
    if "\0" in text:
        raise _invalid("it holds the character NUL")
    words: list[str] = []
    values: dict[str, list[str]] = {}
    for token in _tokens(text):
        term = _TERM.fullmatch(token)
        if term is None:
            if token.startswith("-"):
                raise _invalid(f"{token[:60]!r} excludes a word; only labels can be excluded, with -label:")
            words.append(_plain(token))
            continue
        key, value = term[1], term[2]
        if key not in subject.keys:
            raise _invalid(f"{subject.value} have no {key + ':'!r}; there are {_listed(subject.keys, ':')}")
        if not value:
            raise _invalid(f"{key + ':'!r} is without a value")
        values.setdefault(key, []).append(value)
    _limit(words, values)
    sort, descending = _sort(values.get("sort", []), subject)
    return Search(
        words=tuple(words),
        fields=_choices("in", values.get("in", []), ("name", "description")) or ("name", "description"),
        labels=tuple(
            [_label(value, wanted=True) for value in values.get("label", [])]
            + [_label(value, wanted=False) for value in values.get("-label", [])]
        ),
        creators=_users(values.get("creator", []), caller),
        updaters=_users(values.get("last_updater", []), caller),
        modules=_split(values.get("module", [])),
        flags=tuple(
            [(flag, True) for flag in _choices("is", values.get("is", []), subject.flags)]
            + [(flag, False) for flag in _choices("not", values.get("not", []), subject.flags)]
        ),
        sort=sort,
        descending=descending,
    )


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    position = 0
    text = text.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.end() == position:
            raise _invalid("a quotation mark has no partner")
        tokens.append(match[1])
        position = match.end()
    return tokens


def _plain(text: str) -> str:
    """The text without its quotation marks."""
    unquote: Callable[[re.Match[str]], str] = lambda match: re.sub(r"\\(.)", r"\1", match[1])  # noqa: E731
    return _QUOTED.sub(unquote, text)


def _split(values: list[str], separator: str = ",") -> tuple[str, ...]:
    """Values apart at commas outside of quotation marks; the empty ones left out."""
    found: dict[str, None] = {}
    for value in values:
        for piece in re.findall(rf'(?:[^{separator}"]|"(?:[^"\\]|\\.)*")+', value):
            if plain := _plain(piece):
                found[plain] = None
    return tuple(found)


def _label(value: str, *, wanted: bool) -> Label:
    alternatives: list[tuple[str, str | None]] = []
    for piece in _split([value]):
        key, equals, wanted_value = piece.partition("=")
        if not key:
            raise _invalid(f"{piece[:60]!r} is a label without a key")
        alternatives.append((key, wanted_value if equals else None))
    if not alternatives:
        raise _invalid("'label:' is without a value")
    return Label(tuple(alternatives), wanted)


def _users(values: list[str], caller: str) -> tuple[str, ...]:
    return tuple(caller if user == "@me" else "users/" + user.removeprefix("@") for user in _split(values))


def _choices(key: str, values: list[str], allowed: tuple[str, ...]) -> tuple[str, ...]:
    chosen = _split(values)
    for choice in chosen:
        if choice not in allowed:
            raise _invalid(f"'{key}:' does not take {choice[:60]!r}; it takes {_listed(allowed)}")
    return chosen


def _sort(values: list[str], subject: Subject) -> tuple[str, bool]:
    if not values:
        return "created_at", True
    field, _, direction = values[-1].rpartition("-")
    if len(values) > 1 or field not in subject.sorts or direction not in ("asc", "desc"):
        allowed = _listed(tuple(f"{name}-{end}" for name in subject.sorts for end in ("asc", "desc")))
        raise _invalid(f"'sort:' takes one of {allowed}")
    return field, direction == "desc"


def _limit(words: list[str], values: dict[str, list[str]]) -> None:
    count = len(words) + sum(len(_split(found)) for found in values.values())
    if count > MAX_TERMS:
        raise _invalid(f"it has {count} terms, more than {MAX_TERMS}")


def _listed(items: tuple[str, ...], end: str = "") -> str:
    return ", ".join(item + end for item in items)


def _invalid(why: str) -> InvalidArgument:
    return InvalidArgument(
        f"The filter is not understood: {why}.", reason="FILTER_INVALID", violations=[("filter", why)], cause=why
    )
