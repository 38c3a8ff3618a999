"""What EndpointSlices say of a set's replicas."""

from typing import Any

import pytest

from services.deployer.runtimes import Phase, ReplicaStatus
from services.deployer.runtimes.kubernetes.names import SET
from services.deployer.runtimes.kubernetes.pods import replica_of
from services.deployer.runtimes.kubernetes.slices import endpoints_of, placed


def a_slice(key: str, *endpoints: dict[str, Any], port: int = 3000) -> dict[str, Any]:
    return {
        "metadata": {"name": f"ekiben-{key}-x", "labels": {SET: key}},
        "ports": [{"name": "http", "port": port}],
        "endpoints": list(endpoints),
    }


def endpoint(pod: str, ip: str = "10.0.0.7", **conditions: bool) -> dict[str, Any]:
    return {"addresses": [ip], "conditions": conditions, "targetRef": {"kind": "Pod", "name": pod}}


def replica(phase: Phase, name: str = "p") -> ReplicaStatus:
    return ReplicaStatus(name, phase, "10.0.0.1:3000")


@pytest.mark.parametrize(
    ("conditions", "before", "after", "serving"),
    [
        ({"ready": True, "serving": True, "terminating": False}, Phase.READY, Phase.READY, False),
        ({}, Phase.READY, Phase.READY, False),
        ({"ready": False, "serving": False}, Phase.READY, Phase.STARTING, False),
        ({"ready": True, "serving": True}, Phase.UNREADY, Phase.UNREADY, False),
        ({"ready": False, "serving": True, "terminating": True}, Phase.DRAINING, Phase.DRAINING, True),
        ({"ready": False, "serving": False, "terminating": True}, Phase.DRAINING, Phase.DRAINING, False),
    ],
)
def test_a_replica_gets_requests_where_its_pod_and_its_service_say_so(
    conditions: dict[str, bool], before: Phase, after: Phase, serving: bool
) -> None:
    found = endpoints_of([a_slice("k", endpoint("p", **conditions), port=3001)])
    seen = placed(replica(before), found.get("k"))
    assert (seen.phase, seen.serving, seen.address) == (after, serving, seen.address)
    assert after is not before or seen.address == "10.0.0.7:3001"


def test_a_ready_pod_that_its_service_does_not_list_gets_nothing_and_without_a_service_its_own_word_counts() -> None:
    found = endpoints_of([a_slice("k", endpoint("other"))])
    assert placed(replica(Phase.READY), found.get("k")).phase is Phase.STARTING
    assert placed(replica(Phase.READY), found.get("gone")) == replica(Phase.READY)


def test_several_slices_and_both_families_are_one_place() -> None:
    one, two = a_slice("k", endpoint("p", ready=True)), a_slice("k", endpoint("q", "fd00::7", ready=True))
    again = a_slice("k", endpoint("p", "fd00::8", ready=True))
    found = endpoints_of([one, two, again])["k"]
    assert {name: each.address for name, each in found.items()} == {"p": "10.0.0.7:3000", "q": "[fd00::7]:3000"}


def test_a_readiness_gate_is_said_in_words() -> None:
    said = 'the status of pod readiness gate "mesh" is not "True", but False'
    found = replica_of(
        {
            "metadata": {"name": "p"},
            "status": {
                "podIP": "10.0.0.7",
                "conditions": [
                    {"type": "Ready", "status": "False", "reason": "ReadinessGatesNotReady", "message": said}
                ],
                "containerStatuses": [{"name": "bento", "ready": True, "started": True, "state": {"running": {}}}],
            },
        }
    )
    assert (found.phase, found.message) == (Phase.STARTING, f"It answers, and waits for others: {said}")
