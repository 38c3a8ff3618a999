"""Use cases over repositories and versions: each public method is one transaction.

Both kinds of repository go the same way; `kind` says which is meant.
"""

import json
import uuid
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TypeVar

from ekiben.errors import AlreadyExists, EkibenError, FailedPrecondition, InvalidArgument, NotFound
from services.kernel.clock import Clock
from services.kernel.db import AsyncConnection, Database
from services.kernel.identity import Principal
from services.kernel.updates import check_etag, etag_of
from services.registry.domain import (
    LATEST,
    ContentState,
    Draft,
    Facts,
    Kind,
    Repository,
    Usage,
    Version,
    read_manifest,
)
from services.registry.search import Subject, parse
from services.registry.store import aliases as alias_rows
from services.registry.store import blobs as held
from services.registry.store import catalog as rows
from services.registry.store import deletions
from services.registry.store import quotas as quota_rows
from services.registry.store import uses as use_rows
from services.registry.store.catalog import Found
from services.registry.store.searches import Position
from services.registry.store.tables import repositories, versions
from services.registry.uses import refuse_used, tell_bento

E = TypeVar("E", bound=EkibenError)

_SUBJECTS = {
    (Kind.MODEL, False): Subject.MODEL_REPOSITORIES,
    (Kind.BENTO, False): Subject.BENTO_REPOSITORIES,
    (Kind.MODEL, True): Subject.MODELS,
    (Kind.BENTO, True): Subject.BENTOS,
}


def organization_of(caller: Principal) -> str:
    """The id of the caller's organization, as rows hold it."""
    return caller.organization.removeprefix("organizations/")


def etag(resource: Repository | Version) -> str:
    """Changes with each change of what callers write and with each new content."""
    return etag_of(resource.uid, resource.revision)


class Catalog:
    """What exists. What is deleted can be restored for `delete_grace` (see `deletions.py`); zero deletes for good."""

    def __init__(self, database: Database, clock: Clock, *, delete_grace: timedelta = timedelta(0)) -> None:
        self._database = database
        self._clock = clock
        self._delete_grace = delete_grace

    # Repositories

    async def get_repository(self, caller: Principal, kind: Kind, repository: str) -> Repository:
        """One repository. Raises NotFound (MODEL_REPOSITORY_NOT_FOUND, BENTO_REPOSITORY_NOT_FOUND)."""
        async with self._database.read() as connection:
            found = await rows.repository(connection, organization_of(caller), kind, repository)
        if found is None:
            raise no_repository(kind, repository)
        return found[1]

    async def list_repositories(
        self, caller: Principal, kind: Kind, text: str, size: int, after: Position | None
    ) -> Found[Repository]:
        """A page of repositories; `text` is a filter."""
        search = parse(text, _SUBJECTS[kind, False], caller=caller.user)
        async with self._database.read() as connection:
            return await rows.list_repositories(connection, organization_of(caller), kind, search, size, after)

    async def create_repository(self, caller: Principal, kind: Kind, repository: str, draft: Draft) -> Repository:
        """A new repository.

        Raises:
            AlreadyExists: MODEL_REPOSITORY_EXISTS, BENTO_REPOSITORY_EXISTS.
            ResourceExhausted: the organization has as many as it may (QUOTA_EXCEEDED).
        """
        draft.check()
        organization = organization_of(caller)
        async with self._database.transaction() as connection:
            if not await rows.add_repository(connection, organization, kind, repository, self._new(caller, draft)):
                raise _about(
                    AlreadyExists,
                    f"{_title(kind)} repository {repository!r} exists already.",
                    f"{kind.upper()}_REPOSITORY_EXISTS",
                    f"{kind}_repository",
                    kind.repository_name(repository),
                )
            created = await rows.repository(connection, organization, kind, repository)
            await quota_rows.charge(connection, organization, Usage(repositories=1))
        assert created is not None
        return created[1]

    async def update_repository(
        self, caller: Principal, kind: Kind, repository: str, draft: Draft, sent_etag: str
    ) -> Repository:
        """Change what `draft` gives. Raises Aborted (ETAG_MISMATCH), NotFound."""
        draft.check()
        organization = organization_of(caller)
        async with self._database.transaction() as connection:
            found = await rows.repository(connection, organization, kind, repository, lock=True)
            if found is None:
                raise no_repository(kind, repository)
            check_etag(sent_etag, etag(found[1]))
            if values := self._changes(caller, draft):
                await rows.update(connection, repositories, found[0], values)
                found = await rows.repository(connection, organization, kind, repository)
        assert found is not None
        return found[1]

    async def delete_repository(
        self, caller: Principal, kind: Kind, repository: str, sent_etag: str, *, force: bool
    ) -> None:
        """Delete a repository, with its versions and aliases when `force`; the versions can be restored.

        Raises:
            NotFound, Aborted (ETAG_MISMATCH).
            FailedPrecondition: it holds versions (MODEL_REPOSITORY_NOT_EMPTY, BENTO_REPOSITORY_NOT_EMPTY), or what
                something uses (MODEL_IN_USE, BENTO_IN_USE).
        """
        organization = organization_of(caller)
        async with self._database.transaction() as connection:
            found = await rows.repository(connection, organization, kind, repository, lock=True)
            if found is None:
                raise no_repository(kind, repository)
            check_etag(sent_etag, etag(found[1]))
            if (count := found[1].version_count) and not force:
                raise FailedPrecondition(
                    f"{_title(kind)} repository {repository!r} holds {count} {kind}s. Delete them first, or set force.",
                    reason=f"{kind.upper()}_REPOSITORY_NOT_EMPTY",
                    repository=found[1].name,
                    count=count,
                )
            for alias in await alias_rows.list_aliases(connection, organization, kind, repository, None, None):
                change = alias.next(self._clock.now(), caller.user, None, "The repository was deleted.")
                await alias_rows.add_change(connection, organization, change, None)
            inside = await rows.lock_versions(connection, found[0])
            used = [kind.version_name(repository, version) for version, _ in inside]
            what = f"{_title(kind)} repository {repository!r} holds what is"
            await refuse_used(
                connection, organization, kind, what, used, f"Delete that, or its {kind}s by force, first."
            )
            here = versions.c.repository_id == found[0]
            await use_rows.end_of(connection, organization, [uid for _, uid in inside], self._clock.now())
            freed = 0
            if self._delete_grace:
                count = await self._keep(connection, caller, here)
                now = self._clock.now()
                await deletions.keep_repository(connection, found[0], now=now, expire_time=now + self._delete_grace)
            else:
                contents = await self._let_go(connection, here)
                count = await rows.delete_repository(connection, found[0])
                freed = await quota_rows.freed(connection, organization, contents)
            gone = Usage(bytes=-freed, versions=-count, repositories=-1)
            await quota_rows.charge(connection, organization, gone)

    # Versions

    async def get_version(self, caller: Principal, kind: Kind, repository: str, version: str) -> Version:
        """One version, by its id or an alias; `latest` is the newest with content.

        Raises:
            NotFound: MODEL_NOT_FOUND, BENTO_NOT_FOUND.
        """
        found = await rows.meant(self._database.lookups, organization_of(caller), kind, repository, version)
        if found is None:
            raise no_version(kind, repository, version)
        return found[1]

    async def list_versions(
        self, caller: Principal, kind: Kind, repository: str | None, text: str, size: int, after: Position | None
    ) -> Found[Version]:
        """A page of the versions of a repository, or of all with None. Raises NotFound for an unknown repository."""
        search = parse(text, _SUBJECTS[kind, True], caller=caller.user)
        organization = organization_of(caller)
        async with self._database.read() as connection:
            row_id = None
            if repository is not None:
                row_id = await rows.repository_id(connection, organization, kind, repository)
                if row_id is None:
                    raise no_repository(kind, repository)
            return await rows.list_versions(connection, organization, kind, row_id, search, size, after)

    async def create_version(
        self, caller: Principal, kind: Kind, repository: str, version: str, draft: Draft
    ) -> Version:
        """A new version, without content unless it needs none; a missing repository is created.

        Raises:
            AlreadyExists: MODEL_EXISTS, BENTO_EXISTS.
            FailedPrecondition: the id is that of an alias (VERSION_IS_ALIAS).
            ResourceExhausted: the organization has as many versions or repositories as it may (QUOTA_EXCEEDED).
            InvalidArgument: the id is `latest` (VERSION_RESERVED), or see Draft.check.
        """
        if version == LATEST:
            raise InvalidArgument(
                f"'{LATEST}' means the newest {kind} and cannot be the version of one. Choose another.",
                reason="VERSION_RESERVED",
                violations=[(f"{kind}_id", "must not be 'latest'")],
            )
        draft.check()
        facts = read_manifest(draft.manifest or "")
        external = kind is Kind.MODEL and facts.external
        organization = organization_of(caller)
        values = self._new(caller, draft) | _facts(facts)
        values["manifest"] = draft.manifest or ""
        values["build_time"] = draft.build_time
        values["state"] = ContentState.EXTERNAL if external else ContentState.PENDING
        async with self._database.transaction() as connection:
            new = self._new(caller, Draft(description="", labels={}))
            parent, made = await rows.ensure_repository(connection, organization, kind, repository, new)
            if await alias_rows.exists(connection, organization, kind, repository, version):
                raise is_alias(kind, repository, version)
            added = await rows.add_version(connection, organization, kind, parent, repository, version, values)
            if not added:
                raise version_exists(kind, repository, version)
            created = await rows.version(connection, organization, kind, repository, version)
            assert created is not None
            await self._tell_uses(connection, organization, created[1])
            await quota_rows.charge(connection, organization, Usage(versions=1, repositories=int(made)))
        return created[1]

    async def update_version(
        self, caller: Principal, kind: Kind, repository: str, version: str, draft: Draft, sent_etag: str
    ) -> Version:
        """Change what `draft` gives.

        Raises:
            NotFound, Aborted (ETAG_MISMATCH); see Draft.check.
            FailedPrecondition: it is an alias, and not the version's own id (VERSION_REQUIRED).
        """
        draft.check()
        organization = organization_of(caller)
        async with self._database.transaction() as connection:
            found = await rows.version(connection, organization, kind, repository, version, lock=True)
            if found is None:
                raise await not_itself(connection, organization, kind, repository, version)
            check_etag(sent_etag, etag(found[1]))
            values = self._changes(caller, draft)
            if draft.manifest is not None:
                facts = read_manifest(draft.manifest)
                values |= _facts(facts) | {"manifest": draft.manifest}
                if kind is Kind.MODEL and facts.external and not found[1].content.state.usable:
                    values["state"] = ContentState.EXTERNAL
            if values:
                await rows.update(connection, versions, found[0], values)
                found = await rows.version(connection, organization, kind, repository, version)
                assert found is not None
                if draft.manifest is not None:
                    await self._tell_uses(connection, organization, found[1])
        assert found is not None
        return found[1]

    async def delete_version(
        self, caller: Principal, kind: Kind, repository: str, version: str, sent_etag: str, *, force: bool = False
    ) -> None:
        """Delete a version, which can be restored for a while; with `force` also one that something uses.

        Raises:
            NotFound, Aborted (ETAG_MISMATCH).
            FailedPrecondition: an alias names it (MODEL_ALIASED, BENTO_ALIASED), something uses it (MODEL_IN_USE,
                BENTO_IN_USE), or it is an alias, and not the version's own id (VERSION_REQUIRED).
        """
        organization = organization_of(caller)
        async with self._database.transaction() as connection:
            found = await rows.version(connection, organization, kind, repository, version, lock=True)
            if found is None:
                raise await not_itself(connection, organization, kind, repository, version)
            check_etag(sent_etag, etag(found[1]))
            if found[1].aliases:
                shown = ", ".join(found[1].aliases)
                raise FailedPrecondition(
                    f"{_title(kind)} '{repository}:{version}' is what {shown} means. Make the alias name another "
                    f"{kind}, or delete it, first.",
                    reason=f"{kind.upper()}_ALIASED",
                    resource=found[1].name,
                    aliases=shown,
                )
            if not force:
                what, todo = f"{_title(kind)} '{repository}:{version}' is", "Delete that first, or set force."
                await refuse_used(connection, organization, kind, what, [found[1].name], todo)
            await use_rows.end_of(connection, organization, [found[1].uid], self._clock.now())
            freed = 0
            if self._delete_grace:
                await self._keep(connection, caller, versions.c.id == found[0])
            else:
                contents = await self._let_go(connection, versions.c.id == found[0])
                await rows.delete_version(connection, found[0])
                freed = await quota_rows.freed(connection, organization, contents)
            await quota_rows.charge(connection, organization, Usage(bytes=-freed, versions=-1))

    async def _tell_uses(self, connection: AsyncConnection, organization: str, version: Version) -> None:
        if version.kind is Kind.BENTO:
            models, now = version.facts.models, self._clock.now()
            await tell_bento(connection, organization, version.name, version.uid, models, now)

    async def _let_go(self, connection: AsyncConnection, where: Any) -> Mapping[str, int]:
        contents = await quota_rows.contents(connection, where)
        await held.let_go(connection, await rows.contents(connection, where), self._clock.now())
        return contents

    async def _keep(self, connection: AsyncConnection, caller: Principal, where: Any) -> int:
        now = self._clock.now()
        return await deletions.keep_versions(
            connection, where, now=now, expire_time=now + self._delete_grace, deleter=caller.user
        )

    def _new(self, caller: Principal, draft: Draft) -> dict[str, Any]:
        now = self._clock.now()
        return {
            "uid": str(uuid.uuid4()),
            "description": draft.description or "",
            "labels": json.dumps(dict(draft.labels or {}), sort_keys=True),
            "annotations": json.dumps(dict(draft.annotations or {}), sort_keys=True),
            "creator": caller.user,
            "updater": caller.user,
            "create_time": now,
            "update_time": now,
        }

    def _changes(self, caller: Principal, draft: Draft) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if draft.description is not None:
            values["description"] = draft.description
        if draft.labels is not None:
            values["labels"] = json.dumps(dict(draft.labels), sort_keys=True)
        if draft.annotations is not None:
            values["annotations"] = json.dumps(dict(draft.annotations), sort_keys=True)
        if draft.build_time is not None:
            values["build_time"] = draft.build_time
        if values or draft.manifest is not None:
            values |= {"updater": caller.user, "update_time": self._clock.now()}
        return values


def is_alias(kind: Kind, repository: str, version: str) -> FailedPrecondition:
    """The id of a version is an alias by now."""
    return FailedPrecondition(
        f"{version!r} is an alias in {kind} repository {repository!r}. Choose another version, or delete "
        "the alias first.",
        reason="VERSION_IS_ALIAS",
        alias=kind.alias_name(repository, version),
    )


def version_exists(kind: Kind, repository: str, version: str, *, todo: str = "") -> AlreadyExists:
    """There is a version of this name; `todo` is a sentence that says what to do about it."""
    sentence = f"{_title(kind)} '{repository}:{version}' exists already.{todo and ' ' + todo}"
    return _about(AlreadyExists, sentence, f"{kind.upper()}_EXISTS", kind, kind.version_name(repository, version))


def no_repository(kind: Kind, repository: str) -> NotFound:
    """There is no repository of this name."""
    return _about(
        NotFound,
        f"{_title(kind)} repository {repository!r} does not exist.",
        f"{kind.upper()}_REPOSITORY_NOT_FOUND",
        f"{kind}_repository",
        kind.repository_name(repository),
    )


def no_version(kind: Kind, repository: str, version: str) -> NotFound:
    """There is no version of this name, or none with content where `latest` is asked for."""
    sentence = (
        f"{_title(kind)} repository {repository!r} has no {kind} that is uploaded."
        if version == LATEST
        else f"{_title(kind)} '{repository}:{version}' does not exist."
    )
    return _about(NotFound, sentence, f"{kind.upper()}_NOT_FOUND", kind, kind.version_name(repository, version))


async def not_itself(
    connection: AsyncConnection, organization: str, kind: Kind, repository: str, version: str
) -> EkibenError:
    """Why there is no version of this very id to change: it is another name of one, or of none."""
    found = await rows.meant(connection, organization, kind, repository, version)
    if found is None or found[1].version == version:  # the one that was asked for went, and another came just now
        return no_version(kind, repository, version)
    return FailedPrecondition(
        f"'{repository}:{version}' means {found[1].name} now, and may mean another {kind} soon. "
        f"Name the {kind} itself.",
        reason="VERSION_REQUIRED",
        name=kind.version_name(repository, version),
        version=found[1].name,
    )


def _about(cls: type[E], sentence: str, reason: str, key: str, name: str) -> E:
    error = cls(sentence, reason=reason)
    error.metadata[str(key)] = name
    return error


def _title(kind: Kind) -> str:
    return kind.capitalize()


def _facts(facts: Facts) -> dict[str, Any]:
    return {
        "module": facts.module,
        "bentoml_version": facts.bentoml_version,
        "development": facts.development,
        "models": json.dumps(list(facts.models)),
    }
