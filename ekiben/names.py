"""Resource names: parsed, checked and written in one place, by clients and services alike.

`Model.parse("modelRepositories/iris/models/v1")` gives `Model(repository="iris", model="v1")`, and
`str(...)` gives the name back. A bad name is InvalidArgument (NAME_INVALID) and says which form was
expected. Names and versions of models and bentos follow BentoML; ids which people choose for
deployments, users and secrets are what a host name may hold, so that they can become one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import ClassVar, Self

from ekiben.errors import InvalidArgument

_TAG = (
    re.compile(r"[a-z0-9](?:[-._a-z0-9]{0,61}[a-z0-9])?"),
    "at most 63 of a-z, 0-9, '-', '_' and '.', beginning and ending with a letter or a digit",
)
_HOST = (
    re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"),
    "at most 63 of a-z, 0-9 and '-', beginning with a letter and ending with a letter or a digit",
)
_GIVEN = (
    re.compile(r"[A-Za-z0-9](?:[-._A-Za-z0-9]{0,126}[A-Za-z0-9])?"),
    "at most 128 of A-Z, a-z, 0-9, '-', '_' and '.'",
)
_NUMBER = (re.compile(r"[1-9][0-9]{0,9}"), "a number counting from 1")
_TRACE = (re.compile(r"[0-9a-f]{32}"), "32 hexadecimal digits in lower case")

WILDCARD = "-"
"""Stands for "of any" in the parent of a list (AIP-159)."""


@dataclass(frozen=True)
class ResourceName:
    """A name made of collections and ids. Subclasses give the collections and the form of each id."""

    _segments: ClassVar[tuple[tuple[str, tuple[re.Pattern[str], str]], ...]] = ()

    def __post_init__(self) -> None:
        for field, _, form in _parts(type(self)):
            _check(type(self), field, str(getattr(self, field)), form)

    @classmethod
    def pattern(cls) -> str:
        """The form of such a name, `modelRepositories/{repository}/models/{model}`."""
        ids = (field.name for field in fields(cls))
        return "/".join(f"{c}/{{{i}}}" for (c, _), i in zip(cls._segments, ids, strict=True))

    @classmethod
    def parse(cls, name: str, *, wildcard: bool = False) -> Self:
        """The parts of `name`; with `wildcard`, an id may also be `-`, "any".

        Raises:
            InvalidArgument: another form, or an id outside its alphabet or length (NAME_INVALID).
        """
        parts, expected = name.split("/"), _parts(cls)
        if len(parts) != 2 * len(expected) or any(
            part != collection for part, (_, collection, _) in zip(parts[::2], expected, strict=True)
        ):
            raise InvalidArgument(
                f"{_shown(name)} is not a name of the form {cls.pattern()}.",
                reason="NAME_INVALID",
                violations=[("name", f"must have the form {cls.pattern()}")],
                name=name,
            )
        result = object.__new__(cls)
        for (field, _, form), value in zip(expected, parts[1::2], strict=True):
            if not (wildcard and value == WILDCARD):
                _check(cls, field, value, form)
            object.__setattr__(result, field, int(value) if form is _NUMBER and value != WILDCARD else value)
        return result

    def __str__(self) -> str:
        return "/".join([f"{collection}/{getattr(self, field)}" for field, collection, _ in _parts(type(self))])


_Parts = tuple[tuple[str, str, tuple[re.Pattern[str], str]], ...]
_known_parts: dict[type[ResourceName], _Parts] = {}


def _parts(cls: type[ResourceName]) -> _Parts:
    """For each id of names of the class `cls` its field, its collection and its form."""
    found = _known_parts.get(cls)
    if found is None:
        pairs = zip(fields(cls), cls._segments, strict=True)
        found = _known_parts[cls] = tuple((field.name, collection, form) for field, (collection, form) in pairs)
    return found


def _check(cls: type[ResourceName], field: str, value: str, form: tuple[re.Pattern[str], str]) -> None:
    if form[0].fullmatch(value) is None:
        raise InvalidArgument(
            f"{_shown(value)} cannot be the {field} of {cls.pattern()}: it must be {form[1]}.",
            reason="NAME_INVALID",
            violations=[(field, f"must be {form[1]}")],
            name=value,
        )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:100] + "…")


@dataclass(frozen=True)
class Organization(ResourceName):
    """`organizations/{organization}`."""

    _segments = (("organizations", _HOST),)
    organization: str


@dataclass(frozen=True)
class User(ResourceName):
    """`users/{user}`."""

    _segments = (("users", _HOST),)
    user: str


@dataclass(frozen=True)
class ApiToken(ResourceName):
    """`apiTokens/{api_token}`; the id is given by the server."""

    _segments = (("apiTokens", _GIVEN),)
    api_token: str


@dataclass(frozen=True)
class Secret(ResourceName):
    """`secrets/{secret}`."""

    _segments = (("secrets", _TAG),)
    secret: str


@dataclass(frozen=True)
class AuditEntry(ResourceName):
    """`auditEntries/{audit_entry}`; the id is given by the server."""

    _segments = (("auditEntries", _GIVEN),)
    audit_entry: str


@dataclass(frozen=True)
class ModelRepository(ResourceName):
    """`modelRepositories/{repository}`."""

    _segments = (("modelRepositories", _TAG),)
    repository: str


@dataclass(frozen=True)
class Model(ResourceName):
    """`modelRepositories/{repository}/models/{model}`; `model` is BentoML's version."""

    _segments = (("modelRepositories", _TAG), ("models", _TAG))
    repository: str
    model: str

    @property
    def parent(self) -> ModelRepository:
        """The repository that holds it."""
        return ModelRepository(self.repository)

    @property
    def tag(self) -> str:
        """BentoML's name for it, `repository:version`."""
        return f"{self.repository}:{self.model}"

    @classmethod
    def from_tag(cls, tag: str) -> Model:
        """The model that BentoML calls `repository:version`; without a version, the latest."""
        return cls(*_split_tag(tag))


@dataclass(frozen=True)
class ModelAlias(ResourceName):
    """`modelRepositories/{repository}/aliases/{alias}`."""

    _segments = (("modelRepositories", _TAG), ("aliases", _TAG))
    repository: str
    alias: str


@dataclass(frozen=True)
class BentoRepository(ResourceName):
    """`bentoRepositories/{repository}`."""

    _segments = (("bentoRepositories", _TAG),)
    repository: str


@dataclass(frozen=True)
class Bento(ResourceName):
    """`bentoRepositories/{repository}/bentos/{bento}`; `bento` is BentoML's version."""

    _segments = (("bentoRepositories", _TAG), ("bentos", _TAG))
    repository: str
    bento: str

    @property
    def parent(self) -> BentoRepository:
        """The repository that holds it."""
        return BentoRepository(self.repository)

    @property
    def tag(self) -> str:
        """BentoML's name for it, `repository:version`."""
        return f"{self.repository}:{self.bento}"

    @classmethod
    def from_tag(cls, tag: str) -> Bento:
        """The bento that BentoML calls `repository:version`; without a version, the latest."""
        return cls(*_split_tag(tag))


@dataclass(frozen=True)
class BentoAlias(ResourceName):
    """`bentoRepositories/{repository}/aliases/{alias}`."""

    _segments = (("bentoRepositories", _TAG), ("aliases", _TAG))
    repository: str
    alias: str


@dataclass(frozen=True)
class DeletedVersion(ResourceName):
    """`deletedVersions/{deleted_version}`: the uid of a version that was deleted."""

    _segments = (("deletedVersions", _GIVEN),)
    deleted_version: str


@dataclass(frozen=True)
class Upload(ResourceName):
    """`uploads/{upload}`; the id is given by the server."""

    _segments = (("uploads", _GIVEN),)
    upload: str


@dataclass(frozen=True)
class Build(ResourceName):
    """`builds/{build}`; the id is given by the server."""

    _segments = (("builds", _GIVEN),)
    build: str


@dataclass(frozen=True)
class Image(ResourceName):
    """`images/{image}`; the id is given by the server."""

    _segments = (("images", _GIVEN),)
    image: str


@dataclass(frozen=True)
class Deployment(ResourceName):
    """`deployments/{deployment}`; the id becomes part of a host name."""

    _segments = (("deployments", _HOST),)
    deployment: str


@dataclass(frozen=True)
class Terminal(ResourceName):
    """`deployments/{deployment}/terminals/{terminal}`."""

    _segments = (("deployments", _HOST), ("terminals", _HOST))
    deployment: str
    terminal: str


@dataclass(frozen=True)
class Revision(ResourceName):
    """`deployments/{deployment}/revisions/{revision}`; ids count from 1."""

    _segments = (("deployments", _HOST), ("revisions", _NUMBER))
    deployment: str
    revision: int

    @property
    def parent(self) -> Deployment:
        """The deployment that it is of."""
        return Deployment(self.deployment)


@dataclass(frozen=True)
class InstanceType(ResourceName):
    """`instanceTypes/{instance_type}`."""

    _segments = (("instanceTypes", _GIVEN),)
    instance_type: str


@dataclass(frozen=True)
class Cluster(ResourceName):
    """`clusters/{cluster}`."""

    _segments = (("clusters", _HOST),)
    cluster: str


@dataclass(frozen=True)
class Prediction(ResourceName):
    """`predictions/{prediction}`: the request id that the gateway gave."""

    _segments = (("predictions", _GIVEN),)
    prediction: str


@dataclass(frozen=True)
class Trace(ResourceName):
    """`traces/{trace}`: a W3C trace id."""

    _segments = (("traces", _TRACE),)
    trace: str


def _split_tag(tag: str) -> tuple[str, str]:
    repository, _, version = tag.partition(":")
    return repository, version or "latest"
