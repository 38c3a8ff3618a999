"""What the registry knows, and its rules; all pure.

A *repository* holds *versions*: a model repository holds models, a bento repository bentos. Both kinds follow the
same rules, so they share these classes and differ in `kind`. A version has a manifest at once and content later:
an *upload* brings it, and what was there before stays until the upload is whole.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum

from ekiben import names
from ekiben.errors import InvalidArgument, ResourceExhausted

MAX_MANIFEST_BYTES = 4 << 20
MAX_DESCRIPTION_BYTES = 3 << 20
MAX_REASON_BYTES = 4000
MAX_LABELS = 256
MAX_LABEL_KEY = 128
MAX_LABEL_VALUE = 1024
MAX_ANNOTATION_KEY = 256
MAX_ANNOTATIONS_BYTES = 256 << 10
"""Keys and values together: they are read with every version, so they must not become a place for content."""
LATEST = "latest"
"""The id that means the newest version with content; no version can be created with it."""


class Kind(StrEnum):
    """What a repository holds."""

    MODEL = "model"
    BENTO = "bento"

    def repository_name(self, repository: str) -> str:
        """The resource name of a repository."""
        return str(names.ModelRepository(repository) if self is Kind.MODEL else names.BentoRepository(repository))

    def version_name(self, repository: str, version: str) -> str:
        """The resource name of a version."""
        return str(names.Model(repository, version) if self is Kind.MODEL else names.Bento(repository, version))

    def alias_name(self, repository: str, alias: str) -> str:
        """The resource name of an alias."""
        return str(names.ModelAlias(repository, alias) if self is Kind.MODEL else names.BentoAlias(repository, alias))


class ContentState(StrEnum):
    """How far the bytes of a version have come. See `Content.State` of the proto."""

    PENDING = "PENDING"
    UPLOADING = "UPLOADING"
    READY = "READY"
    FAILED = "FAILED"
    EXTERNAL = "EXTERNAL"

    @property
    def usable(self) -> bool:
        """Whether the version can be deployed: it has its bytes, or needs none."""
        return self in (ContentState.READY, ContentState.EXTERNAL)

    def when_opened(self) -> "ContentState":
        """The state once an upload has been opened."""
        return self if self.usable else ContentState.UPLOADING

    def when_lost(self) -> "ContentState":
        """The state once the last open upload has ended without content."""
        return self if self.usable else ContentState.FAILED


class UploadState(StrEnum):
    """How far an upload is. Only OPEN changes, once, to one of the others."""

    OPEN = "OPEN"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    ABORTED = "ABORTED"


class BlobState(StrEnum):
    """What the registry intends with a blob. See `store/blobs.py` for who moves it when."""

    CLAIMED = "CLAIMED"
    STORED = "STORED"
    DELETING = "DELETING"


@dataclass(frozen=True)
class Repository:
    """A name under which versions are kept. `revision` counts its changes; `latest` is a version's id, or empty."""

    kind: Kind
    repository: str
    uid: str
    description: str
    labels: Mapping[str, str]
    create_time: datetime
    update_time: datetime
    creator: str
    revision: int
    latest: str = ""
    version_count: int = 0
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its resource name."""
        return self.kind.repository_name(self.repository)


@dataclass(frozen=True)
class Content:
    """What bytes a version has. `digest` is `sha256:<hex>`, set when READY; `open_upload` an upload's id, or empty."""

    state: ContentState
    digest: str = ""
    size_bytes: int = 0
    failure: str = ""
    upload_start_time: datetime | None = None
    upload_end_time: datetime | None = None
    open_upload: str = ""


@dataclass(frozen=True)
class Facts:
    """What the registry itself reads from a manifest; everything else in it is the client's business."""

    module: str = ""
    bentoml_version: str = ""
    development: bool = False
    external: bool = False
    models: tuple[str, ...] = ()


@dataclass(frozen=True)
class Version:
    """A model or a bento. `manifest` is the client's text, to the letter."""

    kind: Kind
    repository: str
    version: str
    uid: str
    description: str
    labels: Mapping[str, str]
    create_time: datetime
    update_time: datetime
    creator: str
    revision: int
    manifest: str
    facts: Facts
    build_time: datetime | None
    content: Content
    aliases: tuple[str, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its resource name."""
        return self.kind.version_name(self.repository, self.version)


@dataclass(frozen=True)
class AliasChange:
    """From when on an alias named what, who made it so and why. `version` is empty where it was deleted.

    The newest is the alias as it is. `number` counts the changes of an alias from 1, deletions and all; `create_time`
    rises with it.
    """

    kind: Kind
    repository: str
    alias: str
    number: int
    create_time: datetime
    user: str
    before: str
    version: str
    version_uid: str
    reason: str

    @property
    def alias_name(self) -> str:
        """Resource name of the alias."""
        return self.kind.alias_name(self.repository, self.alias)

    @property
    def name(self) -> str:
        """Its own resource name."""
        return f"{self.alias_name}/changes/{self.number}"

    @classmethod
    def never(cls, kind: Kind, repository: str, alias: str) -> "AliasChange":
        """What goes before the first change."""
        return cls(kind, repository, alias, 0, datetime(1970, 1, 1, tzinfo=UTC), "", "", "", "", "")

    def next(self, now: datetime, user: str, to: Version | None, reason: str) -> "AliasChange":
        """The change after this one, to a version or, with None, to nothing. It is later, whatever the clock says."""
        return replace(
            self,
            number=self.number + 1,
            create_time=max(now, self.create_time + timedelta(microseconds=1)),
            user=user,
            before=self.version,
            version=to.version if to else "",
            version_uid=to.uid if to else "",
            reason=reason,
        )


@dataclass(frozen=True)
class Deleted:
    """A version that was deleted and can be restored until `expire_time`. `digest` is empty where it has no content."""

    organization: str
    kind: Kind
    repository: str
    version: str
    uid: str
    labels: Mapping[str, str]
    digest: str
    size_bytes: int
    create_time: datetime
    delete_time: datetime
    expire_time: datetime
    deleter: str
    models: tuple[str, ...] = ()

    @property
    def resource(self) -> str:
        """The resource name that it had."""
        return self.kind.version_name(self.repository, self.version)


@dataclass(frozen=True)
class Use:
    """A consumer uses a resource, both by name; `digest` is that of what is used, where it is known."""

    consumer: str
    consumer_uid: str
    resource: str
    digest: str = ""
    live: bool = True
    create_time: datetime | None = None
    end_time: datetime | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from others. Names of consumers are used again; a resource is meant by its name."""
        return self.consumer_uid, self.resource


@dataclass(frozen=True)
class KnownUse:
    """A use as it is kept: the owner's generation that it was told of, and until when a claim holds."""

    use: Use
    generation: int
    claim_end_time: datetime | None = None

    def claimed(self, generation: int, now: datetime) -> bool:
        """Whether it was claimed for a later generation, so that a report of `generation` knows nothing of it."""
        return self.generation > generation and self.claim_end_time is not None and self.claim_end_time > now


def claimed_uses(
    known: Iterable[KnownUse], told: Iterable[Use], generation: int, now: datetime, until: datetime
) -> list[KnownUse]:
    """What must be written for a claim: every use that it names becomes live."""
    before = {one.use.key: one for one in known}
    written = []
    for use in told:
        old = before.get(use.key)
        created = old.use.create_time if old else now
        kept = replace(use, live=True, create_time=created, end_time=None)
        written.append(KnownUse(kept, max(generation, old.generation if old else 0), until))
    return written


def reported_uses(
    known: Iterable[KnownUse], told: Iterable[Use], generation: int, now: datetime, *, gone: bool = False
) -> list[KnownUse]:
    """What must be written for a report: what it names is as it says, what it leaves out has ended. Nothing where
    that was known. A use that was claimed for a later generation is left, unless the owner is `gone` for ever."""
    before = {one.use.key: one for one in known}
    named = {use.key: use for use in told}
    written = []
    for key, use in named.items():
        old = before.get(key)
        if old is None:
            written.append(KnownUse(replace(use, create_time=now, end_time=None if use.live else now), generation))
            continue
        if old.claimed(generation, now):
            continue
        ended = None if use.live else old.use.end_time or now
        wanted = KnownUse(replace(use, create_time=old.use.create_time, end_time=ended), generation)
        if wanted.use != old.use or old.claim_end_time is not None:
            written.append(wanted)
    for key, old in before.items():
        if key not in named and old.use.live and (gone or not old.claimed(generation, now)):
            written.append(KnownUse(replace(old.use, live=False, end_time=now), generation))
    return written


@dataclass(frozen=True)
class Unnamed:
    """A blob that nothing names: who named it last and until when, where that is known; its size once it goes."""

    digest: str
    size_bytes: int | None
    organization: str
    last_holder: str
    release_time: datetime | None


class GarbageKind(StrEnum):
    """What goes. See `GarbageItem.Kind` of the proto."""

    BLOB = "BLOB"
    PARTS = "PARTS"
    DELETED_VERSION = "DELETED_VERSION"
    STRAY = "STRAY"
    HOLD = "HOLD"


@dataclass(frozen=True)
class Garbage:
    """One thing that the collector frees, or would."""

    kind: GarbageKind
    name: str
    size_bytes: int = 0
    last_holder: str = ""
    release_time: datetime | None = None


@dataclass(frozen=True)
class Upload:
    """One attempt to give a version its bytes. `size_bytes` None and `digest` empty: not announced.

    `replaces`: there was content when it was opened, so that whoever opened it means to replace it.
    """

    upload: str
    organization: str
    resource: str
    digest: str
    size_bytes: int | None
    state: UploadState
    failure: str
    create_time: datetime
    expire_time: datetime
    creator: str
    replaces: bool = False
    digest_wanted: bool = False
    """Content of this size is there: see the proto."""


class ListingState(StrEnum):
    """How far the listing of a blob's files is. WORKING ends by itself when whoever works is gone."""

    WAITING = "WAITING"
    WORKING = "WORKING"
    DONE = "DONE"
    FAILED = "FAILED"


@dataclass(frozen=True)
class File:
    """One file of a content; `offset` is -1 where the archive is compressed."""

    path: str
    size_bytes: int
    offset: int
    mode: int
    digest: str


@dataclass(frozen=True)
class Usage:
    """What an organization keeps, or what is added to that: see `Quota` of the proto."""

    bytes: int = 0
    versions: int = 0
    repositories: int = 0


@dataclass(frozen=True)
class Limits:
    """The most that it may keep; None is no limit."""

    bytes: int | None = None
    versions: int | None = None
    repositories: int | None = None

    def check(self) -> None:
        """Refuse what cannot be a limit (QUOTA_INVALID)."""
        faults = [(f.name, v) for f in fields(self) if (v := getattr(self, f.name)) is not None and v < 0]
        if faults:
            raise InvalidArgument(
                f"A quota cannot be negative: {', '.join(f'{name} is {value}' for name, value in faults)}.",
                reason="QUOTA_INVALID",
                violations=[(name, "must not be negative") for name, _ in faults],
            )


@dataclass(frozen=True)
class Quota:
    """What an organization keeps and may keep. `revision` counts changes of the limits."""

    organization: str
    used: Usage = Usage()
    limits: Limits = Limits()
    updater: str = ""
    update_time: datetime | None = None
    revision: int = 0

    def check(self, added: Usage) -> None:
        """Refuse what was added, `used` already holding it, where that is more than a limit.

        What takes nothing away of what is scarce passes, also where a limit was set below what is kept.

        Raises:
            ResourceExhausted: QUOTA_EXCEEDED.
        """
        for what, todo in _QUOTAS.items():
            more, used, limit = getattr(added, what), getattr(self.used, what), getattr(self.limits, what)
            if more > 0 and limit is not None and used > limit:
                raise ResourceExhausted(
                    f"The organization keeps {used - more:,} {what} and may keep {limit:,}: {more:,} more do not fit. "
                    f"{todo}, or have an admin raise the quota: `ekiben quotas set --{what} …`.",
                    reason="QUOTA_EXCEEDED",
                    organization=f"organizations/{self.organization}",
                    quota=what,
                    used=used - more,
                    added=more,
                    limit=limit,
                )


_QUOTAS = {
    "bytes": "Delete and purge models or bentos (`ekiben models purge`; what can be restored counts)",
    "versions": "Delete models or bentos",
    "repositories": "Delete repositories",
}


@dataclass(frozen=True)
class Draft:
    """What a caller may write of a repository or a version; None leaves a field as it is."""

    description: str | None = None
    labels: Mapping[str, str] | None = None
    annotations: Mapping[str, str] | None = None
    manifest: str | None = None
    build_time: datetime | None = None

    def check(self) -> None:
        """Refuse what cannot be kept.

        Raises:
            InvalidArgument: DESCRIPTION_INVALID, LABELS_INVALID, ANNOTATIONS_INVALID, MANIFEST_TOO_LARGE or
                MANIFEST_INVALID.
        """
        if self.description is not None:
            check_text("description", self.description, MAX_DESCRIPTION_BYTES)
        if self.labels is not None:
            check_labels(self.labels)
        if self.annotations is not None:
            check_annotations(self.annotations)
        if self.manifest is not None:
            read_manifest(self.manifest)


def check_text(name: str, text: str, max_bytes: int, reason: str = "DESCRIPTION_INVALID") -> None:
    """Refuse text that is too long or holds the character NUL, which PostgreSQL cannot keep."""
    if len(text.encode()) > max_bytes:
        raise InvalidArgument(
            f"The {name} has {len(text.encode()):,} bytes; at most {max_bytes:,} are kept.",
            reason=reason,
            violations=[(name, f"at most {max_bytes:,} bytes")],
            field=name,
        )
    if "\0" in text:
        raise InvalidArgument(
            f"The {name} holds the character NUL, which cannot be kept.",
            reason=reason,
            violations=[(name, "holds the character NUL")],
            field=name,
        )


def check_labels(labels: Mapping[str, str]) -> None:
    """Refuse labels that are too many, too long or without a key (LABELS_INVALID)."""
    faults: list[str] = []
    if len(labels) > MAX_LABELS:
        faults.append(f"there are {len(labels)}, more than {MAX_LABELS}")
    for key, value in labels.items():
        shown = repr(key[:40])
        if not 1 <= len(key) <= MAX_LABEL_KEY:
            faults.append(f"the key {shown} has {len(key)} characters, not 1 to {MAX_LABEL_KEY}")
        if len(value) > MAX_LABEL_VALUE:
            faults.append(f"the value of {shown} has {len(value):,} characters, more than {MAX_LABEL_VALUE:,}")
        if "\0" in key + value:
            faults.append(f"{shown} holds the character NUL")
    if faults:
        raise InvalidArgument(
            f"The labels are refused: {'; '.join(faults[:5])}.",
            reason="LABELS_INVALID",
            violations=[("labels", fault) for fault in faults[:20]],
        )


def check_annotations(annotations: Mapping[str, str]) -> None:
    """Refuse annotations that are too large together, or a key that is none (ANNOTATIONS_INVALID)."""
    faults: list[str] = []
    total = sum(len(key.encode()) + len(value.encode()) for key, value in annotations.items())
    if total > MAX_ANNOTATIONS_BYTES:
        faults.append(f"they have {total:,} bytes together, more than {MAX_ANNOTATIONS_BYTES:,}")
    for key, value in annotations.items():
        if not 1 <= len(key) <= MAX_ANNOTATION_KEY:
            faults.append(f"the key {key[:40]!r} has {len(key)} characters, not 1 to {MAX_ANNOTATION_KEY}")
        if "\0" in key + value:
            faults.append(f"{key[:40]!r} holds the character NUL")
    if faults:
        raise InvalidArgument(
            f"The annotations are refused: {'; '.join(faults[:5])}.",
            reason="ANNOTATIONS_INVALID",
            violations=[("annotations", fault) for fault in faults[:20]],
        )


def read_manifest(text: str) -> Facts:
    """The facts of a manifest; an empty text has none. A field of an unexpected type counts as absent.

    Raises:
        InvalidArgument: over 4 MiB (MANIFEST_TOO_LARGE), or not JSON text of an object (MANIFEST_INVALID).
    """
    if not text:
        return Facts()
    if len(text) > MAX_MANIFEST_BYTES or len(text.encode()) > MAX_MANIFEST_BYTES:
        raise InvalidArgument(
            f"The manifest has more than {MAX_MANIFEST_BYTES:,} bytes, the most that is kept.",
            reason="MANIFEST_TOO_LARGE",
            violations=[("manifest", f"at most {MAX_MANIFEST_BYTES:,} bytes")],
        )
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as exc:
        why = "it is nested too deeply" if isinstance(exc, RecursionError) else str(exc)[:200]
        raise InvalidArgument(
            f"The manifest is not JSON: {why}.", reason="MANIFEST_INVALID", violations=[("manifest", why)], cause=why
        ) from exc
    if not isinstance(manifest, dict):
        raise InvalidArgument(
            "The manifest is not a JSON object.", reason="MANIFEST_INVALID", violations=[("manifest", "not an object")]
        )
    metadata = manifest.get("metadata")
    return Facts(
        module=_text(manifest.get("module")),
        bentoml_version=_text(manifest.get("bentoml_version")),
        development=manifest.get("dev") is True,
        external=isinstance(metadata, dict) and metadata.get("registry") == "huggingface",
        models=_models(manifest.get("models")),
    )


def _text(value: object) -> str:
    return value[:200].replace("\0", "") if isinstance(value, str) else ""


def _models(value: object) -> tuple[str, ...]:
    """Resource names of the `name:version` tags in a bento's manifest; what is no tag is left out."""
    found: dict[str, None] = {}
    for tag in value if isinstance(value, list) else ():
        if not isinstance(tag, str) or ":" not in tag:
            continue
        try:
            found[str(names.Model.from_tag(tag))] = None
        except InvalidArgument:
            continue
    return tuple(found)
