"""The cluster's events: of a deployment for who asks, and of pods in trouble to tell what is wrong with them.

Nobody watches events while nobody asks: a cluster writes more of them than of all else together. A pod that is not
ready is asked about once it has been so for a while, and then ever more seldom.

Source: the Kubernetes API, Event v1 (core).
"""

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ekiben.errors import Aborted, EkibenError
from services.deployer.runtimes import Event, SetStatus
from services.deployer.runtimes.kubernetes.api import Api
from services.deployer.runtimes.kubernetes.names import CONTAINER, Object, name_of
from services.deployer.runtimes.kubernetes.pods import troubled
from services.kernel.clock import Clock

log = logging.getLogger(__name__)

_PAUSES_S = (5.0, 10.0, 30.0, 120.0, 300.0)
"""Before a troubled pod is asked about, again and again. The first is longer than most replicas take to start."""
_READY_ONCE_S = 0.0
"""The same for one that ran: its probe has failed several times by then. That its node is away is said a moment later,
so that it is asked again after the first pause."""
_PODS_A_SET = 2
"""Replicas of a set suffer from the same; more are not asked about."""


@dataclass
class _Asked:
    """What is known of one pod in trouble."""

    key: str
    """Of its set."""
    due: float
    times: int = 0
    started: bool = False
    events: tuple[Object, ...] = ()


class Explainer:
    """Warnings about pods that are in trouble. Costs no call while none is."""

    def __init__(self, api: Api, clock: Clock) -> None:
        self._api, self._clock = api, clock
        self._asked: dict[str, _Asked] = {}
        self._troubled: dict[str, dict[str, Object]] = {}
        """Pods by set and name."""
        self._denied = False

    def of(self, pod: Object) -> tuple[Object, ...]:
        """Warnings about a pod as far as they are known, oldest first."""
        known = self._asked.get(pod["metadata"]["uid"])
        return known.events if known else ()

    def heard(self, key: str, pod: Object) -> None:
        """A pod of a set is another than before."""
        name = pod["metadata"]["name"]
        if troubled(pod):
            self._troubled.setdefault(key, {})[name] = pod
        else:
            self.gone(key, name)

    def gone(self, key: str, name: str) -> None:
        """A pod is no more, or no more of this set."""
        known = self._troubled.get(key, {})
        known.pop(name, None)
        if not known:
            self._troubled.pop(key, None)

    async def turn(self) -> set[str]:
        """Ask about those whose time has come. Gives the keys of sets of whose pods something else is known."""
        chosen = {
            pod["metadata"]["uid"]: (key, pod)
            for key, pods in self._troubled.items()
            for pod in list(pods.values())[:_PODS_A_SET]
        }
        fresh = {known.key for uid, known in self._asked.items() if uid not in chosen and known.events}
        self._asked = {uid: known for uid, known in self._asked.items() if uid in chosen}
        for uid, (key, pod) in chosen.items():
            if await self._ask(uid, key, pod):
                fresh.add(key)
        return fresh

    def pause_s(self) -> float | None:
        """How long until the next turn has something to ask; None while nothing is in trouble."""
        if self._denied or not self._asked:
            return None
        return max(0.1, min(known.due for known in self._asked.values()) - self._clock.monotonic())

    async def _ask(self, uid: str, key: str, pod: Object) -> bool:
        now = self._clock.monotonic()
        started = _started(pod)
        known = self._asked.setdefault(
            uid, _Asked(key, now + (_READY_ONCE_S if started else _PAUSES_S[0]), started=started)
        )
        if started and not known.started:
            known.started, known.due = True, now + _READY_ONCE_S
        if self._denied or known.due > now:
            return False
        known.times += 1
        known.due = now + _PAUSES_S[min(known.times - known.started, len(_PAUSES_S) - 1)]
        try:
            found, _ = await self._api.listed("Event", "", fields=f"involvedObject.uid={uid},type=Warning")
        except EkibenError as exc:
            if exc.reason == "KUBERNETES_DENIED":
                self._denied = True
                log.warning("events may not be read, so that messages say less", extra={"error": exc.message})
            return False
        events = tuple(sorted(found, key=lambda item: _last(item)))
        fresh, known.events = events != known.events, events
        return fresh


async def of_deployment(api: Api, sets: Callable[[], Mapping[str, SetStatus]], *, follow: bool) -> AsyncIterator[Event]:
    """Events of the objects of `sets`, oldest first, and with `follow` what comes. `sets` (by key) is asked again."""
    known: dict[str, SetStatus] = {}

    def event_of(item: Object) -> Event | None:
        known.update(sets())
        return _event(item, known)

    while True:
        items, version = await api.listed("Event", "")
        for item in sorted(items, key=_last):
            if (found := event_of(item)) is not None:
                yield found
        if not follow:
            return
        try:
            while True:
                async for kind, item in api.watch("Event", "", version):
                    version = item["metadata"]["resourceVersion"]
                    if kind in ("ADDED", "MODIFIED") and (found := event_of(item)) is not None:
                        yield found
        except Aborted:
            continue  # Everything is told again: `id` and `time` say what is known already.


def _event(item: Object, sets: Mapping[str, SetStatus]) -> Event | None:
    """The event, where it is about one of the sets."""
    about = item.get("involvedObject") or {}
    name = str(about.get("name") or "")
    one = next((one for key, one in sets.items() if name == name_of(key) or name.startswith(f"{name_of(key)}-")), None)
    if one is None:
        return None
    series = item.get("series") or {}
    source = item.get("reportingComponent") or (item.get("source") or {}).get("component") or ""
    return Event(
        id=str(item["metadata"]["uid"]),
        time=_last(item),
        first_time=_time(item.get("firstTimestamp") or item.get("eventTime") or item["metadata"]["creationTimestamp"]),
        count=int(series.get("count") or item.get("count") or 1),
        warning=item.get("type") == "Warning",
        reason=str(item.get("reason") or ""),
        message=str(item.get("message") or "").strip(),
        object=f"{about.get('kind')}/{name}",
        source=str(source),
        service=one.service,
        replica=name if about.get("kind") == "Pod" else "",
        revision=one.revision,
        target=one.target,
    )


def _started(pod: Object) -> bool:
    containers: Iterable[Mapping[str, Any]] = (pod.get("status") or {}).get("containerStatuses") or ()
    own = next((each for each in containers if each["name"] == CONTAINER), {})
    return bool(own.get("started") or own.get("restartCount"))


def _last(item: Object) -> datetime:
    """When it happened last."""
    series = item.get("series") or {}
    stamp = series.get("lastObservedTime") or item.get("lastTimestamp") or item.get("eventTime")
    return _time(stamp or item["metadata"]["creationTimestamp"])


def _time(text: str | None) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else datetime.fromtimestamp(0, UTC)
