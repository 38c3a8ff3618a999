"""Quotas: how much the organization may keep in the registry, and how much it does."""

from collections.abc import Sequence

import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask

from ekiben.registry.v1 import quotas_pb2 as pb
from ekiben.registry.v1.quotas_pb2_grpc import QuotasStub

OWN = "organizations/-/quota"
"""The quota of the caller's organization."""


class Quotas:
    """Limits of what is kept, and counts of it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = QuotasStub(channel)

    async def get(self, name: str = OWN) -> pb.Quota:
        """A quota with what is used of it."""
        return await self._stub.GetQuota(pb.GetQuotaRequest(name=name))

    async def update(self, quota: pb.Quota, paths: Sequence[str] = ()) -> pb.Quota:
        """Set limits: the `paths`, or what is populated. A path whose field is absent lifts the limit."""
        mask = FieldMask(paths=paths) if paths else None
        return await self._stub.UpdateQuota(pb.UpdateQuotaRequest(quota=quota, update_mask=mask))
