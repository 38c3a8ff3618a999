"""The flags that say how a deployment is reached from outside of its cluster."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import click

from ekiben.cli.options import CHANGE, DEFAULT, change
from ekiben.deployer.v1 import exposure_pb2

F = TypeVar("F", bound=Callable[..., Any])

_KINDS = {
    "ingress": exposure_pb2.Exposure.INGRESS,
    "http-route": exposure_pb2.Exposure.HTTP_ROUTE,
    "none": exposure_pb2.Exposure.NONE,
}


@dataclass(frozen=True)
class ExposureFlags:
    """As click gives them; None and empty mean not given."""

    expose: str | None = None
    expose_host: str | None = None
    expose_path: str | None = None
    expose_class: str | None = None
    expose_gateways: tuple[str, ...] = ()
    expose_tls: bool | None = None
    expose_tls_secret: str | None = None
    expose_issuer: str | None = None
    expose_annotations: tuple[tuple[str, str | None], ...] = ()

    @classmethod
    def take(cls, arguments: dict[str, Any]) -> "ExposureFlags":
        """Take the flags out of a command's arguments."""
        return cls(**{field.name: arguments.pop(field.name) for field in fields(cls) if field.name in arguments})


NONE_GIVEN = ExposureFlags()


def exposure_options(function: F) -> F:
    """The flags."""
    options = [
        click.option("--expose", type=click.Choice([*_KINDS, DEFAULT]), help="How a Kubernetes cluster leads to it."),
        click.option(
            "--expose-host", metavar="HOST", help="Its host name there; NAME-NAMESPACE.DOMAIN by default, and for ''."
        ),
        click.option("--expose-path", metavar="PATH", help="Let in only requests below this path."),
        click.option("--expose-class", metavar="NAME", help="Which class of Ingress; the cluster's default."),
        click.option(
            "--expose-gateway",
            "expose_gateways",
            multiple=True,
            metavar="[NAMESPACE/]NAME[:LISTENER]",
            help="Gateway that the HTTPRoute is attached to. '' for none.",
        ),
        click.option("--expose-tls/--no-expose-tls", default=None, help="Whether clients come by https."),
        click.option("--expose-tls-secret", metavar="NAME", help="Secret with the Ingress's certificate."),
        click.option("--expose-issuer", metavar="[cluster/]NAME", help="cert-manager issuer of that certificate."),
        click.option(
            "--expose-annotation",
            "expose_annotations",
            type=CHANGE,
            multiple=True,
            metavar="KEY=VALUE|KEY-",
            help="Annotation of the Ingress or HTTPRoute.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def apply(exposure: exposure_pb2.Exposure, flags: ExposureFlags) -> None:
    """Change an exposure as the flags say; without flags it stays as it is."""
    if flags.expose is not None:
        if _KINDS[flags.expose] != exposure.kind:
            exposure.Clear()
        exposure.kind = _KINDS[flags.expose]
    if flags.expose_host is not None:
        exposure.host = flags.expose_host
    if flags.expose_path is not None:
        exposure.path = flags.expose_path
    if flags.expose_class is not None:
        exposure.class_name = flags.expose_class
    if flags.expose_gateways:
        del exposure.gateways[:]
        exposure.gateways.extend(_gateway(word) for word in flags.expose_gateways if word)
    change(exposure.annotations, flags.expose_annotations)
    if flags.expose_tls is False:
        exposure.ClearField("tls")
    elif flags.expose_tls:
        exposure.tls.SetInParent()
    if flags.expose_tls_secret is not None:
        exposure.tls.secret = flags.expose_tls_secret
    if flags.expose_issuer is not None:
        where, slash, name = flags.expose_issuer.rpartition("/")
        if slash and where != "cluster":
            raise click.UsageError("--expose-issuer takes NAME, or cluster/NAME for a ClusterIssuer.")
        exposure.tls.issuer, exposure.tls.cluster_issuer = ("", name) if slash else (name, "")


def _gateway(word: str) -> exposure_pb2.ParentGateway:
    place, _, listener = word.partition(":")
    namespace, _, name = place.rpartition("/")
    return exposure_pb2.ParentGateway(name=name, namespace=namespace, listener=listener)
