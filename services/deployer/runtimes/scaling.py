"""The port Runtime, as far as a cluster scales a replica set by itself: by what, how fast, and what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

HPA = "hpa"
NONE = "none"
EXTERNAL = "external"
POLICIES = (HPA, NONE, EXTERNAL)
SOURCES = ("resource", "pods", "object", "external")


@dataclass(frozen=True)
class Metric:
    """One metric with its target; amounts are quantities of Kubernetes."""

    source: str
    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    object: tuple[str, str, str] | None = None
    """API version, kind and name of the object that it is of."""
    utilization_percent: int | None = None
    average_value: str = ""
    value: str = ""


@dataclass(frozen=True)
class Step:
    """How much may change within a period."""

    type: str
    value: int
    period_s: int


@dataclass(frozen=True)
class Rules:
    """How fast replicas are added, or taken away; what is None is the cluster's own."""

    window_s: int | None = None
    select: str = ""
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Autoscaling:
    """Who scales a set, and between what."""

    policy: str
    """HPA, or EXTERNAL: somebody else, and the runtime never writes how many replicas there are."""
    least: int
    most: int
    metrics: tuple[Metric, ...] = ()
    up: Rules | None = None
    down: Rules | None = None


@dataclass(frozen=True)
class Scaled:
    """What an autoscaler says of itself."""

    works: bool | None
    """None while it is not known."""
    reason: str = ""
    message: str = ""
