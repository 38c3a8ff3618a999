"""What is wrong with a pod, in words."""

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from ekiben.errors import PermissionDenied
from services.deployer.runtimes import Phase, SetStatus
from services.deployer.runtimes.kubernetes import events
from services.deployer.runtimes.kubernetes.events import Explainer
from services.deployer.runtimes.kubernetes.pods import lost_of, not_made, overdue, replica_of, troubled
from services.kernel.clock import ManualClock

RUNNING = {"running": {"startedAt": "2026-01-01T00:00:10Z"}}
SCHEDULED = {"type": "PodScheduled", "status": "True"}


def pod(conditions: Iterable[dict[str, Any]] = (SCHEDULED,), **status: Any) -> dict[str, Any]:
    metadata = {"name": "ekiben-abc-1-2", "uid": "u1", "labels": {"ekiben.dev/set": "abc"}}
    return {"metadata": metadata, "spec": {"nodeName": "node-1"}, "status": {"conditions": [*conditions], **status}}


def container(state: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    return [{"name": "bento", "state": state, **more}]


def waiting(reason: str, message: str = "") -> list[dict[str, Any]]:
    return container({"waiting": {"reason": reason, "message": message}})


def warning(message: str, at: str = "2026-01-01T00:00:20Z", reason: str = "Unhealthy") -> dict[str, Any]:
    return {"type": "Warning", "reason": reason, "message": message, "lastTimestamp": at}


@pytest.mark.parametrize(
    ("status", "phase", "said"),
    [
        (
            {
                "containerStatuses": waiting(
                    "ErrImagePull", 'failed to resolve reference "h/x@sha256:0": h/x: not found'
                )
            },
            Phase.STARTING,
            "Image not found: failed to resolve reference",
        ),
        (
            {"containerStatuses": waiting("ImagePullBackOff", "pull access denied, authorization failed: 401")},
            Phase.STARTING,
            "The registry does not let the node have the image (is the pull secret right?): pull access",
        ),
        (
            {"containerStatuses": waiting("ErrImagePull", "dial tcp 10.0.0.1:443: connect: connection refused")},
            Phase.STARTING,
            "The node does not reach the image's registry: dial tcp",
        ),
        (
            {"containerStatuses": waiting("CreateContainerConfigError", 'secret "hub" not found')},
            Phase.CRASHED,
            'The container cannot be made: secret "hub" not found',
        ),
        (
            {"containerStatuses": container({"terminated": {"reason": "OOMKilled", "exitCode": 137}}, restartCount=1)},
            Phase.CRASHED,
            "It used more memory than its instance type has",
        ),
        (
            {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."},
            Phase.CRASHED,
            "Its node put it out: The node was low on resource: memory.",
        ),
        (
            {
                "phase": "Failed",
                "conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}],
            },
            Phase.CRASHED,
            "A pod of a higher priority took its place.",
        ),
        (
            {
                "initContainerStatuses": [
                    {"name": "fetch", "state": {"terminated": {"exitCode": 3, "reason": "Error"}}},
                ],
                "containerStatuses": waiting("PodInitializing"),
            },
            Phase.CRASHED,
            "Container fetch, which goes before it: It ended with status 3.",
        ),
        (
            {
                "containerStatuses": [
                    *container(RUNNING, started=True, ready=True),
                    {"name": "sidecar", "ready": False, "state": {}},
                ]
            },
            Phase.UNREADY,
            "Its container sidecar is not ready.",
        ),
    ],
)
def test_a_pod_says_itself_what_is_wrong(status: dict[str, Any], phase: Phase, said: str) -> None:
    seen = replica_of(pod(**status))
    assert (seen.phase, seen.message[: len(said)]) == (phase, said)


def test_what_a_probe_was_answered_is_told_from_events() -> None:
    unready = pod(containerStatuses=container(RUNNING, started=True))
    assert replica_of(unready).message == "It does not answer its readiness probe."
    answered = [warning("Readiness probe failed: HTTP probe failed with statuscode: 503")]
    assert replica_of(unready, answered).message == "It answers its readiness probe with 503."
    starting = pod(containerStatuses=container(RUNNING, started=False))
    silent = [warning('Startup probe failed: Get "http://10.1.1.1:3000/readyz": connection refused')]
    assert replica_of(starting, silent).message == (
        'It runs, but is not ready: it does not answer its startup probe: Get "http://10.1.1.1:3000/readyz": '
        "connection refused"
    )


def test_a_probe_of_the_run_before_says_nothing_of_this_one_but_how_that_ended() -> None:
    before = [warning("Liveness probe failed: HTTP probe failed with statuscode: 500", at="2026-01-01T00:00:01Z")]
    starting = pod(containerStatuses=container(RUNNING, started=False))
    assert replica_of(starting, before).message == "It is starting."
    ended = {"exitCode": 137, "reason": "Error"}
    crashed = pod(
        containerStatuses=container({"waiting": {"reason": "CrashLoopBackOff"}}, lastState={"terminated": ended})
    )
    assert replica_of(crashed, before).message == "It was killed by SIGKILL. It answers its liveness probe with 500."


def test_what_keeps_a_container_from_being_made_is_told_from_events() -> None:
    making = pod(containerStatuses=waiting("ContainerCreating"))
    missing = [warning('MountVolume.SetUp failed for volume "conf": configmap "x" not found', reason="FailedMount")]
    assert replica_of(making, missing).message.startswith("Its container cannot be made yet: MountVolume.SetUp failed")


def test_a_quota_and_a_security_standard_are_named() -> None:
    def failing(message: str) -> dict[str, Any]:
        return {"status": {"conditions": [{"type": "ReplicaFailure", "status": "True", "message": message}]}}

    assert not_made(failing('pods "x" is forbidden: exceeded quota: q'))[0] == "QUOTA_EXCEEDED"
    assert "security standard" in not_made(failing('violates PodSecurity "restricted:latest"'))[1]
    assert not_made({"status": {}}) == ("", "")


class Events:
    """A cluster's answers, counted."""

    def __init__(self) -> None:
        self.asked = 0
        self.items: list[dict[str, Any]] = []
        self.denied = False

    async def listed(self, kind: str, selector: str, *, fields: str = "") -> tuple[list[dict[str, Any]], str]:
        self.asked += 1
        if self.denied:
            raise PermissionDenied("no", reason="KUBERNETES_DENIED")
        return self.items, "1"


async def test_events_are_asked_for_while_a_pod_is_in_trouble_and_ever_more_seldom() -> None:
    api, clock = Events(), ManualClock()
    explainer = Explainer(api, clock)  # type: ignore[arg-type]
    fine = pod(conditions=[SCHEDULED, {"type": "Ready", "status": "True"}], containerStatuses=container(RUNNING))
    unready = pod(containerStatuses=container(RUNNING, started=True))
    assert not troubled(fine) and troubled(unready)
    explainer.heard("set", fine)
    assert not await explainer.turn()
    assert (api.asked, explainer.pause_s()) == (0, None)
    stamps = {"creationTimestamp": "2026-01-01T00:00:00Z"}
    api.items = [{**warning("Readiness probe failed: HTTP probe failed with statuscode: 503"), "metadata": stamps}]
    explainer.heard("set", unready)
    assert await explainer.turn() == {"set"}
    assert "503" in replica_of(unready, explainer.of(unready)).message
    assert not await explainer.turn()  # Nothing is due.
    assert api.asked == 1
    for _ in range(100):
        await clock.advance(6)
        await explainer.turn()
    assert api.asked <= 6
    explainer.heard("set", fine)
    assert await explainer.turn() == {"set"}
    assert (explainer.of(unready), explainer.pause_s()) == ((), None)


async def test_where_events_may_not_be_read_nobody_asks_twice() -> None:
    api = Events()
    api.denied = True
    explainer = Explainer(api, ManualClock())  # type: ignore[arg-type]
    unready = pod(containerStatuses=container(RUNNING, started=True))
    explainer.heard("set", unready)
    await explainer.turn()
    await explainer.turn()
    assert (api.asked, explainer.pause_s()) == (1, None)


async def test_events_of_a_deployment_are_those_of_its_objects_alone() -> None:
    def item(name: str, at: str) -> dict[str, Any]:
        return {
            "metadata": {"uid": f"e-{name}", "creationTimestamp": at},
            "involvedObject": {"kind": "Pod", "name": name},
            "type": "Warning",
            "reason": "FailedScheduling",
            "message": "0/2 nodes are available",
            "eventTime": at,
            "series": {"count": 4, "lastObservedTime": "2026-01-01T00:01:00.000000Z"},
            "reportingComponent": "default-scheduler",
        }

    api = Events()
    api.items = [item(name, "2026-01-01T00:00:05.000000Z") for name in ("ekiben-abc-1-2", "ekiben-abcd-1-2", "other")]
    known = {"abc": SetStatus("abc", "deployments/iris", "uid", 3, "main", "Iris", 1)}
    found = [each async for each in events.of_deployment(api, lambda: known, follow=False)]  # type: ignore[arg-type]
    (one,) = found
    assert (one.replica, one.service, one.revision, one.count, one.warning) == ("ekiben-abc-1-2", "Iris", 3, 4, True)
    assert one.time == datetime(2026, 1, 1, 0, 1, tzinfo=UTC)
    assert one.object == "Pod/ekiben-abc-1-2"


def test_a_node_that_is_away_is_said_and_not_what_probes_were_answered_before() -> None:
    unready = {"type": "Ready", "status": "False", "lastTransitionTime": "2026-01-01T00:10:00Z"}
    away = pod(conditions=[SCHEDULED, unready], containerStatuses=container(RUNNING, started=True, ready=True))
    startup = warning("Startup probe failed: dial tcp 10.0.0.1:3000: connect: connection refused")
    assert replica_of(away, [startup]).message == "It does not answer its readiness probe."
    lost = warning("Node is not ready", at="2026-01-01T00:10:00Z", reason="NodeNotReady")
    assert replica_of(away, [startup, lost]).message == "Its node node-1 does not answer the cluster."
    # It came back, and went by itself later.
    earlier = warning("Node is not ready", at="2026-01-01T00:05:00Z", reason="NodeNotReady")
    assert replica_of(away, [startup, earlier]).message == "It does not answer its readiness probe."


def test_a_pod_whose_node_never_says_that_it_ended_is_lost() -> None:
    leaving = pod(containerStatuses=container(RUNNING, started=True, ready=True))
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:10:00Z"
    assert not overdue(leaving, datetime(2026, 1, 1, 0, 10, 29, tzinfo=UTC))
    assert overdue(leaving, datetime(2026, 1, 1, 0, 10, 31, tzinfo=UTC))
    assert not overdue(pod(), datetime(2027, 1, 1, tzinfo=UTC))
    found = lost_of(replica_of(leaving))
    assert (found.phase, found.lost, "kubectl delete node" in found.message) == (Phase.DRAINING, True, True)
    assert lost_of(replace(found, message="Its node is gone: x")).message.startswith(
        "Its node is gone: x. Its node does"
    )
