"""What a service's pods have, from its instance type, its template and a client's extras. Pure."""

from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployer.v1.pods_pb2 import PodSettings
from services.deployer.domain import InstanceType, check_envs, check_metadata, whole
from services.deployer.quantities import quantity
from services.deployer.runtimes import Pod

LONGEST_GRACE_S = 86400


def pod_of(template: pb.ServiceTemplate, size: InstanceType | None) -> Pod:
    """What a service says of its pods wins over its instance type."""
    settings = PodSettings()
    if size is not None:
        settings.MergeFrom(size.pod)
    settings.MergeFrom(template.pod)
    patch = whole(json_format.MessageToDict(settings.patch))
    settings.ClearField("patch")
    return Pod(settings, _extra(template), patch)


def limits_of(settings: PodSettings, size: InstanceType | None) -> tuple[int, int]:
    """Thousandths of a core and bytes of memory that a replica cannot go beyond; 0 for no limit."""
    given = settings.resources
    cpu, memory = (size.cpu_millicores, size.memory_bytes) if size is not None else (0, 0)
    if "cpu" in given.limits:
        cpu = int(quantity(given.limits["cpu"]) * 1000)
    elif "cpu" in given.requests:
        cpu = 0
    if "memory" in given.limits:
        memory = int(quantity(given.limits["memory"]))
    elif "memory" in given.requests:
        memory = 0
    return cpu, memory


def _extra(template: pb.ServiceTemplate) -> dict[str, Any]:
    """The patch that a client's `extras` are. What is no mapping there is passed over: clients may send anything."""
    given = _mapping(whole(json_format.MessageToDict(template.extras)), "bento_function_overrides")
    metadata = {**_mapping(given, "extraPodMetadata")}
    if annotations := _mapping(given, "annotations"):
        metadata["annotations"] = {**annotations, **_mapping(metadata, "annotations")}
    patch = {"metadata": metadata, "spec": _mapping(given, "extraPodSpec")}
    return {key: value for key, value in patch.items() if value}


def _mapping(of: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = of.get(key)
    return found if isinstance(found, dict) else {}


def violations(path: str, settings: PodSettings) -> list[tuple[str, str]]:
    """What is wrong whatever the cluster. The rest it says itself."""
    found = check_metadata(path, labels=settings.labels, annotations=settings.annotations)
    found += check_envs(f"{path}.envs", (env.name for env in settings.envs))
    if settings.HasField("termination_grace") and not 1 <= settings.termination_grace.seconds <= LONGEST_GRACE_S:
        found.append((f"{path}.termination_grace", f"must be from 1 to {LONGEST_GRACE_S} seconds"))
    for index, one in enumerate(settings.mounts):
        here = f"{path}.mounts[{index}]"
        if not one.path.startswith("/") or ".." in one.path.split("/") or ":" in one.path:
            found.append((f"{here}.path", "must be an absolute path"))
        where_from = {"secret": one.secret, "config_map": one.config_map, "claim": one.claim}
        found += _one_of(here, **where_from, empty=one.HasField("empty"))
        if one.items and not (one.secret or one.config_map):
            found.append((f"{here}.items", "only a Secret or a ConfigMap has keys"))
    for index, source in enumerate(settings.env_from):
        found += _one_of(f"{path}.env_from[{index}]", secret=source.secret, config_map=source.config_map)
    for index, env in enumerate(settings.envs):
        sources = {"secret": env.secret, "config_map": env.config_map, "field": env.field, "resource": env.resource}
        found += _one_of(f"{path}.envs[{index}]", **sources)
    for kind in ("requests", "limits"):
        for name, amount in getattr(settings.resources, kind).items():
            try:
                quantity(amount)
            except ValueError as exc:
                found.append((f"{path}.resources.{kind}[{name}]", str(exc)))
    for index, claim in enumerate(settings.resources.claims):
        found += _one_of(f"{path}.resources.claims[{index}]", claim=claim.claim, template=claim.template)
    return found


def _one_of(path: str, **sources: object) -> list[tuple[str, str]]:
    if sum(map(bool, sources.values())) == 1:
        return []
    return [(path, f"must name one of {', '.join(sources)}, and only one")]
