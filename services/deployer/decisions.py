"""What is seen of a deployment to what its replica sets are told. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ekiben.deployer.v1 import deployer_pb2 as pb
from services.deployer import rollout, scaling, specs
from services.deployer.domain import MAIN, Deployment
from services.deployer.rollout import SetView
from services.deployer.runtimes import Phase, SetStatus
from services.deployer.runtimes.scaling import Autoscaling
from services.deployer.specs import Version
from services.deployer.status import ServiceFact

Routed = Callable[[str], bool]
"""Whether a replica can be reached through every gateway."""


@dataclass(frozen=True)
class View:
    """One deployment, and what runs of it."""

    deployment: Deployment
    versions: Mapping[int, Sequence[Version]]
    """Those of the latest revision, and of each that has a replica set, by its number."""
    sets: Sequence[SetStatus]

    @property
    def latest(self) -> Sequence[Version]:
        """The versions to be rolled out, main first."""
        return self.versions[self.deployment.latest_revision]

    def version_of(self, one: SetStatus) -> Version | None:
        """What a replica set runs."""
        return next((each for each in self.versions[one.revision] if each.target == one.target), None)


@dataclass(frozen=True)
class Decision:
    """What becomes of one service of the latest revision."""

    fact: ServiceFact
    key: str
    """Of its replica set."""
    asked: Mapping[str, int]
    """By key of the sets that are to be told: how many replicas to have."""
    lent: Autoscaling | None
    """Who scales the new set meanwhile."""


def decide(
    view: View, version: Version, service: str, autoscaling: Autoscaling | None, *, scales: bool, routed: Routed
) -> Decision:
    """The next steps of one service towards the latest revision.

    Args:
        view: the deployment.
        version: the target of the latest revision.
        service: which of its services.
        autoscaling: who should scale it.
        scales: whether the runtime lets anybody.
        routed: see there.
    """
    deployment = view.deployment
    key = specs.key_of(deployment.uid, deployment.latest_revision, version.target, service)
    new = _set_of(view, key)
    old = [
        one
        for one in sorted(view.sets, key=lambda one: one.revision)
        if one.target == version.target and one.service == service and one.revision != deployment.latest_revision
    ]
    acted_on = autoscaling if scales else None
    least = specs.desired_of(deployment, version, service)
    remembered = deployment.status.scale.get(f"{version.target}/{service}")
    desired = scaling.desired_of(acted_on, least, remembered, new, old)
    strategy = version.services.get(service, pb.ServiceTemplate()).deployment_strategy
    plan = rollout.plan_of(strategy, desired, called=bool(version.manifest.dependents(service)))
    plan = scaling.plan_of(plan, acted_on)
    # A new replica counts once gateways know it: before, an old one must not go, and nobody should be told RUNNING.
    seen_new = replace(_seen(new, key), ready=_reached(new, routed))
    seen_old = [_seen(one, one.key) for one in old]
    fact = ServiceFact(
        version.target,
        service,
        plan.desired,
        service == version.manifest.entry,
        scaling.complete(plan, seen_new, seen_old, least if new is not None and new.autoscaled else None),
        new,
        tuple(old),
        autoscaling,
        acted_on=acted_on is not None,
    )
    may_start = (new is not None and new.asked > 0) or _may_call(view, version, service, routed)
    held = [one.key for one in old if _is_called(view, one)]
    steps = rollout.next_steps(plan, seen_new, seen_old, may_start=may_start, held=held)
    asked = {step.key: step.replicas for step in scaling.kept(steps, old, acted_on)}
    # Its autoscaler is stopped by the first step of the rollout after this one.
    lent = acted_on if fact.complete or (new is not None and new.autoscaled and not old) else None
    return Decision(fact, key, asked, lent)


def obsolete(view: View, *, complete: bool) -> list[SetStatus]:
    """Sets to end: of targets that the latest revision does not have, and of services once it is rolled out."""
    wanted = {(version.target, one.name) for version in view.latest for one in version.manifest.services}
    targets = {version.target for version in view.latest}
    return [
        one
        for one in view.sets
        if (one.target, one.service) not in wanted
        and (complete or one.target not in targets)
        and one.asked
        and not _is_called(view, one)
    ]


def ready_revisions(view: View) -> list[int]:
    """Revisions whose entry service has a ready replica."""
    return [
        one.revision
        for one in view.sets
        if one.target == MAIN
        and one.count(Phase.READY)
        and (version := view.version_of(one)) is not None
        and one.service == version.manifest.entry
    ]


def _may_call(view: View, version: Version, service: str, routed: Routed) -> bool:
    """Whether all that the service calls is there, and gateways know the way."""
    uid, latest = view.deployment.uid, view.deployment.latest_revision
    called = version.manifest.service(service).dependencies
    keys = [specs.key_of(uid, latest, version.target, name) for name in called]
    return all(_reached(_set_of(view, key), routed) for key in keys)


def _is_called(view: View, one: SetStatus) -> bool:
    """Whether services of the same revision may still call this set."""
    version = view.version_of(one)
    callers = version.manifest.dependents(one.service) if version is not None else ()
    return any(
        other.revision == one.revision and other.target == one.target and other.service in callers
        for other in view.sets
        if other.replicas or other.asked
    )


def _reached(one: SetStatus | None, routed: Routed) -> int:
    """How many replicas answer and can be reached."""
    replicas = one.replicas if one is not None else ()
    return sum(replica.phase is Phase.READY and routed(replica.replica) for replica in replicas)


def _set_of(view: View, key: str) -> SetStatus | None:
    return next((one for one in view.sets if one.key == key), None)


def _seen(one: SetStatus | None, key: str) -> SetView:
    if one is None:
        return SetView(key, 0)
    draining, lost = one.count(Phase.DRAINING), sum(replica.lost for replica in one.replicas)
    return SetView(key, one.asked, len(one.replicas) - draining, one.count(Phase.READY), draining - lost, lost)
