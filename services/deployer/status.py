"""What is observed of a deployment, to a state and conditions in words. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from services.deployer.domain import MAIN, Condition, Status
from services.deployer.runtimes import Phase, ReplicaStatus, SetStatus
from services.deployer.runtimes.scaling import EXTERNAL, Autoscaling, Scaled

_LAST_LINES = " Its last lines:\n"


@dataclass(frozen=True)
class ServiceFact:
    """One service of one target of the latest revision."""

    target: str
    service: str
    desired: int
    entry: bool
    complete: bool
    new: SetStatus | None
    old: tuple[SetStatus, ...] = ()
    autoscaling: Autoscaling | None = None
    """Who should scale it."""
    acted_on: bool = False
    """Whether the runtime lets him."""


@dataclass(frozen=True)
class Facts:
    """Everything that a state is made from."""

    generation: int
    latest_revision: int
    services: tuple[ServiceFact, ...] = ()
    building: bool = False
    """Whether an environment is not there yet."""
    building_message: str = ""
    problem: Condition | None = None
    """What keeps the latest revision from starting at all."""
    verified: Condition | None = None
    """Who signed what it runs; None where nobody asks."""
    leaving: bool = False
    """Whether nothing should run."""
    left: int = 0
    """How many replicas are there nevertheless."""
    serving_revision: int = 0
    crashes_until_failed: int = 3
    refused_port: int = 0
    """The own port, where a gateway cannot listen at it."""
    url_by_name: str = ""
    """Where it is reached by its host name."""
    exposed: Condition | None = None
    """What came of its exposure; None where it has none."""


def summarize(facts: Facts, before: Status, now: datetime) -> Status:
    """The status to show."""
    if facts.leaving:
        return _left(facts, before, now)
    complete = bool(facts.services) and all(fact.complete for fact in facts.services) and facts.problem is None
    complete = complete and not facts.building
    crashed = _worst(facts.services)
    ran = facts.serving_revision == facts.latest_revision
    failed = crashed is not None and crashed.failed_starts >= facts.crashes_until_failed
    if complete:
        state = "RUNNING"
    elif facts.problem is not None:
        state = "FAILED"
    elif facts.building:
        state = "BUILDING"
    elif ran and crashed is not None:
        state = "UNHEALTHY"
    elif failed:
        state = "FAILED"
    else:
        state = "DEPLOYING"
    available = _available(facts, crashed)
    conditions = (
        _built(facts),
        available,
        _progressing(facts, state, crashed, told=available.status is False),
        *_verified(facts),
        *_applied(facts),
        *_reachable(facts),
        *_autoscaled(facts),
        *((facts.exposed,) if facts.exposed is not None else ()),
    )
    counts = {
        fact.service: _counts(fact)
        for fact in sorted(facts.services, key=lambda fact: fact.target == MAIN)  # main's counts win
    }
    return Status(
        state,
        _dated(conditions, before.conditions, now),
        counts,
        facts.generation,
        facts.serving_revision,
        complete,
        {f"{fact.target}/{fact.service}": fact.desired for fact in facts.services if fact.acted_on},
    )


def serving_revision(latest: int, before: int, complete: bool, ready: Sequence[int]) -> int:
    """The revision that gets the requests: the latest once it is complete, the former one while it can.

    Args:
        latest: the newest revision.
        before: what was given the last time; 0 for none.
        complete: whether the latest is rolled out.
        ready: revisions whose entry service has a ready replica.
    """
    if complete:
        return latest
    if before in ready or not ready:
        return before
    return max(ready)


def _left(facts: Facts, before: Status, now: datetime) -> Status:
    if facts.left:
        text = f"{facts.left} replicas finish their requests."
        conditions = (
            Condition("Available", False, "TERMINATING", text),
            Condition("Progressing", True, "TERMINATING", text),
        )
        return Status("TERMINATING", _dated(conditions, before.conditions, now), {}, facts.generation, 0, False)
    text = "It was terminated. Update it to start it again."
    conditions = (
        Condition("Available", False, "TERMINATED", text),
        Condition("Progressing", False, "TERMINATED", text),
    )
    return Status("TERMINATED", _dated(conditions, before.conditions, now), {}, facts.generation, 0, True)


def _counts(fact: ServiceFact) -> tuple[int, int, int, int]:
    sets = [*([fact.new] if fact.new else []), *fact.old]
    ready = sum(one.count(Phase.READY) for one in sets)
    updated = fact.new.count(Phase.READY) if fact.new else 0
    return fact.desired, sum(len(one.replicas) for one in sets), ready, updated


def _worst(services: Sequence[ServiceFact]) -> ReplicaStatus | None:
    """The replica of the latest revision that is most in trouble; None where all merely start."""
    troubled = [
        replica
        for fact in services
        if fact.new is not None
        for replica in fact.new.replicas
        if replica.phase in (Phase.CRASHED, Phase.UNREADY)
        or (replica.phase is Phase.STARTING and (replica.failed_starts or replica.restart_count))
    ]
    return max(troubled, key=lambda replica: (replica.failed_starts, replica.restart_count), default=None)


def _built(facts: Facts) -> Condition:
    if facts.problem is not None and facts.problem.type == "Built":
        return facts.problem
    if facts.building:
        return Condition("Built", None, "BUILDING", facts.building_message or "The environment is being built.")
    return Condition("Built", True, "BUILT", "")


def _verified(facts: Facts) -> tuple[Condition, ...]:
    if facts.problem is not None and facts.problem.type == "Verified":
        return (facts.problem,)
    return () if facts.verified is None else (facts.verified,)


def _available(facts: Facts, crashed: ReplicaStatus | None) -> Condition:
    lacking = []
    for fact in facts.services:
        _, _, ready, _ = _counts(fact)
        if ready < 1:
            name = fact.service if fact.target == MAIN else f"{fact.service} of {fact.target}"
            lacking.append(f"{name} has no ready replica")
    notes = sorted({fact.new.note for fact in facts.services if fact.new and fact.new.note})
    note = f" Note: {'; '.join(notes).rstrip('.')}." if notes else ""
    if facts.services and not lacking:
        # What a cluster does not take has a condition of its own.
        notes = sorted({fact.new.note for fact in facts.services if fact.new and fact.new.note and not fact.new.reason})
        note = f" Note: {'; '.join(notes)}." if notes else ""
        shown = ", ".join(
            f"{fact.service} {_counts(fact)[2]}/{fact.desired}" for fact in facts.services if fact.target == MAIN
        )
        return Condition("Available", True, "REPLICAS_READY", f"Ready: {shown}.{note}")
    if facts.problem is not None:
        built = facts.problem.type == "Built"
        text = "Its environment cannot be built." if built else facts.problem.message
        return Condition("Available", False, facts.problem.reason, text)
    if crashed is not None:
        return Condition("Available", False, _reason(crashed), _told(crashed, note))
    if facts.building:
        return Condition("Available", False, "BUILDING", "The environment is being built.")
    text = "; ".join(lacking) or "nothing is started yet"
    said = sorted({one.message for fact in facts.services if fact.new for one in fact.new.replicas if one.message})
    if lacking and said:
        text += f". {' '.join(said)}".rstrip(".")
    return Condition("Available", False, "REPLICAS_STARTING", f"{text[:1].upper()}{text[1:]}.{note}")


def _progressing(facts: Facts, state: str, crashed: ReplicaStatus | None, *, told: bool) -> Condition:
    """`told`: another condition says already what is wrong; a page of log lines is read once."""
    if state == "RUNNING":
        return Condition("Progressing", False, "ROLLED_OUT", f"Revision {facts.latest_revision} is rolled out.")
    if state == "FAILED":
        if facts.problem is not None:
            why = "" if told or facts.problem.type == "Built" else f" {facts.problem.message}"
            text = f"Revision {facts.latest_revision} cannot be started.{why}"
            return Condition("Progressing", False, facts.problem.reason, text)
        assert crashed is not None
        why = "" if told else f" {_told(crashed)}"
        text = f"Revision {facts.latest_revision} does not start; it is tried again.{why}"
        return Condition("Progressing", False, _reason(crashed), text)
    if crashed is not None and not told:
        return Condition("Progressing", True, _reason(crashed), _told(crashed))
    done = sum(fact.new.count(Phase.READY) if fact.new else 0 for fact in facts.services)
    wanted = sum(fact.desired for fact in facts.services)
    text = f"Revision {facts.latest_revision}: {done} of {wanted} replicas are ready."
    return Condition("Progressing", True, _reason(crashed) if crashed is not None else "ROLLING_OUT", text)


def _applied(facts: Facts) -> tuple[Condition, ...]:
    """Only where a cluster does not have the latest revision as it is wanted: a field that somebody else owns, a quota,
    an API that is away."""
    told = [fact.new for fact in facts.services if fact.new is not None and fact.new.reason]
    if not told:
        return ()
    text = "; ".join(dict.fromkeys(one.note for one in told))
    return (Condition("Applied", False, told[0].reason, f"{text[:1].upper()}{text[1:]}"),)


def _reachable(facts: Facts) -> tuple[Condition, ...]:
    """Only where something is wrong: at its host name a deployment is reached whoever has its port."""
    if not facts.refused_port:
        return ()
    text = (
        f"Another program listens at port {facts.refused_port}, so that the deployment's URL does not lead here. It is "
        f"reached at {facts.url_by_name}; it takes its own port back once that is free."
    )
    return (Condition("Reachable", False, "PORT_TAKEN", text),)


def _autoscaled(facts: Facts) -> tuple[Condition, ...]:
    """Only where somebody should scale anything."""
    told = [_scaled(fact, fact.autoscaling) for fact in facts.services if fact.autoscaling is not None]
    if not told:
        return ()
    order: list[bool | None] = [False, None, True]
    worst = min(told, key=lambda one: order.index(one.status))
    said = " ".join(dict.fromkeys(one.message for one in told if one.status is worst.status))
    return (replace(worst, message=said),)


def _scaled(fact: ServiceFact, by: Autoscaling) -> Condition:
    name = fact.service if fact.target == MAIN else f"{fact.service} of {fact.target}"
    if not fact.acted_on:
        text = f"{name} keeps {fact.desired} of up to {by.most} replicas: this runtime scales nothing by itself."
        return Condition("Autoscaled", False, "RUNTIME_SCALES_NOTHING", text)
    if fact.new is None or not fact.new.autoscaled:
        return Condition("Autoscaled", None, "ROLLING_OUT", f"{name} is scaled once it is rolled out.")
    if by.policy == EXTERNAL:
        return Condition("Autoscaled", True, "EXTERNAL", f"Somebody else scales {name}.")
    says = fact.new.scaled or Scaled(None)
    if says.works is False:
        text = f"{name} keeps the replicas that it has: {says.reason}: {says.message.rstrip('.')}."
        return Condition("Autoscaled", False, "AUTOSCALER_FAILS", text)
    if says.works is None:
        return Condition("Autoscaled", None, "AUTOSCALER_STARTING", f"{name}: the autoscaler has not looked yet.")
    return Condition("Autoscaled", True, "AUTOSCALED", f"{name} has {by.least} to {by.most} replicas by its use.")


def _reason(replica: ReplicaStatus) -> str:
    return "REPLICA_UNREADY" if replica.phase is Phase.UNREADY else "REPLICA_CRASHED"


def _told(replica: ReplicaStatus, note: str = "") -> str:
    again = f" It was started {replica.restart_count + 1} times." if replica.restart_count else ""
    lines = f"{_LAST_LINES}{replica.last_lines}" if replica.last_lines else ""
    return f"Replica {replica.replica}: {replica.message}{again}{note}{lines}"


def without_lines(message: str) -> str:
    """A condition's message without what replicas printed: for callers of a deployment, who need not see its log."""
    return message.partition(_LAST_LINES)[0]


def _dated(conditions: Sequence[Condition], before: Sequence[Condition], now: datetime) -> tuple[Condition, ...]:
    known = {condition.type: condition for condition in before}
    dated = []
    for condition in conditions:
        former = known.get(condition.type)
        kept = former is not None and former.status == condition.status
        dated.append(replace(condition, transition_time=former.transition_time if former and kept else now))
    return tuple(dated)
