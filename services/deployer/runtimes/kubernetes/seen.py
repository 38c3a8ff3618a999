"""What is seen of replica sets in a cluster: of thousands only those are looked at of which something was told."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import datetime

from services.deployer.runtimes import ReplicaStatus, SetStatus
from services.deployer.runtimes.kubernetes.autoscaling import SCALED_BY, scaled_of
from services.deployer.runtimes.kubernetes.caches import ByLabel, Cache
from services.deployer.runtimes.kubernetes.events import Explainer
from services.deployer.runtimes.kubernetes.keeping import Keeper
from services.deployer.runtimes.kubernetes.names import SET, UID, Object, facts_of, label, name_of, object_name
from services.deployer.runtimes.kubernetes.pods import lost_of, not_made, overdue, replica_of
from services.deployer.runtimes.kubernetes.slices import endpoints_of, placed
from services.deployer.runtimes.scaling import HPA
from services.kernel.clock import Clock

_SHOWN = ("Deployment", "Pod", "ServiceAccount", "EndpointSlice")
"""What a set is seen by. The first three say what it is, each where those before it are not there."""


class Seen:
    """See the module. `caches` are what watches know, by kind; `keeper` is what is asked, `explainer` what the cluster
    says of pods in trouble."""

    def __init__(self, caches: Mapping[str, Cache], keeper: Keeper, explainer: Explainer, clock: Clock) -> None:
        self._caches, self._keeper, self._explainer, self._clock = caches, keeper, explainer, clock
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

    def touch(self, key: str) -> None:
        """Something of a set may be another than at the last look."""
        self._stale[key] = None

    def heard(self, kind: str, of: str) -> None:
        """An object is another, or gone."""
        if kind not in _SHOWN:
            return
        live = self._caches[kind].objects.get(of)
        touched = self._by_set[kind].heard(of, live)
        self._stale.update(dict.fromkeys(touched))
        if kind != "Pod":
            return
        for key in touched:
            if live is not None and key == label(live, SET):
                self._explainer.heard(key, live)
            else:
                self._explainer.gone(key, of)

    def look(self) -> list[SetStatus]:
        """All sets. Those of which nothing was told are the very same as the last time."""
        faults = tuple((cache.reason, cache.fault) for cache in self._caches.values())
        if faults != self._lost:  # Each set says so.
            self._lost = faults
            self._stale.update(dict.fromkeys((*self._statuses, *self._keeper.asked)))
        stale, self._stale = {*self._stale, *self._leaving}, {}
        for key in stale:
            if (one := self._look_at(key)) is None:
                self._statuses.pop(key, None)
                self._leaving.discard(key)
            else:
                self._statuses[key] = one
        return list(self._statuses.values())

    def sets_of(self, deployment_uid: str) -> dict[str, SetStatus]:
        """The sets of a deployment by key, as far as anything of them is there."""
        found: dict[str, SetStatus] = {}
        for cache in self._caches.values():
            for item in cache.objects.values():
                if label(item, UID) == deployment_uid and (seen := _set_of(item, label(item, SET))) is not None:
                    found[seen.key] = seen
        return found

    def pods(self, deployment_uid: str, service: str, replica: str) -> Iterable[tuple[Object, str]]:
        """Pods of a deployment with the services that they run; `service` and `replica` choose, empty for all."""
        for pod in list(self._caches["Pod"].objects.values()):
            seen = _set_of(pod, label(pod, SET))
            if seen is None or label(pod, UID) != deployment_uid:
                continue
            if service in ("", seen.service) and replica in ("", object_name(pod)):
                yield pod, seen.service

    def _look_at(self, key: str) -> SetStatus | None:
        """A set, as far as anything of it is asked or there."""
        if not key:
            return None

        def own(kind: str) -> list[Object]:
            # A pod that somebody gave another label, to look into it, is of no set any more.
            return [item for item in self._by_set[kind].of(key).values() if object_name(item).startswith(name_of(key))]

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
            found = next((seen for item in items if (seen := _set_of(item, key)) is not None), None)
            if found is None:
                return None
            one = found
            for item in self._by_set["Deployment"].of(key).values():
                if key not in self._keeper.ending:
                    lent = SCALED_BY in (item["metadata"].get("annotations") or {})
                    one = replace(one, asked=int(item["spec"].get("replicas", 1)), autoscaled=lent)
        place = endpoints_of(self._by_set["EndpointSlice"].of(key).values()).get(key)
        pods, now = sorted(own("Pod"), key=object_name), self._clock.now()
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
        of, said = object_name(pod), self._explainer.of(pod)
        known = self._replicas.get(of)
        if known is None or known[0] is not pod or known[1] is not said:
            if len(self._replicas) > 2 * len(self._caches["Pod"].objects) + 100:
                self._replicas.clear()
            known = self._replicas[of] = (pod, said, replica_of(pod, said))
        return lost_of(known[2]) if overdue(pod, now) else known[2]

    def _faults(self, key: str) -> tuple[str, str]:
        """Why the cluster does not have a set as it is wanted, in words; and the first reason for programs."""
        asked, live = self._keeper.asked.get(key), self._caches["Deployment"].objects.get(name_of(key))
        found = [(asked.reason, asked.fault)] if asked else []
        found += [not_made(live)] if live else []
        found += [(cache.reason, cache.fault) for cache in self._caches.values()]
        told = [(reason, text) for reason, text in found if text]
        return "; ".join(dict.fromkeys(text for _, text in told)), told[0][0] if told else ""


def _set_of(item: Object, key: str) -> SetStatus | None:
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
