"""What is asked of replica sets, and the loop that makes it so.

Level-triggered: what is asked is remembered, what is there is known by watches of every kind that is made, and the
loop applies the difference, whoever made it. A set is looked at when it is asked anew and when one of its objects is
another than before, so that nothing is called, nor computed, while nothing changes. Sets are brought up beside one
another, the objects of one in their order.
"""

import asyncio
import itertools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ekiben.errors import EkibenError, FailedPrecondition
from services.deployer.runtimes import SetSpec
from services.deployer.runtimes.kubernetes import objects
from services.deployer.runtimes.kubernetes.api import Api
from services.deployer.runtimes.kubernetes.autoscaling import CONTROLLER, SCALED_BY, owners_of_replicas, targets
from services.deployer.runtimes.kubernetes.caches import Cache
from services.deployer.runtimes.kubernetes.names import APPLIED, FIELD_MANAGER, SET, Object, Where, label, name_of
from services.deployer.runtimes.kubernetes.sameness import digest_of, holds, print_of
from services.deployer.runtimes.kubernetes.volumes import explained
from services.deployer.runtimes.scaling import EXTERNAL
from services.kernel.clock import Clock
from services.kernel.watches import Signal

log = logging.getLogger(__name__)

MADE = (
    "ServiceAccount",
    "Secret",
    "Service",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "Deployment",
    "HorizontalPodAutoscaler",
)
"""The kinds that are made of a set, and watched."""
LENDER = f"{FIELD_MANAGER}-replicas"
"""The field manager that keeps a number of replicas while nobody else has taken it over."""
_AWAY = "KUBERNETES_AWAY"
_OWNED = "FIELD_OWNED"
_PAUSES_S: Mapping[str, tuple[float, ...]] = {_AWAY: (1.0, 3.0, 10.0), "": (1.0, 5.0, 15.0, 30.0)}
"""Before something is applied again that the cluster did not take, by reason."""
_LOOK_S = 30.0
_AT_ONCE = 8
"""How many sets are brought up at the same time."""


@dataclass
class Asked:
    """What the reconciler wants of one set."""

    spec: SetSpec
    replicas: int
    sent: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By kind: the digest of what was applied, and the print of what lives since."""
    fault: str = ""
    """Why the cluster does not have it all, in words."""
    reason: str = ""
    failures: int = 0
    again_at: float = 0.0

    def mended(self) -> None:
        """Try again at once."""
        self.fault, self.reason, self.failures, self.again_at = "", "", 0, 0.0

    def failed(self, reason: str, message: str, now: float) -> None:
        """Try again after a while, unless it was refused meanwhile."""
        if self.again_at == math.inf:
            return
        pauses = _PAUSES_S.get(reason, _PAUSES_S[""])
        self.fault, self.reason = message, reason
        self.again_at = now + pauses[min(self.failures, len(pauses) - 1)]
        self.failures += 1

    def refused(self, reason: str, message: str) -> None:
        """Try no more until it is asked anew."""
        self.fault, self.reason, self.again_at = message, reason, math.inf


class Keeper:
    """See the module. `changed` is called with the key of a set when what it knows of that may be another; `check`
    raises while a set cannot run."""

    def __init__(
        self,
        api: Api,
        where: Where,
        caches: Mapping[str, Cache],
        changed: Callable[[str], None],
        clock: Clock,
        check: Callable[[SetSpec], None] = lambda spec: None,
    ) -> None:
        self._api, self._where, self._caches, self._clock = api, where, caches, clock
        self._changed, self._check = changed, check
        self.asked: dict[str, Asked] = {}
        """By key. Not to be changed by who reads them."""
        self.ending: dict[str, float] = {}
        """Keys of sets that go, and when they are deleted again."""
        self._dirty: dict[str, None] = {}
        """Keys of sets to look at, oldest first."""
        self._running: set[str] = set()
        self._signal = Signal()

    def ask(self, spec: SetSpec, replicas: int) -> Asked:
        """Want a set, as it is described and with so many replicas."""
        asked = self.asked.setdefault(spec.key, Asked(spec, replicas))
        asked.spec, asked.replicas = spec, replicas
        asked.mended()
        self.ending.pop(spec.key, None)
        self._look_at(spec.key)
        return asked

    def scale(self, key: str, replicas: int) -> None:
        """Want another number of replicas of a set that is known, and nobody else to scale it."""
        asked = self.asked.get(key)
        if asked is not None and (asked.replicas != replicas or asked.spec.autoscaling is not None):
            asked.spec, asked.replicas = replace(asked.spec, autoscaling=None), replicas
            if asked.again_at != math.inf:
                asked.mended()
            self._look_at(key)

    def end(self, key: str) -> None:
        """Want a set to go, with all of it."""
        if self.asked.pop(key, None) is not None or self.lives(key):
            self.ending.setdefault(key, 0.0)
        self._look_at(key)

    def forget(self) -> list[str]:
        """Want nothing any more, and leave what there is alone. Gives the keys of what was wanted."""
        keys = list(self.asked)
        for known in (self.asked, self.ending, self._dirty):
            known.clear()
        return keys

    def heard(self, kind: str, item: Object | None) -> None:
        """A watch told of something, or is lost or there again."""
        if item is None:
            if not self._caches[kind].fault:
                self.mend(_AWAY)
        elif kind in MADE:
            key = label(item, SET)
            if not key:  # Somebody took the label off: the name still says whose it is.
                key = str(item["metadata"]["name"]).partition("-")[2]
            asked = self.asked.get(key)
            if kind == "Deployment" and asked is not None and asked.spec.autoscaling is not None:
                # Who scales it decides; a Deployment that is deleted by hand comes back with as many.
                asked.replicas = int(item["spec"].get("replicas", asked.replicas))
            known = asked.sent.get(kind) if asked is not None else None
            live = item["metadata"]["name"] in self._caches[kind].objects
            if asked is not None and not live and asked.reason == _OWNED:
                asked.mended()  # Whoever owned a field has perhaps deleted the object, to give it up.
            if key in self.ending or (asked is not None and (not live or not known or known[1] != print_of(item))):
                self._look_at(key)
            self._changed(key)

    async def run(self) -> None:
        """Make it so, for ever."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                for key in self._due():
                    self._running.add(key)
                    tasks.create_task(self._bring(key))
                await self._signal.wait(at_most_s=self._pause_s())

    def settled(self) -> bool:
        """Whether the cluster has been told all that is asked so far, or refused it."""
        waiting = self._running | {key for key in self._dirty if key in self.asked}
        return not any(key in self.asked and not self.asked[key].fault for key in waiting)

    def lives(self, key: str) -> bool:
        """Whether there is still something of a set that is not going yet."""
        name = name_of(key)
        return any(
            name in self._caches[kind].objects
            and not self._caches[kind].objects[name]["metadata"].get("deletionTimestamp")
            for kind in ("Deployment", "ServiceAccount")
        )

    def _look_at(self, key: str) -> None:
        self._dirty[key] = None
        self._signal.notify()

    def mend(self, reason: str) -> None:
        """What kept sets back is no more: nobody waits for the end of a pause."""
        for key, asked in self.asked.items():
            if asked.reason == reason:
                asked.mended()
                self._look_at(key)

    def _again_at(self, key: str) -> float:
        if key in self.asked:
            return self.asked[key].again_at
        return self.ending.get(key, 0.0)

    def _due(self) -> list[str]:
        now = self._clock.monotonic()
        due = (key for key in self._dirty if key not in self._running and self._again_at(key) <= now)
        return list(itertools.islice(due, max(0, _AT_ONCE - len(self._running))))

    def _pause_s(self) -> float:
        if len(self._running) >= _AT_ONCE:
            return _LOOK_S  # Whichever of them ends says so.
        now = self._clock.monotonic()
        waiting = [self._again_at(key) - now for key in self._dirty if key not in self._running]
        return max(0.05, min([*waiting, _LOOK_S]))

    async def _bring(self, key: str) -> None:
        self._dirty.pop(key, None)
        asked = self.asked.get(key)
        try:
            if asked is not None:
                self._check(asked.spec)
                await self._apply(asked)
                if asked.again_at != math.inf:
                    asked.mended()
            elif key in self.ending:
                await self._end(key)
        except EkibenError as exc:
            told = explained(exc, asked.spec) if asked is not None else exc
            self._failed(key, asked, told.reason, told.message)
        except Exception as exc:
            # One set that trips us up must not keep the others from being looked after.
            log.error("a replica set could not be applied", exc_info=exc, extra={"set": key})
            self._failed(key, asked, "INTERNAL", f"It could not be applied: {exc!r}")
        finally:
            self._running.discard(key)
            self._signal.notify()
            self._changed(key)

    def _failed(self, key: str, asked: Asked | None, reason: str, message: str) -> None:
        if asked is not None:
            asked.failed(reason, message, self._clock.monotonic())
        elif key in self.ending:
            self.ending[key] = self._clock.monotonic() + _PAUSES_S[_AWAY][1]
        self._dirty[key] = None

    async def _apply(self, asked: Asked) -> None:
        spec, name = asked.spec, name_of(asked.spec.key)
        made = objects.objects(spec, asked.replicas, self._where, "")
        # First what is not wanted any more: an autoscaler that goes on would write what we are about to.
        for kind in set(MADE) - {"ServiceAccount"} - {each["kind"] for each in made}:
            if name in self._caches[kind].objects:
                await self._api.delete(kind, name)
        anchor = await self._one(asked, objects.anchor(spec, self._where))
        owned: EkibenError | None = None
        for each in objects.objects(spec, asked.replicas, self._where, anchor["metadata"]["uid"]):
            try:
                if each["kind"] == "Deployment" and spec.autoscaling is not None:
                    await self._lend(asked, each, anchor["metadata"]["uid"])
                await self._one(asked, each)
            except FailedPrecondition as exc:
                if exc.reason != _OWNED or each["kind"] == "Deployment":  # No autoscaler for one that is not as asked.
                    raise owned or exc from exc
                owned = owned or exc  # The others are wanted none the less.
        if owned is not None:
            raise owned

    async def _lend(self, asked: Asked, wanted: Object, owner_uid: str) -> None:
        """Let go of a Deployment's `replicas`, where we still own them, without a change of their number."""
        name = wanted["metadata"]["name"]
        live = self._caches["Deployment"].objects.get(name)
        if live is None:  # With as many as there should be, and not the one that is the default.
            given = replace(asked.spec, autoscaling=None)
            (own,) = (
                each
                for each in objects.objects(given, asked.replicas, self._where, owner_uid)
                if each["kind"] == "Deployment"
            )
            live = await self._one(asked, own)
        if SCALED_BY not in (live["metadata"].get("annotations") or {}):
            # A field that its only owner stops to apply is gone, so another one has it until the scaler takes it.
            head = {"name": name, "namespace": self._where.namespace}
            kept = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": head}
            kept["spec"] = {"replicas": int(live["spec"].get("replicas", 1))}
            await self._api.apply(kept, manager=LENDER)

    async def _one(self, asked: Asked, wanted: Object) -> Object:
        """One object as it is wanted, with a call where it is not so. Gives what lives."""
        kind, digest = wanted["kind"], digest_of(wanted)
        live = self._caches[kind].objects.get(wanted["metadata"]["name"])
        if live is not None:
            if live["metadata"].get("deletionTimestamp"):
                return live  # What comes after it is looked at once it is gone.
            printed, noted = print_of(live), (live["metadata"].get("annotations") or {}).get(APPLIED)
            if asked.sent.get(kind) == (digest, printed):
                return live
            if noted == digest and holds(live, wanted):
                # By a former deployer, or changed in what is none of ours.
                asked.sent[kind] = digest, printed
                return live
        wanted["metadata"].setdefault("annotations", {})[APPLIED] = digest
        try:
            applied = await self._api.apply(wanted)
        except FailedPrecondition as exc:
            if kind != "Deployment" or exc.metadata.get("fields") != ".spec.replicas":
                raise
            applied = await self._take_back(wanted, exc)
        self._caches[kind].put(applied)
        asked.sent[kind] = digest, print_of(applied)
        return applied

    async def _take_back(self, wanted: Object, refused: FailedPrecondition) -> Object:
        """A Deployment's `replicas`, where whoever owns them has them from us and scales no more.

        Raises what was refused where somebody else goes on to scale it.
        """
        name = wanted["metadata"]["name"]
        live = await self._api.get("Deployment", name)
        scalers, _ = await self._api.listed("HorizontalPodAutoscaler", "")
        for scaler in scalers:
            if targets(scaler, name) and scaler["metadata"]["name"] != name:
                text = f"{refused.message} The HorizontalPodAutoscaler {scaler['metadata']['name']} scales it."
                raise FailedPrecondition(text, reason="FIELD_OWNED", owners=scaler["metadata"]["name"])
        lent = (live["metadata"].get("annotations") or {}).get(SCALED_BY)
        ours = {(LENDER, ""), (FIELD_MANAGER, ""), (CONTROLLER, "scale")}
        if lent != EXTERNAL and not owners_of_replicas(live) <= ours:
            text = f"{refused.message} With the scale policy external the number is his; back from there, it is ours."
            raise FailedPrecondition(text, reason="FIELD_OWNED", owners=refused.metadata["owners"])
        wanted["metadata"]["resourceVersion"] = live["metadata"]["resourceVersion"]
        return await self._api.apply(wanted, force=True)

    async def _end(self, key: str) -> None:
        if not self.lives(key):
            self.ending.pop(key, None)
            return
        # The Deployment by itself: an owner that is gone takes it away only after a while.
        await self._api.delete("Deployment", name_of(key))
        await self._api.delete("ServiceAccount", name_of(key))
        if key in self.ending:  # Until the watches have told that it is gone.
            self.ending[key] = self._clock.monotonic() + _PAUSES_S[_AWAY][1]
            self._dirty[key] = None
