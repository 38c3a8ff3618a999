"""Deleted versions over gRPC."""

from google.protobuf.empty_pb2 import Empty

from ekiben import names
from ekiben.registry.v1 import deletions_pb2 as pb
from ekiben.registry.v1 import deletions_pb2_grpc
from services.kernel import pages
from services.kernel.identity import current_principal
from services.registry import deletions as use_cases
from services.registry.messages import deletions as messages
from services.registry.servicer.context import Context


class Deletions(deletions_pb2_grpc.DeletionsServicer):
    """Serves ekiben.registry.v1.Deletions."""

    def __init__(self, deletions: use_cases.Deletions) -> None:
        self._deletions = deletions

    async def ListDeletedVersions(
        self, request: pb.ListDeletedVersionsRequest, context: Context
    ) -> pb.ListDeletedVersionsResponse:
        """See the proto."""
        size, after = pages.page_size(request.page_size), pages.decode(request, int, int)
        found, following = await self._deletions.list(current_principal(), request.parent, size, after)
        return pb.ListDeletedVersionsResponse(
            deleted_versions=[messages.deleted_version(one) for one in found],
            next_page_token=pages.encode(request, *following) if following else "",
        )

    async def UndeleteVersion(self, request: pb.UndeleteVersionRequest, context: Context) -> pb.DeletedVersion:
        """See the proto."""
        name = names.DeletedVersion.parse(request.name)
        return messages.deleted_version(await self._deletions.undelete(current_principal(), name.deleted_version))

    async def PurgeVersion(self, request: pb.PurgeVersionRequest, context: Context) -> Empty:
        """See the proto."""
        name = names.DeletedVersion.parse(request.name)
        await self._deletions.purge(current_principal(), name.deleted_version)
        return Empty()
