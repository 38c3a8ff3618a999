"""The pod in which a replica runs: one container, which may do nothing but serve. Pure.

Source: the restricted pod security standard of Kubernetes; what `bentoml serve` needs.
"""

import json
from collections.abc import Sequence

from ekiben.errors import InvalidArgument
from services.deployer.runtimes import SecretFile, SetSpec
from services.deployer.runtimes.kubernetes.names import CONTAINER, PORT, Object, Where, name_of
from services.deployer.runtimes.kubernetes.volumes import model_volumes
from services.deployer.runtimes.serving import BENTO, USER, merge

TEMPORARY = "/tmp"
_USERS_TOO = ("HOME", "BENTOML_DO_NOT_TRACK", "PYTHONUNBUFFERED")
"""Variables of ours that a user may set otherwise; the rest must be as it is."""
UNROUTED_S = 5
"""A pod that leaves goes on answering for so long: until every gateway knows."""


def pod_of(spec: SetSpec, where: Where) -> Object:
    """The `spec` of the pods of a set.

    Raises:
        InvalidArgument: a secret file's path cannot be a mount (SECRET_PATH_INVALID).
    """
    volumes, mounts = _files(spec.files, spec)
    models, at = model_volumes(spec)
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
        "containers": [where.telemetry.told(_container(spec, [*mounts, *at]), spec, name_of(spec.key))],
        "volumes": [{"name": "temporary", "emptyDir": {}}, *volumes, *models],
    }
    named = [*([where.pull_secret] if where.pull_secret else []), *spec.pull_secrets]
    if named:
        pod["imagePullSecrets"] = [{"name": name} for name in dict.fromkeys(named)]
    return pod


def _container(spec: SetSpec, mounts: Sequence[Object]) -> Object:
    limits: dict[str, str] = {}
    if spec.cpu_millicores:
        limits["cpu"] = f"{spec.cpu_millicores}m"
    if spec.memory_bytes:
        limits["memory"] = str(spec.memory_bytes)
    # A list with a name twice is refused by the cluster, so it is decided here whose value counts, as on one machine.
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
        if name not in environment or name in _USERS_TOO
    ]
    given = {each["name"] for each in from_secret}
    probe = {"port": "http", "scheme": "HTTP"}
    return {
        "name": CONTAINER,
        "image": spec.image,
        "imagePullPolicy": "IfNotPresent",
        "command": command(spec),
        "workingDir": BENTO,
        "env": [
            *from_secret,
            *({"name": name, "value": value} for name, value in environment.items() if name not in given),
        ],
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
            "httpGet": {"path": spec.liveness_path, **probe},
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
    mounts: dict[str, Object] = {}  # By path: of two Secrets with the same one the last has it, as on one machine.
    items: dict[str, Object] = {}
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
        items[path] = {"key": f"file.{number}", "path": str(number)}
        mounts[path] = {"name": "files", "mountPath": path, "subPath": str(number), "readOnly": True}
    secret = {"secretName": name_of(spec.key), "items": list(items.values()), "defaultMode": 0o440}
    return [{"name": "files", "secret": secret}], list(mounts.values())
