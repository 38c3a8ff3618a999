"""From what the client says of a deployment to the deployment that it wants. Pure functions."""

from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from ekiben import names
from ekiben.deployer.v1 import deployer_pb2 as deployer
from ekiben.errors import InvalidArgument
from services.gateway.bentocloud.wire import member, read_labels, required

Services = Mapping[str, deployer.ServiceTemplate]
Scalings = Mapping[str, deployer.Scaling]
_LARGEST_REPLICAS = 1 << 20


def deployment_of(body: Mapping[str, Any], name: str = "") -> deployer.Deployment:
    """The deployment of a create or an update body; without a name, the server makes one up."""
    deployment = deployer.Deployment(
        name=str(names.Deployment(name)) if name else "",
        template=template_of(body),
        scaling=scaling_of(member(body, "services", dict, {})),
        access_authorization=bool(member(body, "access_authorization", bool, False)),
        dev=bool(member(body, "dev", bool, False)),
    )
    if (labels := member(body, "labels", list)) is not None:
        deployment.labels.update(read_labels(labels))
    return deployment


def template_of(body: Mapping[str, Any]) -> deployer.Template:
    """What a revision fixes."""
    template = deployer.Template(
        bento=bento_name(required(body, "bento")),
        envs=envs_of(body),
        secrets=secrets_of(body),
        services=services_of(member(body, "services", dict, {})),
    )
    canary = member(body, "canary", dict)
    if canary is not None and member(canary, "versions", dict, {}):
        template.canary.CopyFrom(canary_of(canary))
    return template


def keep(current: deployer.Deployment, wanted: deployer.Deployment) -> None:
    """Give a deployment that replaces another what clients have no words for: each of their updates would lose it."""
    if wanted.template.bento == current.template.bento and current.template.HasField("image"):
        wanted.template.image.CopyFrom(current.template.image)
    wanted.template.model_delivery = current.template.model_delivery
    _keep_services(current.template.services, wanted.template.services)
    _keep_scaling(current.scaling, wanted.scaling)
    versions = current.template.canary.versions
    for name, version in wanted.template.canary.versions.items():
        if name in versions:
            _keep_services(versions[name].services, version.services)
            _keep_scaling(versions[name].scaling, version.scaling)


def _keep_services(current: Services, wanted: Services) -> None:
    for name, service in wanted.items():
        if name in current and current[name].HasField("pod"):
            service.pod.CopyFrom(current[name].pod)


def _keep_scaling(current: Scalings, wanted: Scalings) -> None:
    for name, scaling in wanted.items():
        if name in current and current[name].HasField("autoscaling"):
            scaling.autoscaling.CopyFrom(current[name].autoscaling)


def bento_name(tag: str) -> str:
    """The resource name for `name`, `name:latest` or `name:version`; the registry resolves `latest`."""
    repository, _, version = tag.partition(":")
    return str(names.Bento(repository, version or "latest"))


def services_of(services: Mapping[str, Any]) -> dict[str, deployer.ServiceTemplate]:
    """How each service is run."""
    return {name: _service(name, config) for name, config in services.items()}


def scaling_of(services: Mapping[str, Any]) -> dict[str, deployer.Scaling]:
    """Replicas by service; the client always fills in the largest number."""
    scalings = {}
    for name, config in services.items():
        given = member(_object(name, config), "scaling", dict)
        if given is None:
            continue
        scaling = deployer.Scaling()
        for field in ("min_replicas", "max_replicas"):
            if (value := member(given, field, int)) is not None:
                if not 0 <= value <= _LARGEST_REPLICAS:
                    raise InvalidArgument(
                        f"{field!r} of service {name!r} must be a number of replicas, not {value}.",
                        reason="FIELD_INVALID",
                    )
                setattr(scaling, field, value)
        if policy := member(given, "policy", dict):
            scaling.policy.CopyFrom(struct_of(policy))
        scalings[name] = scaling
    return scalings


def canary_of(canary: Mapping[str, Any]) -> deployer.Canary:
    """Named versions beside the main one."""
    versions = {}
    for name, version in member(canary, "versions", dict, {}).items():
        given = _object(name, version)
        services = member(given, "services", dict, {})
        versions[name] = deployer.CanaryVersion(
            bento=bento_name(required(given, "bento")),
            weight_percent=member(given, "weight", int, 0),
            envs=envs_of(given),
            secrets=secrets_of(given),
            services=services_of(services),
            scaling=scaling_of(services),
        )
    return deployer.Canary(
        route_type=member(canary, "route_type", str, ""),
        route_by=member(canary, "route_by", str, ""),
        versions=versions,
    )


def envs_of(body: Mapping[str, Any]) -> list[deployer.EnvVar]:
    """Environment variables of `[{"name": …, "value": …}]`; old clients say key for name."""
    envs = []
    for item in member(body, "envs", list, []):
        if item is None:
            continue
        given = _object("envs", item)
        name = required(given, "name" if "name" in given else "key")
        value = member(given, "value", (str, int, float, bool), "")
        envs.append(deployer.EnvVar(name=name, value=value if isinstance(value, str) else str(value)))
    return envs


def secrets_of(body: Mapping[str, Any]) -> list[str]:
    """Resource names of secrets."""
    return [str(names.Secret(secret)) for secret in member(body, "secrets", list, []) if isinstance(secret, str)]


def struct_of(value: Mapping[str, Any]) -> Struct:
    """Any JSON object as a Struct.

    Raises:
        InvalidArgument: nested too deeply.
    """
    try:
        return json_format.ParseDict(dict(value), Struct())
    except (json_format.ParseError, RecursionError) as error:
        raise InvalidArgument(f"The object cannot be kept: {error}.", reason="FIELD_INVALID") from error


def _service(name: str, config: Any) -> deployer.ServiceTemplate:
    given = _object(name, config)
    service = deployer.ServiceTemplate(
        instance_type=member(given, "instance_type", str, ""),
        envs=envs_of(given),
        deployment_strategy=member(given, "deployment_strategy", str, ""),
    )
    if (timeout_s := member(given, "cold_start_timeout", int)) is not None:
        service.cold_start_timeout.seconds = min(max(timeout_s, 0), 10**9)
    if overrides := member(given, "config_overrides", dict):
        service.config_overrides.CopyFrom(struct_of(overrides))
    if extras := member(given, "extras", dict):
        service.extras.CopyFrom(struct_of(extras))
    return service


def _object(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidArgument(f"{name!r} must be an object.", reason="FIELD_INVALID")
    return value
