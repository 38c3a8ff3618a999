"""Model repositories and models; upload and download."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask

from ekiben import localstore, names, pages
from ekiben.content import check_digest, check_ready
from ekiben.errors import AlreadyExists, FailedPrecondition
from ekiben.registry.v1 import registry_pb2 as pb
from ekiben.registry.v1.registry_pb2_grpc import ModelsStub
from ekiben.transfer import Progress, Transfer, no_progress


class Models:
    """Model repositories, and the models (versions) in them."""

    def __init__(self, channel: grpc.aio.Channel, transfer: Transfer) -> None:
        self._stub, self._transfer = ModelsStub(channel), transfer

    async def get(self, name: str) -> pb.Model:
        """One model; the id `latest` gives the newest that is uploaded."""
        return await self._stub.GetModel(pb.GetModelRequest(name=name))

    def list(self, parent: str = "modelRepositories/-", *, filter: str = "", limit: int = 0) -> AsyncIterator[pb.Model]:
        """Models of a repository or of all, newest first."""
        request = pb.ListModelsRequest(parent=parent, filter=filter)
        return pages.items(self._stub.ListModels, request, "models", limit=limit)

    async def create(self, name: str, model: pb.Model | None = None) -> pb.Model:
        """Create a model without content; a missing repository is created."""
        parsed = names.Model.parse(name)
        request = pb.CreateModelRequest(parent=str(parsed.parent), model_id=parsed.model, model=model)
        return await self._stub.CreateModel(request)

    async def update(self, model: pb.Model, paths: Sequence[str] = ()) -> pb.Model:
        """Change description, labels or annotations: the `paths`, or what is populated."""
        mask = FieldMask(paths=paths) if paths else None
        return await self._stub.UpdateModel(pb.UpdateModelRequest(model=model, update_mask=mask))

    async def delete(self, name: str, *, etag: str = "", force: bool = False) -> None:
        """Delete a model; `Client.deletions` restores it for a while. With `force` also one that something uses."""
        await self._stub.DeleteModel(pb.DeleteModelRequest(name=name, etag=etag, force=force))

    async def push(
        self,
        source: str | Path | localstore.Version,
        *,
        force: bool = False,
        labels: Mapping[str, str] | None = None,
        progress: Progress = no_progress,
        resume: bool = False,
    ) -> tuple[pb.Model, bool]:
        """Upload a model: a tag of the local BentoML store, a folder, a tar file, or what was read of one.

        Returns the model, and whether bytes had to be sent at all: one that is READY is left alone unless `force`.
        `resume` goes on with a push of the same bytes that did not end.

        Raises:
            DataLoss: the registry holds other bytes than were sent (CONTENT_DIFFERS).
            Aborted: another push of this version came first (CONTENT_EXISTS), or right after (CONTENT_REPLACED).
        """
        if not isinstance(source, localstore.Version):
            path = source if isinstance(source, Path) else localstore.folder("models", source)
            source = await asyncio.to_thread(localstore.read_model, path)
        name = str(names.Model(source.repository, source.version))
        wanted = pb.Model(manifest=source.manifest, labels={**source.labels, **(labels or {})})
        if source.build_time is not None:
            wanted.build_time.FromDatetime(source.build_time)
        try:
            model = await self.create(name, wanted)
        except AlreadyExists:
            model = await self.get(name)
            if model.content.state == pb.Content.READY and not force:
                return model, False
        upload, digest = await self._transfer.upload(
            model.name,
            source.archive,
            progress=progress,
            resume=resume,
            open_upload=model.content.open_upload,
        )
        model = await self.get(name)
        check_digest(model.name, model.content, upload, digest)
        return model, True

    async def pull(
        self, name: str, into: Path | None = None, *, unpack: bool = True, progress: Progress = no_progress
    ) -> Path:
        """Download a model to the new folder `into`, or, without `unpack`, to a tar file; returns where it is.

        Without `into` it goes to the local BentoML store; one that is there already is left alone.
        One that was killed is gone on with.
        """
        model = await self.get(name)
        parsed = names.Model.parse(model.name)
        path = into or localstore.target("models", parsed.repository, parsed.model)
        if into is None and (path / "model.yaml").is_file():
            return path
        check_ready(model.name, model.content)
        try:
            await self._transfer.download(
                model.name,
                path,
                digest=model.content.digest,
                size_bytes=model.content.size_bytes,
                unpack=unpack,
                work=None if into else localstore.work(),
                progress=progress,
            )
        except FailedPrecondition as error:
            if into is not None or error.reason != "TARGET_EXISTS" or not (path / "model.yaml").is_file():
                raise
            return path  # another pull brought it meanwhile
        if into is None:
            localstore.mark_latest(path)
        return path

    async def get_repository(self, name: str) -> pb.ModelRepository:
        """One model repository."""
        return await self._stub.GetModelRepository(pb.GetModelRepositoryRequest(name=name))

    def repositories(self, *, filter: str = "", limit: int = 0) -> AsyncIterator[pb.ModelRepository]:
        """Model repositories, newest first."""
        request = pb.ListModelRepositoriesRequest(filter=filter)
        return pages.items(self._stub.ListModelRepositories, request, "model_repositories", limit=limit)

    async def create_repository(self, repository: pb.ModelRepository) -> pb.ModelRepository:
        """Create a model repository."""
        request = pb.CreateModelRepositoryRequest(model_repository=repository)
        return await self._stub.CreateModelRepository(request)

    async def update_repository(self, repository: pb.ModelRepository, paths: Sequence[str] = ()) -> pb.ModelRepository:
        """Change description, labels or annotations: the `paths`, or what is populated."""
        mask = FieldMask(paths=paths) if paths else None
        request = pb.UpdateModelRepositoryRequest(model_repository=repository, update_mask=mask)
        return await self._stub.UpdateModelRepository(request)

    async def delete_repository(self, name: str, *, force: bool = False, etag: str = "") -> None:
        """Delete a model repository, which must be empty unless `force` is set."""
        request = pb.DeleteModelRepositoryRequest(name=name, force=force, etag=etag)
        await self._stub.DeleteModelRepository(request)
