"""Bento repositories and bentos; upload and download."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask

from ekiben import localstore, names, pages
from ekiben.content import check_digest, check_ready
from ekiben.errors import AlreadyExists, FailedPrecondition
from ekiben.registry.v1 import registry_pb2 as pb
from ekiben.registry.v1.registry_pb2_grpc import BentosStub
from ekiben.transfer import Progress, Transfer, no_progress


class Bentos:
    """Bento repositories, and the bentos (versions) in them."""

    def __init__(self, channel: grpc.aio.Channel, transfer: Transfer) -> None:
        self._stub, self._transfer = BentosStub(channel), transfer

    async def get(self, name: str) -> pb.Bento:
        """One bento; the id `latest` gives the newest that is uploaded."""
        return await self._stub.GetBento(pb.GetBentoRequest(name=name))

    def list(self, parent: str = "bentoRepositories/-", *, filter: str = "", limit: int = 0) -> AsyncIterator[pb.Bento]:
        """Bentos of a repository or of all, newest first."""
        request = pb.ListBentosRequest(parent=parent, filter=filter)
        return pages.items(self._stub.ListBentos, request, "bentos", limit=limit)

    async def create(self, name: str, bento: pb.Bento | None = None) -> pb.Bento:
        """Create a bento without content; a missing repository is created."""
        parsed = names.Bento.parse(name)
        request = pb.CreateBentoRequest(parent=str(parsed.parent), bento_id=parsed.bento, bento=bento)
        return await self._stub.CreateBento(request)

    async def update(self, bento: pb.Bento, paths: Sequence[str] = ()) -> pb.Bento:
        """Change description, labels or annotations: the `paths`, or what is populated."""
        mask = FieldMask(paths=paths) if paths else None
        return await self._stub.UpdateBento(pb.UpdateBentoRequest(bento=bento, update_mask=mask))

    async def delete(self, name: str, *, etag: str = "", force: bool = False) -> None:
        """Delete a bento; `Client.deletions` restores it for a while. With `force` also one that something uses."""
        await self._stub.DeleteBento(pb.DeleteBentoRequest(name=name, etag=etag, force=force))

    async def push(
        self,
        source: str | Path | localstore.Version,
        *,
        force: bool = False,
        labels: Mapping[str, str] | None = None,
        progress: Progress = no_progress,
        resume: bool = False,
    ) -> tuple[pb.Bento, bool]:
        """Upload a bento: a tag of the local BentoML store, a folder, a tar file, or what was read of one.

        The models that it names are not pushed with it. Returns the bento, and whether bytes had to be sent at all:
        one that is READY is left alone unless `force`.
        `resume` goes on with a push of the same bytes that did not end.

        Raises:
            DataLoss: the registry holds other bytes than were sent (CONTENT_DIFFERS).
            Aborted: another push of this version came first (CONTENT_EXISTS), or right after (CONTENT_REPLACED).
        """
        if not isinstance(source, localstore.Version):
            path = source if isinstance(source, Path) else localstore.folder("bentos", source)
            source = await asyncio.to_thread(localstore.read_bento, path)
        name = str(names.Bento(source.repository, source.version))
        wanted = pb.Bento(
            manifest=source.manifest,
            description=source.description,
            labels={**source.labels, **(labels or {})},
        )
        if source.build_time is not None:
            wanted.build_time.FromDatetime(source.build_time)
        try:
            bento = await self.create(name, wanted)
        except AlreadyExists:
            bento = await self.get(name)
            if bento.content.state == pb.Content.READY and not force:
                return bento, False
            changed = pb.Bento(
                name=name, manifest=wanted.manifest, description=wanted.description, labels=wanted.labels
            )
            bento = await self.update(changed)
        upload, digest = await self._transfer.upload(
            bento.name,
            source.archive,
            progress=progress,
            resume=resume,
            open_upload=bento.content.open_upload,
        )
        bento = await self.get(name)
        check_digest(bento.name, bento.content, upload, digest)
        return bento, True

    async def pull(
        self, name: str, into: Path | None = None, *, unpack: bool = True, progress: Progress = no_progress
    ) -> Path:
        """Download a bento to the new folder `into`, or, without `unpack`, to a tar file; returns where it is.

        Without `into` it goes to the local BentoML store; one that is there already is left alone.
        One that was killed is gone on with.
        """
        bento = await self.get(name)
        parsed = names.Bento.parse(bento.name)
        path = into or localstore.target("bentos", parsed.repository, parsed.bento)
        if into is None and (path / "bento.yaml").is_file():
            return path
        check_ready(bento.name, bento.content)
        try:
            await self._transfer.download(
                bento.name,
                path,
                digest=bento.content.digest,
                size_bytes=bento.content.size_bytes,
                unpack=unpack,
                work=None if into else localstore.work(),
                progress=progress,
            )
        except FailedPrecondition as error:
            if into is not None or error.reason != "TARGET_EXISTS" or not (path / "bento.yaml").is_file():
                raise
            return path  # another pull brought it meanwhile
        if into is None:
            localstore.mark_latest(path)
        return path

    async def get_repository(self, name: str) -> pb.BentoRepository:
        """One bento repository."""
        return await self._stub.GetBentoRepository(pb.GetBentoRepositoryRequest(name=name))

    def repositories(self, *, filter: str = "", limit: int = 0) -> AsyncIterator[pb.BentoRepository]:
        """Bento repositories, newest first."""
        request = pb.ListBentoRepositoriesRequest(filter=filter)
        return pages.items(self._stub.ListBentoRepositories, request, "bento_repositories", limit=limit)

    async def create_repository(self, repository: pb.BentoRepository) -> pb.BentoRepository:
        """Create a bento repository."""
        request = pb.CreateBentoRepositoryRequest(bento_repository=repository)
        return await self._stub.CreateBentoRepository(request)

    async def update_repository(self, repository: pb.BentoRepository, paths: Sequence[str] = ()) -> pb.BentoRepository:
        """Change description, labels or annotations: the `paths`, or what is populated."""
        mask = FieldMask(paths=paths) if paths else None
        request = pb.UpdateBentoRepositoryRequest(bento_repository=repository, update_mask=mask)
        return await self._stub.UpdateBentoRepository(request)

    async def delete_repository(self, name: str, *, force: bool = False, etag: str = "") -> None:
        """Delete a bento repository, which must be empty unless `force` is set."""
        request = pb.DeleteBentoRepositoryRequest(name=name, force=force, etag=etag)
        await self._stub.DeleteBentoRepository(request)
