"""Users, API tokens, logins, secrets and audit entries, and the rules about roles; all pure.

Roles are the numbers of `ekiben.api.v1.Role`: each includes those before it. ROLE_SERVICE is never anybody's.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import InvalidArgument, PermissionDenied

TOKEN_PREFIX = "ekb_"
MAX_TOKEN_NAME = 128
MAX_SECRET_BYTES = 1 << 20
MAX_SECRET_ITEMS = 1000
_GRANTABLE = (Role.ROLE_VIEWER, Role.ROLE_DEVELOPER, Role.ROLE_ADMIN)


@dataclass(frozen=True)
class Organization:
    """What owns everything else."""

    organization: str
    uid: str
    description: str
    create_time: datetime


@dataclass(frozen=True)
class User:
    """A person or a program with an account."""

    user: str
    uid: str
    email: str
    first_name: str
    last_name: str
    role: int
    disabled: bool
    create_time: datetime
    update_time: datetime
    revision: int

    @property
    def name(self) -> str:
        """The resource name."""
        return f"users/{self.user}"


@dataclass(frozen=True)
class ApiToken:
    """A credential of a user; its value is nowhere kept."""

    api_token: str
    user: str
    display_name: str
    description: str
    role: int
    scopes: Sequence[str]
    create_time: datetime
    expire_time: datetime | None
    last_use_time: datetime | None

    @property
    def name(self) -> str:
        """The resource name."""
        return f"apiTokens/{self.api_token}"


@dataclass(frozen=True)
class SecretItem:
    """One value; None where values are left out."""

    key: str
    sub_path: str = ""
    value: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Secret:
    """Values for replicas or builds. `kind` and `stage` are numbers of the proto's enums."""

    secret: str
    uid: str
    description: str
    kind: int
    stage: int
    path: str
    items: Sequence[SecretItem]
    creator: str
    create_time: datetime
    update_time: datetime
    revision: int

    @property
    def name(self) -> str:
        """The resource name."""
        return f"secrets/{self.secret}"


@dataclass(frozen=True)
class AuditEntry:
    """One thing done or refused."""

    entry: str
    create_time: datetime
    user: str
    api_token: str
    method: str
    resource: str
    outcome: str
    detail: str
    request_id: str
    trace_id: str
    peer: str


def hash_of(token: str) -> str:
    """What is kept of a token or a code: its sha256 in hex. They are random, so nothing slower is of use."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def check_role(role: int) -> None:
    """Pass a role that a user may have (ROLE_INVALID)."""
    if role not in _GRANTABLE:
        allowed = ", ".join(Role.Name(granted) for granted in _GRANTABLE)
        raise InvalidArgument(
            f"The role must be one of {allowed}.", reason="ROLE_INVALID", violations=[("role", f"one of {allowed}")]
        )


def granted_role(wanted: int, caller_role: int, owner_role: int) -> int:
    """The role of a new token of a user with `owner_role`, made by a caller with `caller_role`.

    Unspecified gives the most that both allow.

    Raises:
        InvalidArgument: no role that a token can have (ROLE_INVALID).
        PermissionDenied: more than the caller or the owner has (ROLE_TOO_HIGH).
    """
    most = min(caller_role, owner_role, Role.ROLE_ADMIN)
    if wanted == Role.ROLE_UNSPECIFIED:
        return most
    check_role(wanted)
    if wanted > most:
        names = Role.Name(Role.ValueType(wanted)), Role.Name(Role.ValueType(most))
        raise PermissionDenied(
            f"The token cannot have {names[0]}: {names[1]} is the most that its user and its maker allow.",
            reason="ROLE_TOO_HIGH",
            role=names[0],
            most=names[1],
        )
    return wanted
