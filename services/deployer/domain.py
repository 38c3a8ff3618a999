"""Rules of the deployer: what may be asked for, and what a bento's manifest says. Pure."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ekiben.deployer.v1.pods_pb2 import PodSettings
from ekiben.errors import FailedPrecondition, InvalidArgument

MAIN = "main"
"""Name of the target that is no canary."""
DEFAULT_CLUSTER = "default"
STRATEGIES = ("RollingUpdate", "Recreate", "RampedSlowRollout", "BestEffortControlledRollout")
ROUTE_TYPES = ("", "random", "header", "query")
MAX_REPLICAS = 1000
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
"""Of a Secret of Kubernetes."""
RESERVED_ENVS = ("EKIBEN_PROCESS", "BENTOML_HOME", "BENTOML_RUNNER_MAP", "PROMETHEUS_MULTIPROC_DIR")
"""Set by the platform for each replica; a value of the user's would break it."""
_RESERVED = {"labels": ("ekiben.dev/", "app.kubernetes.io/", "helm.sh/"), "annotations": ("ekiben.dev/",)}
"""Of pods. By its labels the platform finds what is its own, and Services choose whom they send requests to."""
GPU = "nvidia.com/gpu"
"""What Kubernetes calls a GPU of which nothing else is said."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


@dataclass(frozen=True)
class InstanceType:
    """A size that a service may ask for."""

    name: str
    cpu_millicores: int
    memory_bytes: int
    gpu_count: int = 0
    gpu_type: str = ""
    description: str = ""
    group: str = ""
    price: str = ""
    pod: PodSettings = field(default_factory=PodSettings)
    """What pods of this type have; other runtimes know cores and memory only."""

    @classmethod
    def parse(cls, text: str) -> "InstanceType":
        """From `NAME=CORES/MEMORY[/GPUS[/GPU_TYPE]]`. Raises ValueError."""
        name, _, sizes = text.partition("=")
        cores, memory, *gpu = sizes.split("/")
        amount = re.fullmatch(r"(\d+(?:\.\d+)?)(|K|M|G|T|Ki|Mi|Gi)B?", memory)
        if not name or amount is None:
            raise ValueError(f"{text!r} is not NAME=CORES/MEMORY[/GPUS[/GPU_TYPE]]")
        count, kind, pod = int(gpu[0]) if gpu else 0, "/".join(gpu[1:]), PodSettings()
        if count:
            # A kind may be a resource by itself, as amd.com/gpu; else it only describes.
            pod.resources.limits[kind if "/" in kind else GPU] = str(count)
        return cls(name, round(float(cores) * 1000), int(float(amount[1]) * _UNITS[amount[2]]), count, kind, pod=pod)


@dataclass(frozen=True)
class ServiceManifest:
    """One service of a bento."""

    name: str
    dependencies: tuple[str, ...] = ()
    """Services of the same bento that it calls."""
    deployments: tuple[str, ...] = ()
    """Other deployments that it calls."""
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BentoManifest:
    """What of a bento's manifest matters for running it."""

    entry: str
    services: tuple[ServiceManifest, ...]
    env_defaults: Mapping[str, str]
    """Variables with a value, of the entry service; those of the build stage left out."""
    env_required: tuple[str, ...]
    """Variables without a value."""
    legacy: bool
    """Made with BentoML before 1.2: run as a whole, its runners inside."""

    @classmethod
    def parse(cls, text: str, repository: str) -> "BentoManifest":
        """From the manifest's JSON; 1.0 and 1.1 name no services, so the repository's name stands for the whole.

        Raises:
            FailedPrecondition: it is not what BentoML writes (MANIFEST_UNREADABLE).
        """
        try:
            manifest = json.loads(text or "{}")
            described = manifest.get("services") or []
            services = tuple(
                ServiceManifest(
                    item["name"],
                    tuple(d["service"] for d in item.get("dependencies") or [] if d.get("service") and not _remote(d)),
                    tuple(d["deployment"] for d in item.get("dependencies") or [] if d.get("deployment")),
                    item.get("config") or {},
                )
                for item in described
            )
            envs = [env for env in manifest.get("envs") or [] if env.get("stage") != "build"]
            entry = manifest.get("entry_service") or ""
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise FailedPrecondition(
                f"The manifest of {repository} is not one that BentoML writes: {exc}.", reason="MANIFEST_UNREADABLE"
            ) from exc
        names = [service.name for service in services]
        if not services:
            entry = repository
        elif entry not in names:
            entry = names[0]
        return cls(
            entry,
            services or (ServiceManifest(entry),),
            {env["name"]: str(env["value"]) for env in envs if env.get("value")},
            tuple(env["name"] for env in envs if not env.get("value")),
            not services,
        )

    def service(self, name: str) -> ServiceManifest:
        """The service with this name. Raises KeyError."""
        for service in self.services:
            if service.name == name:
                return service
        raise KeyError(name)

    def dependents(self, name: str) -> tuple[str, ...]:
        """Services that call this one."""
        return tuple(service.name for service in self.services if name in service.dependencies)


def _remote(dependency: Mapping[str, Any]) -> bool:
    return bool(dependency.get("deployment") or dependency.get("url"))


def check_envs(path: str, names: Iterable[str]) -> list[tuple[str, str]]:
    """Violations of the names of environment variables."""
    found = []
    for index, name in enumerate(names):
        if not ENV_NAME.fullmatch(name):
            found.append((f"{path}[{index}].name", f"{name!r} cannot be the name of an environment variable"))
        elif name in RESERVED_ENVS:
            found.append((f"{path}[{index}].name", f"{name} is set by the platform"))
    return found


def reserved(field: str, keys: Iterable[str]) -> list[str]:
    """Those keys of a pod's `labels` or `annotations` that only the platform sets."""
    return sorted(key for key in keys if key.startswith(_RESERVED[field]))


def check_metadata(path: str, **fields: Iterable[str]) -> list[tuple[str, str]]:
    """Violations of the keys of a pod's labels and annotations."""
    return [
        (f"{path}.{field}[{key[:64]}]", f"only the platform sets {field} below {', '.join(_RESERVED[field])}")
        for field, keys in fields.items()
        for key in reserved(field, keys)
    ]


def check_scaling(path: str, least: int | None, most: int | None) -> list[tuple[str, str]]:
    """Violations of the bounds of one service's replicas."""
    found = []
    if least is not None and not 0 <= least <= MAX_REPLICAS:
        found.append((f"{path}.min_replicas", f"must be from 0 to {MAX_REPLICAS}"))
    elif most is not None and not max(least or 0, 1) <= most <= MAX_REPLICAS:
        found.append((f"{path}.max_replicas", f"must be from max(min_replicas, 1) to {MAX_REPLICAS}"))
    return found


def replicas_of(least: int | None) -> int:
    """How many replicas a service gets on one machine, which does not scale by itself: `min_replicas`, at least 1."""
    return max(1, 1 if least is None else least)


def check_strategy(path: str, strategy: str) -> list[tuple[str, str]]:
    """Violations of a rollout strategy; empty means the default."""
    if strategy and strategy not in STRATEGIES:
        return [(path, f"must be one of {', '.join(STRATEGIES)}")]
    return []


def refuse(violations: Sequence[tuple[str, str]], *, reason: str = "FIELDS_INVALID") -> None:
    """Raises InvalidArgument with all violations, if there are any."""
    if violations:
        field_, description = violations[0]
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        raise InvalidArgument(f"{field_}: {description}{more}.", reason=reason, violations=violations, field=field_)


@dataclass(frozen=True)
class Bento:
    """The bento of a target, as it was when the revision was made."""

    name: str
    digest: str
    manifest: str
    models: tuple[tuple[str, str], ...] = ()
    """Name and digest each."""

    def parsed(self) -> BentoManifest:
        """What of the manifest matters."""
        return BentoManifest.parse(self.manifest, self.name.split("/")[1])


@dataclass(frozen=True)
class Revision:
    """A template as it is rolled out. Never changes."""

    deployment_uid: str
    number: int
    uid: str
    template: str
    """JSON of ekiben.deployer.v1.Template."""
    bentos: Mapping[str, Bento]
    """By target."""
    creator: str
    create_time: datetime
    rolled_back_to: int = 0


@dataclass(frozen=True)
class Status:
    """What was observed last."""

    state: str
    """Name of ekiben.deployer.v1.Deployment.State."""
    conditions: tuple["Condition", ...] = ()
    counts: Mapping[str, tuple[int, int, int, int]] = field(default_factory=dict)
    """By service: desired, total, ready, ready of the latest revision."""
    observed_generation: int = 0
    serving_revision: int = 0
    settled: bool = False
    """Whether what runs is what is desired."""
    scale: Mapping[str, int] = field(default_factory=dict)
    """How many replicas services that are scaled by the cluster should have had: by `TARGET/SERVICE`."""


@dataclass(frozen=True)
class Condition:
    """One thing that is so, or not, or not known."""

    type: str
    status: bool | None
    reason: str
    message: str = ""
    transition_time: datetime | None = None


@dataclass(frozen=True)
class Deployment:
    """What is desired, and what was observed last."""

    name: str
    """The id, without `deployments/`."""
    uid: str
    organization: str
    labels: Mapping[str, str]
    cluster: str
    scaling: str
    """JSON: Scaling by service."""
    capture: str
    """JSON of CapturePolicy; empty for none."""
    access_authorization: bool
    dev: bool
    generation: int
    latest_revision: int
    terminated: bool
    deleting: bool
    port: int
    """0 for none."""
    build: str
    traceparent: str
    """Of the call that last changed what is desired."""
    creator: str
    create_time: datetime
    update_time: datetime
    status: Status
    exposure: str = ""
    """JSON of Exposure; empty for none."""
    exposed_host: str | None = None
    """The host that the exposure names, which no other deployment may have; None where it names none."""
    kubernetes_namespace: str = ""
    """Of a cluster that was added; empty in the default one."""

    @property
    def place(self) -> str:
        """Which of several runtimes it is in: see SetSpec.place."""
        return "" if self.cluster == DEFAULT_CLUSTER else f"{self.cluster}/{self.kubernetes_namespace}"


@dataclass(frozen=True)
class Cluster:
    """A cluster that somebody added, or the default one."""

    name: str
    """The id, without `clusters/`."""
    uid: str
    create_time: datetime
    description: str = ""
    server: str = ""
    """Where its API is."""
    namespaces: tuple[str, ...] = ()
    pull_host: str = ""
    pull_secret: str = ""
    otlp_http_endpoint: str = ""
    """Where its pods reach the recorder's receiver; empty where they send nothing."""
    key_id: str = ""
    """Which key the kubeconfig is sealed with."""
    kubeconfig: bytes | None = field(default=None, repr=False)
    """Sealed; None means the identity of the pod in which the deployer runs."""
    generation: int = 0
    """Grows with each change."""
    update_time: datetime | None = None

    @property
    def places(self) -> tuple[str, ...]:
        """The runtimes that it has, one for each namespace: see SetSpec.place."""
        return tuple(f"{self.name}/{namespace}" for namespace in self.namespaces)


def whole(value: Any) -> Any:
    """Numbers of a Struct are floats; BentoML and Kubernetes want integers where they are whole."""
    if isinstance(value, dict):
        return {key: whole(one) for key, one in value.items()}
    if isinstance(value, list):
        return [whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class Terminal:
    """A command that somebody ran in a replica by hand. Its recording outlives it, and the deployment."""

    id: str
    organization: str
    deployment: str
    """The deployment's id."""
    deployment_uid: str
    replica: str
    service: str
    command: tuple[str, ...]
    tty: bool
    debug_image: str
    """Of the container beside the replica in which it runs; empty for the replica's own."""
    user: str
    state: str
    """`PENDING`, `OPEN` or `ENDED`."""
    create_time: datetime
    reason: str = ""
    """Why it ended: `EXITED`, `CLIENT_LEFT`, `TIME_LIMIT`, `RECORDING_FULL`, `LOST`, `FAILED`."""
    exit_code: int | None = None
    end_time: datetime | None = None
    owner: str = ""

    @property
    def name(self) -> str:
        """The resource's name."""
        return f"deployments/{self.deployment}/terminals/{self.id}"
