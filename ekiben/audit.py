"""What was done, by whom, and what was refused."""

from collections.abc import AsyncIterator

import grpc.aio

from ekiben import pages
from ekiben.identity.v1 import identity_pb2 as pb
from ekiben.identity.v1.identity_pb2_grpc import AuditStub


class Audit:
    """The audit log."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = AuditStub(channel)

    def list(
        self, *, user: str = "", resource: str = "", refused: bool = False, limit: int = 0
    ) -> AsyncIterator[pb.AuditEntry]:
        """Audit entries, newest first."""
        request = pb.ListAuditEntriesRequest(user=user, resource=resource, refused=refused)
        return pages.items(self._stub.ListAuditEntries, request, "audit_entries", limit=limit)
