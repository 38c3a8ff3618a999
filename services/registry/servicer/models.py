"""Model repositories and models over gRPC."""

from google.protobuf.empty_pb2 import Empty

from ekiben import names
from ekiben.registry.v1 import registry_pb2 as pb
from ekiben.registry.v1 import registry_pb2_grpc
from services.kernel import pages, updates
from services.kernel.identity import current_principal
from services.registry.catalog import Catalog
from services.registry.domain import Kind
from services.registry.messages import catalog as messages
from services.registry.servicer.context import Context

_CREATABLE = messages.WRITABLE | {"build_time"}


class Models(registry_pb2_grpc.ModelsServicer):
    """Serves ekiben.registry.v1.Models."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def GetModelRepository(self, request: pb.GetModelRepositoryRequest, context: Context) -> pb.ModelRepository:
        """See the proto."""
        name = names.ModelRepository.parse(request.name)
        found = await self._catalog.get_repository(current_principal(), Kind.MODEL, name.repository)
        return messages.model_repository(found)

    async def ListModelRepositories(
        self, request: pb.ListModelRepositoriesRequest, context: Context
    ) -> pb.ListModelRepositoriesResponse:
        """See the proto."""
        size, after = pages.page_size(request.page_size), pages.decode(request, int, int)
        page = await self._catalog.list_repositories(current_principal(), Kind.MODEL, request.filter, size, after)
        return pb.ListModelRepositoriesResponse(
            model_repositories=[messages.model_repository(found) for found in page.items],
            next_page_token=pages.encode(request, *page.next) if page.next else "",
            total_size=page.total,
            total_size_estimated=not page.counted,
        )

    async def CreateModelRepository(
        self, request: pb.CreateModelRepositoryRequest, context: Context
    ) -> pb.ModelRepository:
        """See the proto."""
        name = names.ModelRepository.parse(request.model_repository.name)
        draft = messages.repository_draft(request.model_repository)
        created = await self._catalog.create_repository(current_principal(), Kind.MODEL, name.repository, draft)
        return messages.model_repository(created)

    async def UpdateModelRepository(
        self, request: pb.UpdateModelRepositoryRequest, context: Context
    ) -> pb.ModelRepository:
        """See the proto."""
        sent = request.model_repository
        name = names.ModelRepository.parse(sent.name)
        fields = updates.paths(sent, request.update_mask, messages.REPOSITORY_WRITABLE)
        draft = messages.repository_draft(sent, fields)
        updated = await self._catalog.update_repository(
            current_principal(), Kind.MODEL, name.repository, draft, sent.etag
        )
        return messages.model_repository(updated)

    async def DeleteModelRepository(self, request: pb.DeleteModelRepositoryRequest, context: Context) -> Empty:
        """See the proto."""
        name = names.ModelRepository.parse(request.name)
        await self._catalog.delete_repository(
            current_principal(), Kind.MODEL, name.repository, request.etag, force=request.force
        )
        return Empty()

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.Model:
        """See the proto."""
        name = names.Model.parse(request.name)
        found = await self._catalog.get_version(current_principal(), Kind.MODEL, name.repository, name.model)
        return messages.model(found)

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """See the proto."""
        parent = names.ModelRepository.parse(request.parent, wildcard=True)
        repository = None if parent.repository == names.WILDCARD else parent.repository
        size, after = pages.page_size(request.page_size), pages.decode(request, int, int)
        page = await self._catalog.list_versions(
            current_principal(), Kind.MODEL, repository, request.filter, size, after
        )
        return pb.ListModelsResponse(
            models=[messages.model(found) for found in page.items],
            next_page_token=pages.encode(request, *page.next) if page.next else "",
            total_size=page.total,
            total_size_estimated=not page.counted,
        )

    async def CreateModel(self, request: pb.CreateModelRequest, context: Context) -> pb.Model:
        """See the proto."""
        parent = names.ModelRepository.parse(request.parent)
        name = names.Model(parent.repository, request.model_id)
        draft = messages.version_draft(request.model, _CREATABLE)
        created = await self._catalog.create_version(
            current_principal(), Kind.MODEL, name.repository, name.model, draft
        )
        return messages.model(created)

    async def UpdateModel(self, request: pb.UpdateModelRequest, context: Context) -> pb.Model:
        """See the proto."""
        name = names.Model.parse(request.model.name)
        fields = updates.paths(request.model, request.update_mask, messages.WRITABLE)
        draft = messages.version_draft(request.model, fields)
        updated = await self._catalog.update_version(
            current_principal(), Kind.MODEL, name.repository, name.model, draft, request.model.etag
        )
        return messages.model(updated)

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: Context) -> Empty:
        """See the proto."""
        name = names.Model.parse(request.name)
        await self._catalog.delete_version(
            current_principal(), Kind.MODEL, name.repository, name.model, request.etag, force=request.force
        )
        return Empty()
