"""What is desired and observed of one service, to the next steps. Pure.

Each call looks at everything anew and gives steps which are safe whatever happened before: the caller may be killed
between any two. The arithmetic is that of Kubernetes' Deployment controller, so that both runtimes behave alike:
never more replicas than desired and the surge, never fewer ready ones than desired less the unavailable, and what is
broken goes first. Other than there, a replica set may be held: new ones until what they call is there, old ones until
nobody calls them any more.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SetView:
    """One replica set, as observed."""

    key: str
    asked: int
    """How many replicas it was last told to have."""
    total: int = 0
    """How many are there, draining ones left out."""
    ready: int = 0
    """How many of these answer."""
    draining: int = 0
    lost: int = 0
    """How many should have ended, on a node that does not say whether they did."""

    @property
    def occupied(self) -> int:
        """How many there are or will be."""
        return max(self.asked, self.total)

    @property
    def surely_ready(self) -> int:
        """Ready ones that it may keep."""
        return min(self.ready, self.asked)

    @property
    def gone(self) -> bool:
        """Whether nothing of it is left that anybody knows of."""
        return self.asked == 0 and self.total == 0 and self.draining == 0


@dataclass(frozen=True)
class Plan:
    """How a service should end up, and what is allowed on the way."""

    desired: int
    surge: int = 1
    unavailable: int = 0
    recreate: bool = False

    def __post_init__(self) -> None:
        if self.desired > 0 and self.surge <= 0 and self.unavailable <= 0 and not self.recreate:
            raise ValueError("a rollout needs a surge or an unavailable replica to make any step")


@dataclass(frozen=True)
class Scale:
    """Tell a replica set how many replicas to have."""

    key: str
    replicas: int


def plan_of(strategy: str, desired: int, *, called: bool) -> Plan:
    """The plan for a strategy.

    Args:
        strategy: see `domain.STRATEGIES`; empty is RollingUpdate.
        called: whether other services call this one. Each revision calls its own services, so for the time of the
            rollout those behind the entry service are there twice.
    """
    if strategy == "Recreate":
        return Plan(desired, surge=0, recreate=True)
    if called:
        return Plan(desired, surge=max(1, desired))
    if strategy == "BestEffortControlledRollout":
        return Plan(desired, surge=0, unavailable=1)
    return Plan(desired, surge=1)


def complete(plan: Plan, new: SetView, old: Sequence[SetView]) -> bool:
    """Whether the service is as desired."""
    return new.asked == plan.desired and new.ready >= plan.desired and all(view.gone for view in old)


def next_steps(
    plan: Plan, new: SetView, old: Sequence[SetView], *, may_start: bool = True, held: Collection[str] = ()
) -> list[Scale]:
    """What to do now; nothing when it is time to wait, or when all is done.

    Args:
        plan: how it should end up.
        new: the set of the latest revision, with zeros when there is none yet.
        old: the sets of former revisions, oldest first.
        may_start: whether new replicas may be started now.
        held: keys of old sets whose replicas may not be stopped now.
    """
    steps = []
    wanted = _grown(plan, new, old) if may_start else new.asked
    wanted = min(wanted, plan.desired)
    if wanted != new.asked:
        steps.append(Scale(new.key, wanted))
    return steps + _shrunk(plan, new, old, held)


def _grown(plan: Plan, new: SetView, old: Sequence[SetView]) -> int:
    if plan.recreate:
        # What is lost may run still, and may not do so beside the new one.
        return plan.desired if all(view.gone and not view.lost for view in old) else new.asked
    room = plan.desired + plan.surge - new.occupied - sum(view.occupied for view in old)
    return new.asked + max(0, room)


def _shrunk(plan: Plan, new: SetView, old: Sequence[SetView], held: Collection[str]) -> list[Scale]:
    left = {view.key: view.asked for view in old}
    # Not all of them because of one: the failed attempt of an update may have to go before the next can be made.
    free = [view for view in old if view.key not in held]
    if plan.recreate:
        return [Scale(view.key, 0) for view in free if view.asked > 0]
    new_unready = max(0, new.asked - new.ready)
    least_ready = max(0, plan.desired - plan.unavailable)
    total = new.asked + sum(left.values())
    spare = max(0, total - least_ready - new_unready)
    # What does not answer goes first, the newest of it before the rest: it is the failed attempt, and an older
    # revision is what still serves.
    for view in reversed(free):
        ended = min(view.asked - view.surely_ready, spare)
        left[view.key] -= ended
        spare -= ended
    ready = min(new.ready, new.asked) + sum(view.surely_ready for view in old)
    spare = min(spare, max(0, ready - least_ready))
    for view in free:
        ended = min(left[view.key], spare)
        left[view.key] -= ended
        spare -= ended
    return [Scale(view.key, left[view.key]) for view in old if left[view.key] != view.asked]
