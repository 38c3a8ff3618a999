"""What a deployment says of its pods: where they run and with what, and its patch, which has the last word. Pure.

Source: the Kubernetes API of 1.30 and later; kubeedge.io/docs, "Node labels and taints" (the role `edge`).
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from google.protobuf import json_format

from ekiben.deployer.v1 import pods_pb2
from ekiben.errors import InvalidArgument
from services.deployer.domain import reserved, whole
from services.deployer.runtimes import SetSpec
from services.deployer.runtimes.kubernetes.names import CONTAINER, INSTALLATION, PREFIX, SET, Object, Where
from services.deployer.runtimes.kubernetes.strategic import merged

EDGE = "node-role.kubernetes.io/edge"
_AWAY = ("node.kubernetes.io/unreachable", "node.kubernetes.io/not-ready")
USABLE = f"{PREFIX}/usable"
"""Label by which a Secret, ConfigMap, claim or service account says that deployments may use it."""


def placed(spec: SetSpec, where: Where, template: Object) -> Object:
    """The pod template with all that is said of it. One of which nothing is said stays as it is.

    Raises:
        InvalidArgument: the patch is none (PATCH_INVALID), or takes away what the platform needs (PATCH_REFUSED).
    """
    settings, ours = spec.pod.settings, {**template["metadata"]}
    _metadata(settings, template["metadata"])
    _nodes(settings, template["spec"], {SET: spec.key, INSTALLATION: where.installation})
    (container,) = template["spec"]["containers"]
    _resources(settings, template["spec"], container)
    _environment(settings, container)
    _mounts(settings, template["spec"], container)
    found = template
    for patch in (spec.pod.extra, spec.pod.patch):
        found = merged(found, patch)
    _keep(ours, found)
    return found


def _metadata(settings: pods_pb2.PodSettings, metadata: Object) -> None:
    # Ours win: the platform finds its pods by them.
    for field in ("labels", "annotations"):
        metadata[field] = {**getattr(settings, field), **metadata[field]}


def _nodes(settings: pods_pb2.PodSettings, pod: Object, selector: Mapping[str, str]) -> None:
    tolerations = [_toleration(one) for one in settings.tolerations]
    nodes = dict(settings.node_selector)
    if settings.edge:
        nodes.setdefault(EDGE, "")
        tolerations.append({"key": EDGE, "operator": "Exists"})
        tolerations += [{"key": key, "operator": "Exists", "effect": "NoExecute"} for key in _AWAY]
    spread = [
        {
            "topologyKey": one.topology_key,
            "maxSkew": one.max_skew or 1,
            "whenUnsatisfiable": one.when_unsatisfiable or "DoNotSchedule",
            "labelSelector": {"matchLabels": dict(selector)},
        }
        for one in settings.topology_spread
    ]
    said = {
        "nodeSelector": nodes,
        "tolerations": tolerations,
        "affinity": whole(json_format.MessageToDict(settings.affinity)),
        "topologySpreadConstraints": spread,
        "priorityClassName": settings.priority_class,
        "runtimeClassName": settings.runtime_class,
        "schedulerName": settings.scheduler_name,
    }
    pod.update({key: value for key, value in said.items() if value})


def _toleration(one: pods_pb2.Toleration) -> Object:
    said = {"key": one.key, "operator": one.operator, "value": one.value, "effect": one.effect}
    found: Object = {key: value for key, value in said.items() if value}
    if one.HasField("toleration_seconds"):
        found["tolerationSeconds"] = one.toleration_seconds
    return found


def _resources(settings: pods_pb2.PodSettings, pod: Object, container: Object) -> None:
    given = settings.resources
    limits = {**container["resources"].get("limits", {}), **given.limits}
    requests = {**container["resources"].get("requests", {}), **given.limits, **given.requests}
    if limits or requests:
        container["resources"] = {key: each for key, each in (("limits", limits), ("requests", requests)) if each}
    claims = [(claim.name or claim.claim or claim.template, claim) for claim in given.claims]
    if claims:
        by_name = {
            name: {"resourceClaimName": one.claim} if one.claim else {"resourceClaimTemplateName": one.template}
            for name, one in claims
        }
        pod["resourceClaims"] = [{"name": name, **source} for name, source in by_name.items()]
        container["resources"]["claims"] = [
            {"name": name, "request": one.request} if one.request else {"name": name} for name, one in claims
        ]


def _environment(settings: pods_pb2.PodSettings, container: Object) -> None:
    sources = [
        {
            **({"prefix": one.prefix} if one.prefix else {}),
            **({"secretRef": {"name": one.secret}} if one.secret else {"configMapRef": {"name": one.config_map}}),
        }
        for one in settings.env_from
    ]
    if sources:
        container["envFrom"] = sources
    known = {each["name"] for each in container["env"]}
    container["env"] = [
        *container["env"],
        *({"name": one.name, "valueFrom": _value(one)} for one in settings.envs if one.name not in known),
    ]


def _value(one: pods_pb2.EnvVarFrom) -> Object:
    if one.secret:
        return {"secretKeyRef": {"name": one.secret, "key": one.key or one.name}}
    if one.config_map:
        return {"configMapKeyRef": {"name": one.config_map, "key": one.key or one.name}}
    if one.resource:
        return {"resourceFieldRef": {"resource": one.resource}}
    return {"fieldRef": {"fieldPath": one.field}}


def _mounts(settings: pods_pb2.PodSettings, pod: Object, container: Object) -> None:
    for number, one in enumerate(settings.mounts):
        name = f"mount-{number}"
        pod["volumes"].append({"name": name, **_source(one)})
        mount: Object = {"name": name, "mountPath": one.path}
        if one.sub_path:
            mount["subPath"] = one.sub_path
        if one.read_only or one.secret or one.config_map:
            mount["readOnly"] = True
        container["volumeMounts"].append(mount)


def _source(one: pods_pb2.Mount) -> Object:
    items = {"items": [{"key": key, "path": path} for key, path in sorted(one.items.items())]} if one.items else {}
    if one.secret:
        return {"secret": {"secretName": one.secret, "defaultMode": 0o440, **items}}
    if one.config_map:
        return {"configMap": {"name": one.config_map, **items}}
    if one.claim:
        return {"persistentVolumeClaim": {"claimName": one.claim}}
    folder: Object = {"medium": "Memory"} if one.empty.in_memory else {}
    return {"emptyDir": {**folder, **({"sizeLimit": one.empty.size_limit} if one.empty.size_limit else {})}}


def _keep(ours: Object, found: Object) -> None:
    for field in ("labels", "annotations"):
        left, set_here = _mapping(_mapping(found, "metadata"), field), ours[field]
        if wrong := [key for key in reserved(field, {*left, *set_here}) if left.get(key) != set_here.get(key)]:
            raise _refused(f"only the platform sets the {field} {', '.join(wrong)}, by which pods are found")
    containers = _mapping(found, "spec").get("containers")
    named = [each.get("name") for each in containers if isinstance(each, dict)] if isinstance(containers, list) else []
    if CONTAINER not in named or not isinstance(containers, list):
        raise _refused(f"it takes away the container {CONTAINER}, in which the service runs")
    ports = containers[named.index(CONTAINER)].get("ports")
    if not any(isinstance(each, dict) and each.get("name") == "http" for each in ports or ()):
        raise _refused("it takes away the port http, at which probes and requests come")


def _mapping(of: Object, key: str) -> Object:
    found = of.get(key)
    return found if isinstance(found, dict) else {}


def _refused(why: str) -> InvalidArgument:
    return InvalidArgument(f"The patch of the pod cannot be: {why}. Leave that out.", reason="PATCH_REFUSED")


def images(template: Object) -> set[str]:
    """All images of a pod template, those of volumes too."""
    pod = template["spec"]
    kinds = ("initContainers", "containers", "ephemeralContainers")
    found = [each.get("image") for kind in kinds for each in pod.get(kind) or () if isinstance(each, dict)]
    found += [_mapping(each, "image").get("reference") for each in pod.get("volumes") or () if isinstance(each, dict)]
    return {str(each) for each in found if each}


def used(template: Object, own: str, logins: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Kind and name of each object of the namespace that a pod template uses, but for those called `own` and the
    `logins` with which it pulls anyhow."""
    pod = template["spec"]
    # The old name counts where the new one is taken away; with neither the pod is the namespace's default account.
    account = str(pod.get("serviceAccountName") or pod.get("serviceAccount") or "default")
    found = [("ServiceAccount", account), *_walk(pod)]
    found += [("Secret", name) for name in login_names(pod) if name not in logins]
    yield from ((kind, name) for kind, name in found if name != own)


def login_names(pod: Object) -> list[str]:
    """The Secrets with which a pod's images are pulled."""
    listed = pod.get("imagePullSecrets")
    named = [each.get("name") for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    return [str(name) for name in named if name]


def borrowed(template: Object, level: str) -> Iterator[str]:
    """Data from outside of the pod of which nobody can say that deployments may use it, in words: a snapshot, another
    namespace's claim or a volume by its name, and whatever the driver of an inline volume gives out."""
    listed = template["spec"].get("volumes")
    for volume in [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else ():
        name = f"volume {volume.get('name')}"
        if volume.get("csi") is not None and level != "privileged":
            yield f"{name} is an inline csi, which only kubernetes_pod_security=privileged allows"
        claim = _mapping(_mapping(_mapping(volume, "ephemeral"), "volumeClaimTemplate"), "spec")
        yield from (f"{name} chooses its {field}" for field in ("volumeName", "selector") if claim.get(field))
        for field in ("dataSource", "dataSourceRef"):
            source = _mapping(claim, field)
            foreign = source.get("kind") != _CLAIM or source.get("apiGroup") or source.get("namespace")
            if claim.get(field) and foreign:
                yield f"{name} has a {field} that is no {_CLAIM} of its namespace"


_CLAIM = "PersistentVolumeClaim"
_REFERENCES = {
    "secretRef": ("Secret", "name"),
    "secretKeyRef": ("Secret", "name"),
    "configMapRef": ("ConfigMap", "name"),
    "configMapKeyRef": ("ConfigMap", "name"),
    "nodePublishSecretRef": ("Secret", "name"),
    "persistentVolumeClaim": (_CLAIM, "claimName"),
    "configMap": ("ConfigMap", "name"),
}


def _walk(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):
        for each in value:
            yield from _walk(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            if key in _REFERENCES and isinstance(each, dict):
                kind, field = _REFERENCES[key]
                yield kind, str(each.get(field) or "")
            elif key == "secret" and isinstance(each, dict):  # A volume calls it secretName, a projected source name.
                yield "Secret", str(each.get("secretName") or each.get("name") or "")
            elif key == "secretName":  # Of azureFile, for one.
                yield "Secret", str(each)
            elif key in ("dataSource", "dataSourceRef") and _mapping(value, key).get("kind") == _CLAIM:
                yield _CLAIM, str(each.get("name") or "")  # A new claim that begins as a copy of another.
            else:
                yield from _walk(each)
