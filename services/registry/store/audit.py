"""The audit log as rows; nothing changes one once it is written."""

from datetime import datetime
from typing import Any

import sqlalchemy as sa

from services.kernel.db import AsyncConnection
from services.registry.identities import AuditEntry
from services.registry.store.tables import audit_entries


async def add(connection: AsyncConnection, organization: str, entries: list[AuditEntry]) -> None:
    """Insert entries."""
    rows = [
        {
            "organization": organization,
            "entry": entry.entry,
            "create_time": entry.create_time,
            "user_name": entry.user,
            "api_token": entry.api_token,
            "method": entry.method,
            "resource": entry.resource,
            "outcome": entry.outcome,
            "detail": entry.detail,
            "request_id": entry.request_id,
            "trace_id": entry.trace_id,
            "peer": entry.peer,
        }
        for entry in entries
    ]
    await connection.execute(audit_entries.insert(), rows)


def _entry(row: sa.Row[Any]) -> AuditEntry:
    return AuditEntry(
        entry=row.entry,
        create_time=row.create_time,
        user=row.user_name,
        api_token=row.api_token,
        method=row.method,
        resource=row.resource,
        outcome=row.outcome,
        detail=row.detail,
        request_id=row.request_id,
        trace_id=row.trace_id,
        peer=row.peer,
    )


async def list_newest(
    connection: AsyncConnection,
    organization: str,
    size: int,
    before: int | None,
    *,
    user: str = "",
    resource: str = "",
    refused: bool = False,
) -> list[tuple[int, AuditEntry]]:
    """At most `size` entries in the order of their writing, newest first, each with its row id."""
    where: list[sa.ColumnElement[bool]] = [audit_entries.c.organization == organization]
    if user:
        where.append(audit_entries.c.user_name == user)
    if resource:
        where.append(audit_entries.c.resource == resource)
    if refused:
        where.append(audit_entries.c.outcome != "OK")
    if before is not None:
        where.append(audit_entries.c.id < before)
    statement = sa.select(audit_entries).where(*where).order_by(audit_entries.c.id.desc()).limit(size)
    return [(row.id, _entry(row)) for row in (await connection.execute(statement)).all()]


async def forget_strangers(connection: AsyncConnection, before: datetime) -> None:
    """Delete old refusals of callers whom nobody knew; what users and services did stays."""
    old = (audit_entries.c.user_name == "", audit_entries.c.create_time < before)
    await connection.execute(audit_entries.delete().where(*old))
