"""Use cases over the audit log: what was done, by whom, and what was refused.

It is also the suite's Auditor: `record` returns once the entry is on disk.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from services.kernel.db import Database
from services.kernel.identity import AuditRecord, Principal
from services.registry.catalog import organization_of
from services.registry.identities import AuditEntry
from services.registry.store import audit as rows


@dataclass(frozen=True)
class AuditFilter:
    """Which entries are asked for; empty fields ask for all."""

    user: str = ""
    resource: str = ""
    refused: bool = False


class Audit:
    """The log."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(self, entry: AuditRecord) -> None:
        """Write one entry of the kernel's."""
        await self.write_all([entry])

    async def write_all(self, entries: Sequence[AuditRecord]) -> None:
        """Write entries in one transaction. Texts are cut to what a row holds."""
        by_organization: dict[str, list[AuditEntry]] = {}
        for entry in entries:
            organization = entry.organization.removeprefix("organizations/")
            by_organization.setdefault(organization, []).append(_kept(entry))
        if by_organization:
            async with self._database.transaction() as connection:
                for organization, kept in by_organization.items():
                    await rows.add(connection, organization, kept)

    async def list(
        self, caller: Principal, wanted: AuditFilter, size: int, before: int | None
    ) -> Sequence[tuple[int, AuditEntry]]:
        """At most `size` entries, newest first, each with its row id."""
        async with self._database.read() as connection:
            return await rows.list_newest(
                connection,
                organization_of(caller),
                size,
                before,
                user=wanted.user,
                resource=wanted.resource,
                refused=wanted.refused,
            )


def _kept(entry: AuditRecord) -> AuditEntry:
    return AuditEntry(
        entry=secrets.token_hex(12),
        create_time=entry.time,
        user=_cut(entry.user, 128),
        api_token=_cut(entry.api_token, 128),
        method=_cut(entry.method, 256),
        resource=_cut(entry.resource, 500),
        outcome=_cut(entry.outcome, 64),
        detail=_cut(entry.detail, 2000),
        request_id=_cut(entry.request_id, 128),
        trace_id=_cut(entry.trace_id, 64),
        peer=_cut(entry.peer, 256),
    )


def _cut(text: str, limit: int) -> str:
    return text.replace("\0", "")[:limit]
