"""What is written down of whom."""

import asyncio
from datetime import UTC, datetime

from services.kernel import audit
from services.kernel.audit import Writer
from services.kernel.clock import ManualClock
from services.kernel.identity import AuditRecord


class Entries:
    """An auditor that keeps entries in a list."""

    def __init__(self) -> None:
        self.entries: list[AuditRecord] = []

    async def record(self, entry: AuditRecord) -> None:
        """See Auditor."""
        self.entries.append(entry)


def refusal(user: str) -> AuditRecord:
    return AuditRecord(datetime.now(UTC), user, "organizations/default", "a.B/C", "UNAUTHENTICATED")


def test_strangers_write_so_much_and_then_little_and_users_always() -> None:
    async def trial() -> None:
        auditor, clock = Entries(), ManualClock()
        writer = Writer(auditor, clock)
        for _ in range(audit._STRANGERS + 50):
            await writer.now(refusal(""))
        assert len(auditor.entries) == audit._STRANGERS
        await writer.now(refusal("users/known"))
        assert auditor.entries[-1].user == "users/known"
        await clock.advance(audit._STRANGER_S * 2)
        for _ in range(5):
            await writer.now(refusal(""))
        assert len(auditor.entries) == audit._STRANGERS + 1 + 2

    asyncio.run(trial())
