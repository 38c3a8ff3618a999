"""Searches as structures: written down in the language, and answered from the model of the registry by looking at all.

The answer is found without the parser, without SQL and without indexes, so that it can tell whether those are right.
"""

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from services.registry.domain import Kind
from tests.registry_model import Model, MRepository, MVersion, Scope

KEYS = ("team", "ünit")
VALUES = ("a", "b", "x y", 'q"=,')
USERS = ("admin", "bob")
WORDS = ("m", "n-1", "v1", "m:v", "ODEL", "50%", "a_b", "Ärger", "ärger", "zz", "\\", "one two")
DESCRIPTIONS = ("", "A Model: 50% of a_b", "ÄRGER one two\\", "Ärger")
MODULES = ("bentoml.sklearn", "bentoml.onnx", "none")
MANIFESTS: tuple[tuple[str, dict[str, object]], ...] = (
    ("", {}),
    ('{"module": "bentoml.sklearn", "dev": true}', {"module": "bentoml.sklearn", "dev": True}),
    ('{"models": ["m:v1"]}', {"models": "m:v1"}),
    (
        '{"module": "bentoml.onnx", "metadata": {"registry": "huggingface"}}',
        {"module": "bentoml.onnx", "external": True},
    ),
)


def quoted(text: str) -> str:
    """As one word of the language."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


@dataclass(frozen=True)
class Query:
    """What is looked for; a label's value of None means any."""

    words: tuple[str, ...] = ()
    place: str = ""
    labels: tuple[tuple[tuple[tuple[str, str | None], ...], bool], ...] = ()
    creators: tuple[str, ...] = ()
    updaters: tuple[str, ...] = ()
    module: str = ""
    flags: tuple[tuple[str, bool], ...] = ()
    sort: str = ""
    descending: bool = True

    def text(self) -> str:
        """In the language."""
        pieces = [quoted(word) for word in self.words]
        if self.place:
            pieces.append(f"in:{self.place}")
        for alternatives, wanted in self.labels:
            shown = ",".join(quoted(key if value is None else f"{key}={value}") for key, value in alternatives)
            pieces.append(f"{'' if wanted else '-'}label:{shown}")
        pieces += [f"creator:{user}" for user in self.creators]
        pieces += [f"last_updater:{','.join(self.updaters)}"] if self.updaters else []
        pieces += [f"module:{self.module}"] if self.module else []
        pieces += [f"{'is' if wanted else 'not'}:{flag}" for flag, wanted in self.flags]
        if self.sort:
            pieces.append(f"sort:{self.sort}-{'desc' if self.descending else 'asc'}")
        return " ".join(pieces)

    def versions(self, model: Model, scope: Scope, repository: str | None) -> list[MVersion]:
        """The versions that match, in order."""
        found = [
            version
            for version in model.all_versions(scope)
            if repository in (None, version.repository)
            and self._holds(version, f"{version.repository}:{version.name}")
            and (not self.module or version.facts.get("module", "") == self.module)
            and all(self._flag(version, flag) is wanted for flag, wanted in self.flags)
        ]
        return self._ordered(found)

    def repositories(self, model: Model, scope: Scope) -> list[MRepository]:
        """The repositories that match, in order."""
        return self._ordered([each for each in model.of(scope).values() if self._holds(each, each.name)])

    def _holds(self, item: MVersion | MRepository, name: str) -> bool:
        places = {"name": [name], "description": [item.description]}
        texts = places[self.place] if self.place else places["name"] + places["description"]
        words = all(any(small(word) in small(text) for text in texts) for word in self.words)
        labels = all(
            any(key in item.labels and value in (None, item.labels[key]) for key, value in alternatives) is wanted
            for alternatives, wanted in self.labels
        )
        creator = not self.creators or item.creator.removeprefix("users/") in self.creators
        updater = not self.updaters or item.updater.removeprefix("users/") in self.updaters
        return words and labels and creator and updater

    @staticmethod
    def _flag(version: MVersion, flag: str) -> bool:
        return bool(version.facts.get("dev")) if flag == "dev" else version.state == flag.upper()

    def _ordered(self, items: list[Any]) -> list[Any]:
        keys = {
            "created_at": lambda item: item.create_time,
            "updated_at": lambda item: item.update_time,
            "size": lambda item: item.size_bytes,
            "build_at": lambda item: 0,
        }
        key = keys[self.sort or "created_at"]
        return sorted(items, key=lambda item: (key(item), item.serial), reverse=self.descending)


def small(text: str) -> str:
    """With A to Z as a to z, and nothing else."""
    return "".join(chr(ord(letter) + 32) if "A" <= letter <= "Z" else letter for letter in text)


LABELS = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), max_size=2)
_ALTERNATIVE = st.tuples(st.sampled_from(KEYS), st.none() | st.sampled_from(VALUES))
_LABEL = st.tuples(st.lists(_ALTERNATIVE, min_size=1, max_size=2, unique=True).map(tuple), st.booleans())


def queries(kind: Kind | None) -> st.SearchStrategy[Query]:
    """Searches of versions of a kind, or of repositories with None. Most of them short: long ones find nothing."""
    fields: dict[str, st.SearchStrategy[Any]] = {
        "words": st.lists(st.sampled_from(WORDS), min_size=1, max_size=2).map(tuple),
        "place": st.sampled_from(("name", "description")),
        "labels": st.lists(_LABEL, min_size=1, max_size=3).map(tuple),
        "creators": st.lists(st.sampled_from(USERS), min_size=1, max_size=2, unique=True).map(tuple),
        "updaters": st.lists(st.sampled_from(USERS), min_size=1, max_size=2, unique=True).map(tuple),
        "sort": st.sampled_from(("created_at", "updated_at") if kind is None else ("created_at", "build_at", "size")),
        "descending": st.booleans(),
    }
    if kind is not None:
        flags = ["ready", "pending", "uploading", "failed", "external"] + (["dev"] if kind is Kind.BENTO else [])
        flag = st.tuples(st.sampled_from(flags), st.booleans())
        fields["flags"] = st.lists(flag, min_size=1, max_size=2, unique_by=lambda pair: pair[0]).map(tuple)
    if kind is Kind.MODEL:
        fields["module"] = st.sampled_from(MODULES)

    def some(names: set[str]) -> st.SearchStrategy[Query]:
        if "descending" in names and "sort" not in names:
            names = names - {"descending"}
        return st.builds(Query, **{name: fields[name] for name in sorted(names)})

    return st.sets(st.sampled_from(sorted(fields)), max_size=3).flatmap(some)


@dataclass
class Walk:
    """A list that is read page by page while others write."""

    scope: Scope
    query: Query
    expected: dict[str, int]
    """Uids of what matched when it began, and how often each had been touched by then."""
    after: Any = None
    seen: list[str] = field(default_factory=list)
