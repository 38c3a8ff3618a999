"""Several places where replicas run, as one runtime: the deployer's own, and a namespace of each cluster.

A place that is not there (yet, or any more) takes what is asked and says so; the others go on.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime

from services.deployer.runtimes import Event, Line, Runtime, SetSpec, SetStatus
from services.deployer.runtimes.exposures import Exposed, ExposureStatus
from services.deployer.runtimes.sessions import ExecSpec, Session

OWN = ""
"""The place that the deployer's settings name."""


class SeveralRuntimes:
    """See the module. Implements Runtime."""

    def __init__(self, own: Runtime) -> None:
        self._runtimes: dict[str, Runtime] = {OWN: own}
        self._asked: dict[str, tuple[SetSpec, int]] = {}
        """What is asked of places that are not there."""
        self._places: dict[str, str] = {}
        """Place of each set, by key."""
        self._of: dict[str, str] = {}
        """Place of each deployment that has a set elsewhere, by uid."""
        self._moved = asyncio.Event()
        self.renewed: Callable[[], None] = lambda: None
        """Called when a place has another runtime than before, which was asked for nothing yet."""

    async def add(self, place: str, runtime: Runtime) -> None:
        """A place is there. What was asked of it meanwhile is asked of it now."""
        before = self._runtimes.get(place)
        self._runtimes[place] = runtime
        if before is not None:
            self.renewed()
        for key, (spec, replicas) in list(self._asked.items()):
            if spec.place == place:
                del self._asked[key]
                await runtime.apply(spec, replicas)
        self._moved.set()

    def remove(self, place: str, runtime: Runtime) -> None:
        """A place is gone, if this is still its runtime."""
        if self._runtimes.get(place) is runtime:
            del self._runtimes[place]
            self._moved.set()

    # The port

    def scales(self, place: str) -> bool:
        """See Runtime. Places that were added are namespaces of Kubernetes clusters."""
        return place != OWN or self._runtimes[OWN].scales(place)

    def knows(self, place: str) -> bool:
        """See Runtime. A place that is not there is not known."""
        runtime = self._runtimes.get(place)
        return runtime is not None and runtime.knows(place)

    async def check(self, spec: SetSpec) -> None:
        """See Runtime. A place that is not there is not asked."""
        if runtime := self._runtimes.get(spec.place):
            await runtime.check(spec)

    async def apply(self, spec: SetSpec, replicas: int) -> None:
        """See Runtime."""
        self._places[spec.key] = spec.place
        if spec.place != OWN:
            self._of[spec.deployment_uid] = spec.place
        if runtime := self._runtimes.get(spec.place):
            await runtime.apply(spec, replicas)
        elif replicas:
            self._asked[spec.key] = spec, replicas
        else:
            self._asked.pop(spec.key, None)

    async def scale(self, key: str, replicas: int) -> None:
        """See Runtime."""
        if key in self._asked:
            spec, _ = self._asked[key]
            if replicas:
                self._asked[key] = spec, replicas
            else:
                del self._asked[key]
        elif runtime := self._runtimes.get(self._places.get(key, OWN)):
            await runtime.scale(key, replicas)

    async def release(self, replicas: Collection[str]) -> None:
        """See Runtime."""
        for runtime in list(self._runtimes.values()):
            await runtime.release(replicas)

    async def observe(self) -> list[SetStatus]:
        """See Runtime."""
        self._moved.clear()
        found = []
        for place, runtime in list(self._runtimes.items()):
            for one in await runtime.observe():
                self._places[one.key] = place
                if place != OWN:
                    self._of[one.deployment_uid] = place
                found.append(one)
        there = {one.key for one in found}
        self._places = {key: place for key, place in self._places.items() if key in there or key in self._asked}
        for key, (spec, replicas) in self._asked.items():
            which = (spec.deployment, spec.deployment_uid, spec.revision, spec.target, spec.service)
            note = f"The cluster and namespace {spec.place} cannot be reached: see `ekiben clusters get`."
            found.append(SetStatus(key, *which, replicas, note=note, reason="CLUSTER_UNREACHABLE", outlives=True))
        return found

    async def drain(self, grace_s: float) -> None:
        """See Runtime."""
        for runtime in list(self._runtimes.values()):
            await runtime.drain(grace_s)

    async def changed(self) -> None:
        """See Runtime."""
        waits = [asyncio.ensure_future(runtime.changed()) for runtime in self._runtimes.values()]
        waits.append(asyncio.ensure_future(self._moved.wait()))  # type: ignore[arg-type]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def forget(self, deployment_uid: str) -> None:
        """See Runtime."""
        for runtime in list(self._runtimes.values()):
            await runtime.forget(deployment_uid)
        self._of.pop(deployment_uid, None)

    async def check_exposure(self, wanted: Exposed) -> None:
        """See Runtime. The gateway is where the settings say, so that all ways to it are there."""
        await self._runtimes[OWN].check_exposure(wanted)

    async def expose(self, wanted: Sequence[Exposed]) -> None:
        """See Runtime."""
        await self._runtimes[OWN].expose(wanted)

    async def stand_by(self) -> None:
        """See Runtime."""
        self._asked.clear()
        for runtime in list(self._runtimes.values()):
            await runtime.stand_by()

    def exposure(self, wanted: Exposed) -> ExposureStatus:
        """See Runtime."""
        return self._runtimes[OWN].exposure(wanted)

    def logs(
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
        """See Runtime."""
        return self._where(deployment_uid).logs(
            deployment_uid,
            service=service,
            replica=replica,
            tail=tail,
            since=since,
            follow=follow,
            previous=previous,
        )

    def events(self, deployment_uid: str, *, follow: bool = False) -> AsyncIterator[Event]:
        """See Runtime."""
        return self._where(deployment_uid).events(deployment_uid, follow=follow)

    def exec(self, spec: ExecSpec) -> AbstractAsyncContextManager[Session]:
        """See Runtime."""
        return self._where(spec.deployment_uid).exec(spec)

    def _where(self, deployment_uid: str) -> Runtime:
        return self._runtimes.get(self._of.get(deployment_uid, OWN), self._runtimes[OWN])
