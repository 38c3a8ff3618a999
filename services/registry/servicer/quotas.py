"""Quotas over gRPC."""

from ekiben.registry.v1 import quotas_pb2 as pb
from ekiben.registry.v1 import quotas_pb2_grpc
from services.kernel import updates
from services.kernel.identity import current_principal
from services.registry import quotas as use_cases
from services.registry.messages import quotas as messages
from services.registry.servicer.context import Context


class Quotas(quotas_pb2_grpc.QuotasServicer):
    """Serves ekiben.registry.v1.Quotas."""

    def __init__(self, quotas: use_cases.Quotas) -> None:
        self._quotas = quotas

    async def GetQuota(self, request: pb.GetQuotaRequest, context: Context) -> pb.Quota:
        """See the proto."""
        found = await self._quotas.get(current_principal(), messages.organization_of(request.name))
        return messages.quota(found)

    async def UpdateQuota(self, request: pb.UpdateQuotaRequest, context: Context) -> pb.Quota:
        """See the proto."""
        sent = request.quota
        organization = messages.organization_of(sent.name)
        fields = updates.paths(sent, request.update_mask, messages.WRITABLE)
        limits = messages.limits(sent, fields)
        return messages.quota(await self._quotas.update(current_principal(), organization, limits, sent.etag))
