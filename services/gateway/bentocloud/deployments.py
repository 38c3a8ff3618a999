"""Deployments as 1.4 knows them."""

import asyncio
from collections.abc import Iterable

from google.protobuf.field_mask_pb2 import FieldMask

from ekiben import names
from ekiben.deployer.v1 import deployer_pb2 as deployer
from ekiben.errors import Aborted, NotFound, Unimplemented
from ekiben.registry.v1 import registry_pb2 as registry
from services.gateway.bentocloud import clusters
from services.gateway.bentocloud.api import Call
from services.gateway.bentocloud.deployment_replies import bentos_of, deployment_reply
from services.gateway.bentocloud.deployment_requests import deployment_of, keep
from services.gateway.bentocloud.repositories import BENTOS
from services.gateway.bentocloud.versions import with_repository
from services.gateway.bentocloud.wire import Reply, last, member, number, page

_ATTEMPTS = 5
_NO_CODESPACES = (
    "Codespaces (`bentoml code`) are not offered here yet. "
    "Use `bentoml serve` to develop and `bentoml deploy` to deploy."
)


async def get(call: Call) -> Reply:
    """GET /api/v2/deployments/{name}."""
    await clusters.check(call)
    request = deployer.GetDeploymentRequest(name=_name(call))
    return await _reply(call, await call(call.api.deployments.GetDeployment, request))


async def list_all(call: Call) -> Reply:
    """GET /api/v2/deployments: all, or those of the cluster that is named, unless `count` says how many; `total` counts
    all that match."""
    cluster = await clusters.check(call) if call.query("cluster") else ""
    query = call.request.rel_url.query
    start, count = number(query, "start", 0), number(query, "count", 0)
    words = " ".join(filter(None, (call.query("q"), call.query("search"))))
    listing = deployer.ListDeploymentsRequest(filter=words)
    listed = call.pages(call.api.deployments.ListDeployments, listing, "deployments")
    found = [each async for each in listed if cluster in ("", last(each.cluster))]
    shown = found[start : start + count if count else None]
    return page(await replies(call, shown), start=start, total=len(found))


async def create(call: Call) -> Reply:
    """POST /api/v2/deployments."""
    cluster = await clusters.check(call)
    body = await call.body()
    deployment = deployment_of(body, member(body, "name", str, ""))
    deployment.cluster = f"clusters/{cluster}"
    if deployment.dev:
        bento = await call(call.api.bentos.GetBento, registry.GetBentoRequest(name=deployment.template.bento))
        if bento.content.state == registry.Content.EXTERNAL:
            raise Unimplemented(_NO_CODESPACES, reason="CODESPACES_NOT_OFFERED")
    request = deployer.CreateDeploymentRequest(deployment=deployment)
    return await _reply(call, await call(call.api.deployments.CreateDeployment, request))


async def update(call: Call) -> Reply:
    """PUT /api/v2/deployments/{name}: what is wanted, as a whole; only labels may be left out, and `dev` stays."""
    await clusters.check(call)
    body = await call.body()
    deployment = deployment_of({**body, "dev": False}, call.path("deployment"))
    paths = ["template", "scaling", "access_authorization"]
    if body.get("labels") is not None:
        paths.append("labels")
    return await _reply(call, await replace(call, deployment, paths))


async def replace(call: Call, deployment: deployer.Deployment, paths: list[str]) -> deployer.Deployment:
    """Update a deployment as a client wants it, but for what it has no words for."""
    request = deployer.UpdateDeploymentRequest(deployment=deployment, update_mask=FieldMask(paths=paths))
    for attempt in range(_ATTEMPTS):
        current = await call(call.api.deployments.GetDeployment, deployer.GetDeploymentRequest(name=deployment.name))
        request.deployment.CopyFrom(deployment)
        request.deployment.etag = current.etag
        keep(current, request.deployment)
        try:
            return await call(call.api.deployments.UpdateDeployment, request)
        except Aborted:  # Somebody else changed it meanwhile: what is kept is another thing now.
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError


async def void_update(call: Call) -> Reply:
    """PUT /api/v2/deployments/{name}/void_update: an update that changes nothing, which starts what was terminated."""
    await clusters.check(call)
    name = _name(call)
    current = await call(call.api.deployments.GetDeployment, deployer.GetDeploymentRequest(name=name))
    request = deployer.UpdateDeploymentRequest(
        deployment=deployer.Deployment(name=name, template=current.template), update_mask=FieldMask(paths=["template"])
    )
    return await _reply(call, await call(call.api.deployments.UpdateDeployment, request))


async def terminate(call: Call) -> Reply:
    """POST /api/v2/deployments/{name}/terminate."""
    await clusters.check(call)
    request = deployer.TerminateDeploymentRequest(name=_name(call))
    return await _reply(call, await call(call.api.deployments.TerminateDeployment, request))


async def delete(call: Call) -> Reply:
    """DELETE /api/v2/deployments/{name}: what was deleted, in full."""
    await clusters.check(call)
    request = deployer.DeleteDeploymentRequest(name=_name(call))
    return await _reply(call, await call(call.api.deployments.DeleteDeployment, request))


async def files(call: Call) -> Reply:
    """Any method on /api/v2/deployments/{name}/files: the files of a codespace."""
    raise Unimplemented(_NO_CODESPACES, reason="CODESPACES_NOT_OFFERED")


async def replies(call: Call, deployments: Iterable[deployer.Deployment]) -> list[Reply]:
    """Deployments with their bentos and creators; each bento is read once."""
    shown = list(deployments)
    tags = sorted(bentos_of(shown))
    bentos = dict(zip(tags, await asyncio.gather(*(_bento(call, name) for name in tags)), strict=True))
    found = {name: bento for name, bento in bentos.items() if bento is not None}
    return [
        deployment_reply(
            deployment,
            creator=await call.user(deployment.creator),
            cluster=clusters.cluster_reply(deployer.Cluster(name=deployment.cluster or "clusters/default")),
            bentos=found,
        )
        for deployment in shown
    ]


async def _reply(call: Call, deployment: deployer.Deployment) -> Reply:
    return (await replies(call, [deployment]))[0]


async def _bento(call: Call, name: str) -> Reply | None:
    try:
        bento, repository = await asyncio.gather(
            BENTOS.get(call, name), BENTOS.get_repository(call, name.rsplit("/", 2)[0])
        )
    except NotFound:
        return None  # deleted since; the deployment runs on
    return with_repository(BENTOS, bento, repository, strategy=call.api.upload_strategy)


def _name(call: Call) -> str:
    return str(names.Deployment(call.path("deployment")))
