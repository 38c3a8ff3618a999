"""Every path of the wire protocol. All lie at the root of the host, and none redirects: clients follow nothing."""

import json
from collections.abc import Awaitable, Callable, Iterator

from aiohttp import web

from services.gateway.bentocloud import (
    api_tokens,
    auth,
    clusters,
    deployments,
    old_deployments,
    pods,
    repositories,
    secrets,
    uploads,
    versions,
)
from services.gateway.bentocloud.api import Api, Call, Handler
from services.gateway.bentocloud.repositories import BENTOS, MODELS, Kind
from services.gateway.responses import short_error

# The action after a version's path, and what does it.
_ACTIONS = {
    "presign_upload_url": uploads.presign,
    "presign_download_url": uploads.presign_download,
    "start_upload": uploads.start,
    "finish_upload": uploads.finish,
    "start_multipart_upload": uploads.start_multipart,
    "presign_multipart_upload_url": uploads.presign_part,
    "complete_multipart_upload": uploads.complete_multipart,
}


def routes(api: Api) -> list[web.RouteDef]:
    """The protocol, for an application."""
    return [web.route(method, path, _answering(api, handler)) for method, path, handler in _paths()]


def _paths() -> Iterator[tuple[str, str, Handler]]:
    yield "GET", "/api/v1/auth/current", auth.current
    yield "GET", "/api/v1/auth/code", auth.code
    yield "GET", "/api/v1/auth/token", auth.token
    yield "GET", "/api/v1/current_org", auth.current_organization
    for kind in (MODELS, BENTOS):
        yield from _version_paths(kind)
    yield "GET", "/api/v1/clusters", clusters.list_all
    yield "GET", "/api/v1/clusters/{cluster}", clusters.get
    yield "GET", "/api/v1/instance_types", clusters.list_instance_types
    yield "GET", "/api/v1/org_secrets", secrets.list_all
    yield "POST", "/api/v1/org_secrets", secrets.create
    yield "GET", "/api/v1/org_secrets/{secret}", secrets.get
    yield "PATCH", "/api/v1/org_secrets/{secret}", secrets.update
    yield "DELETE", "/api/v1/org_secrets/{secret}", secrets.delete
    yield "GET", "/api/v1/api_tokens", api_tokens.list_all
    yield "POST", "/api/v1/api_tokens", api_tokens.create
    yield "GET", "/api/v1/api_tokens/{token}", api_tokens.get
    yield "DELETE", "/api/v1/api_tokens/{token}", api_tokens.delete
    yield "GET", "/api/v2/deployments", deployments.list_all
    yield "POST", "/api/v2/deployments", deployments.create
    yield "GET", "/api/v2/deployments/{deployment}", deployments.get
    yield "PUT", "/api/v2/deployments/{deployment}", deployments.update
    yield "DELETE", "/api/v2/deployments/{deployment}", deployments.delete
    yield "PUT", "/api/v2/deployments/{deployment}/void_update", deployments.void_update
    yield "POST", "/api/v2/deployments/{deployment}/terminate", deployments.terminate
    yield "*", "/api/v2/deployments/{deployment}/files", deployments.files
    old = "/api/v1/clusters/{cluster}/namespaces/{namespace}/deployments/{deployment}"
    yield "GET", "/api/v1/deployments", old_deployments.list_all
    yield "GET", "/api/v1/clusters/{cluster}/deployments", old_deployments.list_all
    yield "POST", "/api/v1/clusters/{cluster}/deployments", old_deployments.create
    yield "GET", old, old_deployments.get
    yield "PATCH", old, old_deployments.update
    yield "DELETE", old, old_deployments.delete
    yield "POST", old + "/terminate", old_deployments.terminate
    yield "GET", "/ws/v1/clusters/{cluster}/pods", pods.builder_pods
    yield "GET", "/ws/v1/clusters/{cluster}/tail", pods.tail
    yield "GET", "/ws/v2/deployments/{deployment}/pods", pods.deployment_pods


def _version_paths(kind: Kind) -> Iterator[tuple[str, str, Handler]]:
    root = f"/api/v1/{kind.word}_repositories"
    every = f"{root}/{{repository}}/{kind.word}s"
    one = f"{every}/{{version}}"
    yield "GET", f"/api/v1/{kind.word}s", _of(kind, versions.list_all)
    yield "GET", root, _of(kind, repositories.list_all)
    yield "POST", root, _of(kind, repositories.create)
    yield "GET", root + "/{repository}", _of(kind, repositories.get)
    yield "GET", every, _of(kind, versions.list_of_repository)
    yield "POST", every, _of(kind, versions.create)
    yield "GET", one, _of(kind, versions.get)
    yield "PATCH", one, _of(kind, versions.update)
    for action, handler in _ACTIONS.items():
        yield "PATCH", f"{one}/{action}", _of(kind, handler)
    yield "PUT", one + "/upload", _of(kind, uploads.receive)
    yield "GET", one + "/download", _of(kind, uploads.send)


def _of(kind: Kind, handler: Callable[[Call, Kind], object]) -> Handler:
    def bound(call: Call) -> object:
        return handler(call, kind)

    return bound  # type: ignore[return-value]


def _answering(api: Api, handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            reply = await handler(Call(api, request))
        except Exception as error:
            return short_error(request, error)
        if isinstance(reply, web.StreamResponse):
            return reply
        body = json.dumps(reply, ensure_ascii=False).encode()
        return web.Response(body=body, content_type="application/json")

    return answer
