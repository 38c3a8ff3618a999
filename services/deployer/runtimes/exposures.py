"""The port Runtime, as far as a deployment is reached from outside of its cluster: what is wanted, what came of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

INGRESS = "INGRESS"
HTTP_ROUTE = "HTTP_ROUTE"


@dataclass(frozen=True)
class Parent:
    """A Gateway of the Gateway API."""

    name: str
    namespace: str = ""
    listener: str = ""


@dataclass(frozen=True)
class Tls:
    """Who has the certificate; all empty for whoever ends TLS anyway."""

    secret: str = ""
    issuer: str = ""
    cluster_issuer: str = ""


@dataclass(frozen=True)
class Exposed:
    """A host name of a deployment that the cluster should lead to the gateway."""

    deployment: str
    """`deployments/{deployment}`."""
    deployment_uid: str
    kind: str
    """INGRESS or HTTP_ROUTE."""
    host: str
    path: str = "/"
    class_name: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    gateways: tuple[Parent, ...] = ()
    tls: Tls | None = None
    """None for plain http."""

    @property
    def url(self) -> str:
        """Where clients reach it."""
        return f"{'http' if self.tls is None else 'https'}://{self.host}{self.path.rstrip('/')}"


@dataclass(frozen=True)
class ExposureStatus:
    """What the cluster made of one."""

    done: bool | None
    """None where nobody has said yet."""
    reason: str
    message: str = ""
