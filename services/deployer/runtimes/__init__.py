"""The port Runtime: where replicas run. `process.py` runs them on this machine.

The port speaks of replica sets, as Kubernetes does, and of nothing that only one machine has: no path, no process id.
What it is given can be sent over a network, what it answers too, so a runtime may live in an agent elsewhere.

Promises. Every method may be called again with the same arguments, and after a crash between any two. `apply` and
`scale` return at once: what came of them is seen in `observe`, and `changed` wakes whoever waits. A runtime keeps as
many replicas alive as it was told, starting those that end again with growing pauses. To scale down it chooses those
that do not answer first and sets them DRAINING; it stops a draining replica once it is told by `release` that nobody
routes to it (a runtime which has its own ways may stop it before).
"""

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any, Protocol

from ekiben.deployer.v1.pods_pb2 import PodSettings
from services.deployer.runtimes.exposures import Exposed, ExposureStatus
from services.deployer.runtimes.scaling import Autoscaling, Scaled
from services.deployer.runtimes.sessions import ExecSpec, Session


class Phase(Enum):
    """What a runtime sees of a replica."""

    STARTING = "STARTING"
    READY = "READY"
    UNREADY = "UNREADY"
    DRAINING = "DRAINING"
    CRASHED = "CRASHED"


@dataclass(frozen=True)
class SecretFile:
    """A file that the replicas find."""

    path: str
    """Absolute, or below the bento where it begins with `$BENTO_PATH`, or below the home where it begins with `~`."""
    value: str = field(repr=False)


@dataclass(frozen=True)
class Pod:
    """What a deployment says of its pods. A runtime without pods refuses it, but for `extra`."""

    settings: PodSettings = field(default_factory=PodSettings)
    """All but its `patch`."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Strategic merge patch of the pod template that a client's extras are. A runtime without pods passes it over."""
    patch: Mapping[str, Any] = field(default_factory=dict)
    """That of the settings, which comes after it."""


@dataclass(frozen=True)
class SetSpec:
    """What a replica set runs. The same key always has the same bento, service and environment."""

    key: str
    """At most 20 of a-z and 0-9; the same for the same deployment, revision, target and service."""
    deployment: str
    """`deployments/{deployment}`."""
    deployment_uid: str
    revision: int
    target: str
    service: str
    entry: bool
    """Whether it takes requests from outside; the others are called by services of the same revision."""
    legacy: bool
    """Whether the bento was made before BentoML 1.2 and is served as a whole."""
    bento: str
    """`bentoRepositories/{repository}/bentos/{bento}`."""
    bento_digest: str
    models: tuple[tuple[str, str], ...]
    """Name and digest of each model: `modelRepositories/{repository}/models/{model}`."""
    environment: str
    """Where the builder put the Python environment, on the machine or volume that it shares with the runtime."""
    image: str = ""
    """Where the builder put the image of the bento, as `oci:FOLDER:REFERENCE` or `docker://HOST/NAME`; empty for a
    runtime that needs none."""
    image_digest: str = ""
    """`sha256:<hex>` of its manifest or index: what is run, whatever the reference names by then."""
    organization: str = ""
    """Id of the organization whose the deployment is: only its own images does the platform let it pull."""
    model_images: tuple[tuple[str, str], ...] = ()
    """Models that the image leaves out: name, and digest of the image in the same repository that has it."""
    pull_secrets: tuple[str, ...] = ()
    """What the image's registry is logged in to with, by names that the runtime knows: Secrets of a namespace, say."""
    envs: Mapping[str, str] = field(default_factory=dict, repr=False)
    files: tuple[SecretFile, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fragment of BentoML's service configuration."""
    readiness_path: str = "/readyz"
    """Where a replica says with 200 that it takes requests."""
    liveness_path: str = "/livez"
    """Where it says with 200 that it must not be started again."""
    dependencies: tuple[tuple[str, str], ...] = ()
    """Services that it calls, each with the key of its replica set."""
    cpu_millicores: int = 0
    memory_bytes: int = 0
    drain_s: float = 30.0
    pod: Pod = field(default_factory=Pod)
    autoscaling: Autoscaling | None = None
    """Who scales it from here on; None where only `scale` does. Only for a runtime that `scales`."""
    place: str = ""
    """Which of several runtimes: empty for the one of the deployer's settings, else `CLUSTER/NAMESPACE`."""


@dataclass(frozen=True)
class ReplicaStatus:
    """One replica, as observed."""

    replica: str
    phase: Phase
    address: str = ""
    """`host:port` or `unix:PATH`, reachable from the gateway."""
    message: str = ""
    """What is wrong, in words."""
    last_lines: str = ""
    """What it printed last, for one that ended: for those who look after it, as anything may be in it."""
    restart_count: int = 0
    """How often it was started again."""
    failed_starts: int = 0
    """How often it ended in a row without ever having been ready."""
    start_time: datetime | None = None
    reason: str = ""
    """Why it could not be started, for programs: `ENVIRONMENT_MISSING`, `IMAGE_MISSING`."""
    serving: bool = False
    """Of one that is DRAINING: that it still answers new requests, for as long as nobody else does."""
    lost: bool = False
    """Of one that is DRAINING: that its time to end is over, and who should say that it ended does not answer. Nobody
    waits for it but who may not run beside it."""


@dataclass(frozen=True)
class SetStatus:
    """One replica set, as observed."""

    key: str
    deployment: str
    deployment_uid: str
    revision: int
    target: str
    service: str
    asked: int
    replicas: tuple[ReplicaStatus, ...] = ()
    socket_path: str = ""
    """Where replicas of the same revision expect to reach the set; the gateway listens there."""
    note: str = ""
    """What could not be done as asked: limits that this machine does not know."""
    reason: str = ""
    """For programs, where the note says why a cluster does not have the set as it is wanted: `FIELD_OWNED`, say."""
    autoscaled: bool = False
    """Whether somebody else gives it replicas now; `asked` is what he asked for."""
    scaled: Scaled | None = None
    """What the cluster's autoscaler says, where it has one."""
    outlives: bool = False
    """Whether its replicas go on when the deployer stops, and are another deployer's as well as this one's. Where they
    do not, a deployer that stops drains them, and one that lost its cluster to another ends them."""

    def count(self, *phases: Phase) -> int:
        """How many replicas are in one of the phases."""
        return sum(replica.phase in phases for replica in self.replicas)


@dataclass(frozen=True)
class Line:
    """One line that a replica printed."""

    replica: str
    service: str
    time: datetime
    text: str


@dataclass(frozen=True)
class Event:
    """Something that happened to a deployment, as the cluster wrote it down."""

    id: str
    """The same for the same event when it happens again: `count` and `time` grow."""
    time: datetime
    """When it happened last."""
    first_time: datetime
    count: int
    warning: bool
    reason: str
    """A word for programs: `FailedScheduling`."""
    message: str
    object: str
    """What it happened to: `Pod/NAME`."""
    source: str
    """Who wrote it down."""
    service: str = ""
    replica: str = ""
    revision: int = 0
    target: str = ""


class Runtime(Protocol):
    """See the module."""

    def scales(self, place: str) -> bool:
        """Whether it acts on `SetSpec.autoscaling` in a place: see SetSpec.place."""
        ...

    def knows(self, place: str) -> bool:
        """Whether `observe` has all that is in a place: after a start it takes a cluster a while to tell."""
        ...

    async def check(self, spec: SetSpec) -> None:
        """Refuse what could never be applied, before somebody is told that it will be. Nothing is changed.

        Raises:
            InvalidArgument: this runtime cannot do what is asked, or the cluster would not take it.
        """
        ...

    async def apply(self, spec: SetSpec, replicas: int) -> None:
        """Make the set, or tell it its environment anew, and scale it. With `autoscaling` it begins with so many."""
        ...

    async def scale(self, key: str, replicas: int) -> None:
        """Tell a set how many replicas to have, and whoever scales it no more; unknown sets are ignored. At 0 all
        drain, then the set is forgotten."""
        ...

    async def release(self, replicas: Collection[str]) -> None:
        """No request can reach these draining replicas any more: end them once they have answered what they have."""
        ...

    async def observe(self) -> list[SetStatus]:
        """All sets; each equal to what it was the last time unless something of it is another. Asked each second."""
        ...

    async def drain(self, grace_s: float) -> None:
        """End all replicas at once, each having at most so long for its requests. For a runtime that stops with us."""
        ...

    async def changed(self) -> None:
        """Return once something may differ from the last `observe`."""
        ...

    async def forget(self, deployment_uid: str) -> None:
        """Remove what is kept of a deployment without replicas: logs, homes."""
        ...

    async def check_exposure(self, wanted: Exposed) -> None:
        """Raises InvalidArgument or FailedPrecondition, in the cluster's words, for one that it would not take."""
        ...

    async def expose(self, wanted: Sequence[Exposed]) -> None:
        """These host names, and no others, should lead to the gateway. Returns at once, see `exposure`."""
        ...

    async def stand_by(self) -> None:
        """Another deployer has what outlives this one: forget what was asked of it, and leave it alone. Whoever has
        it asks for all of it anew. Said again and again."""
        ...

    def exposure(self, wanted: Exposed) -> ExposureStatus:
        """What came of one of them."""
        ...

    def logs(
        self,
        deployment_uid: str,
        *,
        service: str = "",
        replica: str = "",
        tail: int = 100,
        since: datetime | None = None,
        follow: bool = False,
        previous: bool = False,
    ) -> AsyncIterator[Line]:
        """What replicas printed, oldest first, and with `follow` what comes.

        `tail`: of each no more than its last lines; 0 is nothing of the past, negative all that is kept.
        `since`: nothing from before.
        `previous`: only what they printed before they were started last, as far as that is kept.
        """
        ...

    def events(self, deployment_uid: str, *, follow: bool = False) -> AsyncIterator[Event]:
        """What the cluster wrote down of a deployment, oldest first, and with `follow` what comes.

        Raises:
            FailedPrecondition: this runtime writes down no events (EVENTS_NOT_KEPT).
        """
        ...

    def exec(self, spec: ExecSpec) -> AbstractAsyncContextManager[Session]:
        """Run a command in a replica while inside; left before its end, it is hung up.

        Raises:
            FailedPrecondition: nothing runs there (REPLICA_NOT_RUNNING), the command cannot be started (EXEC_FAILED),
                or there are no containers (DEBUG_UNSUPPORTED).
        """
        ...
