"""A pod as the port sees a replica, with what is wrong in words. Pure.

Source: kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle.
"""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from services.deployer.runtimes import Phase, ReplicaStatus
from services.deployer.runtimes.kubernetes.names import CONTAINER, PORT, Object

_NO_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_NOT_MADE = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError")


def replica_of(pod: Object, last_lines: str = "") -> ReplicaStatus:
    """The replica. Of a pod that ended for good (evicted, its node gone) the phase is CRASHED."""
    status, metadata = pod.get("status") or {}, pod["metadata"]
    container: Mapping[str, Any] = next(
        (each for each in status.get("containerStatuses") or () if each["name"] == CONTAINER), {}
    )
    restarts = int(container.get("restartCount") or 0)
    ready = _condition(status, "Ready").get("status") == "True"
    phase, message = _phase(pod, status, container, ready=ready)
    address = f"{status['podIP']}:{PORT}" if status.get("podIP") else ""
    if ":" in status.get("podIP", ""):
        address = f"[{status['podIP']}]:{PORT}"
    never = not ready and not container.get("started") and not (container.get("lastState") or {}).get("terminated")
    ended = (container.get("lastState") or {}).get("terminated") or {}
    return ReplicaStatus(
        metadata["name"],
        phase,
        address,
        message,
        last_lines or str(ended.get("message") or "")[-2000:],
        restart_count=restarts,
        failed_starts=0 if ready or never else restarts,
        start_time=_time(status.get("startTime")),
    )


def _phase(pod: Object, status: Mapping[str, Any], container: Mapping[str, Any], *, ready: bool) -> tuple[Phase, str]:
    if pod["metadata"].get("deletionTimestamp"):
        return Phase.DRAINING, ""
    if status.get("phase") in ("Failed", "Succeeded"):
        said = status.get("message") or status.get("reason") or "it ended"
        return Phase.CRASHED, f"The pod ended: {said}"
    if ready:
        return Phase.READY, ""
    reason, message = _waiting(container)
    if reason in _NO_IMAGE:
        return Phase.STARTING, f"Image not found: {_short(message or reason)}"
    if reason in _NOT_MADE:
        return Phase.CRASHED, f"The container cannot be made: {_short(message or reason)}"
    if reason == "CrashLoopBackOff":
        return Phase.CRASHED, _ended(container)
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        return Phase.STARTING, f"No node takes the pod: {_short(scheduled.get('message') or '')}"
    gates = _condition(status, "Ready")
    if gates.get("reason") == "ReadinessGatesNotReady":
        return Phase.STARTING, f"It answers, and waits for others: {_short(gates.get('message') or '')}"
    if container.get("started"):
        return Phase.UNREADY, "It does not answer its readiness probe."
    if "running" in (container.get("state") or {}):
        return Phase.STARTING, _ended(container) if container.get("restartCount") else "It is starting."
    return Phase.STARTING, "Its container is being made."


def _ended(container: Mapping[str, Any]) -> str:
    """How the container ended last."""
    ended = (container.get("lastState") or {}).get("terminated") or {}
    if ended.get("reason") == "OOMKilled":
        return "It used more memory than its instance type has, so the kernel ended it."
    if not ended:
        return "It ended."
    return f"It ended with status {ended.get('exitCode')}."


def _waiting(container: Mapping[str, Any]) -> tuple[str, str]:
    waiting = (container.get("state") or {}).get("waiting") or {}
    return str(waiting.get("reason") or ""), str(waiting.get("message") or "")


def _condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return next((each for each in status.get("conditions") or () if each["type"] == kind), {})


def _short(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()[:500]


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None
