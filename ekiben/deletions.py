"""What was deleted and can be restored."""

from collections.abc import AsyncIterator

import grpc.aio

from ekiben import pages
from ekiben.errors import NotFound
from ekiben.registry.v1 import deletions_pb2 as pb
from ekiben.registry.v1.deletions_pb2_grpc import DeletionsStub


class Deletions:
    """Deleted models and bentos, until their grace period ends."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = DeletionsStub(channel)

    def list(self, parent: str = "", *, limit: int = 0) -> AsyncIterator[pb.DeletedVersion]:
        """Deleted versions, deleted last first: of a repository, of one name, or all."""
        return pages.items(
            self._stub.ListDeletedVersions,
            pb.ListDeletedVersionsRequest(parent=parent),
            "deleted_versions",
            limit=limit,
        )

    async def find(self, name: str) -> pb.DeletedVersion:
        """The version that was deleted last of those that had the resource name `name`.

        Raises:
            NotFound: there is none (DELETED_VERSION_NOT_FOUND).
        """
        async for found in self.list(name, limit=1):
            return found
        raise NotFound(
            f"No deleted version had the name {name}, or its grace period is over.",
            reason="DELETED_VERSION_NOT_FOUND",
            resource=name,
        )

    async def undelete(self, name: str) -> pb.DeletedVersion:
        """Restore a version, given as `deletedVersions/{uid}`, under the name that it had."""
        return await self._stub.UndeleteVersion(pb.UndeleteVersionRequest(name=name))

    async def purge(self, name: str) -> None:
        """Delete a deleted version for good; for admins."""
        await self._stub.PurgeVersion(pb.PurgeVersionRequest(name=name))
