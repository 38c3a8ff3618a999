"""Model and bento repositories, and what the two kinds of version have in common."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from ekiben import names
from ekiben.registry.v1 import registry_pb2 as registry
from services.gateway.bentocloud.api import Api, Call
from services.gateway.bentocloud.manifests import bento_manifest, model_manifest
from services.gateway.bentocloud.wire import Reply, last, member, page, required, resource

Version = registry.Model | registry.Bento
Repository = registry.ModelRepository | registry.BentoRepository


@dataclass(frozen=True)
class Kind:
    """Models or bentos: the same protocol under two names."""

    word: str
    """`model` or `bento`."""

    def repository_name(self, repository: str) -> str:
        """The resource name of a repository."""
        return str(names.ModelRepository(repository) if self.word == "model" else names.BentoRepository(repository))

    def version_name(self, repository: str, version: str) -> str:
        """The resource name of a version."""
        return str(names.Model(repository, version) if self.word == "model" else names.Bento(repository, version))

    async def get_repository(self, call: Call, name: str) -> Repository:
        """One repository."""
        if self.word == "model":
            return await call(call.api.models.GetModelRepository, registry.GetModelRepositoryRequest(name=name))
        return await call(call.api.bentos.GetBentoRepository, registry.GetBentoRepositoryRequest(name=name))

    async def create_repository(self, call: Call, name: str, description: str) -> Repository:
        """A new repository."""
        if self.word == "model":
            models = registry.ModelRepository(name=name, description=description)
            return await call(
                call.api.models.CreateModelRepository, registry.CreateModelRepositoryRequest(model_repository=models)
            )
        bentos = registry.BentoRepository(name=name, description=description)
        return await call(
            call.api.bentos.CreateBentoRepository, registry.CreateBentoRepositoryRequest(bento_repository=bentos)
        )

    def repositories(self, call: Call) -> AsyncIterator[Repository]:
        """Every repository, newest first."""
        if self.word == "model":
            listing = registry.ListModelRepositoriesRequest()
            return call.pages(call.api.models.ListModelRepositories, listing, "model_repositories")
        return call.pages(
            call.api.bentos.ListBentoRepositories, registry.ListBentoRepositoriesRequest(), "bento_repositories"
        )

    async def get(self, call: Call, name: str) -> Version:
        """One version."""
        if self.word == "model":
            return await call(call.api.models.GetModel, registry.GetModelRequest(name=name))
        return await call(call.api.bentos.GetBento, registry.GetBentoRequest(name=name))

    def versions(self, call: Call, parent: str, filter_: str = "", page_size: int = 0) -> AsyncIterator[Version]:
        """Every version of a repository, or of all with `…/-`, newest first."""
        api: Api = call.api
        listing: Any
        if self.word == "model":
            listing = registry.ListModelsRequest(parent=parent, filter=filter_, page_size=page_size)
            return call.pages(api.models.ListModels, listing, "models")
        listing = registry.ListBentosRequest(parent=parent, filter=filter_, page_size=page_size)
        return call.pages(api.bentos.ListBentos, listing, "bentos")

    def manifest(self, version: Version) -> dict[str, Any]:
        """The manifest that a client is given."""
        if self.word == "model":
            return model_manifest(version.manifest)
        _, repository, _, id_ = version.name.split("/")
        return bento_manifest(version.manifest, repository, id_)


MODELS, BENTOS = Kind("model"), Kind("bento")


async def get(call: Call, kind: Kind) -> Reply:
    """GET /api/v1/{kind}_repositories/{repository}."""
    return repository_reply(kind, await kind.get_repository(call, kind.repository_name(call.path("repository"))))


async def create(call: Call, kind: Kind) -> Reply:
    """POST /api/v1/{kind}_repositories."""
    body = await call.body()
    name = kind.repository_name(required(body, "name"))
    return repository_reply(kind, await kind.create_repository(call, name, member(body, "description", str, "")))


async def list_all(call: Call, kind: Kind) -> Reply:
    """GET /api/v1/{kind}_repositories."""
    return page([repository_reply(kind, repository) async for repository in kind.repositories(call)])


def repository_reply(kind: Kind, repository: Repository) -> Reply:
    """A repository, without its latest version: nobody reads that, and an old client may crash over a new manifest."""
    base = resource(
        f"{kind.word}_repository",
        last(repository.name),
        repository.uid,
        created=repository.create_time,
        updated=repository.update_time,
        labels=repository.labels,
    )
    return {**base, "description": repository.description, f"latest_{kind.word}": None}
