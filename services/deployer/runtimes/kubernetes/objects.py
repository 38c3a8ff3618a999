"""What a replica set is in Kubernetes: the objects, from what the port says of the set. Pure.

    ServiceAccount            without a token; owns all the others, so that its deletion is theirs
    Secret                    environment variables with secret values, and secret files
    Service                   the name under which services of the same revision reach it
    Deployment                the pods
    PodDisruptionBudget       one pod at a time may be taken from more than one
    NetworkPolicy             for services that others call: they unpickle what they are sent
    HorizontalPodAutoscaler   where the cluster scales it; the Deployment then says nothing of replicas

All have the name of the set. Source: the Kubernetes API of 1.30 and later; the restricted pod security standard.
"""

import base64

from ekiben.errors import FailedPrecondition
from services.deployer.runtimes import SetSpec
from services.deployer.runtimes.kubernetes.autoscaling import SCALED_BY, autoscaler_spec
from services.deployer.runtimes.kubernetes.names import (
    ABOUT,
    INSTALLATION,
    PORT,
    SET,
    UID,
    Object,
    Where,
    about,
    labels_of,
    name_of,
)
from services.deployer.runtimes.kubernetes.placement import placed
from services.deployer.runtimes.kubernetes.pod import pod_of
from services.deployer.runtimes.scaling import HPA


def anchor(spec: SetSpec, where: Where) -> Object:
    """The ServiceAccount: applied first."""
    made = _head("v1", "ServiceAccount", spec, where)
    made["metadata"]["annotations"] = {ABOUT: about(spec)}
    return {
        **made,
        "automountServiceAccountToken": False,
    }


def image_of(spec: SetSpec, pull_host: str) -> str:
    """The image as a node pulls it: always by digest, so that all pods of a set run the same.

    Raises:
        FailedPrecondition: it is on a disk that nodes do not see, and nobody is named who serves it (IMAGE_NOT_SERVED).
    """
    kind, _, place = spec.image.partition(":")
    if kind == "docker":
        name = place.removeprefix("//").partition("@")[0]
        head, _, tail = name.rpartition("/")
        return f"{head}/{tail.partition(':')[0]}@{spec.image_digest}"
    if kind != "oci":
        return spec.image
    if not pull_host:
        raise FailedPrecondition(
            "The images of this platform are in a folder, which the cluster's nodes do not see. Set "
            "kubernetes_pull_host to the name under which nodes reach the platform's /v2/, or the builder's images to "
            "a registry.",
            reason="IMAGE_NOT_SERVED",
            image=spec.image,
        )
    reference = place.partition(":")[2]
    return f"{pull_host}/{reference.partition(':')[0]}@{spec.image_digest}"


def objects(spec: SetSpec, replicas: int, where: Where, owner_uid: str) -> list[Object]:
    """All but the anchor, in the order in which they are applied.

    Raises:
        InvalidArgument: a secret file's path cannot be a mount (SECRET_PATH_INVALID).
    """
    owner = {"apiVersion": "v1", "kind": "ServiceAccount", "name": name_of(spec.key), "uid": owner_uid}
    found = [_secret(spec, where), _service(spec, where)]
    if not spec.entry:
        found.append(_network_policy(spec, where))
    found += [_disruptions(spec, where), _deployment(spec, replicas, where)]
    if spec.autoscaling is not None and spec.autoscaling.policy == HPA:
        scaler = _head("autoscaling/v2", "HorizontalPodAutoscaler", spec, where)
        found.append({**scaler, "spec": autoscaler_spec(spec.autoscaling, name_of(spec.key))})
    for each in found:
        each["metadata"]["ownerReferences"] = [owner]
    return found


def _head(version: str, kind: str, spec: SetSpec, where: Where) -> Object:
    return {
        "apiVersion": version,
        "kind": kind,
        "metadata": {
            "name": name_of(spec.key),
            "namespace": where.namespace,
            "labels": labels_of(spec, where),
        },
    }


def _secret(spec: SetSpec, where: Where) -> Object:
    values = {f"env.{name}": value for name, value in spec.envs.items()}
    values |= {f"file.{number}": file.value for number, file in enumerate(spec.files)}
    values |= where.telemetry.secret()
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    return {**_head("v1", "Secret", spec, where), "type": "Opaque", "data": data}


def _service(spec: SetSpec, where: Where) -> Object:
    return {
        **_head("v1", "Service", spec, where),
        "spec": {
            "selector": {SET: spec.key, INSTALLATION: where.installation},
            "ports": [{"name": "http", "port": PORT, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def _network_policy(spec: SetSpec, where: Where) -> Object:
    """Only pods of the same deployment, and the nodes' probes, which no policy keeps out."""
    return {
        **_head("networking.k8s.io/v1", "NetworkPolicy", spec, where),
        "spec": {
            "podSelector": {"matchLabels": {SET: spec.key, INSTALLATION: where.installation}},
            "policyTypes": ["Ingress"],
            "ingress": [
                {
                    "from": [{"podSelector": {"matchLabels": {UID: spec.deployment_uid}}}],
                    "ports": [{"port": PORT, "protocol": "TCP"}],
                }
            ],
        },
    }


def _disruptions(spec: SetSpec, where: Where) -> Object:
    return {
        **_head("policy/v1", "PodDisruptionBudget", spec, where),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": {SET: spec.key, INSTALLATION: where.installation}}},
    }


def template_of(spec: SetSpec, where: Where) -> Object:
    """What each pod of a set is made from. Raises what `pod_of` and `placed` raise."""
    metadata = {"labels": labels_of(spec, where), "annotations": {ABOUT: about(spec)}}
    return placed(spec, where, {"metadata": metadata, "spec": pod_of(spec, where)})


def _deployment(spec: SetSpec, replicas: int, where: Where) -> Object:
    made = _head("apps/v1", "Deployment", spec, where)
    made["metadata"]["annotations"] = {ABOUT: about(spec)}
    made["spec"] = {
        "replicas": replicas,
        "revisionHistoryLimit": 0,
        "progressDeadlineSeconds": 3600,
        "selector": {"matchLabels": {SET: spec.key, INSTALLATION: where.installation}},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "template": template_of(spec, where),
    }
    if spec.autoscaling is not None:
        made["metadata"]["annotations"][SCALED_BY] = spec.autoscaling.policy
        del made["spec"]["replicas"]
    return made
