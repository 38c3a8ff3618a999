"""KubernetesRuntime: replicas as pods of Deployments, one for each replica set.

What is asked is kept by `keeping.py`, what is there is known by watches; while both agree, no call is made. A deployer
that starts anew reads from the cluster which sets there are, and is told by the reconciler what they run; until then
they are left as they are. Pods outlive every deployer.

Pods are never stopped from here one by one: Kubernetes chooses, and each leaving pod answers a little longer than
gateways need to hear of it.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ekiben.errors import EkibenError, NotFound, Unavailable
from services.deployer.runtimes import Event, Line, SetSpec, SetStatus
from services.deployer.runtimes.exposures import Exposed, ExposureStatus
from services.deployer.runtimes.kubernetes import checking, events, objects, printed, terminal
from services.deployer.runtimes.kubernetes.api import Api, open_api
from services.deployer.runtimes.kubernetes.caches import Cache
from services.deployer.runtimes.kubernetes.events import Explainer
from services.deployer.runtimes.kubernetes.exposing import Exposures
from services.deployer.runtimes.kubernetes.keeping import MADE, Keeper
from services.deployer.runtimes.kubernetes.names import INSTALLATION, SET, Object, Where, label, object_name
from services.deployer.runtimes.kubernetes.pulling import Logins, PullSecret
from services.deployer.runtimes.kubernetes.seen import Seen
from services.deployer.runtimes.sessions import ExecSpec, Session
from services.kernel.clock import SYSTEM, Clock
from services.kernel.watches import Signal

_OBSERVED = ("Pod", "EndpointSlice")
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
        self._mine = False
        """Whether this deployer is the one that asks."""
        self._keeper = Keeper(api, where, self._caches, self._touched, clock, self._check_login)
        for kind in (*_OBSERVED, *MADE):
            self._caches[kind] = Cache(api, kind, selector, self._heard, clock)
        self._awaited = [cache for kind, cache in self._caches.items() if kind not in _UNAWAITED]
        self._explainer, self._pods_moved = Explainer(api, clock), Signal()
        self._seen = Seen(self._caches, self._keeper, self._explainer, clock)
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
        self._mine = True
        self._touched(spec.key)
        try:
            spec = self._pulled(replace(spec, image=objects.image_of(spec, self._pull_host)))
            self._keeper.ask(spec, replicas)
        except EkibenError as exc:
            self._keeper.ask(spec, replicas).refused(exc.reason, exc.message)

    async def scale(self, key: str, replicas: int) -> None:
        """Tell a set how many replicas to have; at 0 all of it is deleted, and its pods drain."""
        self._mine = True
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
        return self._seen.look()

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

    async def expose(self, wanted: Sequence[Exposed]) -> None:
        """See Runtime."""
        self._mine = True
        self._exposures.want(wanted)

    async def stand_by(self) -> None:
        """See Runtime."""
        self._mine = False
        self._exposures.want(None)
        for key in self._keeper.forget():
            self._touched(key)
        if self._pulling is not None:
            self._pulling.forget()

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
            return list(self._seen.pods(deployment_uid, service, replica))

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
        async for one in events.of_deployment(self._api, lambda: self._seen.sets_of(deployment_uid), follow=follow):
            yield one

    @asynccontextmanager
    async def exec(self, spec: ExecSpec) -> AsyncIterator[Session]:
        """A command in a pod: in the bento's container, or in an ephemeral one beside it."""

        def pod_of() -> Object | None:
            pods = self._seen.pods(spec.deployment_uid, "", spec.replica)
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
            if self._mine and not self._keeper.asked and not self._caches["Deployment"].objects:
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

    def _touched(self, key: str) -> None:
        """Something of a set may be another than before."""
        self._seen.touch(key)
        self._changed.set()

    def _heard(self, kind: str, item: Object | None) -> None:
        self._keeper.heard(kind, item)
        self._changed.set()
        if item is not None:
            self._seen.heard(kind, object_name(item))
            if kind == "Pod":
                self._pods_moved.notify()
        if kind == "Deployment" or (kind == "Secret" and item is not None and not label(item, SET)):
            self._pulled_moved.notify()

    async def _explain(self) -> None:
        """Ask for the events of pods in trouble; for ever."""
        while True:
            for key in await self._explainer.turn():
                self._touched(key)
            await self._pods_moved.wait(at_most_s=self._explainer.pause_s())


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
