"""Principals, users, API tokens, secrets and audit entries."""

from collections.abc import Collection
from datetime import datetime
from typing import Any

from ekiben import names
from ekiben.api.v1.annotations_pb2 import Role
from ekiben.identity.v1 import identity_pb2 as pb
from services.kernel.identity import AuditRecord, Principal
from services.registry import accounts, secrets
from services.registry.accounts import TokenDraft
from services.registry.identities import ApiToken, AuditEntry, Organization, Secret, SecretItem, User
from services.registry.messages.catalog import from_timestamp, to_timestamp

USER_WRITABLE = frozenset({"email", "first_name", "last_name", "role", "disabled"})
SECRET_WRITABLE = frozenset({"description", "kind", "stage", "path", "items"})


def principal(who: Principal) -> pb.Principal:
    """The message of a principal."""
    return pb.Principal(
        user=who.user,
        organization=who.organization,
        role=Role.ValueType(who.role),
        api_token=who.api_token,
        api_token_display_name=who.api_token_display_name,
    )


def organization(found: Organization) -> pb.Organization:
    """The message of an organization."""
    return pb.Organization(
        name=f"organizations/{found.organization}",
        uid=found.uid,
        description=found.description,
        create_time=to_timestamp(found.create_time),
    )


def user(found: User) -> pb.User:
    """The message of a user."""
    return pb.User(
        name=found.name,
        uid=found.uid,
        email=found.email,
        first_name=found.first_name,
        last_name=found.last_name,
        role=Role.ValueType(found.role),
        disabled=found.disabled,
        create_time=to_timestamp(found.create_time),
        update_time=to_timestamp(found.update_time),
        etag=accounts.etag(found),
    )


def user_values(message: pb.User, fields: Collection[str] = USER_WRITABLE) -> dict[str, Any]:
    """What a caller wrote of a user, in these fields."""
    return {field: int(message.role) if field == "role" else getattr(message, field) for field in fields}


def api_token(found: ApiToken, value: str = "") -> pb.ApiToken:
    """The message of a token; `value` only in the answer to its creation."""
    return pb.ApiToken(
        name=found.name,
        display_name=found.display_name,
        description=found.description,
        role=Role.ValueType(found.role),
        user=f"users/{found.user}",
        expire_time=to_timestamp(found.expire_time),
        create_time=to_timestamp(found.create_time),
        last_use_time=to_timestamp(found.last_use_time),
        token=value,
        scopes=found.scopes,
    )


def token_draft(message: pb.ApiToken) -> TokenDraft:
    """What a caller wrote of a new token."""
    return TokenDraft(
        display_name=message.display_name,
        description=message.description,
        role=message.role,
        user=names.User.parse(message.user).user if message.user else "",
        expire_time=(
            from_timestamp(message.expire_time, "api_token.expire_time") if message.HasField("expire_time") else None
        ),
        scopes=tuple(message.scopes),
    )


def secret(found: Secret) -> pb.Secret:
    """The message of a secret, with its values where the domain's has them."""
    return pb.Secret(
        name=found.name,
        uid=found.uid,
        description=found.description,
        kind=pb.Secret.Kind.ValueType(found.kind),
        stage=pb.Secret.Stage.ValueType(found.stage),
        path=found.path,
        items=[pb.Secret.Item(key=i.key, sub_path=i.sub_path, value=i.value or "") for i in found.items],
        create_time=to_timestamp(found.create_time),
        update_time=to_timestamp(found.update_time),
        creator=found.creator,
        etag=secrets.etag(found),
    )


def secret_values(message: pb.Secret, fields: Collection[str] = SECRET_WRITABLE) -> dict[str, Any]:
    """What a caller wrote of a secret, in these fields; kind and stage that are not given are ENV and ALL."""
    values: dict[str, Any] = {
        "description": message.description,
        "kind": int(message.kind) or int(pb.Secret.ENV),
        "stage": int(message.stage) or int(pb.Secret.ALL),
        "path": message.path,
        "items": [SecretItem(item.key, item.sub_path, item.value) for item in message.items],
    }
    return {field: values[field] for field in fields}


def audit_entry(found: AuditEntry) -> pb.AuditEntry:
    """The message of an audit entry."""
    return pb.AuditEntry(
        name=f"auditEntries/{found.entry}",
        create_time=to_timestamp(found.create_time),
        user=found.user,
        api_token=found.api_token,
        method=found.method,
        resource=found.resource,
        outcome=found.outcome,
        detail=found.detail,
        request_id=found.request_id,
        trace_id=found.trace_id,
        peer=found.peer,
    )


def audit_record(message: pb.AuditEntry, organization: str, now: datetime) -> AuditRecord:
    """The record that another service sends."""
    stamped = message.HasField("create_time")
    return AuditRecord(
        time=from_timestamp(message.create_time, "create_time") if stamped else now,
        user=message.user,
        organization=organization,
        method=message.method,
        outcome=message.outcome,
        api_token=message.api_token,
        resource=message.resource,
        detail=message.detail,
        request_id=message.request_id,
        trace_id=message.trace_id,
        peer=message.peer,
    )
