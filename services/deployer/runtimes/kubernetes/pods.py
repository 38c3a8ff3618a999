"""A pod as the port sees a replica, with what is wrong in words. Pure.

Most of it the pod itself says. What its probes were answered, and why a volume is not there, stands in events only:
`troubled` says of which pods these are worth asking for, `replica_of` puts them into words.

Source: kubernetes.io/docs/concepts/workloads/pods: pod-lifecycle, disruptions. Messages are kubelet's and containerd's.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from services.deployer.runtimes import Phase, ReplicaStatus
from services.deployer.runtimes.kubernetes.names import CONTAINER, PORT, Object

_NO_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_NOT_MADE = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError")
_FORBIDDEN = re.compile(r"unauthorized|forbidden|denied|authorization failed|no basic auth|\b40[13]\b", re.I)
_UNREACHABLE = re.compile(r"dial tcp|i/o timeout|no such host|connection refused|TLS|x509|deadline exceeded", re.I)
_DISRUPTED = {
    "PreemptionByScheduler": "A pod of a higher priority took its place",
    "DeletionByTaintManager": "Its node has a taint that it does not tolerate",
    "EvictionByEvictionAPI": "It was evicted by request, as when a node is drained",
    "DeletionByPodGC": "Its node is gone",
    "TerminationByKubelet": "Its node put it out",
}
_PROBE = re.compile(
    r"(Readiness|Liveness|Startup) probe (?:failed|errored)(?: and resulted in .*?)?: (?P<what>.*)", re.S
)
_STATUS = re.compile(r"HTTP probe failed with statuscode: (\d+)")
_OVERDUE = timedelta(seconds=30)
"""Kubelets take some seconds to say that a pod ended once its time is over; after this one does not answer."""
_SIGNALS = {137: "SIGKILL", 139: "SIGSEGV", 134: "SIGABRT", 143: "SIGTERM"}


def replica_of(pod: Object, events: Sequence[Object] = ()) -> ReplicaStatus:
    """The replica. Of a pod that ended for good (evicted, its node gone) the phase is CRASHED.

    `events`: warnings about the pod, oldest first, as far as somebody asked for them.
    """
    status, metadata = pod.get("status") or {}, pod["metadata"]
    container = _container(status)
    restarts = int(container.get("restartCount") or 0)
    ready = _condition(status, "Ready").get("status") == "True"
    phase, message = _phase(pod, status, container, ready=ready)
    if phase in (Phase.STARTING, Phase.UNREADY, Phase.CRASHED):
        message = _explained(message, phase, events, since=_began(container))
    if phase is Phase.UNREADY and _node_away(status, events):
        message = f"Its node {pod.get('spec', {}).get('nodeName', '')} does not answer the cluster."
    address = f"{status['podIP']}:{PORT}" if status.get("podIP") else ""
    if ":" in status.get("podIP", ""):
        address = f"[{status['podIP']}]:{PORT}"
    ended = _last_end(container)
    never = not ready and not container.get("started") and not ended
    return ReplicaStatus(
        metadata["name"],
        phase,
        address,
        message,
        str(ended.get("message") or "")[-2000:],
        restart_count=restarts,
        failed_starts=0 if ready or never else restarts,
        start_time=_time(status.get("startTime")),
    )


def troubled(pod: Object) -> bool:
    """Whether events may tell more of it than it does itself: it is not ready, and it is not clear why."""
    status = pod.get("status") or {}
    if pod["metadata"].get("deletionTimestamp") or status.get("phase") in ("Failed", "Succeeded"):
        return False
    if _condition(status, "Ready").get("status") == "True":
        return False
    if _condition(status, "PodScheduled").get("status") != "True":
        return False
    return _waiting(_container(status))[0] not in (*_NO_IMAGE, *_NOT_MADE)


def overdue(pod: Object, now: datetime) -> bool:
    """Whether a pod that was told to end should have, and its node does not say so."""
    until = _time(pod["metadata"].get("deletionTimestamp"))
    return until is not None and now > until + _OVERDUE


def lost_of(replica: ReplicaStatus) -> ReplicaStatus:
    """The replica of a pod that is overdue."""
    said = "Its node does not say that it ended, so nobody waits for it. It goes with the Node: `kubectl delete node`."
    before = f"{replica.message.rstrip('.')}. " if replica.message else ""
    return replace(replica, lost=True, serving=False, message=f"{before}{said}")


def not_made(deployment: Object) -> tuple[str, str]:
    """Why the cluster makes no more pods of a Deployment: the reason (a quota, say), and words. Empty where it does."""
    failure = _condition(deployment.get("status") or {}, "ReplicaFailure")
    if failure.get("status") != "True":
        return "", ""
    said = _short(failure.get("message") or failure.get("reason") or "")
    if "exceeded quota" in said:
        return "QUOTA_EXCEEDED", f"The namespace's quota is used up, so that no pod is made: {said}"
    if "PodSecurity" in said:
        return "POD_SECURITY", f"The namespace's pod security standard refuses the pods: {said}"
    return "POD_REFUSED", f"The cluster makes no pod: {said}"


def _phase(pod: Object, status: Mapping[str, Any], container: Mapping[str, Any], *, ready: bool) -> tuple[Phase, str]:
    if pod["metadata"].get("deletionTimestamp"):
        return Phase.DRAINING, _disrupted(status)
    if status.get("phase") in ("Failed", "Succeeded"):
        return Phase.CRASHED, _gone(status)
    if ready:
        return Phase.READY, ""
    reason, message = _waiting(container)
    if reason in _NO_IMAGE:
        return Phase.STARTING, _no_image(reason, message)
    if reason in _NOT_MADE:
        return Phase.CRASHED, f"The container cannot be made: {_short(message or reason)}"
    if reason == "CrashLoopBackOff":
        return Phase.CRASHED, _ended(container)
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        what = "A gate keeps the pod from being scheduled" if scheduled.get("reason") == "SchedulingGated" else ""
        return Phase.STARTING, f"{what or 'No node takes the pod'}: {_short(scheduled.get('message') or '')}"
    gates = _condition(status, "Ready")
    if gates.get("reason") == "ReadinessGatesNotReady":
        return Phase.STARTING, f"It answers, and waits for others: {_short(gates.get('message') or '')}"
    if (first := _initializing(status)) is not None:
        return first
    if container.get("started"):
        return Phase.UNREADY, _unready(status)
    if "terminated" in (container.get("state") or {}):
        return Phase.CRASHED, _ended(container)
    if "running" in (container.get("state") or {}):
        return Phase.STARTING, _ended(container) if container.get("restartCount") else "It is starting."
    return Phase.STARTING, "Its container is being made."


def _no_image(reason: str, message: str) -> str:
    said = _short(message or reason)
    if reason == "InvalidImageName":
        return f"The image's name cannot be read: {said}"
    # What the registry said of the image comes first: its address may be in the same sentence.
    if re.search(r"not found|no such image|manifest unknown|\b404\b", said, re.I):
        return f"Image not found: {said}"
    if _FORBIDDEN.search(said):
        return f"The registry does not let the node have the image (is the pull secret right?): {said}"
    if _UNREACHABLE.search(said):
        return f"The node does not reach the image's registry: {said}"
    return f"Image not found: {said}" if reason == "ErrImageNeverPull" else f"The image cannot be pulled: {said}"


def _initializing(status: Mapping[str, Any]) -> tuple[Phase, str] | None:
    """What keeps a container that goes before ours from ending well."""
    for one in status.get("initContainerStatuses") or ():
        name, (reason, message) = one["name"], _waiting(one)
        if reason in _NO_IMAGE:
            return Phase.STARTING, f"Container {name}: {_no_image(reason, message)}"
        if reason in _NOT_MADE:
            return Phase.CRASHED, f"Container {name} cannot be made: {_short(message or reason)}"
        ended = _last_end(one)
        if ended and int(ended.get("exitCode") or 0):
            return Phase.CRASHED, f"Container {name}, which goes before it: {_ended(one)}"
    return None


def _unready(status: Mapping[str, Any]) -> str:
    """Of one that runs: its own probe, another container, or a gate of somebody's."""
    lacking = [
        str(one["name"])
        for one in status.get("containerStatuses") or ()
        if not one.get("ready") and one["name"] != CONTAINER
    ]
    if lacking and _container(status).get("ready"):
        return f"Its container {', '.join(lacking)} is not ready."
    return "It does not answer its readiness probe."


def _gone(status: Mapping[str, Any]) -> str:
    """Of a pod that ended for good."""
    said = _short(status.get("message") or "")
    if status.get("reason") == "Evicted":
        return f"Its node put it out: {said}"
    if why := _disrupted(status):
        return why
    return f"The pod ended: {said or status.get('reason') or _ended(_container(status))}"


def _disrupted(status: Mapping[str, Any]) -> str:
    """Who ended the pod, where the cluster says so."""
    target = _condition(status, "DisruptionTarget")
    if target.get("status") != "True":
        return ""
    said = _short(target.get("message") or "")
    return f"{_DISRUPTED.get(str(target.get('reason')), 'The cluster ended it')}{f': {said}' if said else '.'}"


def _ended(container: Mapping[str, Any]) -> str:
    """How the container ended last."""
    ended = _last_end(container)
    if ended.get("reason") == "OOMKilled":
        return "It used more memory than its instance type has, so the kernel ended it."
    if not ended:
        return "It ended."
    code = int(ended.get("exitCode") or 0)
    if ended.get("reason") in ("ContainerCannotRun", "StartError"):
        return f"It cannot be run: {_short(ended.get('message') or '')}"
    return f"It was killed by {_SIGNALS[code]}." if code in _SIGNALS else f"It ended with status {code}."


def _explained(message: str, phase: Phase, events: Sequence[Object], since: datetime | None) -> str:
    """With what events add: what probes were answered, and what keeps a container from being made."""
    probes, others = [], []
    for event in events:
        text = str(event.get("message") or "")
        if _PROBE.match(text):
            # A probe of a run before this one says nothing of this one, unless that is how it ended.
            when = _time(event.get("lastTimestamp") or event.get("eventTime"))
            if since is None or when is None or when >= since or phase is Phase.CRASHED:
                probes.append(text)
        elif event.get("reason") not in ("BackOff", "FailedScheduling", "Failed"):
            others.append(text)
    if message == "Its container is being made." and others:
        return f"Its container cannot be made yet: {_short(others[-1])}"
    if probes and phase is Phase.CRASHED and any("Liveness" in text for text in probes):
        liveness = [text for text in probes if "Liveness" in text]
        return f"{message} {_probed(liveness[-1])}"
    if phase is Phase.UNREADY:  # It has started: what was answered before says nothing any more.
        probes = [text for text in probes if not text.startswith("Startup")]
    if probes and phase is Phase.UNREADY and message == "It does not answer its readiness probe.":
        return _probed(probes[-1])
    if probes and phase is Phase.STARTING and message == "It is starting.":
        return f"It runs, but is not ready: {_uncapitalized(_probed(probes[-1]))}"
    return message


def _probed(text: str) -> str:
    found = _PROBE.match(text)
    assert found is not None
    kind, what = found[1].lower(), _short(found["what"])
    if status := _STATUS.match(what):
        return f"It answers its {kind} probe with {status[1]}."
    return f"It does not answer its {kind} probe: {what}"


def _node_away(status: Mapping[str, Any], events: Sequence[Object]) -> bool:
    """Whether the cluster took the pod for not ready because it hears nothing of its node. It says so by an event only,
    just after it changed the pod's condition; once the node is back, the pod's condition is the node's again."""
    changed = _time(_condition(status, "Ready").get("lastTransitionTime"))
    said = [_time(each.get("lastTimestamp") or each.get("eventTime")) for each in _of_nodes(events)]
    return any(changed is None or when is None or when >= changed for when in said)


def _of_nodes(events: Sequence[Object]) -> list[Object]:
    return [event for event in events if event.get("reason") == "NodeNotReady"]


def _uncapitalized(text: str) -> str:
    return f"{text[:1].lower()}{text[1:]}"


def _began(container: Mapping[str, Any]) -> datetime | None:
    return _time(((container.get("state") or {}).get("running") or {}).get("startedAt"))


def _container(status: Mapping[str, Any]) -> Mapping[str, Any]:
    """The status of the bento's container."""
    return next((each for each in status.get("containerStatuses") or () if each["name"] == CONTAINER), {})


def _last_end(container: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (
        (container.get("state") or {}).get("terminated") or (container.get("lastState") or {}).get("terminated") or {}
    )
    return found


def _waiting(container: Mapping[str, Any]) -> tuple[str, str]:
    waiting = (container.get("state") or {}).get("waiting") or {}
    return str(waiting.get("reason") or ""), str(waiting.get("message") or "")


def _condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return next((each for each in status.get("conditions") or () if each["type"] == kind), {})


def _short(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()[:500]


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None
