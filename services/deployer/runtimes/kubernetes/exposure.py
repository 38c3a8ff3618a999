"""A deployment's host name in Kubernetes: an Ingress or an HTTPRoute to the gateway's Service; what came of it. Pure.

Its backend is the gateway and not the pods: access checks, capture, canaries and rollouts stay as they are. All that is
written is of the standards; what a controller wants beside that are the user's annotations.

Source: kubernetes.io/docs/concepts/services-networking/ingress; gateway-api.sigs.k8s.io/reference/spec, HTTPRoute;
cert-manager.io/docs/usage/ingress.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from services.deployer.runtimes.exposures import HTTP_ROUTE, INGRESS, Exposed, ExposureStatus
from services.deployer.runtimes.kubernetes.names import APPLIED, INSTALLATION, UID, Object, Where, label_of

KINDS = {INGRESS: "Ingress", HTTP_ROUTE: "HTTPRoute"}
_ISSUER = "cert-manager.io/issuer"
_CLUSTER_ISSUER = "cert-manager.io/cluster-issuer"


def exposure_name(deployment_uid: str) -> str:
    """The name of the object."""
    digest = hashlib.sha256(f"exposure\0{deployment_uid}".encode()).digest()
    return f"ekiben-{base64.b32encode(digest).decode().lower()[:16]}"


def exposure_object(exposed: Exposed, where: Where, service: str) -> Object:
    """The Ingress or HTTPRoute. `service`: `NAME:PORT` of the gateway's."""
    name, port = service.split(":")
    number: int | None = int(port) if port.isdigit() else None
    if exposed.kind == INGRESS:
        backend = {"service": {"name": name, "port": {"name": port} if number is None else {"number": number}}}
        made = _head("networking.k8s.io/v1", exposed, where)
        made["spec"] = _ingress(exposed, backend)
    else:
        made = _head("gateway.networking.k8s.io/v1", exposed, where)
        made["spec"] = _http_route(exposed, {"name": name, **({"port": number} if number is not None else {})})
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:32]
    made["metadata"]["annotations"][APPLIED] = digest
    return made


def same(live: Object, made: Object) -> bool:
    """Whether what is there was made from this, as far as metadata tell."""
    there = live["metadata"]
    return all(
        (there.get(kind) or {}).get(key) == value
        for kind in ("labels", "annotations")
        for key, value in made["metadata"][kind].items()
    )


def status_of(exposed: Exposed, live: Object) -> ExposureStatus:
    """What the controller says of it."""
    if exposed.kind == INGRESS:
        return _ingress_status(exposed, live)
    return _http_route_status(exposed, live)


def _head(version: str, exposed: Exposed, where: Where) -> Object:
    annotations = dict(exposed.annotations)
    if exposed.tls is not None and exposed.tls.issuer:
        annotations[_ISSUER] = exposed.tls.issuer
    if exposed.tls is not None and exposed.tls.cluster_issuer:
        annotations[_CLUSTER_ISSUER] = exposed.tls.cluster_issuer
    return {
        "apiVersion": version,
        "kind": KINDS[exposed.kind],
        "metadata": {
            "name": exposure_name(exposed.deployment_uid),
            "namespace": where.namespace,
            "labels": {
                "app.kubernetes.io/managed-by": "ekiben",
                "app.kubernetes.io/name": label_of(exposed.deployment.partition("/")[2]),
                INSTALLATION: where.installation,
                UID: exposed.deployment_uid,
            },
            "annotations": annotations,
        },
    }


def _ingress(exposed: Exposed, backend: Object) -> Object:
    spec: Object = {
        "rules": [
            {
                "host": exposed.host,
                "http": {"paths": [{"path": exposed.path, "pathType": "Prefix", "backend": backend}]},
            }
        ]
    }
    if exposed.class_name:
        spec["ingressClassName"] = exposed.class_name
    if (tls := exposed.tls) is not None:
        secret = tls.secret
        if not secret and (tls.issuer or tls.cluster_issuer):
            secret = f"{exposure_name(exposed.deployment_uid)}-tls"
        spec["tls"] = [{"hosts": [exposed.host], **({"secretName": secret} if secret else {})}]
    return spec


def _http_route(exposed: Exposed, backend: Object) -> Object:
    parents = [
        {
            "name": one.name,
            **({"namespace": one.namespace} if one.namespace else {}),
            **({"sectionName": one.listener} if one.listener else {}),
        }
        for one in exposed.gateways
    ]
    match = {"path": {"type": "PathPrefix", "value": exposed.path}}
    return {
        "parentRefs": parents,
        "hostnames": [exposed.host],
        "rules": [{"matches": [match], "backendRefs": [backend]}],
    }


def _ingress_status(exposed: Exposed, live: Object) -> ExposureStatus:
    name = live["metadata"]["name"]
    found = ((live.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
    places = [one.get("hostname") or one.get("ip") for one in found if one.get("hostname") or one.get("ip")]
    if places:
        return ExposureStatus(True, "EXPOSED", f"{exposed.url} leads to {', '.join(places)} and so to the gateway.")
    kind = (live.get("spec") or {}).get("ingressClassName")
    which = f"class {kind}" if kind else "no class, and the cluster has no default one"
    return ExposureStatus(
        None,
        "INGRESS_WITHOUT_ADDRESS",
        f"No controller has given the Ingress {name} ({which}) an address yet. Is one for that class running?",
    )


def _http_route_status(exposed: Exposed, live: Object) -> ExposureStatus:
    name, generation = live["metadata"]["name"], int(live["metadata"].get("generation") or 0)
    parents = [
        one
        for one in (live.get("status") or {}).get("parents") or ()
        if any(
            (one.get("parentRef") or {}).get("name") == each.name
            and (one.get("parentRef") or {}).get("sectionName", "") == each.listener
            for each in exposed.gateways
        )
    ]
    told = [condition for one in parents for condition in _conditions(one, generation)]
    for kind in ("Accepted", "ResolvedRefs"):
        refused = [one for one in told if one["type"] == kind and one["status"] == "False"]
        if refused:
            said = str(refused[0].get("message") or refused[0].get("reason"))
            return ExposureStatus(
                False, "HTTP_ROUTE_NOT_ACCEPTED", f"The Gateway does not take the HTTPRoute {name}: {said}"
            )
    accepted = sum(one["type"] == "Accepted" and one["status"] == "True" for one in told)
    if accepted >= len(exposed.gateways):
        return ExposureStatus(True, "EXPOSED", f"{exposed.url} leads to the gateway.")
    waited = ", ".join(one.name for one in exposed.gateways)
    return ExposureStatus(
        None,
        "HTTP_ROUTE_PENDING",
        f"No controller has said yet whether it takes the HTTPRoute {name} (Gateway {waited}). Is it there, and "
        "its controller?",
    )


def _conditions(parent: Mapping[str, Any], generation: int) -> Sequence[Mapping[str, Any]]:
    """What is said of this generation: not of an older one."""
    return [
        one for one in parent.get("conditions") or () if int(one.get("observedGeneration") or generation) >= generation
    ]
