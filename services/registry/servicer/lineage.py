"""Uses and what they connect, over gRPC."""

from google.protobuf.empty_pb2 import Empty

from ekiben.registry.v1 import lineage_pb2 as pb
from ekiben.registry.v1 import lineage_pb2_grpc
from services.kernel import pages
from services.kernel.identity import current_principal
from services.registry import lineage as use_cases
from services.registry.messages import lineage as messages
from services.registry.servicer.context import Context


class Lineage(lineage_pb2_grpc.LineageServicer):
    """Serves ekiben.registry.v1.Lineage."""

    def __init__(self, lineage: use_cases.Lineage) -> None:
        self._lineage = lineage

    async def GetLineage(self, request: pb.GetLineageRequest, context: Context) -> pb.LineageGraph:
        """See the proto."""
        return messages.graph(await self._lineage.graph(current_principal(), request.name, live_only=request.live_only))

    async def ClaimUses(self, request: pb.ClaimUsesRequest, context: Context) -> Empty:
        """See the proto."""
        organization, owner, uid = messages.owner(request.owner)
        told = [messages.read_use(use) for use in request.uses]
        await self._lineage.claim(organization, owner, uid, request.generation, told)
        return Empty()

    async def ReportUses(self, request: pb.ReportUsesRequest, context: Context) -> Empty:
        """See the proto."""
        organization, owner, uid = messages.owner(request.owner)
        told = [messages.read_use(use) for use in request.uses]
        await self._lineage.report(organization, owner, uid, request.generation, told, gone=request.gone)
        return Empty()

    async def ListUseOwners(self, request: pb.ListUseOwnersRequest, context: Context) -> pb.ListUseOwnersResponse:
        """See the proto."""
        size, after = pages.page_size(request.page_size), pages.decode(request, str)
        found, following = await self._lineage.owners(request.prefix, size, after[0] if after else "")
        return pb.ListUseOwnersResponse(
            owners=[
                pb.UseOwner(organization=f"organizations/{organization}", name=name, uid=uid)
                for organization, name, uid in found
            ],
            next_page_token=pages.encode(request, following) if following else "",
        )
