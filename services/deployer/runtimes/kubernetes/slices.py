"""What EndpointSlices say of a set's pods: who gets requests, and at which address. Pure.

They are Kubernetes' own word on it, the same that kube-proxy and ingress controllers go by: readiness gates are in it,
what an operator changed of the Service, and that a leaving pod still answers.

Source: kubernetes.io/docs/concepts/services-networking/endpoint-slices, "Conditions".
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from services.deployer.runtimes import Phase, ReplicaStatus
from services.deployer.runtimes.kubernetes.names import SET, Object, label

Place = dict[str, "Endpoint"]
"""The endpoints of one set by the names of their pods."""


class Endpoint(NamedTuple):
    """One endpoint of a Service."""

    address: str
    ready: bool
    serving: bool
    """Whether it answers, be it leaving or not."""


def endpoints_of(slices: Iterable[Object]) -> dict[str, Place]:
    """Endpoints by set. A set that is not in it has no slice: its Service is not there, or not yet."""
    found: dict[str, Place] = {}
    for each in slices:
        key = label(each, SET)
        place = found.setdefault(key, {})
        port = next((one.get("port") for one in each.get("ports") or () if one.get("name") == "http"), None)
        if port is None:
            continue
        for one in each.get("endpoints") or ():
            target, conditions = one.get("targetRef") or {}, one.get("conditions") or {}
            if target.get("kind") != "Pod" or not one.get("addresses"):
                continue
            ip = str(one["addresses"][0])
            address = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
            # Absent means true, and for `serving` what `ready` says.
            ready = conditions.get("ready") is not False
            serving = conditions.get("serving")
            # Of two families of addresses the first one that is told stays, so that a route does not change.
            place.setdefault(str(target["name"]), Endpoint(address, ready, ready if serving is None else bool(serving)))
    return found


def placed(replica: ReplicaStatus, place: Mapping[str, Endpoint] | None) -> ReplicaStatus:
    """The replica as its Service has it. Where there is no Service (None), its pod's own word counts."""
    if place is None:
        return replica
    endpoint = place.get(replica.replica)
    if replica.phase is Phase.READY and (endpoint is None or not endpoint.ready):
        return replace(replica, phase=Phase.STARTING, message="It is ready, and its Service does not list it yet.")
    if endpoint is None:
        return replica
    if replica.phase is not Phase.DRAINING and replica.address == endpoint.address:
        return replica  # As nearly all are: there may be ten thousand, at each look.
    return replace(replica, address=endpoint.address, serving=endpoint.serving and replica.phase is Phase.DRAINING)
