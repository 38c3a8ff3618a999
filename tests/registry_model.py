"""The registry as a few dictionaries: what it must do, without databases, files or concurrency.

A method does what the use case of its name does, or raises `Refused` with the reason of the error that it raises.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from services.registry.domain import Kind

USABLE = ("READY", "EXTERNAL")
Scope = tuple[str, Kind]
"""Organization and kind: nothing is shared between two of them but the bytes."""


class Refused(Exception):
    """The use case ends with an error of this reason."""


@dataclass(eq=False)
class MRepository:
    """A repository."""

    name: str
    description: str
    labels: dict[str, str]
    creator: str
    create_time: datetime
    serial: int
    updater: str = ""
    update_time: datetime | None = None
    revision: int = 1
    versions: dict[str, "MVersion"] = field(default_factory=dict)
    aliases: dict[str, "MVersion"] = field(default_factory=dict)

    def latest(self) -> "MVersion | None":
        """The newest version with content."""
        usable = [version for version in self.versions.values() if version.state in USABLE]
        return max(usable, key=lambda version: (version.create_time, version.serial), default=None)


@dataclass(eq=False)
class MVersion:
    """A version."""

    repository: str
    name: str
    description: str
    labels: dict[str, str]
    manifest: str
    facts: Mapping[str, object]
    creator: str
    create_time: datetime
    serial: int
    state: str
    updater: str = ""
    update_time: datetime | None = None
    revision: int = 1
    digest: str = ""
    size_bytes: int = 0
    failed: bool = False
    touched: int = 0
    """Counts changes of any kind, for whoever looked at it before."""


@dataclass(eq=False)
class MUpload:
    """An upload; `version` may have been deleted since."""

    kind: Kind
    version: MVersion
    digest: str
    size_bytes: int | None
    create_time: datetime
    expire_time: datetime
    replaces: bool
    """Whether there was content when it was opened; else it gives way to another that brings some first."""
    state: str = "OPEN"
    parts: dict[int, bytes] = field(default_factory=dict)


@dataclass
class Model:
    """All of it. `now` is the time, which the test moves."""

    now: datetime
    expire: timedelta
    grace: timedelta
    delete_grace: timedelta
    serials: Iterator[int] = field(default_factory=itertools.count)
    repositories: dict[Scope, dict[str, MRepository]] = field(default_factory=dict)
    uploads: dict[str, MUpload] = field(default_factory=dict)
    deleted: list[tuple[Scope, MVersion, datetime]] = field(default_factory=list)
    """What can be restored, and until when."""
    deleted_repositories: list[tuple[Scope, MRepository, datetime]] = field(default_factory=list)
    stored: dict[str, tuple[int, datetime]] = field(default_factory=dict)
    """Digests of the blobs: size, and until when each is kept without a name."""
    contents: dict[str, bytes] = field(default_factory=dict)

    def of(self, scope: Scope) -> dict[str, MRepository]:
        """The repositories of an organization and kind."""
        return self.repositories.setdefault(scope, {})

    def all_versions(self, scope: Scope) -> list[MVersion]:
        """Its versions, in no order."""
        return [version for repository in self.of(scope).values() for version in repository.versions.values()]

    def repository(self, scope: Scope, name: str) -> MRepository:
        """One repository."""
        if name not in self.of(scope):
            raise Refused(f"{scope[1].upper()}_REPOSITORY_NOT_FOUND")
        return self.of(scope)[name]

    def create_repository(
        self, scope: Scope, name: str, user: str, description: str, labels: dict[str, str]
    ) -> MRepository:
        """A new repository."""
        if name in self.of(scope):
            raise Refused(f"{scope[1].upper()}_REPOSITORY_EXISTS")
        made = MRepository(name, description, labels, user, self.now, next(self.serials), user, self.now)
        self.of(scope)[name] = made
        return made

    def delete_repository(self, scope: Scope, name: str, *, force: bool) -> None:
        """Delete a repository, its versions too when `force`."""
        found = self.repository(scope, name)
        if found.versions and not force:
            raise Refused(f"{scope[1].upper()}_REPOSITORY_NOT_EMPTY")
        for version in found.versions.values():
            self._refuse_used(scope, version)
        for version in list(found.versions.values()):
            self._keep(scope, version)
        found.versions, found.aliases = {}, {}
        del self.of(scope)[name]
        self.deleted_repositories.append((scope, found, self.now + self.delete_grace))

    def meant(self, scope: Scope, repository: str, version: str) -> MVersion:
        """A version by its id, an alias, or `latest`."""
        found = self.of(scope).get(repository)
        if found is not None:
            meant = found.latest() if version == "latest" else found.versions.get(version) or found.aliases.get(version)
            if meant is not None:
                return meant
        raise Refused(f"{scope[1].upper()}_NOT_FOUND")

    def itself(self, scope: Scope, repository: str, version: str) -> MVersion:
        """A version by its id only: it is to be changed."""
        meant = self.meant(scope, repository, version)
        if meant.name != version:
            raise Refused("VERSION_REQUIRED")
        return meant

    def create_version(
        self,
        scope: Scope,
        repository: str,
        version: str,
        user: str,
        description: str,
        labels: dict[str, str],
        manifest: str,
        facts: Mapping[str, object],
    ) -> MVersion:
        """A new version, and its repository where there is none."""
        if version == "latest":
            raise Refused("VERSION_RESERVED")
        parent = self.of(scope).get(repository)
        if parent is not None and version in parent.aliases:
            raise Refused("VERSION_IS_ALIAS")
        if parent is not None and version in parent.versions:
            raise Refused(f"{scope[1].upper()}_EXISTS")
        if parent is None:
            parent = self.create_repository(scope, repository, user, "", {})
        state = "EXTERNAL" if scope[1] is Kind.MODEL and facts.get("external") else "PENDING"
        made = MVersion(
            *(repository, version, description, labels, manifest, facts, user, self.now, next(self.serials), state),
            updater=user,
            update_time=self.now,
        )
        parent.versions[version] = made
        return made

    def delete_version(self, scope: Scope, repository: str, version: str) -> None:
        """Delete a version that no alias names."""
        found = self.itself(scope, repository, version)
        parent = self.of(scope)[repository]
        if found in parent.aliases.values():
            raise Refused(f"{scope[1].upper()}_ALIASED")
        self._refuse_used(scope, found)
        del parent.versions[version]
        self._keep(scope, found)

    def _refuse_used(self, scope: Scope, version: MVersion) -> None:
        bentos = self.all_versions((scope[0], Kind.BENTO)) if scope[1] is Kind.MODEL else []
        if any(bento.facts.get("models") == f"{version.repository}:{version.name}" for bento in bentos):
            raise Refused("MODEL_IN_USE")

    def _keep(self, scope: Scope, version: MVersion) -> None:
        self.uploads = {name: upload for name, upload in self.uploads.items() if upload.version is not version}
        self.deleted.append((scope, version, self.now + self.delete_grace))

    def undelete(self, organization: str, version: MVersion) -> None:
        """Restore a version, and its repository where that is gone: as it was, while it is kept."""
        kept = [each for each in self.deleted if each[1] is version and each[0][0] == organization]
        if not kept or kept[0][2] <= self.now:
            raise Refused("DELETED_VERSION_NOT_FOUND")
        scope = kept[0][0]
        parent = self.of(scope).get(version.repository)
        if parent is not None and version.name in parent.aliases:
            raise Refused("VERSION_IS_ALIAS")
        if parent is not None and version.name in parent.versions:
            raise Refused(f"{scope[1].upper()}_EXISTS")
        if parent is None:
            last = [
                each for each in self.deleted_repositories if each[0] == scope and each[1].name == version.repository
            ]
            parent = last[-1][1] if last else MRepository(version.repository, "", {}, "", self.now, 0)
            parent.serial = next(self.serials)
            self.deleted_repositories = [each for each in self.deleted_repositories if each[1] is not parent]
            self.of(scope)[parent.name] = parent
        self.deleted.remove(kept[0])
        parent.versions[version.name] = version
        version.state = "PENDING" if version.state == "UPLOADING" else version.state
        version.serial, version.update_time = next(self.serials), self.now
        version.revision += 1
        version.touched += 1

    def set_alias(self, scope: Scope, repository: str, alias: str, version: str, expected: str | None) -> None:
        """Make an alias name a version."""
        if alias == "latest":
            raise Refused("ALIAS_RESERVED")
        parent = self.repository(scope, repository)
        if alias in parent.versions:
            raise Refused("ALIAS_IS_VERSION")
        named = self.meant(scope, repository, version)
        if named.state not in USABLE:
            raise Refused("CONTENT_NOT_READY")
        current = parent.aliases.get(alias)
        if expected is not None and expected != (current.name if current else ""):
            raise Refused("ALIAS_MOVED")
        parent.aliases[alias] = named

    def delete_alias(self, scope: Scope, repository: str, alias: str) -> None:
        """Delete an alias."""
        parent = self.repository(scope, repository)
        if parent.aliases.pop(alias, None) is None:
            raise Refused("ALIAS_NOT_FOUND")

    # Uploads

    def open_upload(self, scope: Scope, repository: str, version: str, digest: str, size_bytes: int | None) -> MUpload:
        """A new upload, completed at once where its content is stored."""
        stored = digest in self.stored
        if stored:
            if size_bytes not in (None, self.stored[digest][0]):
                raise Refused("SIZE_MISMATCH")
            if not fits(scope[1], self.contents[digest]):
                raise Refused("ARCHIVE_INVALID")
        found = self.itself(scope, repository, version)
        made = MUpload(scope[1], found, digest, size_bytes, self.now, self.now + self.expire, found.state in USABLE)
        found.state = found.state if found.state in USABLE else "UPLOADING"
        found.failed = False
        found.touched += 1
        if stored:
            self._name(made, digest, self.stored[digest][0])
        return made

    def must_be_open(self, upload: MUpload) -> None:
        """Refuse one that ended or is over its time."""
        if upload.state != "OPEN" or upload.expire_time <= self.now:
            raise Refused("UPLOAD_ENDED")

    def put(self, upload: MUpload, number: int, data: bytes) -> None:
        """Receive a part."""
        self.must_be_open(upload)
        if number == 0:
            if upload.size_bytes not in (None, len(data)):
                raise Refused("SIZE_MISMATCH")
            if upload.digest and upload.digest != digest_of(data):
                raise Refused("DIGEST_MISMATCH")
            if not fits(upload.kind, data):
                raise Refused("ARCHIVE_INVALID")
        upload.parts[number] = data

    def complete(self, upload: MUpload) -> None:
        """Make the content visible: the parts from 1 on where there are such, else the whole."""
        if upload.state == "COMPLETED":
            return
        self.must_be_open(upload)
        pieces = sorted(number for number in upload.parts if number)
        if not upload.parts and upload.kind is Kind.BENTO and upload.version.facts.get("dev"):
            if upload.version.digest and not upload.replaces:
                raise Refused("CONTENT_EXISTS")
            self._name(upload, "", 0)
            return
        if pieces != list(range(1, len(pieces) + 1)) or (not pieces and 0 not in upload.parts):
            raise Refused("UPLOAD_INCOMPLETE")
        data = b"".join(upload.parts[number] for number in pieces) if pieces else upload.parts[0]
        why = ""
        if not fits(upload.kind, data):
            why = "ARCHIVE_INVALID"
        elif upload.size_bytes not in (None, len(data)):
            why = "SIZE_MISMATCH"
        elif upload.digest and upload.digest != digest_of(data):
            why = "DIGEST_MISMATCH"
        if why:
            self.end(upload, "FAILED")
            raise Refused(why)
        digest = digest_of(data)
        self.contents[digest] = data
        self._hold(digest, len(data), self.now + max(self.grace, timedelta(minutes=1)))
        if upload.version.digest not in ("", digest) and not upload.replaces:
            self.end(upload, "FAILED")
            raise Refused("CONTENT_EXISTS")
        self._name(upload, digest, len(data))

    def abort(self, upload: MUpload) -> None:
        """Give it up."""
        if upload.state == "COMPLETED":
            raise Refused("UPLOAD_ENDED")
        self.end(upload, "ABORTED")

    def end(self, upload: MUpload, state: str) -> None:
        """It ends without content."""
        if upload.state != "OPEN":
            return
        upload.state = state
        upload.parts = {}
        version = upload.version
        if not any(other.state == "OPEN" and other.version is version for other in self.uploads.values()):
            version.state = version.state if version.state in USABLE else "FAILED"
            version.failed = True
            version.touched += 1

    def collect(self) -> None:
        """What the collector's round leaves."""
        for upload in self.uploads.values():
            if upload.state == "OPEN" and upload.expire_time <= self.now:
                self.end(upload, "ABORTED")
        forgotten = self.now - timedelta(days=7)
        self.uploads = {
            name: upload
            for name, upload in self.uploads.items()
            if upload.state == "OPEN" or upload.expire_time >= forgotten
        }
        self.deleted = [each for each in self.deleted if each[2] > self.now]
        self.deleted_repositories = [each for each in self.deleted_repositories if each[2] > self.now]
        named = self.named()
        self.stored = {
            digest: (size, until)
            for digest, (size, until) in self.stored.items()
            if digest in named or until > self.now
        }

    def named(self) -> set[str]:
        """Digests that versions have, also those that can be restored."""
        versions = [version for scope in self.repositories for version in self.all_versions(scope)]
        versions += [version for _, version, _ in self.deleted]
        return {version.digest for version in versions if version.digest}

    def _hold(self, digest: str, size_bytes: int, until: datetime) -> None:
        earlier = self.stored.get(digest, (0, until))[1]
        self.stored[digest] = (size_bytes, max(earlier, until))

    def _name(self, upload: MUpload, digest: str, size_bytes: int) -> None:
        if digest:
            self._hold(digest, size_bytes, self.now + self.grace)
        upload.state = "COMPLETED"
        upload.parts = {}
        version = upload.version
        version.state = "READY" if digest else "EXTERNAL"
        version.digest, version.size_bytes, version.failed = digest, size_bytes, False
        version.update_time = self.now
        version.revision += 1
        version.touched += 1


def digest_of(data: bytes) -> str:
    """The digest of content."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def fits(kind: Kind, data: bytes) -> bool:
    """Whether it is an archive of this kind, as far as the archives of these tests go."""
    return f"./{'model' if kind is Kind.MODEL else 'bento'}.yaml".encode() in data[:4096]


def split(data: bytes, pieces: int) -> Sequence[bytes]:
    """Content in pieces."""
    size = -(-len(data) // pieces)
    return [data[start : start + size] for start in range(0, len(data), size)]
