"""Deployments as 1.0 and 1.1 know them: one target, an API server and its runners.

The API server is the bento's entry service, which is called like the repository for bentos of that time.
"""

from collections.abc import Mapping
from typing import Any

from ekiben import names
from ekiben.deployer.v1 import deployer_pb2 as deployer
from ekiben.errors import InvalidArgument
from services.gateway.bentocloud import deployments
from services.gateway.bentocloud.api import Call
from services.gateway.bentocloud.clusters import DEFAULT_CLUSTER
from services.gateway.bentocloud.deployment_requests import deployment_of
from services.gateway.bentocloud.wire import Reply, member, number, page, required

# The status words that came later, in those that a strict reader knows.
_OLD_STATUS = {"scaled-to-zero": "running"}


async def list_all(call: Call) -> Reply:
    """GET /api/v1/clusters/{cluster}/deployments, and of all clusters."""
    query = call.request.rel_url.query
    start, count = number(query, "start", 0), number(query, "count", 0)
    words = " ".join(filter(None, (call.query("q"), call.query("search"))))
    listing = deployer.ListDeploymentsRequest(filter=words)
    found = [each async for each in call.pages(call.api.deployments.ListDeployments, listing, "deployments")]
    shown = found[start : start + count if count else None]
    items = [old_reply(reply) for reply in await deployments.replies(call, shown)]
    return page(items, start=start, total=len(found))


async def get(call: Call) -> Reply:
    """GET …/deployments/{name}."""
    request = deployer.GetDeploymentRequest(name=_name(call))
    return await _reply(call, await call(call.api.deployments.GetDeployment, request))


async def create(call: Call) -> Reply:
    """POST /api/v1/clusters/{cluster}/deployments."""
    body = await call.body()
    deployment = deployment_of(new_body(body), required(body, "name"))
    deployment.cluster = str(names.Cluster(call.path("cluster")))
    if call.path("cluster") != DEFAULT_CLUSTER:
        deployment.kubernetes_namespace = member(body, "kube_namespace", str, "")
    request = deployer.CreateDeploymentRequest(deployment=deployment)
    return await _reply(call, await call(call.api.deployments.CreateDeployment, request))


async def update(call: Call) -> Reply:
    """PATCH …/deployments/{name}."""
    body = await call.body()
    paths = ["template", "scaling"] + (["labels"] if body.get("labels") is not None else [])
    return await _reply(
        call, await deployments.replace(call, deployment_of(new_body(body), call.path("deployment")), paths)
    )


async def terminate(call: Call) -> Reply:
    """POST …/deployments/{name}/terminate."""
    request = deployer.TerminateDeploymentRequest(name=_name(call))
    return await _reply(call, await call(call.api.deployments.TerminateDeployment, request))


async def delete(call: Call) -> Reply:
    """DELETE …/deployments/{name}."""
    request = deployer.DeleteDeploymentRequest(name=_name(call))
    return await _reply(call, await call(call.api.deployments.DeleteDeployment, request))


def new_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """An old request in the words of 1.4.

    Raises:
        InvalidArgument: not exactly one target.
    """
    targets = member(body, "targets", list, [])
    if len(targets) != 1 or not isinstance(targets[0], dict):
        raise InvalidArgument("A deployment has exactly one target.", reason="FIELD_INVALID")
    target = targets[0]
    repository = required(target, "bento_repository")
    config = member(target, "config", dict, {})
    services = {repository: _service(config)}
    for runner, runner_config in member(config, "runners", dict, {}).items():
        services[runner] = _service(runner_config if isinstance(runner_config, dict) else {})
    return {
        "bento": f"{repository}:{required(target, 'bento')}",
        "services": {name: service for name, service in services.items() if service},
        "labels": body.get("labels"),
    }


def old_reply(reply: Reply) -> Reply:
    """A reply for 1.4 in the words of 1.0 and 1.1."""
    revision = reply["latest_revision"]
    if revision is not None:
        # A target whose bento was deleted cannot be said in this protocol.
        targets = [_old_target(target) for target in revision["targets"] if target["bento"] is not None]
        revision = {**revision, "targets": targets[:1]}
    status = reply["status"]
    old = {key: value for key, value in reply.items() if key != "manifest"}
    return {**old, "status": _OLD_STATUS.get(status, status), "latest_revision": revision, "mode": "deployment"}


def _old_target(target: Reply) -> Reply:
    bento, config = target["bento"], target["config"]
    entry = bento["manifest"]["entry_service"]
    services = config["services"]
    runners = {name: _old_config(service) for name, service in services.items() if name != entry}
    common = {key: target[key] for key in target if key not in ("config", "kube_resource_uid", "kube_resource_version")}
    return {
        **common,
        "type": "stable",
        "bento": {**bento, "models": []},
        "config": {
            **_old_config(services.get(entry, {})),
            "kubeResourceUid": "",
            "kubeResourceVersion": "",
            "enable_ingress": True,
            "runners": runners or None,
        },
        "canary_rules": None,
    }


def _old_config(service: Mapping[str, Any]) -> dict[str, Any]:
    scaling = service.get("scaling") or {"min_replicas": 1, "max_replicas": 1}
    envs = service.get("envs") or []
    return {
        "resources": {},
        "resource_instance": service.get("instance_type"),
        "hpa_conf": {"min_replicas": scaling["min_replicas"], "max_replicas": scaling["max_replicas"]},
        "envs": [{"key": env["name"], "value": env["value"]} for env in envs] or None,
        "deployment_strategy": service.get("deployment_strategy"),
    }


def _service(config: Mapping[str, Any]) -> dict[str, Any]:
    scaling = member(config, "hpa_conf", dict, {})
    service = {
        "instance_type": config.get("resource_instance"),
        "scaling": {key: scaling[key] for key in ("min_replicas", "max_replicas") if scaling.get(key) is not None},
        "envs": config.get("envs"),
        "deployment_strategy": config.get("deployment_strategy"),
    }
    return {key: value for key, value in service.items() if value}


async def _reply(call: Call, deployment: deployer.Deployment) -> Reply:
    return old_reply((await deployments.replies(call, [deployment]))[0])


def _name(call: Call) -> str:
    return str(names.Deployment(call.path("deployment")))
