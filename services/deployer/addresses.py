"""Under which names a deployment is reached: its own port, its host name, and what a cluster exposes. Pure."""

import re
from collections.abc import Collection
from urllib.parse import urlsplit

from google.protobuf import json_format

from ekiben.deployer.v1 import exposure_pb2
from ekiben.errors import FailedPrecondition, InvalidArgument
from services.deployer import messages
from services.deployer.domain import Deployment
from services.deployer.runtimes.exposures import HTTP_ROUTE, INGRESS, Exposed, Parent, Tls
from services.deployer.settings import Settings
from services.kernel.settings import SettingsError

CONDITION = "Exposed"
"""Type of the condition that says what came of an exposure."""
_PART = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}$){_PART}(\.{_PART})*")
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([-.a-z0-9]*[a-z0-9])?")
_ANNOTATION = re.compile(r"([a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?")
_PATH = re.compile(r"/[A-Za-z0-9/._~%-]*")
_MOST_ANNOTATION_BYTES = 64 << 10
_MOST_LABEL_CHARS = 63
Violations = list[tuple[str, str]]


class Addresses:
    """See the module."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError where the settings' own exposure is not one."""
        self._settings = settings
        self._public = urlsplit(settings.public_url)
        self._default = _default_of(settings)
        if self._default is not None:
            found = self._violations(self._default, "exposure", own="")
            if settings.runtime != "kubernetes" or not settings.kubernetes_gateway_service:
                found.append(("exposure", "needs the runtime kubernetes, and kubernetes_gateway_service"))
            if found:
                raise SettingsError([f"{field}: {why}." for field, why in found])

    def host_of(self, name: str) -> str:
        """The host name that each deployment has."""
        return f"{name}-{self._settings.namespace}.{self._settings.domain}"

    def by_name(self, name: str) -> str:
        """The gateway's URL for it by its host name."""
        port = f":{self._public.port}" if self._public.port else ""
        return f"{self._public.scheme}://{self.host_of(name)}{port}"

    def hosts(self, deployment: Deployment) -> list[str]:
        """All host names that the gateway takes for it."""
        exposed = self.exposed(deployment)
        return list(dict.fromkeys([self.host_of(deployment.name), *([exposed.host] if exposed else [])]))

    def urls(self, deployment: Deployment) -> list[str]:
        """Where requests go, the one to use first: from outside, once the cluster says that it leads here."""
        host = self._settings.host
        authority = f"[{host}]" if ":" in host else host
        found = [f"http://{authority}:{deployment.port}"] if deployment.port else []
        if not found or self._settings.domain != "localhost":
            found.append(self.by_name(deployment.name))
        if (exposed := self.exposed(deployment)) is not None:
            leads = any(one.type == CONDITION and one.status for one in deployment.status.conditions)
            found.insert(0 if leads else len(found), exposed.url)
        return found

    def exposed(self, deployment: Deployment) -> Exposed | None:
        """What its cluster should lead to the gateway; None for nothing."""
        sent = messages.exposure(deployment.exposure) or self._default
        if sent is None or sent.kind not in (exposure_pb2.Exposure.INGRESS, exposure_pb2.Exposure.HTTP_ROUTE):
            return None
        return Exposed(
            f"deployments/{deployment.name}",
            deployment.uid,
            INGRESS if sent.kind == exposure_pb2.Exposure.INGRESS else HTTP_ROUTE,
            sent.host or self.host_of(deployment.name),
            sent.path or "/",
            sent.class_name,
            dict(sent.annotations),
            tuple(Parent(one.name, one.namespace, one.listener) for one in sent.gateways),
            Tls(sent.tls.secret, sent.tls.issuer, sent.tls.cluster_issuer) if sent.HasField("tls") else None,
        )

    def violations(self, sent: exposure_pb2.Exposure, name: str) -> Violations:
        """What is wrong with the exposure of the deployment with this name."""
        return self._violations(sent, "deployment.exposure", own=self.host_of(name) if name else "")

    def check_name(self, deployment: Deployment) -> None:
        """Whether the host name that it has by its name is one, where it has neither a port nor a host of its own.

        Raises:
            InvalidArgument: the name is too long for that (NAME_TOO_LONG).
        """
        exposed, host = self.exposed(deployment), self.host_of(deployment.name)
        first = host.partition(".")[0]
        needed = exposed.host == host if exposed is not None else not deployment.port
        if needed and len(first) > _MOST_LABEL_CHARS:
            most = len(deployment.name) - (len(first) - _MOST_LABEL_CHARS)
            raise InvalidArgument(
                f"deployments/{deployment.name} would be reached at {first}, and no part of a host name may have more "
                f"than {_MOST_LABEL_CHARS} characters: choose a name of at most {most}, or a host of its own.",
                reason="NAME_TOO_LONG",
                violations=[("deployment.name", f"at most {most} characters")],
            )

    def check(self, sent: exposure_pb2.Exposure) -> None:
        """Whether this platform can expose anything.

        Raises:
            FailedPrecondition: its runtime cannot (EXPOSURE_UNSUPPORTED), or it does not know the gateway's Service
                (GATEWAY_SERVICE_MISSING).
        """
        if sent.kind not in (exposure_pb2.Exposure.INGRESS, exposure_pb2.Exposure.HTTP_ROUTE):
            return
        if self._settings.runtime != "kubernetes":
            raise FailedPrecondition(
                f"Replicas here are run by the runtime {self._settings.runtime}, which has no Ingress and no Gateway: "
                "leave `exposure` out, and put a proxy in front of the gateway where one is needed.",
                reason="EXPOSURE_UNSUPPORTED",
                runtime=self._settings.runtime,
            )
        if not self._settings.kubernetes_gateway_service:
            raise FailedPrecondition(
                "Nobody has said to which Service of the cluster requests from outside should go: set "
                "EKIBEN_DEPLOYER_KUBERNETES_GATEWAY_SERVICE to NAME:PORT of the gateway's.",
                reason="GATEWAY_SERVICE_MISSING",
            )

    def _violations(self, sent: exposure_pb2.Exposure, at: str, own: str) -> Violations:
        found: Violations = []
        host, domain = sent.host, self._settings.domain
        if host and not _HOST.fullmatch(host):
            found.append((f"{at}.host", f"{host[:80]!r} is no host name in lower case"))
        elif host in (domain, self._public.hostname):
            found.append((f"{at}.host", f"{host} is the platform's own"))
        elif host.endswith(f".{domain}") and host != own:
            found.append((f"{at}.host", f"below {domain} a deployment has {own or 'NAME-NAMESPACE'} and no other name"))
        elif host and host != own and not _below(host, self._settings.exposure_domains):
            allowed = ", ".join(self._settings.exposure_domains)
            found.append((f"{at}.host", f"must be in or below one of {allowed}"))
        if sent.path and (not _PATH.fullmatch(sent.path) or ".." in sent.path.split("/") or len(sent.path) > 1024):
            found.append((f"{at}.path", "must begin with /, with at most 1,024 of A-Z, a-z, 0-9, /, ., _, ~, % and -"))
        for key in sent.annotations:
            if not _ANNOTATION.fullmatch(key) or "ekiben.dev/" in key:
                found.append((f"{at}.annotations[{key[:64]}]", "is no key of an annotation that may be set here"))
        if sum(len(key) + len(value) for key, value in sent.annotations.items()) > _MOST_ANNOTATION_BYTES:
            found.append((f"{at}.annotations", f"hold more than {_MOST_ANNOTATION_BYTES} bytes"))
        return found + _kind_violations(sent, at) + _name_violations(sent, at)


def _kind_violations(sent: exposure_pb2.Exposure, at: str) -> Violations:
    found: Violations = []
    tls = sent.tls
    if tls.issuer and tls.cluster_issuer:
        found.append((f"{at}.tls", "issuer and cluster_issuer exclude one another"))
    if sent.kind == exposure_pb2.Exposure.INGRESS and sent.gateways:
        found.append((f"{at}.gateways", "are for an HTTP_ROUTE"))
    elif sent.kind == exposure_pb2.Exposure.HTTP_ROUTE:
        if not sent.gateways:
            found.append((f"{at}.gateways", "an HTTP_ROUTE needs a Gateway to be attached to"))
        if sent.class_name:
            found.append((f"{at}.class_name", "is for an INGRESS"))
        if tls.secret or tls.issuer or tls.cluster_issuer:
            found.append((f"{at}.tls", "must be empty: the Gateway's listener has the certificate of an HTTP_ROUTE"))
    elif sent.kind not in (exposure_pb2.Exposure.INGRESS, exposure_pb2.Exposure.NONE) and sent.ByteSize():
        found.append((f"{at}.kind", "must be NONE, INGRESS or HTTP_ROUTE"))
    return found


def _name_violations(sent: exposure_pb2.Exposure, at: str) -> Violations:
    named = {
        "class_name": sent.class_name,
        "tls.secret": sent.tls.secret,
        "tls.issuer": sent.tls.issuer,
        "tls.cluster_issuer": sent.tls.cluster_issuer,
    }
    for index, one in enumerate(sent.gateways):
        named |= {f"gateways[{index}].namespace": one.namespace, f"gateways[{index}].listener": one.listener}
        named[f"gateways[{index}].name"] = one.name or "?"
    return [
        (f"{at}.{field}", "is required" if name == "?" else f"{name[:80]!r} is no name of a Kubernetes object")
        for field, name in named.items()
        if name and not _NAME.fullmatch(name)
    ]


def _below(host: str, domains: Collection[str]) -> bool:
    return not domains or any(host == domain or host.endswith(f".{domain}") for domain in domains)


def _default_of(settings: Settings) -> exposure_pb2.Exposure | None:
    if not settings.exposure:
        return None
    try:
        found = json_format.Parse(settings.exposure, exposure_pb2.Exposure())
    except json_format.ParseError as exc:
        raise SettingsError([f"exposure: {exc}. It is the JSON of a deployment's `exposure`, without a host."]) from exc
    if found.host:
        raise SettingsError(["exposure: each deployment has a host of its own; leave `host` out."])
    return found
