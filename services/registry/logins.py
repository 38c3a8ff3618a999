"""Use cases over logins: a command line gets a token through a browser in which somebody approves it.

A code is 160 random bits, kept as its hash, and waits ten minutes. The token is made when the code is redeemed, which
deletes the login in the same transaction: a code gives one token, and none is ever kept in the clear.
"""

import secrets
from datetime import datetime, timedelta

from ekiben.errors import FailedPrecondition, NotFound, PermissionDenied, ResourceExhausted
from services.kernel.clock import Clock
from services.kernel.db import Database
from services.kernel.identity import Principal
from services.registry.accounts import new_token
from services.registry.catalog import organization_of
from services.registry.identities import ApiToken, hash_of
from services.registry.store import accounts as rows

_VALID = timedelta(minutes=10)
_MAX_WAITING = 1000
"""Anybody may open a login, so there must be an end to them."""


class Logins:
    """Codes and what becomes of them."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def create(self, caller: Principal) -> tuple[str, datetime]:
        """A new code and when it stops working. Raises ResourceExhausted (TOO_MANY_LOGINS)."""
        code = secrets.token_urlsafe(20)
        now = self._clock.now()
        async with self._database.transaction() as connection:
            await rows.forget_logins(connection, now)
            if await rows.count_logins(connection) >= _MAX_WAITING:
                raise ResourceExhausted(
                    "Too many logins wait. Try again in some minutes.", reason="TOO_MANY_LOGINS", retry_after_s=60.0
                )
            await rows.add_login(connection, organization_of(caller), hash_of(code), now, now + _VALID)
        return code, now + _VALID

    async def approve(self, caller: Principal, code: str) -> datetime:
        """Approve a code in the caller's name; when it stops working.

        Raises:
            NotFound: unknown, expired or used (LOGIN_NOT_FOUND).
            PermissionDenied: the caller is no user (LOGIN_NOT_A_USER).
        """
        if not caller.user.startswith("users/"):
            raise PermissionDenied("Only a user approves a login.", reason="LOGIN_NOT_A_USER")
        user = caller.user.removeprefix("users/")
        async with self._database.transaction() as connection:
            expire_time = await rows.approve_login(
                connection, organization_of(caller), hash_of(code), user, caller.role, self._clock.now()
            )
        if expire_time is None:
            raise _no_login()
        return expire_time

    async def redeem(self, code: str) -> str:
        """The API token of an approved code, once.

        Raises:
            FailedPrecondition: not yet approved (LOGIN_PENDING).
            NotFound: unknown, expired or used (LOGIN_NOT_FOUND).
        """
        value = new_token()
        now = self._clock.now()
        code_hash = hash_of(code)
        async with self._database.transaction() as connection:
            taken = await rows.take_login(connection, code_hash, now)
            if taken is None:
                if await rows.login_waits(connection, code_hash, now):
                    raise FailedPrecondition(
                        "The login is not approved yet. Approve it in the browser.", reason="LOGIN_PENDING"
                    )
                raise _no_login()
            organization, user, role = taken
            token = ApiToken(
                api_token=secrets.token_hex(8),
                user=user,
                display_name=f"login {now:%Y-%m-%d %H:%M}",
                description="Made by a login in the browser.",
                role=role,
                scopes=(),
                create_time=now,
                expire_time=None,
                last_use_time=None,
            )
            await rows.add_token(connection, organization, token, hash_of(value))
        return value


def _no_login() -> NotFound:
    return NotFound("The code is unknown, used or expired. Log in again.", reason="LOGIN_NOT_FOUND")
