"""What a replica set is in Kubernetes: the objects, from what the port says of the set. Pure.

    ServiceAccount            without a token; owns all the others, so that its deletion is theirs
    Secret                    environment variables with secret values, and secret files
    Service                   the name under which services of the same revision reach it
    Deployment                the pods
    PodDisruptionBudget       one pod at a time may be taken from more than one
    NetworkPolicy             for services that others call: they unpickle what they are sent

All have the name of the set. Source: the Kubernetes API of 1.30 and later; the restricted pod security standard.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ekiben.errors import FailedPrecondition, InvalidArgument
from services.deployer.runtimes import SecretFile, SetSpec
from services.deployer.runtimes.serving import BENTO, USER, merge

Object = dict[str, Any]

PORT = 3000
TEMPORARY = "/tmp"
CONTAINER = "bento"
UNROUTED_S = 5
"""A pod that leaves goes on answering for so long: until every gateway knows."""

PREFIX = "ekiben.dev"
INSTALLATION = f"{PREFIX}/installation"
SET = f"{PREFIX}/set"
UID = f"{PREFIX}/deployment-uid"
ABOUT = f"{PREFIX}/about"
"""Annotation with what `SetStatus` says of the set, so that a deployer which starts anew knows it."""
APPLIED = f"{PREFIX}/applied"
"""Annotation with the digest of what was applied last."""
FIELD_MANAGER = "ekiben"


@dataclass(frozen=True)
class Where:
    """What all sets of a cluster share."""

    installation: str
    """Whose objects these are; others are never touched."""
    namespace: str
    pull_secret: str = ""
    """Name of a Secret of the namespace with the credentials for images."""


def name_of(key: str) -> str:
    """The name of a set's objects. Other services of the revision compute it too."""
    return f"ekiben-{key}"


def labels_of(spec: SetSpec, where: Where) -> dict[str, str]:
    """Of all the objects of a set, its pods included."""
    return {
        "app.kubernetes.io/managed-by": "ekiben",
        "app.kubernetes.io/name": _label(spec.deployment.partition("/")[2]),
        "app.kubernetes.io/component": _label(spec.service),
        "app.kubernetes.io/version": f"r{spec.revision}",
        INSTALLATION: where.installation,
        UID: spec.deployment_uid,
        SET: spec.key,
    }


def about(spec: SetSpec) -> str:
    """See ABOUT."""
    known = (spec.deployment, spec.deployment_uid, spec.revision, spec.target, spec.service)
    names = ("deployment", "deployment_uid", "revision", "target", "service")
    return json.dumps(dict(zip(names, known, strict=True)))


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
    for each in found:
        each["metadata"]["ownerReferences"] = [owner]
    return found


def digest_of(made: Sequence[Object]) -> str:
    """Equal for equal objects. Secret values are in it, so it is one-way."""
    return hashlib.sha256(json.dumps(list(made), sort_keys=True).encode()).hexdigest()[:32]


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


def _deployment(spec: SetSpec, replicas: int, where: Where) -> Object:
    made = _head("apps/v1", "Deployment", spec, where)
    made["metadata"]["annotations"] = {ABOUT: about(spec)}
    made["spec"] = {
        "replicas": replicas,
        "revisionHistoryLimit": 0,
        "progressDeadlineSeconds": 3600,
        "selector": {"matchLabels": {SET: spec.key, INSTALLATION: where.installation}},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "template": {
            "metadata": {"labels": labels_of(spec, where), "annotations": {ABOUT: about(spec)}},
            "spec": _pod(spec, where),
        },
    }
    return made


def _pod(spec: SetSpec, where: Where) -> Object:
    volumes, mounts = _files(spec.files, spec)
    pod: Object = {
        "serviceAccountName": name_of(spec.key),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": int(spec.drain_s) + UNROUTED_S + 5,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(spec, mounts)],
        "volumes": [{"name": "temporary", "emptyDir": {}}, *volumes],
    }
    if where.pull_secret:
        pod["imagePullSecrets"] = [{"name": where.pull_secret}]
    return pod


def _container(spec: SetSpec, mounts: Sequence[Object]) -> Object:
    limits: dict[str, str] = {}
    if spec.cpu_millicores:
        limits["cpu"] = f"{spec.cpu_millicores}m"
    if spec.memory_bytes:
        limits["memory"] = str(spec.memory_bytes)
    environment = {
        "HOME": f"{TEMPORARY}/home",
        "TMPDIR": TEMPORARY,
        "BENTOML_HOME": f"{TEMPORARY}/bentoml",
        "BENTO_PATH": BENTO,
        "BENTOML_DO_NOT_TRACK": "True",
        "PYTHONUNBUFFERED": "1",
    }
    if not spec.legacy:
        config = merge({"runner_probe": {"enabled": False}}, spec.config)
        environment["BENTOML_CONFIG_OVERRIDES"] = json.dumps({"services": {spec.service: config}})
    from_secret = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": name_of(spec.key), "key": f"env.{name}"}}}
        for name in sorted(spec.envs)
    ]
    probe = {"port": "http", "scheme": "HTTP"}
    return {
        "name": CONTAINER,
        "image": spec.image,
        "imagePullPolicy": "IfNotPresent",
        "command": command(spec),
        "workingDir": BENTO,
        "env": [*from_secret, *({"name": name, "value": value} for name, value in environment.items())],
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "resources": {"limits": limits, "requests": dict(limits)} if limits else {},
        "startupProbe": {
            "httpGet": {"path": spec.readiness_path, **probe},
            "periodSeconds": 1,
            "timeoutSeconds": 5,
            "failureThreshold": 600,
        },
        "readinessProbe": {
            "httpGet": {"path": spec.readiness_path, **probe},
            "periodSeconds": 5,
            "timeoutSeconds": 5,
            "failureThreshold": 2,
        },
        # The supervisor holds the port while its worker is dead: only an answer says that it lives.
        "livenessProbe": {
            "httpGet": {"path": "/livez", **probe},
            "periodSeconds": 10,
            "timeoutSeconds": 10,
            "failureThreshold": 6,
        },
        "lifecycle": {"preStop": {"sleep": {"seconds": UNROUTED_S}}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": "temporary", "mountPath": TEMPORARY}, *mounts],
    }


def command(spec: SetSpec) -> list[str]:
    """The command line of a replica."""
    where = ["--host", "0.0.0.0", "--port", str(PORT)]
    if spec.legacy:
        return ["bentoml", "serve", BENTO, "--production", *where]
    grace = ["--timeout-graceful-shutdown", str(max(1, int(spec.drain_s)))]
    calls = [
        word for service, key in spec.dependencies for word in ("--depends", f"{service}=http://{name_of(key)}:{PORT}")
    ]
    python = ["python", "-m", "bentoml_cli._internal.start", "start-http-server", BENTO]
    return [*python, "--service-name", spec.service, *where, *grace, *calls]


def _files(files: Sequence[SecretFile], spec: SetSpec) -> tuple[list[Object], list[Object]]:
    if not files:
        return [], []
    items, mounts = [], []
    for number, file in enumerate(files):
        path = file.path
        if path.startswith("$BENTO_PATH"):
            path = f"{BENTO}/{path.removeprefix('$BENTO_PATH').lstrip('/')}"
        elif path.startswith("~"):
            path = f"{TEMPORARY}/home/{path.removeprefix('~').lstrip('/')}"
        if not path.startswith("/"):
            path = f"{BENTO}/{path}"
        if ".." in path.split("/") or ":" in path:
            raise InvalidArgument(f"The secret file {file.path} cannot be mounted.", reason="SECRET_PATH_INVALID")
        items.append({"key": f"file.{number}", "path": str(number)})
        mounts.append({"name": "files", "mountPath": path, "subPath": str(number), "readOnly": True})
    volume = {"name": "files", "secret": {"secretName": name_of(spec.key), "items": items, "defaultMode": 0o440}}
    return [volume], mounts


def _label(text: str) -> str:
    """The text as a label's value can be."""
    kept = "".join(char if (char.isalnum() and char.isascii()) or char in "-_." else "-" for char in text)[:63]
    return kept.strip("-_.") or "x"


def facts_of(annotations: Mapping[str, str]) -> Mapping[str, Any]:
    """What `about` wrote. Raises ValueError where that is not there."""
    found = json.loads(annotations.get(ABOUT) or "null")
    if not isinstance(found, dict):
        raise ValueError("no annotation says what this set is")
    return found
