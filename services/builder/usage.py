"""Who uses an image or an environment: deployments tell the registry from which builds they run."""

from typing import TYPE_CHECKING

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.registry.v1 import lineage_pb2
from services.builder.domain import Image
from services.kernel.identity import Principal
from services.kernel.peers import on_behalf_of

if TYPE_CHECKING:
    from ekiben.registry.v1 import lineage_pb2_grpc
    from services.builder.store import Store

_MOST_BUILDS = 100
"""Of one image; who forces more builds of one bento than that deploys the last."""


class Usage:
    """Asks the registry's lineage."""

    def __init__(self, store: "Store", lineage: "lineage_pb2_grpc.LineageAsyncStub") -> None:
        self._store = store
        self._lineage = lineage

    async def users(self, image: Image) -> list[str]:
        """Revisions of deployments that may still run from the image.

        Raises:
            Unavailable: the registry cannot be asked now.
        """
        found: set[str] = set()
        for build in await self._store.builds_of_image(image.organization, image.id, _MOST_BUILDS):
            found |= await self._users_of(image.organization, build)
        return sorted(found)

    async def runs_from(self, environment: str) -> bool:
        """Whether replicas may run from an environment of this folder, by its digest.

        Raises:
            Unavailable: the registry cannot be asked now.
        """
        for organization, build in await self._store.builds_of_environment(environment):
            if await self._users_of(organization, build):
                return True
        return False

    async def _users_of(self, organization: str, build: str) -> set[str]:
        with on_behalf_of(Principal("services/builder", organization, Role.ROLE_VIEWER)):
            request = lineage_pb2.GetLineageRequest(name=f"builds/{build}", live_only=True)
            graph = await self._lineage.GetLineage(request)
        return {use.consumer for use in graph.uses if use.resource == f"builds/{build}"}
