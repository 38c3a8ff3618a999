"""Use cases over organizations, users and API tokens; each public method is one transaction.

It is also the suite's Authenticator: a token is looked up by its hash.
"""

import secrets
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import (
    AlreadyExists,
    EkibenError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)
from services.kernel.clock import Clock
from services.kernel.db import AsyncConnection, Database
from services.kernel.identity import Principal
from services.kernel.updates import check_etag, etag_of
from services.registry.catalog import organization_of
from services.registry.domain import check_text
from services.registry.identities import (
    MAX_TOKEN_NAME,
    TOKEN_PREFIX,
    ApiToken,
    Organization,
    User,
    check_role,
    granted_role,
    hash_of,
)
from services.registry.known import Found, KnownTokens
from services.registry.store import accounts as rows

_USE_PRECISION = timedelta(minutes=1)
_NOTE_USES_S = 10.0


def new_token() -> str:
    """A token's value: 256 random bits."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def etag(user: User) -> str:
    """Changes with each change of the user."""
    return etag_of(user.uid, user.revision)


@dataclass(frozen=True)
class TokenDraft:
    """What a caller may say of a new token. `user` is an id, empty for the caller's own."""

    display_name: str
    description: str = ""
    role: int = Role.ROLE_UNSPECIFIED
    user: str = ""
    expire_time: datetime | None = None
    scopes: Sequence[str] = ()


class Accounts:
    """Who there is."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._uses: dict[str, datetime] = {}
        self._known = KnownTokens(clock)

    # Authentication

    async def authenticate(self, token: str) -> Principal:
        """Who sends this token.

        Raises:
            Unauthenticated: unknown (TOKEN_INVALID), expired (TOKEN_EXPIRED), of a disabled user (USER_DISABLED).
        """
        if not token.startswith(TOKEN_PREFIX):
            raise Unauthenticated("The token is not one of this server's.", reason="TOKEN_INVALID")
        found = await self._known.get(hash_of(token), self._by_hash)
        if found is None:
            raise Unauthenticated("The token is unknown: it may have been deleted.", reason="TOKEN_INVALID")
        organization, kept, user = found
        now = self._clock.now()
        if kept.expire_time is not None and kept.expire_time <= now:
            raise Unauthenticated("The token has expired. Create another.", reason="TOKEN_EXPIRED")
        if user.disabled:
            raise Unauthenticated(f"User {user.user!r} is disabled.", reason="USER_DISABLED", user=user.name)
        if kept.last_use_time is None or now - kept.last_use_time >= _USE_PRECISION:
            self._uses[kept.api_token] = now
        return Principal(
            user=user.name,
            organization=f"organizations/{organization}",
            role=min(user.role, kept.role),
            api_token=kept.name,
            api_token_display_name=kept.display_name,
        )

    async def _by_hash(self, token_hash: str) -> Found | None:
        return await rows.by_hash(self._database.lookups, token_hash)

    @asynccontextmanager
    async def _changing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction after which no token is what it was."""
        try:
            async with self._database.transaction() as connection:
                yield connection
        finally:
            self._known.forget()

    async def note_uses(self) -> None:
        """Loop: write down now and then when tokens were used, so that no call has to wait for it."""
        while True:
            await self._clock.sleep(_NOTE_USES_S)
            await self.write_uses()

    async def write_uses(self) -> None:
        """Write down what is known of uses; a database that is full or away costs them."""
        uses, self._uses = self._uses, {}
        if not uses:
            return
        try:
            async with self._database.transaction() as connection:
                await rows.touch_tokens(connection, uses)
        except EkibenError:
            self._uses = {**uses, **self._uses}

    # Organizations and users

    async def get_organization(self, caller: Principal, name: str) -> Organization:
        """The caller's organization; `-` names it too. Raises NotFound (ORGANIZATION_NOT_FOUND)."""
        own = organization_of(caller)
        async with self._database.read() as connection:
            found = await rows.organization(connection, own) if name in ("-", own) else None
        if found is None:
            raise NotFound(
                f"Organization {name!r} does not exist.",
                reason="ORGANIZATION_NOT_FOUND",
                organization=f"organizations/{name}",
            )
        return found

    async def get_user(self, caller: Principal, name: str) -> User:
        """One user. Raises NotFound (USER_NOT_FOUND)."""
        async with self._database.read() as connection:
            return _found(await rows.user(connection, organization_of(caller), name), name)

    async def list_users(self, caller: Principal, size: int, after: str) -> list[User]:
        """At most `size` users by name, from beyond `after`."""
        async with self._database.read() as connection:
            return await rows.list_users(connection, organization_of(caller), size, after)

    async def create_user(self, caller: Principal, name: str, values: Mapping[str, Any]) -> User:
        """A new user. Raises AlreadyExists (USER_EXISTS), InvalidArgument (ROLE_INVALID, USER_INVALID)."""
        check_role(values["role"])
        _check_user(values)
        organization = organization_of(caller)
        now = self._clock.now()
        row = {**values, "user_id": name, "uid": str(uuid.uuid4()), "create_time": now, "update_time": now}
        async with self._database.transaction() as connection:
            if not await rows.add_user(connection, organization, row):
                raise AlreadyExists(f"User {name!r} exists already.", reason="USER_EXISTS", user=f"users/{name}")
            return _found(await rows.user(connection, organization, name), name)

    async def update_user(self, caller: Principal, name: str, values: Mapping[str, Any], sent_etag: str) -> User:
        """Change what `values` gives.

        Raises:
            NotFound, Aborted (ETAG_MISMATCH), InvalidArgument (ROLE_INVALID, USER_INVALID).
            FailedPrecondition: no admin who can log in would be left (LAST_ADMIN).
        """
        if "role" in values:
            check_role(values["role"])
        _check_user(values)
        organization = organization_of(caller)
        async with self._changing() as connection:
            await rows.lock_organization(connection, organization)
            user = _found(await rows.user(connection, organization, name), name)
            check_etag(sent_etag, etag(user))
            remains = values.get("role", user.role) == Role.ROLE_ADMIN and not values.get("disabled", user.disabled)
            if _is_admin(user) and not remains:
                await self._keep_an_admin(connection, organization, name)
            if values:
                changed = {**values, "update_time": self._clock.now()}
                await rows.update_user(connection, organization, name, changed)
            return _found(await rows.user(connection, organization, name), name)

    async def delete_user(self, caller: Principal, name: str, sent_etag: str) -> None:
        """Delete a user and the user's tokens. Raises NotFound, Aborted, FailedPrecondition (LAST_ADMIN)."""
        organization = organization_of(caller)
        async with self._changing() as connection:
            await rows.lock_organization(connection, organization)
            user = _found(await rows.user(connection, organization, name), name)
            check_etag(sent_etag, etag(user))
            if _is_admin(user):
                await self._keep_an_admin(connection, organization, name)
            await rows.delete_user(connection, organization, name, self._clock.now())

    @staticmethod
    async def _keep_an_admin(connection: Any, organization: str, name: str) -> None:
        if not await rows.other_admins(connection, organization, name):
            raise FailedPrecondition(
                f"User {name!r} is the last admin. Make another user an admin first.",
                reason="LAST_ADMIN",
                user=f"users/{name}",
            )

    # API tokens

    async def get_token(self, caller: Principal, name: str) -> ApiToken:
        """One token: the caller's own, or anybody's for an admin. Raises NotFound (API_TOKEN_NOT_FOUND)."""
        async with self._database.read() as connection:
            found = await rows.token(connection, organization_of(caller), name)
        if found is None or not _may_see(caller, found):
            raise _no_token(name)
        return found

    async def list_tokens(
        self, caller: Principal, text: str, size: int, before: int | None
    ) -> tuple[list[tuple[int, ApiToken]], int]:
        """A page of tokens, newest first, each with its row id; and how many there are."""
        owner = None if caller.role >= Role.ROLE_ADMIN else caller.user.removeprefix("users/")
        words = words_of(text)
        async with self._database.read() as connection:
            return await rows.list_tokens(connection, organization_of(caller), owner, words, size, before)

    async def create_token(self, caller: Principal, draft: TokenDraft) -> tuple[ApiToken, str]:
        """A new token and its value, which is seen this once.

        Raises:
            InvalidArgument: API_TOKEN_INVALID, ROLE_INVALID, EXPIRE_TIME_INVALID.
            PermissionDenied: a role above the caller's (ROLE_TOO_HIGH), or another's token (NOT_OWN_TOKEN).
            NotFound: USER_NOT_FOUND.
        """
        if not 1 <= len(draft.display_name) <= MAX_TOKEN_NAME:
            raise InvalidArgument(
                f"The display name must have 1 to {MAX_TOKEN_NAME} characters.",
                reason="API_TOKEN_INVALID",
                violations=[("api_token.display_name", f"1 to {MAX_TOKEN_NAME} characters")],
            )
        for name, text in (("display_name", draft.display_name), ("description", draft.description)):
            check_text(name, text, 16 << 10, "API_TOKEN_INVALID")
        check_text("scopes", "".join(draft.scopes), 4 << 10, "API_TOKEN_INVALID")
        now = self._clock.now()
        if draft.expire_time is not None and draft.expire_time <= now:
            raise InvalidArgument(
                "expire_time has passed already.",
                reason="EXPIRE_TIME_INVALID",
                violations=[("api_token.expire_time", "must be in the future")],
            )
        own = caller.user.removeprefix("users/")
        owner = draft.user or own
        if owner != own and caller.role < Role.ROLE_ADMIN:
            raise PermissionDenied(
                "Only an admin creates tokens for others.", reason="NOT_OWN_TOKEN", user=f"users/{owner}"
            )
        value = new_token()
        organization = organization_of(caller)
        async with self._database.transaction() as connection:
            user = _found(await rows.user(connection, organization, owner), owner)
            token = ApiToken(
                api_token=secrets.token_hex(8),
                user=owner,
                display_name=draft.display_name,
                description=draft.description,
                role=granted_role(draft.role, caller.role, user.role),
                scopes=tuple(draft.scopes),
                create_time=now,
                expire_time=draft.expire_time,
                last_use_time=None,
            )
            await rows.add_token(connection, organization, token, hash_of(value))
        return token, value

    async def delete_token(self, caller: Principal, name: str) -> None:
        """Delete a token; the one that makes the call too, which is then its last. Raises NotFound."""
        organization = organization_of(caller)
        async with self._changing() as connection:
            found = await rows.token(connection, organization, name)
            if found is None or not _may_see(caller, found):
                raise _no_token(name)
            await rows.delete_token(connection, organization, name, self._clock.now())
        self._uses.pop(name, None)


def _is_admin(user: User) -> bool:
    return user.role == Role.ROLE_ADMIN and not user.disabled


def _may_see(caller: Principal, token: ApiToken) -> bool:
    return caller.role >= Role.ROLE_ADMIN or caller.user == f"users/{token.user}"


def _found(user: User | None, name: str) -> User:
    if user is None:
        raise NotFound(f"User {name!r} does not exist.", reason="USER_NOT_FOUND", user=f"users/{name}")
    return user


def _no_token(name: str) -> NotFound:
    return NotFound(f"API token {name!r} does not exist.", reason="API_TOKEN_NOT_FOUND", api_token=f"apiTokens/{name}")


def _check_user(values: Mapping[str, Any]) -> None:
    for name in ("email", "first_name", "last_name"):
        check_text(name, values.get(name, ""), 1024, "USER_INVALID")


def words_of(text: str) -> list[str]:
    """The words of a filter that knows nothing else (FILTER_INVALID)."""
    words = text.split()
    if len(text) > 4096 or len(words) > 50 or "\0" in text:
        raise InvalidArgument("The filter is too long.", reason="FILTER_INVALID", violations=[("filter", "too long")])
    return words
