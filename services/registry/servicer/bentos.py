"""Bento repositories and bentos over gRPC."""

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


class Bentos(registry_pb2_grpc.BentosServicer):
    """Serves ekiben.registry.v1.Bentos."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def GetBentoRepository(self, request: pb.GetBentoRepositoryRequest, context: Context) -> pb.BentoRepository:
        """See the proto."""
        name = names.BentoRepository.parse(request.name)
        found = await self._catalog.get_repository(current_principal(), Kind.BENTO, name.repository)
        return messages.bento_repository(found)

    async def ListBentoRepositories(
        self, request: pb.ListBentoRepositoriesRequest, context: Context
    ) -> pb.ListBentoRepositoriesResponse:
        """See the proto."""
        size, after = pages.page_size(request.page_size), pages.decode(request, int, int)
        page = await self._catalog.list_repositories(current_principal(), Kind.BENTO, request.filter, size, after)
        return pb.ListBentoRepositoriesResponse(
            bento_repositories=[messages.bento_repository(found) for found in page.items],
            next_page_token=pages.encode(request, *page.next) if page.next else "",
            total_size=page.total,
            total_size_estimated=not page.counted,
        )

    async def CreateBentoRepository(
        self, request: pb.CreateBentoRepositoryRequest, context: Context
    ) -> pb.BentoRepository:
        """See the proto."""
        name = names.BentoRepository.parse(request.bento_repository.name)
        draft = messages.repository_draft(request.bento_repository)
        created = await self._catalog.create_repository(current_principal(), Kind.BENTO, name.repository, draft)
        return messages.bento_repository(created)

    async def UpdateBentoRepository(
        self, request: pb.UpdateBentoRepositoryRequest, context: Context
    ) -> pb.BentoRepository:
        """See the proto."""
        sent = request.bento_repository
        name = names.BentoRepository.parse(sent.name)
        fields = updates.paths(sent, request.update_mask, messages.REPOSITORY_WRITABLE)
        draft = messages.repository_draft(sent, fields)
        updated = await self._catalog.update_repository(
            current_principal(), Kind.BENTO, name.repository, draft, sent.etag
        )
        return messages.bento_repository(updated)

    async def DeleteBentoRepository(self, request: pb.DeleteBentoRepositoryRequest, context: Context) -> Empty:
        """See the proto."""
        name = names.BentoRepository.parse(request.name)
        await self._catalog.delete_repository(
            current_principal(), Kind.BENTO, name.repository, request.etag, force=request.force
        )
        return Empty()

    async def GetBento(self, request: pb.GetBentoRequest, context: Context) -> pb.Bento:
        """See the proto."""
        name = names.Bento.parse(request.name)
        found = await self._catalog.get_version(current_principal(), Kind.BENTO, name.repository, name.bento)
        return messages.bento(found)

    async def ListBentos(self, request: pb.ListBentosRequest, context: Context) -> pb.ListBentosResponse:
        """See the proto."""
        parent = names.BentoRepository.parse(request.parent, wildcard=True)
        repository = None if parent.repository == names.WILDCARD else parent.repository
        size, after = pages.page_size(request.page_size), pages.decode(request, int, int)
        page = await self._catalog.list_versions(
            current_principal(), Kind.BENTO, repository, request.filter, size, after
        )
        return pb.ListBentosResponse(
            bentos=[messages.bento(found) for found in page.items],
            next_page_token=pages.encode(request, *page.next) if page.next else "",
            total_size=page.total,
            total_size_estimated=not page.counted,
        )

    async def CreateBento(self, request: pb.CreateBentoRequest, context: Context) -> pb.Bento:
        """See the proto."""
        parent = names.BentoRepository.parse(request.parent)
        name = names.Bento(parent.repository, request.bento_id)
        draft = messages.version_draft(request.bento, _CREATABLE)
        created = await self._catalog.create_version(
            current_principal(), Kind.BENTO, name.repository, name.bento, draft
        )
        return messages.bento(created)

    async def UpdateBento(self, request: pb.UpdateBentoRequest, context: Context) -> pb.Bento:
        """See the proto."""
        name = names.Bento.parse(request.bento.name)
        fields = updates.paths(request.bento, request.update_mask, messages.WRITABLE)
        draft = messages.version_draft(request.bento, fields)
        updated = await self._catalog.update_version(
            current_principal(), Kind.BENTO, name.repository, name.bento, draft, request.bento.etag
        )
        return messages.bento(updated)

    async def DeleteBento(self, request: pb.DeleteBentoRequest, context: Context) -> Empty:
        """See the proto."""
        name = names.Bento.parse(request.name)
        await self._catalog.delete_version(
            current_principal(), Kind.BENTO, name.repository, name.bento, request.etag, force=request.force
        )
        return Empty()
