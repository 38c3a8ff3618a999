"""KubernetesRuntime: replicas as pods of Deployments, one for each replica set.

What is asked is kept by `keeping.py`, what is there is known by watches; while both agree, no call is made. A deployer
that starts anew reads from the cluster which sets there are, and is told by the reconciler what they run; until then
they are left as they are. Pods outlive every deployer.

Pods are never stopped from here one by one: Kubernetes chooses, and each leaving pod answers a little longer than
gateways need to hear of it.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ekiben.errors import EkibenError, NotFound, Unavailable
from services.deployer.runtimes import Event, Line, ReplicaStatus, SetSpec, SetStatus
from services.deployer.runtimes.exposures import Exposed, ExposureStatus
from services.deployer.runtimes.kubernetes import checking, events, objects, printed, terminal
from services.deployer.runtimes.kubernetes.api import Api, open_api
from services.deployer.runtimes.kubernetes.autoscaling import SCALED_BY, scaled_of
from services.deployer.runtimes.kubernetes.caches import ByLabel, Cache
from services.deployer.runtimes.kubernetes.events import Explainer
from services.deployer.runtimes.kubernetes.exposing import Exposures
from services.deployer.runtimes.kubernetes.keeping import MADE, Keeper
from services.deployer.runtimes.kubernetes.names import (
    INSTALLATION,
    SET,
    UID,
    Object,
    Where,
    facts_of,
    name_of,
)
from services.deployer.runtimes.kubernetes.pods import lost_of, not_made, overdue, replica_of
from services.deployer.runtimes.kubernetes.pulling import Logins, PullSecret
from services.deployer.runtimes.kubernetes.slices import endpoints_of, placed
from services.deployer.runtimes.scaling import HPA
from services.deployer.runtimes.sessions import ExecSpec, Session
from services.kernel.clock import SYSTEM, Clock
from services.kernel.watches import Signal

_OBSERVED = ("Pod", "EndpointSlice")
_SHOWN = ("Deployment", "Pod", "ServiceAccount", "EndpointSlice")
"""What a set is seen by. The first three say what it is, each where those before it are not there."""
_UNAWAITED = ("EndpointSlice", "HorizontalPodAutoscaler")
"""Nothing waits for these, which a role of before may not allow: without slices pods are as they say themselves."""
_NO_LOGIN = "IMAGE_LOGIN_MISSING"
_LOOK_S = 30.0


class KubernetesRuntime:
    """See the module. Made by `open_kubernetes_runtime`."""

    def __init__(
        self,
        api: Api,
        where: Where,
        *,
        pull_host: str = "",
        logins: Logins | None = None,
        gateway_service: str = "",
        clock: Clock = SYSTEM,
    ) -> None:
        """`pull_host`: the registry, as nodes call it, that has the images of a builder with a layout on disk; `logins`
        gives what nodes log in there with, where `where` names no Secret that has it. `gateway_service`: where
        exposures lead to; empty for none."""
        self._api, self._where, self._pull_host, self._clock = api, where, pull_host, clock
        self._changed = asyncio.Event()
        selector = f"{INSTALLATION}={where.installation}"
        self._caches: dict[str, Cache] = {}
        self._by_set = {kind: ByLabel(SET) for kind in _SHOWN}
        self._statuses: dict[str, SetStatus] = {}
        """The sets, as they were seen last."""
        self._stale: dict[str, None] = {}
        """Keys of those of which something may be another since."""
        self._leaving: set[str] = set()
        """Keys of those with pods that leave: of these time tells whether they do."""
        self._lost: tuple[tuple[str, str], ...] = ()
        """What was wrong with watches at the last look."""
        self._replicas: dict[str, tuple[Object, tuple[Object, ...], ReplicaStatus]] = {}
        self._keeper = Keeper(api, where, self._caches, self._touched, clock, self._check_login)
        for kind in (*_OBSERVED, *MADE):
            self._caches[kind] = Cache(api, kind, selector, self._heard, clock)
        self._awaited = [cache for kind, cache in self._caches.items() if kind not in _UNAWAITED]
        self._explainer, self._pods_moved = Explainer(api, clock), Signal()
        self._pulling: PullSecret | None = None
        self._pulled_moved = Signal()
        if pull_host and logins is not None and not where.pull_secret:
            self._pulling = PullSecret(api, where, pull_host, logins, self._caches["Secret"], clock)
        self._exposures = Exposures(api, where, gateway_service, clock, self._changed.set)

    # The port

    def scales(self, place: str) -> bool:
        """Pods are scaled by the cluster."""
        return True

    def knows(self, place: str) -> bool:
        """Once the first lists have come."""
        return all(cache.filled.is_set() for cache in self._awaited)

    async def check(self, spec: SetSpec) -> None:
        """Refuse what the cluster would not take. Nothing is changed there."""
        await checking.check(self._api, spec, self._where, self._pull_host)

    async def apply(self, spec: SetSpec, replicas: int) -> None:
        """Make the set, or tell it its environment anew, and scale it."""
        if replicas == 0:
            return await self.scale(spec.key, 0)
        self._touched(spec.key)
        try:
            spec = self._pulled(replace(spec, image=objects.image_of(spec, self._pull_host)))
            self._keeper.ask(spec, replicas)
        except EkibenError as exc:
            self._keeper.ask(spec, replicas).refused(exc.reason, exc.message)

    async def scale(self, key: str, replicas: int) -> None:
        """Tell a set how many replicas to have; at 0 all of it is deleted, and its pods drain."""
        self._touched(key)
        if replicas == 0:
            self._keeper.end(key)
        else:
            self._keeper.scale(key, replicas)

    async def release(self, replicas: Collection[str]) -> None:
        """Nothing: a leaving pod ends by itself."""

    async def observe(self) -> list[SetStatus]:
        """All sets. Those of which nothing is heard are the very same as the last time."""
        self._changed.clear()
        faults = tuple((cache.reason, cache.fault) for cache in self._caches.values())
        if faults != self._lost:  # Each set says so.
            self._lost = faults
            self._stale.update(dict.fromkeys((*self._statuses, *self._keeper.asked)))
        stale, self._stale = {*self._stale, *self._leaving}, {}
        for key in stale:
            if (one := self._seen(key)) is None:
                self._statuses.pop(key, None)
                self._leaving.discard(key)
            else:
                self._statuses[key] = one
        return list(self._statuses.values())

    def _seen(self, key: str) -> SetStatus | None:
        """A set, as far as anything of it is asked or there."""
        if not key:
            return None

        def own(kind: str) -> list[Object]:
            # A pod that somebody gave another label, to look into it, is of no set any more.
            return [item for item in self._by_set[kind].of(key).values() if _name(item).startswith(name_of(key))]

        asked = self._keeper.asked.get(key)
        if asked is not None:
            spec = asked.spec
            which = (spec.deployment, spec.deployment_uid, spec.revision, spec.target, spec.service)
            one = SetStatus(key, *which, asked.replicas)
            if spec.autoscaling is not None:
                scaler = self._caches["HorizontalPodAutoscaler"].objects.get(name_of(key))
                told = scaled_of(scaler) if spec.autoscaling.policy == HPA else None
                one = replace(one, autoscaled=True, scaled=told)
        else:
            items = [item for kind in _SHOWN[:3] for item in own(kind)]
            found = next((seen for item in items if (seen := _status(item, key)) is not None), None)
            if found is None:
                return None
            one = found
            for item in self._by_set["Deployment"].of(key).values():
                if key not in self._keeper.ending:
                    lent = SCALED_BY in (item["metadata"].get("annotations") or {})
                    one = replace(one, asked=int(item["spec"].get("replicas", 1)), autoscaled=lent)
        place = endpoints_of(self._by_set["EndpointSlice"].of(key).values()).get(key)
        pods, now = sorted(own("Pod"), key=_name), self._clock.now()
        if any(pod["metadata"].get("deletionTimestamp") for pod in pods):
            self._leaving.add(key)
        else:
            self._leaving.discard(key)
        note, reason = self._faults(key)
        return replace(
            one,
            replicas=tuple(placed(self._replica(pod, now), place) for pod in pods),
            note=note,
            reason=reason,
            outlives=True,
        )

    def _replica(self, pod: Object, now: datetime) -> ReplicaStatus:
        """The pod as a replica. Of thousands few are another than at the last look."""
        name, said = _name(pod), self._explainer.of(pod)
        known = self._replicas.get(name)
        if known is None or known[0] is not pod or known[1] is not said:
            if len(self._replicas) > 2 * len(self._caches["Pod"].objects) + 100:
                self._replicas.clear()
            known = self._replicas[name] = (pod, said, replica_of(pod, said))
        return lost_of(known[2]) if overdue(pod, now) else known[2]

    async def drain(self, grace_s: float) -> None:
        """Nothing: pods outlive the deployer."""

    async def changed(self) -> None:
        """Return once something may differ from the last `observe`."""
        await self._changed.wait()

    async def forget(self, deployment_uid: str) -> None:
        """Nothing: logs go with the pods."""

    async def check_exposure(self, wanted: Exposed) -> None:
        """See Runtime."""
        await self._exposures.check(wanted)

    async def expose(self, wanted: Sequence[Exposed] | None) -> None:
        """See Runtime."""
        self._exposures.want(wanted)

    def exposure(self, wanted: Exposed) -> ExposureStatus:
        """See Runtime."""
        return self._exposures.status(wanted)

    async def logs(
        self,
        deployment_uid: str,
        *,
        service: str = "",
        replica: str = "",
        tail: int = 100,
        since: datetime | None = None,
        follow: bool = False,
        previous: bool = False,
    ) -> AsyncIterator[Line]:
        """What pods printed, that of a container which ended before the last one included."""

        def pods() -> list[tuple[Object, str]]:
            return list(self._pods(deployment_uid, service, replica))

        if replica and not pods():
            raise NotFound(
                f"There is no replica {replica[:100]}, or its log went with it; `ekiben deployments replicas` lists "
                "those that are there.",
                reason="REPLICA_NOT_FOUND",
                replica=replica[:100],
            )
        async for line in printed.by_pods(
            self._api, pods, self._clock, tail=tail, since=since, follow=follow, previous=previous
        ):
            yield line

    async def events(self, deployment_uid: str, *, follow: bool = False) -> AsyncIterator[Event]:
        """What the cluster wrote down of the objects of its sets in the last hour, or for as long as it keeps that."""
        async for one in events.of_deployment(self._api, lambda: self._sets_of(deployment_uid), follow=follow):
            yield one

    @asynccontextmanager
    async def exec(self, spec: ExecSpec) -> AsyncIterator[Session]:
        """A command in a pod: in the bento's container, or in an ephemeral one beside it."""

        def pod_of() -> Object | None:
            pods = self._pods(spec.deployment_uid, "", spec.replica)
            return next((pod for pod, _ in pods), None) if spec.replica else None

        async with terminal.run(self._api, spec, pod_of, self._clock) as session:
            yield session

    # Its life

    async def run(self) -> None:
        """Watch, and apply what is asked; for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._explain())
            for cache in self._caches.values():
                tasks.create_task(cache.run())
            tasks.create_task(self._exposures.run())
            await self.filled()
            tasks.create_task(self._log_in())
            await self._keeper.run()

    async def filled(self) -> None:
        """Return once it is known what is in the cluster."""
        for cache in self._awaited:
            await cache.filled.wait()

    def fault(self) -> str:
        """Why it is not known what is in the cluster, in words; empty where nothing was answered yet."""
        return next((cache.fault for cache in self._awaited if cache.fault), "")

    async def settled(self) -> None:
        """Return once the cluster has been told all that is asked so far, or refused it."""
        while not self._keeper.settled():
            self._changed.clear()
            await self._changed.wait()

    # Logins

    def _pulled(self, spec: SetSpec) -> SetSpec:
        if self._pulling is None:
            return spec
        self._pulled_moved.notify()
        return self._pulling.lend(spec)

    async def _log_in(self) -> None:
        """Keep what nodes log in with; for ever."""
        while self._pulling is not None:
            specs = [asked.spec for asked in self._keeper.asked.values()]
            organizations = {spec.organization for spec in specs if self._pulling.lent(spec)}
            await self._pulling.look(organizations)
            if not self._keeper.asked and not self._caches["Deployment"].objects:
                await self._pulling.remove()
            if any(self._pulling.serves(organization) for organization in organizations):
                self._keeper.mend(_NO_LOGIN)
            due_s = self._pulling.due_s()
            await self._pulled_moved.wait(at_most_s=_LOOK_S if due_s is None else max(0.05, due_s))

    def _check_login(self, spec: SetSpec) -> None:
        """Raises Unavailable (IMAGE_LOGIN_MISSING): pods would fail to pull, and wait ever longer to try again."""
        if self._pulling is None or not self._pulling.lent(spec):
            return
        if not self._pulling.serves(spec.organization):
            raise Unavailable(self._pulling.fault or "Nodes have no login yet.", reason=_NO_LOGIN)

    def _faults(self, key: str) -> tuple[str, str]:
        """Why the cluster does not have a set as it is wanted, in words; and the first reason for programs."""
        asked, live = self._keeper.asked.get(key), self._caches["Deployment"].objects.get(name_of(key))
        found = [(asked.reason, asked.fault)] if asked else []
        found += [not_made(live)] if live else []
        found += [(cache.reason, cache.fault) for cache in self._caches.values()]
        told = [(reason, text) for reason, text in found if text]
        return "; ".join(dict.fromkeys(text for _, text in told)), told[0][0] if told else ""

    def _touched(self, key: str) -> None:
        """Something of a set may be another than before."""
        self._stale[key] = None
        self._changed.set()

    def _heard(self, kind: str, item: Object | None) -> None:
        self._keeper.heard(kind, item)
        self._changed.set()
        if item is not None and kind in _SHOWN:
            self._sort(kind, _name(item))
        if kind == "Deployment" or (kind == "Secret" and item is not None and not _label(item, SET)):
            self._pulled_moved.notify()

    def _sort(self, kind: str, name: str) -> None:
        """Know whose an object is."""
        live = self._caches[kind].objects.get(name)
        touched = self._by_set[kind].heard(name, live)
        self._stale.update(dict.fromkeys(touched))
        if kind != "Pod":
            return
        for key in touched:
            if live is not None and key == _label(live, SET):
                self._explainer.heard(key, live)
            else:
                self._explainer.gone(key, name)
        self._pods_moved.notify()

    async def _explain(self) -> None:
        """Ask for the events of pods in trouble; for ever."""
        while True:
            for key in await self._explainer.turn():
                self._touched(key)
            await self._pods_moved.wait(at_most_s=self._explainer.pause_s())

    def _sets_of(self, deployment_uid: str) -> dict[str, SetStatus]:
        """By key, as far as anything of them is there."""
        found: dict[str, SetStatus] = {}
        for cache in self._caches.values():
            for item in cache.objects.values():
                if _label(item, UID) == deployment_uid and (seen := _status(item, _label(item, SET))) is not None:
                    found[seen.key] = seen
        return found

    # Logs

    def _pods(self, deployment_uid: str, service: str, replica: str) -> Iterable[tuple[Object, str]]:
        for pod in list(self._caches["Pod"].objects.values()):
            seen = _status(pod, _label(pod, SET))
            if seen is None or _label(pod, UID) != deployment_uid:
                continue
            if service in ("", seen.service) and replica in ("", _name(pod)):
                yield pod, seen.service


def _status(item: Object, key: str) -> SetStatus | None:
    """What an object of a set says of the set; None for one that somebody else made with our labels."""
    try:
        facts = facts_of(item["metadata"].get("annotations") or {})
        return SetStatus(
            key,
            str(facts["deployment"]),
            str(facts["deployment_uid"]),
            int(facts["revision"]),
            str(facts["target"]),
            str(facts["service"]),
            0,
        )
    except (ValueError, KeyError, TypeError):
        return None


def _label(item: Object, name: str) -> str:
    return str((item["metadata"].get("labels") or {}).get(name) or "")


def _name(item: Object) -> str:
    return str(item["metadata"]["name"])


@asynccontextmanager
async def open_kubernetes_runtime(
    kubeconfig: Path | Mapping[str, Any] | None,
    context: str,
    where: Where,
    *,
    pull_host: str = "",
    logins: Logins | None = None,
    gateway_service: str = "",
    clock: Clock = SYSTEM,
) -> AsyncIterator[KubernetesRuntime]:
    """A runtime on a cluster. At the end everything there goes on.

    Raises:
        SettingsError: there is no way to a cluster.
    """
    async with open_api(kubeconfig, context, where.namespace) as api:
        runtime = KubernetesRuntime(
            api, where, pull_host=pull_host, logins=logins, gateway_service=gateway_service, clock=clock
        )
        running = asyncio.create_task(runtime.run())
        try:
            yield runtime
        finally:
            running.cancel()
            await asyncio.wait([running])
