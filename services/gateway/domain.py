"""The route table: which requests reach which replicas. Pure."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

REDACTED_ALWAYS = frozenset(
    {"authorization", "cookie", "set-cookie", "proxy-authorization", "x-yatai-api-token", "x-api-key"}
)
"""Headers whose values no capture holds."""
DEFAULT_BODY_BYTES = 64 << 10
MAX_BODY_BYTES = 1 << 20
_UNSAFE = re.compile(r"[^A-Za-z0-9-]")


@dataclass(frozen=True)
class Endpoint:
    """The address of one ready replica: `host:port` or `unix:PATH`."""

    replica: str
    address: str


@dataclass(frozen=True)
class Capture:
    """What is kept of each prediction."""

    sample_percent: float = 100.0
    max_body_bytes: int = DEFAULT_BODY_BYTES
    redacted_headers: frozenset[str] = frozenset()
    """Lower case, beside `REDACTED_ALWAYS`."""


@dataclass(frozen=True)
class Target:
    """One version of a deployment that gets requests."""

    target: str
    revision: str
    bento: str
    models: tuple[str, ...] = ()
    weight: int = 0
    service: str = ""
    endpoints: tuple[Endpoint, ...] = ()


@dataclass(frozen=True)
class InternalRoute:
    """How the replicas of one service reach another: Envoy listens on a Unix socket for it."""

    revision: str
    target: str
    service: str
    socket_path: str
    endpoints: tuple[Endpoint, ...] = ()


@dataclass(frozen=True)
class Route:
    """How requests reach one deployment."""

    deployment: str
    organization: str = ""
    hosts: tuple[str, ...] = ()
    port: int = 0
    access_authorization: bool = False
    capture: Capture | None = None
    """None captures nothing."""
    targets: tuple[Target, ...] = ()
    not_ready_detail: str = ""
    route_type: str = ""
    route_by: str = ""
    internal_routes: tuple[InternalRoute, ...] = ()

    @property
    def id(self) -> str:
        """The last part of the name."""
        return self.deployment.rpartition("/")[2]

    def shares(self) -> Sequence[tuple[Target, int]]:
        """Targets that have a replica, with their share of the requests that name no target.

        Empty when the deployment is not ready. The share of a target without replicas goes to the others, and
        where no share is left they share alike.
        """
        ready = [target for target in self.targets if target.endpoints]
        weighted = [(target, target.weight) for target in ready if target.weight > 0]
        if self.named_by:
            main = [target for target in ready if target.target == "main"]
            weighted = [(target, 1) for target in main] or weighted
        return weighted or [(target, 1) for target in ready]

    @property
    def named_by(self) -> str:
        """`header` or `query` where requests name their target, else empty."""
        return self.route_type if self.route_type in ("header", "query") and self.route_by else ""

    def named(self) -> Sequence[Target]:
        """Targets that a request may name, which have a replica."""
        return [target for target in self.targets if target.endpoints] if self.named_by else ()


@dataclass(frozen=True)
class RouteTable:
    """Every route at one time."""

    version: int = 0
    routes: tuple[Route, ...] = ()

    def replicas(self) -> Iterator["Replica"]:
        """Every replica that is ready."""
        for route in self.routes:
            sets = [(each.revision, each.service, each.endpoints) for each in route.targets]
            sets += [(each.revision, each.service, each.endpoints) for each in route.internal_routes]
            for revision, service, endpoints in sets:
                for endpoint in endpoints:
                    yield Replica(route.deployment, revision, service, endpoint)


@dataclass(frozen=True)
class Replica:
    """A ready replica, and whose it is."""

    deployment: str
    revision: str
    service: str
    endpoint: Endpoint = field(compare=False)


def cluster_of(deployment: str, target: str, revision: str, service: str = "") -> str:
    """The name of an Envoy cluster, also used as a file name and within statistics' names.

    Different arguments give different names: an id with other characters than letters, digits and `-` gets a
    suffix from its digest. `service` is given for the services behind the entry service.
    """
    parts = [deployment.rpartition("/")[2], target or "main", revision.rpartition("/")[2]]
    return "_".join(
        ["internal" if service else "deployment", *map(_plain, parts), *([_plain(service)] if service else [])]
    )


def _plain(text: str) -> str:
    plain = _UNSAFE.sub("-", text)
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
