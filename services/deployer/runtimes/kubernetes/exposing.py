"""Keeps the Ingresses and HTTPRoutes of deployments as they are wanted.

Level-triggered as the runtime is: what is there is known by watches, what differs is applied, and what is ours and not
wanted any more is deleted, also what a deployer left that was killed. Where the cluster has no such kind, or the
credentials do not allow it, that is said, and looked at again now and then for as long as somebody wants one.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ekiben.errors import EkibenError, FailedPrecondition, NotFound, PermissionDenied
from services.deployer.runtimes.exposures import Exposed, ExposureStatus
from services.deployer.runtimes.kubernetes.api import Api
from services.deployer.runtimes.kubernetes.caches import Cache
from services.deployer.runtimes.kubernetes.exposure import KINDS, exposure_name, exposure_object, same, status_of
from services.deployer.runtimes.kubernetes.names import INSTALLATION, Object, Where
from services.deployer.runtimes.kubernetes.sameness import holds
from services.kernel.clock import Clock
from services.kernel.watches import Signal

log = logging.getLogger(__name__)

_PAUSES_S = (1.0, 5.0, 15.0, 60.0)
_LOOK_AGAIN_S = 30.0
"""How often a kind that is not there is looked for, while somebody wants it."""


@dataclass
class _One:
    exposed: Exposed
    made: Object
    generation: int = 0
    """When it was applied last: a higher one means that somebody else changed it."""
    fault: ExposureStatus | None = None
    failures: int = 0
    again_at: float = 0.0


class Exposures:
    """See the module."""

    def __init__(self, api: Api, where: Where, service: str, clock: Clock, changed: Callable[[], None]) -> None:
        """`service`: `NAME:PORT` of the gateway's; empty where nothing is exposed. `changed` is told of news."""
        self._api, self._where, self._service, self._clock, self._changed = api, where, service, clock, changed
        self._wanted: dict[str, _One] = {}
        self._mine = False
        self._delete_at = 0.0
        """When to try again to take away what could not be."""
        self._signal = Signal()
        self._selector = f"{INSTALLATION}={where.installation}"
        self._caches = {
            kind: Cache(api, kind, self._selector, lambda kind, item: self._heard(), clock) for kind in KINDS.values()
        }
        self._missing: dict[str, ExposureStatus] = {}
        self._looks = {kind: Signal() for kind in self._caches}

    async def check(self, exposed: Exposed) -> None:
        """Ask the cluster whether it would take it. Raises what it says."""
        try:
            await self._api.apply(exposure_object(exposed, self._where, self._service), dry_run=True)
        except NotFound as exc:
            if exc.reason == "NAMESPACE_NOT_FOUND":
                raise FailedPrecondition(exc.message, reason=exc.reason) from exc
            raise FailedPrecondition(_without(exposed.kind), reason="GATEWAY_API_MISSING") from exc
        except PermissionDenied as exc:  # The deployer's rights, not the caller's.
            raise FailedPrecondition(exc.message, reason=exc.reason) from exc

    def want(self, wanted: Sequence[Exposed] | None) -> None:
        """See Runtime.expose."""
        before, self._mine = self._mine, wanted is not None
        if wanted is None or not self._service:
            return
        names = {exposure_name(one.deployment_uid): one for one in wanted}
        changed = names.keys() != self._wanted.keys()
        self._wanted = {name: one for name, one in self._wanted.items() if name in names}
        for name, exposed in names.items():
            if name not in self._wanted or self._wanted[name].exposed != exposed:
                self._wanted[name] = _One(exposed, exposure_object(exposed, self._where, self._service))
                changed = True
        if changed or not before:
            for signal in (self._signal, *self._looks.values()):
                signal.notify()

    def status(self, exposed: Exposed) -> ExposureStatus:
        """See Runtime.exposure."""
        if not self._service:
            return ExposureStatus(
                False,
                "GATEWAY_SERVICE_MISSING",
                "The platform does not know the gateway's Service any more: set kubernetes_gateway_service.",
            )
        kind, name = KINDS[exposed.kind], exposure_name(exposed.deployment_uid)
        if kind in self._missing:
            return self._missing[kind]
        one, live = self._wanted.get(name), self._caches[kind].objects.get(name)
        if one is not None and one.fault is not None:
            return one.fault
        if fault := self._caches[kind].fault:
            return ExposureStatus(None, "KUBERNETES_AWAY", fault)
        if one is None or live is None or one.exposed != exposed or not same(live, one.made):
            return ExposureStatus(None, "EXPOSING", "The cluster is being told.")
        return status_of(exposed, live)

    async def run(self) -> None:
        """Watch and apply; for ever."""
        if not self._service:
            return
        async with asyncio.TaskGroup() as tasks:
            for kind, cache in self._caches.items():
                tasks.create_task(self._keep(kind))
                tasks.create_task(self._begin(cache))
            while True:
                await self._turn()
                await self._signal.wait(at_most_s=self._pause_s())

    async def _begin(self, cache: Cache) -> None:
        """Wake up once it is known what is there: an empty list is no news of its own."""
        await cache.filled.wait()
        self._heard()

    async def _keep(self, kind: str) -> None:
        """Keep the cache of a kind, once there is such a kind."""
        while True:
            try:
                await self._api.listed(kind, self._selector)
            except (NotFound, PermissionDenied) as exc:
                reason = "GATEWAY_API_MISSING" if isinstance(exc, NotFound) else exc.reason
                message = _without(kind) if isinstance(exc, NotFound) else exc.message
                self._missing[kind] = ExposureStatus(False, reason, message)
                self._changed()
                await self._looks[kind].wait(_LOOK_AGAIN_S if self._wants(kind) else None)
                while not self._wants(kind):  # No call for what nobody wants.
                    await self._looks[kind].wait()
                continue
            except EkibenError:
                pass  # The cache goes on trying, and says so.
            self._missing.pop(kind, None)
            await self._caches[kind].run()

    def _wants(self, kind: str) -> bool:
        return any(KINDS[one.exposed.kind] == kind for one in self._wanted.values())

    async def _turn(self) -> None:
        if not self._mine:
            return
        for name, one in list(self._wanted.items()):
            cache = self._caches[KINDS[one.exposed.kind]]
            # Whoever owned a field has perhaps deleted the object, to give it up: that ends a pause.
            given_up = name not in cache.objects and one.fault is not None and one.fault.reason == "FIELD_OWNED"
            due = given_up or one.again_at <= self._clock.monotonic()
            if cache.filled.is_set() and due and self._differs(cache, name, one):
                await self._apply(cache, one)
                self._changed()
        for kind, cache in self._caches.items():
            for name, live in list(cache.objects.items()):
                wanted = self._wanted.get(name)
                if wanted is not None and KINDS[wanted.exposed.kind] == kind:
                    continue
                if not live["metadata"].get("deletionTimestamp"):
                    try:
                        await self._api.delete(kind, name)
                    except EkibenError as exc:  # No watch would tell of it.
                        log.warning("an exposure cannot be taken away", extra={"exposure": name, "error": exc.message})
                        self._delete_at = self._clock.monotonic() + _PAUSES_S[-1]

    def _differs(self, cache: Cache, name: str, one: _One) -> bool:
        live = cache.objects.get(name)
        if live is None or not same(live, one.made):
            return True
        generation = int(live["metadata"].get("generation") or 0)
        if not one.generation:  # Applied by a former deployer, and perhaps changed while there was none.
            if not holds(live, one.made):
                return True
            one.generation = generation
        return generation > one.generation

    async def _apply(self, cache: Cache, one: _One) -> None:
        try:
            applied = await self._api.apply(one.made)
        except EkibenError as exc:
            one.fault = ExposureStatus(False, exc.reason, exc.message)
            one.again_at = self._clock.monotonic() + _PAUSES_S[min(one.failures, len(_PAUSES_S) - 1)]
            one.failures += 1
            return
        one.fault, one.failures, one.again_at = None, 0, 0.0
        one.generation = int(applied["metadata"].get("generation") or 0)
        cache.put(applied)

    def _pause_s(self) -> float | None:
        now = self._clock.monotonic()
        times = [self._delete_at, *(one.again_at for one in self._wanted.values())]
        waiting = [at - now for at in times if at > now]
        return max(0.05, min(waiting)) if waiting else None

    def _heard(self) -> None:
        self._changed()
        self._signal.notify()


def _without(kind: str) -> str:
    return (
        f"The cluster has no {KINDS.get(kind, kind)}: install the definitions of the Gateway API "
        "(gateway-api.sigs.k8s.io), or choose INGRESS."
    )
