"""From a deployment to what the client reads of it. Pure functions."""

from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from ekiben.deployer.v1 import deployer_pb2 as deployer
from services.gateway.bentocloud.wire import KUBE_NAMESPACE, Reply, last, resource

_STATUS = {
    deployer.Deployment.DEPLOYING: "deploying",
    deployer.Deployment.BUILDING: "image-building",
    deployer.Deployment.RUNNING: "running",
    deployer.Deployment.UNHEALTHY: "unhealthy",
    deployer.Deployment.FAILED: "failed",
    deployer.Deployment.TERMINATING: "terminating",
    deployer.Deployment.TERMINATED: "terminated",
    deployer.Deployment.SCALED_TO_ZERO: "scaled-to-zero",
}


def status_of(deployment: deployer.Deployment) -> str:
    """The client's word for a deployment's state."""
    if deployment.state == deployer.Deployment.FAILED and any(
        condition.type == "Built" and condition.status == deployer.Condition.FALSE
        for condition in deployment.conditions
    ):
        return "image-build-failed"
    return _STATUS.get(deployment.state, "unknown")


def deployment_reply(
    deployment: deployer.Deployment, *, creator: Reply, cluster: Reply, bentos: Mapping[str, Reply]
) -> Reply:
    """A deployment of 1.4.

    Args:
        creator: the user reply of who made it.
        cluster: the cluster reply of where it runs.
        bentos: by resource name, the bento replies with their repositories; one that is gone may be missing.
    """
    name = last(deployment.name)
    status = status_of(deployment)
    base = resource(
        "deployment",
        name,
        deployment.uid,
        created=deployment.create_time,
        updated=deployment.update_time,
        labels=deployment.labels,
    )
    return {
        **base,
        "status": status,
        "kube_namespace": deployment.kubernetes_namespace or KUBE_NAMESPACE,
        "creator": creator,
        "cluster": cluster,
        "latest_revision": _revision(deployment, creator, bentos) if deployment.latest_revision else None,
        "manifest": {"dev": deployment.dev, "routing": _routing(deployment.template)},
        # The client takes anything but exactly one URL for "not ready".
        "urls": list(deployment.urls[:1]),
    }


def bentos_of(deployments: Iterable[deployer.Deployment]) -> set[str]:
    """Resource names of every bento that the deployments' targets run."""
    found = set()
    for deployment in deployments:
        found.add(deployment.template.bento)
        found.update(version.bento for version in deployment.template.canary.versions.values())
    return found - {""}


def _revision(deployment: deployer.Deployment, creator: Reply, bentos: Mapping[str, Reply]) -> Reply:
    template, number = deployment.template, last(deployment.latest_revision)
    main = {
        "access_authorization": deployment.access_authorization,
        "envs": _envs(template.envs),
        "labels": None,
        "secrets": [last(secret) for secret in template.secrets],
        "services": services_reply(template.services, deployment.scaling),
        "canary": None,
    }
    targets = [_target(deployment, "main", template.bento, main, creator, bentos)]
    for name, version in sorted(template.canary.versions.items()):
        config = {
            "access_authorization": deployment.access_authorization,
            "envs": _envs(version.envs),
            "labels": None,
            "secrets": [last(secret) for secret in version.secrets],
            "services": services_reply(version.services, version.scaling),
            "canary": None,
        }
        targets.append(_target(deployment, name, version.bento, config, creator, bentos))
    return {
        **resource("deployment_revision", number, f"{deployment.uid}-{number}", created=deployment.update_time),
        "creator": creator,
        "status": "active" if deployment.serving_revision == deployment.latest_revision else "inactive",
        "targets": targets,
    }


def _target(
    deployment: deployer.Deployment, name: str, bento: str, config: Reply, creator: Reply, bentos: Mapping[str, Reply]
) -> Reply:
    return {
        **resource("deployment", name, f"{deployment.uid}-{name}", created=deployment.update_time),
        "creator": creator,
        "config": config,
        "bento": bentos.get(bento),
        "kube_resource_uid": "",
        "kube_resource_version": "",
    }


def services_reply(
    services: Mapping[str, deployer.ServiceTemplate], scaling: Mapping[str, deployer.Scaling]
) -> dict[str, Any]:
    """How each service is run, as it was sent."""
    return {
        name: _service(services[name] if name in services else deployer.ServiceTemplate(), scaling.get(name))
        for name in sorted({*services, *scaling})
    }


def _service(service: deployer.ServiceTemplate, scaling: deployer.Scaling | None) -> dict[str, Any]:
    return {
        "instance_type": service.instance_type or None,
        "scaling": _scaling(scaling or deployer.Scaling()),
        "envs": _envs(service.envs),
        "deployment_strategy": service.deployment_strategy or None,
        "extras": plain(service.extras) if service.HasField("extras") else None,
        "cold_start_timeout": service.cold_start_timeout.seconds if service.HasField("cold_start_timeout") else None,
        "config_overrides": plain(service.config_overrides),
    }


def _scaling(scaling: deployer.Scaling) -> dict[str, Any]:
    smallest = scaling.min_replicas if scaling.HasField("min_replicas") else 1
    return {
        "min_replicas": smallest,
        "max_replicas": scaling.max_replicas if scaling.HasField("max_replicas") else max(smallest, 1),
        "policy": plain(scaling.policy) if scaling.HasField("policy") else None,
    }


def _envs(envs: Iterable[deployer.EnvVar]) -> list[dict[str, str]]:
    return [{"name": env.name, "value": env.value} for env in envs]


def _routing(template: deployer.Template) -> dict[str, Any] | None:
    if not template.canary.versions:
        return None
    return {
        "route_type": template.canary.route_type or None,
        "route_by": template.canary.route_by or None,
        "weights": {name: version.weight_percent for name, version in sorted(template.canary.versions.items())},
    }


def plain(struct: Struct) -> dict[str, Any]:
    """A Struct as the JSON object that it was; whole numbers are integers again."""
    value: dict[str, Any] = _whole(json_format.MessageToDict(struct))
    return value


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
