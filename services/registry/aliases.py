"""Use cases over aliases: names that move from version to version of a repository, and their history.

Each public method is one transaction: a move and its entry in the history are there together or not at all.
"""

from collections.abc import Sequence
from datetime import datetime

from ekiben import names
from ekiben.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from services.kernel.clock import Clock
from services.kernel.db import AsyncConnection, Database
from services.kernel.identity import Principal
from services.registry.catalog import no_repository, no_version, organization_of
from services.registry.domain import LATEST, MAX_REASON_BYTES, AliasChange, Kind, check_text
from services.registry.store import aliases as rows
from services.registry.store import catalog as catalog_rows
from services.registry.store.aliases import Place


def parse_alias(name: str, *, wildcard: bool = False) -> tuple[Kind, str, str]:
    """Kind, repository and id of an alias's resource name. Raises InvalidArgument (NAME_INVALID)."""
    if name.startswith("bentoRepositories/"):
        bento = names.BentoAlias.parse(name, wildcard=wildcard)
        return Kind.BENTO, bento.repository, bento.alias
    model = names.ModelAlias.parse(name, wildcard=wildcard)
    return Kind.MODEL, model.repository, model.alias


def parse_repository(name: str) -> tuple[Kind, str | None]:
    """Kind and id of a repository's resource name, None for `-`. Raises InvalidArgument (NAME_INVALID)."""
    kind = Kind.BENTO if name.startswith("bentoRepositories/") else Kind.MODEL
    parsed = (names.BentoRepository if kind is Kind.BENTO else names.ModelRepository).parse(name, wildcard=True)
    return kind, None if parsed.repository == names.WILDCARD else parsed.repository


class Aliases:
    """What aliases name, and named."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def get(
        self, caller: Principal, kind: Kind, repository: str, alias: str, at: datetime | None = None
    ) -> AliasChange:
        """What an alias names, or named at a time. Raises NotFound (ALIAS_NOT_FOUND)."""
        found = await rows.newest_change(self._database.lookups, organization_of(caller), kind, repository, alias, at)
        if found is None or not found.version:
            raise no_alias(kind, repository, alias, at)
        return found

    async def list(
        self, caller: Principal, kind: Kind, repository: str | None, size: int, after: Place | None
    ) -> Sequence[AliasChange]:
        """At most `size` aliases of a repository, or of all with None. Raises NotFound for an unknown repository."""
        organization = organization_of(caller)
        async with self._database.read() as connection:
            if repository is not None and not await catalog_rows.has_repository(
                connection, organization, kind, repository
            ):
                raise no_repository(kind, repository)
            return await rows.list_aliases(connection, organization, kind, repository, size, after)

    async def changes(
        self, caller: Principal, kind: Kind, repository: str | None, alias: str | None, size: int, before: int | None
    ) -> Sequence[tuple[int, AliasChange]]:
        """At most `size` changes, newest first, with their row ids; None stands for all repositories or aliases."""
        async with self._database.read() as connection:
            return await rows.list_changes(connection, organization_of(caller), kind, repository, alias, size, before)

    async def set(
        self,
        caller: Principal,
        kind: Kind,
        repository: str,
        alias: str,
        version: str,
        *,
        expected: str | None = None,
        reason: str = "",
    ) -> AliasChange:
        """Make an alias name a version, given by its id, another alias or `latest`.

        Raises:
            NotFound: no such repository or version.
            InvalidArgument: the alias is `latest` (ALIAS_RESERVED), or the reason too long (REASON_INVALID).
            FailedPrecondition: it is the id of a version (ALIAS_IS_VERSION), or the version has no content yet
                (CONTENT_NOT_READY).
            Aborted: it names another version than `expected`, which is empty for none (ALIAS_MOVED).
        """
        check_text("reason", reason, MAX_REASON_BYTES, "REASON_INVALID")
        if alias == LATEST:
            raise InvalidArgument(
                f"'{LATEST}' is always the newest {kind} and cannot be set. Choose another alias.",
                reason="ALIAS_RESERVED",
                violations=[("name", "the alias must not be 'latest'")],
            )
        organization = organization_of(caller)
        async with self._database.transaction() as connection:
            if await catalog_rows.lock_repository(connection, organization, kind, repository) is None:
                raise no_repository(kind, repository)
            if await catalog_rows.version(connection, organization, kind, repository, alias) is not None:
                raise FailedPrecondition(
                    f"{kind.capitalize()} repository {repository!r} has a {kind} {alias!r}, which an alias of this "
                    "name would hide. Choose another.",
                    reason="ALIAS_IS_VERSION",
                    version=kind.version_name(repository, alias),
                )
            found = await catalog_rows.meant(connection, organization, kind, repository, version)
            if found is None or not await catalog_rows.lock_version(connection, found[0]):
                raise no_version(kind, repository, version)
            row_id, named = found
            if not named.content.state.usable:
                raise FailedPrecondition(
                    f"{named.name} has no content yet: it is {named.content.state.lower()}. Push it first.",
                    reason="CONTENT_NOT_READY",
                    resource=named.name,
                    state=named.content.state,
                )
            current = await self._current(connection, organization, kind, repository, alias, expected)
            if current.version == named.version:
                return current
            change = current.next(self._clock.now(), caller.user, named, reason)
            await rows.add_change(connection, organization, change, row_id)
        return change

    async def delete(
        self, caller: Principal, kind: Kind, repository: str, alias: str, *, expected: str | None, reason: str
    ) -> None:
        """Delete an alias; its history stays.

        Raises:
            NotFound: ALIAS_NOT_FOUND, or no such repository.
            Aborted: it names another version than `expected` (ALIAS_MOVED).
            InvalidArgument: the reason is too long (REASON_INVALID).
        """
        check_text("reason", reason, MAX_REASON_BYTES, "REASON_INVALID")
        organization = organization_of(caller)
        async with self._database.transaction() as connection:
            if await catalog_rows.lock_repository(connection, organization, kind, repository) is None:
                raise no_repository(kind, repository)
            current = await self._current(connection, organization, kind, repository, alias, expected)
            if not current.version:
                raise no_alias(kind, repository, alias)
            change = current.next(self._clock.now(), caller.user, None, reason)
            await rows.add_change(connection, organization, change, None)

    async def _current(
        self,
        connection: AsyncConnection,
        organization: str,
        kind: Kind,
        repository: str,
        alias: str,
        expected: str | None,
    ) -> AliasChange:
        """The newest change, the repository being locked. Raises Aborted (ALIAS_MOVED)."""
        found = await rows.newest_change(connection, organization, kind, repository, alias)
        current = found or AliasChange.never(kind, repository, alias)
        if expected is not None and current.version != expected:
            names_now = f"names {current.version!r} now" if current.version else "names nothing now"
            wanted = repr(expected) if expected else "nothing"
            raise Aborted(
                f"Alias '{repository}:{alias}' {names_now}, not {wanted}. Read it again, then redo the change.",
                reason="ALIAS_MOVED",
                alias=current.alias_name,
                version=current.version,
                expected_version=expected,
            )
        return current


def no_alias(kind: Kind, repository: str, alias: str, at: datetime | None = None) -> NotFound:
    """There is no such alias, or was none then."""
    did = f"named nothing at {at.isoformat()}" if at else "does not exist"
    return NotFound(
        f"Alias '{repository}:{alias}' of {kind}s {did}.",
        reason="ALIAS_NOT_FOUND",
        alias=kind.alias_name(repository, alias),
    )
