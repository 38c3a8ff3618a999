"""What pods printed: the past of all by time, then what comes. No clock is asked but the nodes'.

Source: the Kubernetes API, `GET …/pods/NAME/log`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import datetime

from ekiben.errors import EkibenError
from services.deployer.runtimes import Line
from services.deployer.runtimes.kubernetes.api import Api
from services.deployer.runtimes.kubernetes.names import CONTAINER, Object, object_name
from services.kernel.clock import Clock

_NEW_PODS_S = 1.0
"""How soon a followed log has the lines of a pod that is new."""

Pods = Callable[[], Iterable[tuple[Object, str]]]
"""Gives pods, each with its service."""


async def by_pods(
    api: Api, pods: Pods, clock: Clock, *, tail: int, since: datetime | None, follow: bool, previous: bool
) -> AsyncIterator[Line]:
    """What pods printed, that of a container which ended before the last one included. See `Runtime.logs`."""
    past: list[Line] = []
    seen: dict[str, datetime] = {}
    for pod, service in pods():
        # The last line says where what comes begins, also where none of the past is wanted.
        found = await _past(api, pod, service, tail or 1, since if tail < 0 else None, previous)
        if found:
            seen[found[-1].replica] = found[-1].time
        past += [line for line in found if tail and (since is None or line.time >= since)]
    for line in sorted(past, key=lambda line: line.time):
        yield line
    if not follow:
        return
    lines: asyncio.Queue[Line] = asyncio.Queue(1000)
    async with asyncio.TaskGroup() as tasks:
        feeding = tasks.create_task(_feed(api, pods, clock, tasks, lines, seen, since))
        try:
            while True:
                yield await lines.get()
        finally:
            feeding.cancel()


async def _past(
    api: Api, pod: Object, service: str, tail: int, since: datetime | None, only_previous: bool
) -> list[Line]:
    found: list[Line] = []
    containers = (pod.get("status") or {}).get("containerStatuses") or ()
    restarted = any(each.get("restartCount") for each in containers)
    runs = [True] * bool(restarted) + [False] * (not only_previous)
    for previous in runs:
        async for line in api.log(object_name(pod), CONTAINER, tail=tail, since=since, previous=previous):
            found.append(_line(pod, service, line))
    return found if tail < 0 else found[len(found) - min(len(found), tail) :]


async def _feed(
    api: Api,
    pods: Pods,
    clock: Clock,
    tasks: asyncio.TaskGroup,
    lines: "asyncio.Queue[Line]",
    seen: dict[str, datetime],
    since: datetime | None,
) -> None:
    """Follow each pod, those that come later too."""
    followed: set[str] = set()

    async def follow(pod: Object, service: str) -> None:
        try:
            after = seen.get(object_name(pod), since)
            async for raw in api.log(object_name(pod), CONTAINER, tail=-1, since=after, follow=True):
                line = _line(pod, service, raw)
                last = seen.get(line.replica)
                if (last is None or line.time > last) and (since is None or line.time >= since):
                    seen[line.replica] = line.time
                    await lines.put(line)
        except EkibenError:
            pass  # It is followed anew from where it was.
        finally:
            followed.discard(object_name(pod))

    while True:
        for pod, service in pods():
            if object_name(pod) not in followed:
                followed.add(object_name(pod))
                tasks.create_task(follow(pod, service))
        await clock.sleep(_NEW_PODS_S)


def _line(pod: Object, service: str, raw: bytes) -> Line:
    stamp, _, text = raw.decode("utf-8", "replace").partition(" ")
    # Nanoseconds, of which Python keeps six digits.
    when = datetime.fromisoformat(f"{stamp[:26].rstrip('Z')}+00:00")
    return Line(object_name(pod), service, when, text)
