"""Replica sets as the runtime shows them, kept in memory: which are another than before."""

from collections import Counter as Tally
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import Gauge

from services.deployer.runtimes import Phase, SetStatus

_replicas = Gauge("ekiben_replicas", "Replicas by what is seen of them.", ["phase"])


@dataclass(frozen=True)
class Shift:
    """Phases of the replicas of a deployment by their ids, before and now."""

    before: Mapping[str, Phase]
    now: Mapping[str, Phase]


class Observed:
    """See the module."""

    def __init__(self) -> None:
        self._sets: dict[str, list[SetStatus]] = {}
        self._phases: Tally[Phase] = Tally()
        """How many replicas are in each phase."""

    @property
    def sets(self) -> Mapping[str, Sequence[SetStatus]]:
        """By the uid of the deployment, as they were taken last."""
        return self._sets

    def reset(self) -> None:
        """Know nothing."""
        self._sets = {}
        self._phases.clear()

    def take(self, found: Iterable[SetStatus]) -> dict[str, Shift]:
        """These are there now. Gives the deployments for which they are others than before."""
        before, self._sets = self._sets, {}
        for one in found:
            self._sets.setdefault(one.deployment_uid, []).append(one)
        shifts = {
            uid: Shift(_phases_of(before.get(uid, ())), _phases_of(self._sets.get(uid, ())))
            for uid in self._sets.keys() | before.keys()
            if self._sets.get(uid) != before.get(uid)
        }
        for shift in shifts.values():
            self._phases.subtract(shift.before.values())
            self._phases.update(shift.now.values())
        if shifts:
            for phase in Phase:
                _replicas.labels(phase.value).set(self._phases[phase])
        return shifts


def _phases_of(sets: Iterable[SetStatus]) -> dict[str, Phase]:
    return {replica.replica: replica.phase for one in sets for replica in one.replicas}
