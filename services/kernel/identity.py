"""Who calls: the principal of the running call, and the ports through which it is known and written down.

A servicer or a use case asks `current_principal()`. Whoever holds the service token speaks for a service of
the suite, or, with the metadata `ekiben-user` and `ekiben-organization`, on behalf of the user who caused the call.
"""

import hmac
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import Unauthenticated

DEFAULT_ORGANIZATION = "organizations/default"


@dataclass(frozen=True)
class Principal:
    """Who makes a call. `role` is a value of `ekiben.api.v1.Role`."""

    user: str
    organization: str
    role: int
    api_token: str = ""
    api_token_display_name: str = ""


def role_name(role: int) -> str:
    """`ROLE_VIEWER` for its number."""
    descriptor = Role.DESCRIPTOR.values_by_number.get(role)
    return str(descriptor.name) if descriptor is not None else str(role)


ANONYMOUS = Principal(user="", organization=DEFAULT_ORGANIZATION, role=Role.ROLE_ANYONE)
"""Somebody without a token that works, in a method open to anyone."""


@dataclass(frozen=True)
class AuditRecord:
    """One thing done or refused.

    `method` is `ekiben.registry.v1.Models/CreateModel`; `outcome` is `OK` or the name of a gRPC code.
    """

    time: datetime
    user: str
    organization: str
    method: str
    outcome: str
    api_token: str = ""
    resource: str = ""
    detail: str = ""
    request_id: str = ""
    trace_id: str = ""
    peer: str = ""


class Authenticator(Protocol):
    """Turns a token into who sent it."""

    async def authenticate(self, token: str) -> Principal:
        """The principal of `token`.

        Raises:
            Unauthenticated: unknown, expired, or of a disabled user.
            Unavailable: nobody can say now.
        """
        ...


class Auditor(Protocol):
    """Keeps what was done and what was refused."""

    async def record(self, entry: AuditRecord) -> None:
        """Take one entry; when it returns, the entry is kept or safely on its way."""
        ...


@dataclass
class Caller:
    """The call that runs: set by the interceptor, read by the log, the tracer and the servicer."""

    method: str = ""
    request_id: str = ""
    peer: str = ""
    component: str = ""
    principal: Principal = field(default=ANONYMOUS)


_caller: ContextVar[Caller | None] = ContextVar("ekiben_caller", default=None)


def current_caller() -> Caller | None:
    """The call that runs in this task, or None outside of one."""
    return _caller.get()


def set_caller(caller: Caller | None) -> None:
    """Make `caller` the running call of this task and of those that it starts."""
    _caller.set(caller)


def current_principal() -> Principal:
    """Who makes the running call.

    Raises:
        RuntimeError: outside of a call: a loop acts for the service and has no caller.
    """
    caller = _caller.get()
    if caller is None:
        raise RuntimeError("current_principal() was asked outside of a call")
    return caller.principal


def token_of(headers: Mapping[str, str]) -> str:
    """The token in a call's metadata or a request's headers, as our clients or BentoML's send it; empty for none.

    What gRPC's metadata cannot carry is no token of ours: it counts as one that nobody knows.
    """
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        token = headers.get("x-yatai-api-token", "")
    token = token.strip()
    return token if token.isascii() and token.isprintable() else "?"


def read_service_token(path: Path) -> str:
    """The service token in `path`.

    Raises:
        ValueError: the file cannot be read or is empty.
    """
    try:
        token = path.read_text().strip()
    except OSError as exc:
        raise ValueError(f"The service token cannot be read: {exc}.") from exc
    if not token:
        raise ValueError(f"The service token file {path} is empty.")
    return token


class ServiceTokenAuthenticator:
    """Knows the suite's service token, compared in constant time; asks `others` about any other token."""

    def __init__(self, service_token: str, others: Authenticator | None) -> None:
        self._service_token = service_token.encode()
        self._others = others

    def is_service(self, token: str) -> bool:
        """Whether `token` is the service token."""
        return hmac.compare_digest(token.encode(), self._service_token)

    async def authenticate(self, token: str) -> Principal:
        """The principal of `token`; see Authenticator."""
        if self.is_service(token):
            return Principal("services/unknown", DEFAULT_ORGANIZATION, Role.ROLE_SERVICE)
        if token.startswith("eks_"):
            raise Unauthenticated("The service token is not that of this suite.", reason="SERVICE_TOKEN_INVALID")
        if self._others is None:
            raise Unauthenticated("The token is not known here.", reason="TOKEN_INVALID")
        return await self._others.authenticate(token)
