"""The loop: look at what is there, decide by pure functions, act so that doing it twice does no harm.

A pass is level-triggered, and yet costs what has changed rather than what there is: of thousands of deployments it
looks at those whose row, replica sets, builds, routes or exposure are another than at the last look, at those which
that look changed or could not finish, and at a few in turn (see `attention.py`).
"""

import asyncio
import contextlib
import logging
from collections import Counter as Tally
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from ekiben.api.v1 import annotations_pb2
from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.errors import EkibenError, NotFound
from ekiben.identity.v1 import identity_pb2
from services.deployer import gate, rollout, routing, scaling, specs, status
from services.deployer.addresses import CONDITION, Addresses
from services.deployer.attention import Attention
from services.deployer.builds import Builds, Made, Output, Progress, Way
from services.deployer.desired import Desired
from services.deployer.domain import DEFAULT_CLUSTER, MAIN, Condition, Deployment, InstanceType, Revision, Status
from services.deployer.ownership import Ownership
from services.deployer.rollout import SetView
from services.deployer.routes import Routes
from services.deployer.runtimes import Phase, Runtime, SetStatus
from services.deployer.runtimes.exposures import Exposed
from services.deployer.runtimes.scaling import Autoscaling
from services.deployer.settings import Settings
from services.deployer.specs import Version
from services.deployer.status import Facts, ServiceFact
from services.deployer.store import Store
from services.deployer.uses import Uses
from services.kernel import telemetry
from services.kernel.clock import Clock
from services.kernel.identity import Principal
from services.kernel.watches import Signal, Topic

log = logging.getLogger(__name__)

PASS_S = 1.0
"""At the latest after so long it is seen whether something differs, whoever forgot to say that it does."""
GIVE_WAY = 10
"""After so many deployments of a pass others get their turn: calls are answered meanwhile."""
REVISIONS = 10
"""So many of each deployment are kept in memory: the latest, and those that have replicas still."""
COMPARE_S = 5.0
"""So often exposures are compared though nobody said that something of them changed."""
PATIENCE_S = 30.0
"""So long a cluster may take to tell what is there, until the routes of others wait no more for it."""
SECRETS_S = 15.0
"""While a rollout goes on, a secret that was missing or wrong is noticed after so long."""
DRAIN_ACK_S = 3.0
"""At shutdown gateways may stop before they acknowledge; a person is waiting."""
WANTED = "wanted"
"""The topic's key for changes of what is desired; a deployment's own key is its uid."""
MISSING = ("ENVIRONMENT_MISSING", "IMAGE_MISSING")
"""Reasons of replicas for which the builder must be asked again."""

_seconds = Histogram("ekiben_reconcile_duration_seconds", "Time of one pass.")
_failures = Counter("ekiben_reconcile_failures_total", "Passes over one deployment that ended in an error.")
_replicas = Gauge("ekiben_replicas", "Replicas by what is seen of them.", ["phase"])


@dataclass
class _View:
    """What one pass knows of one deployment."""

    deployment: Deployment
    revision: Revision
    sets: list[SetStatus]
    services: list[ServiceFact] = field(default_factory=list)
    problem: Condition | None = None
    verified: list[Condition] = field(default_factory=list)
    building: bool = False
    building_message: str = ""
    build: str = ""
    acted: list[str] = field(default_factory=list)


class Reconciler:
    """See the module."""

    def __init__(
        self,
        store: Store,
        runtime: Runtime,
        builds: Builds,
        vault: Any,
        uses: Uses,
        ownership: Ownership,
        topic: Topic,
        settings: Settings,
        instance_types: dict[str, InstanceType],
        clock: Clock,
        addresses: Addresses,
    ) -> None:
        self._store, self._runtime, self._vault, self._uses = store, runtime, vault, uses
        self._settings, self._instance_types, self._clock = settings, instance_types, clock
        self._addresses = addresses
        self._signal = Signal()
        self.ownership = ownership
        ownership.changed = self._signal.notify
        self._owned = False
        self.topic = topic
        """Changes of deployments, by uid; of what is desired also by WANTED."""
        self.routes = Routes(store.next_route_version, clock, self._signal.notify)
        self._builds = builds
        builds.changed = self._notice
        self._desired = Desired(store, clock)
        self._attention = Attention(clock)
        self._seen: dict[str, list[SetStatus]] = {}
        """The replica sets of each deployment, as of the last pass."""
        self._phases: Tally[Phase] = Tally()
        """How many replicas are in each phase."""
        self._draining: dict[str, set[str]] = {}
        """Those that are to be ended once no gateway routes to them, by deployment."""
        self._gone: set[str] = set()
        """Those that are no more, of which the routes still know."""
        self._routes: dict[str, pb.Route] = {}
        """By the uid of the deployment."""
        self._waiting: set[str] = set()
        """Deployments with replicas of which not every gateway knows yet."""
        self._used = (-1, frozenset[int]())
        """What gateways used at the last pass, and which ports they were refused."""
        self._exposures: dict[str, tuple[Exposed, object]] = {}
        """What deployments are exposed by, and what came of it."""
        self._unpublished = True
        """Whether routes are others than gateways were told."""
        self._unexposed = True
        """Whether rows are others than the runtime was told to expose."""
        self._moved = True
        """Whether the runtime has said that something is another."""
        self._compare_at = 0.0
        """When exposures are compared though it has not."""
        self._all_known, self._patient_until = False, 0.0
        """Whether all places have told what is there, and how long they may take."""
        self._revisions: dict[str, dict[int, Revision]] = {}
        self._versions: dict[str, dict[int, list[Version]]] = {}
        """Both by the uid of the deployment, and number."""
        self._secrets_known: dict[str, dict[tuple[object, ...], tuple[float, list[identity_pb2.Secret]]]] = {}
        """By the uid of the deployment, then generation and names."""
        self._applied: set[str] = set()
        self._lent: dict[str, Autoscaling | None] = {}
        """By key of a set of a latest revision: who was last told to scale it."""
        self._restored: set[str] = set()
        self._stopping = False
        self._tasks: asyncio.TaskGroup

    def wake(self, uid: str) -> None:
        """The desired state of a deployment changed."""
        self.topic.notify(uid)
        self.topic.notify(WANTED)

    def ask_anew(self) -> None:
        """A runtime has taken over from another, as at a start: it has what is there, and was asked for nothing."""
        self._applied.clear()
        for uid in self._desired.rows:
            self._attention.tell(uid)
        self._signal.notify()

    def observed(self, uid: str) -> Sequence[SetStatus]:
        """The replica sets of a deployment, as of the last pass. Raises Unavailable where another has them."""
        self.ownership.check()
        return self._seen.get(uid, [])

    # The loop

    async def run(self) -> None:
        """Reconcile until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self.open(tasks)
            while True:
                try:
                    with telemetry.untraced(), _seconds.time():
                        await self.turn()
                except EkibenError as exc:
                    log.warning("deployments could not be reconciled", extra={"reason": exc.reason, "error": str(exc)})
                    await self._clock.sleep(PASS_S)
                await self._signal.wait(at_most_s=PASS_S)

    def open(self, tasks: asyncio.TaskGroup) -> None:
        """Hear of changes from here on, in tasks of this group."""
        self._tasks = tasks
        tasks.create_task(self._listen())
        tasks.create_task(self._hear())

    async def turn(self) -> None:
        """One pass, or nothing to do with what another has."""
        await (self._pass() if self._may_act() else self._stand_by())

    def _may_act(self) -> bool:
        if self.ownership.held and not self._owned:
            self.routes.open()
            self._desired.reset()
            for known in (self._seen, self._phases, self._draining, self._routes, self._exposures, self._secrets_known):
                known.clear()
            for some in (self._restored, self._applied, self._waiting, self._gone):
                some.clear()
            self._unexposed = self._unpublished = True
            self._all_known, self._patient_until = False, self._clock.monotonic() + PATIENCE_S
        elif self._owned and not self.ownership.held:
            self.routes.close()
        self._owned = self.ownership.held
        return self._owned

    def _notice(self, uid: str) -> None:
        self._attention.tell(uid)
        self._signal.notify()

    async def _stand_by(self) -> None:
        """Another deployer has the cluster: end what runs here, as it starts that on its own machine."""
        if self._stopping:
            return
        self.routes.close()
        observed = await self._runtime.observe()
        self._seen = _by_deployment(observed)
        await self._runtime.expose(None)
        ending = [one for one in observed if not one.outlives]
        for one in ending:
            if one.asked or one.replicas:
                await self._runtime.scale(one.key, 0)
        await self._runtime.release([replica.replica for one in ending for replica in one.replicas])

    async def _hear(self) -> None:
        async for _ in self.topic.changes(WANTED):
            self._desired.tell()
            self._signal.notify()

    async def drain(self) -> None:
        """Take every replica out of the routes, then stop them all; what is desired stays. So do replicas that outlive
        the deployer, and their routes."""
        self._stopping = True
        observed = [one for sets in self._seen.values() for one in sets]
        ids = [replica.replica for one in observed if not one.outlives for replica in one.replicas]
        if ids:
            with contextlib.suppress(EkibenError, TimeoutError):
                async with asyncio.timeout(DRAIN_ACK_S):
                    await self.routes.publish(
                        [routing.without(each, set(ids)) for each in self.routes.current().routes]
                    )
                    while not all(self.routes.unrouted(id) for id in ids):
                        await self._clock.sleep(0.05)
        await self._runtime.release(ids)
        await self._runtime.drain(self._settings.shutdown_drain_s)
        await self.ownership.release()

    async def _listen(self) -> None:
        while True:
            await self._runtime.changed()
            self._moved = True
            self._signal.notify()
            # Probes of many replicas come in bursts; one pass does for all of them.
            await asyncio.sleep(0.05)

    async def _pass(self) -> None:
        moved, self._moved = self._moved, False
        observed = await self._runtime.observe()
        if self._stopping:
            return
        if not self._desired.read:
            self._keep(await self._store.latest_revisions())
        in_turn = self._attention.in_turn(self._desired.rows)
        changed = await self._desired.refresh(in_turn)
        rows, sets = self._desired.rows, _by_deployment(observed)
        self._unexposed |= bool(changed)
        for uid in changed | in_turn | self._observe(sets) | self._differing(moved):
            self._attention.tell(uid)
        await self._end_orphans(sets.keys() - rows.keys(), sets)
        # Until its place has told what is there nothing is done for a deployment, and gateways keep the ways that they
        # know; but then words are needed why it does not go on, and others need their ways.
        unknown, late = self._unknown(), self._clock.monotonic() >= self._patient_until
        waits = unknown if not late or len(unknown) == len(rows) else set()
        due = self._attention.due()
        for uid in due - rows.keys():
            self._lose(uid)
        for count, uid in enumerate(sorted((due & rows.keys()) - (set() if late else unknown)), start=1):
            await self._look(rows[uid], sets.get(uid, []))
            if count % GIVE_WAY == 0:
                await asyncio.sleep(0)
            if self._stopping:
                return
        if self._unpublished and not waits and not self._stopping:
            await self.routes.publish(self._routes.values())
            self._unpublished = False
        await self._release()
        if self._unexposed:
            await self._expose()

    def _unknown(self) -> set[str]:
        """Deployments whose place has not told yet what is there, since this deployer has the cluster."""
        if self._all_known:
            return set()
        unknown = {uid for uid, row in self._desired.rows.items() if not self._runtime.knows(row.place)}
        self._all_known = not unknown
        return unknown

    async def _end_orphans(self, uids: Set[str], sets: dict[str, list[SetStatus]]) -> None:
        """End sets of which there is no row; in the database, as another deployer may have made one just now."""
        if not uids:
            return
        known = (await self._store.generations()).keys()
        if uids & known:
            self._desired.tell()
        for uid in uids - known:
            for one in sets[uid]:
                await self._runtime.scale(one.key, 0)

    def _observe(self, sets: dict[str, list[SetStatus]]) -> set[str]:
        """Take what the runtime shows. Gives the deployments for which it is another than before."""
        before, self._seen = self._seen, sets
        shifted = {uid for uid in sets.keys() | before.keys() if sets.get(uid) != before.get(uid)}
        for uid in shifted:
            was, now = _replicas_of(before.get(uid, ())), _replicas_of(sets.get(uid, ()))
            self._gone |= was.keys() - now.keys()
            self._phases.subtract(was.values())
            self._phases.update(now.values())
            self._draining.pop(uid, None)
            if draining := {replica for replica, phase in now.items() if phase is Phase.DRAINING}:
                self._draining[uid] = draining
        if shifted:
            there = {one.key for some in sets.values() for one in some}
            self._lent = {key: lent for key, lent in self._lent.items() if key in there}
            self._applied &= there
            for phase in Phase:
                _replicas.labels(phase.value).set(self._phases[phase])
        return shifted

    def _differing(self, moved: bool) -> set[str]:
        """Deployments for which what gateways do, or what came of an exposure, is another than at the last look."""
        used, refused = self.routes.used(), self.routes.refused_ports()
        found = set(self._waiting) if used != self._used[0] else set()
        if ports := refused ^ self._used[1]:
            found |= {uid for uid, row in self._desired.rows.items() if row.port in ports}
        self._used = used, refused
        now = self._clock.monotonic()
        if moved or now >= self._compare_at:  # What it said may have been heard by a pass that came before.
            self._compare_at = now + COMPARE_S
            found |= {uid for uid, (wanted, came) in self._exposures.items() if self._runtime.exposure(wanted) != came}
        return found

    async def _look(self, deployment: Deployment, sets: list[SetStatus]) -> None:
        """One deployment, whatever becomes of it."""
        uid = deployment.uid
        self._attention.looking(uid)
        try:
            if not await self._reconcile(deployment, list(sets)):
                self._lose(uid)
                return
            self._builds.prune(uid)
            deployment = self._desired.rows.get(uid, deployment)
            self._uses.seen(deployment)
        except Exception as exc:
            # One broken deployment must not keep the others from being looked after.
            self._attention.later(uid, PASS_S)
            self._failed(deployment, exc)
            if uid in self._desired.rows:  # What it wants is kept from being deleted all the same.
                self._uses.seen(deployment)
        try:
            self._reroute(uid, None if deployment.deleting else await self._route(deployment, sets))
        except Exception as exc:  # It keeps the way in that it has.
            self._attention.later(uid, PASS_S)
            self._failed(deployment, exc)
        ready = [one.replica for each in sets for one in each.replicas if one.phase is Phase.READY]
        if all(self.routes.routed(replica) for replica in ready):
            self._waiting.discard(uid)
        else:
            self._waiting.add(uid)

    def _reroute(self, uid: str, route: pb.Route | None) -> None:
        if route == self._routes.get(uid):
            return
        self._unpublished = True
        if route is None:
            del self._routes[uid]
        else:
            self._routes[uid] = route

    def _failed(self, deployment: Deployment, exc: Exception) -> None:
        _failures.inc()
        facts = {"deployment": deployment.name}
        if isinstance(exc, EkibenError):  # Its sentence says all: no traceback each second of a full disk.
            facts |= {"reason": exc.reason, "error": str(exc)}
            log.warning("deployment could not be reconciled", extra=facts)
        else:
            log.error("deployment could not be reconciled", exc_info=exc, extra=facts)

    def _lose(self, uid: str) -> None:
        """Its row is gone: nothing is kept of it."""
        self._attention.looking(uid)
        self._builds.gone(uid)
        self._reroute(uid, None)
        for known in (self._revisions, self._versions, self._exposures, self._secrets_known):
            known.pop(uid, None)
        for some in (self._waiting, self._restored):
            some.discard(uid)

    async def _expose(self) -> None:
        # Of the rows, not of the looks: what could not be looked at now must not lose its way in.
        living = [self._addresses.exposed(one) for one in self._desired.rows.values() if not one.deleting]
        await self._runtime.expose([one for one in living if one is not None])
        self._unexposed = False

    async def _release(self) -> None:
        """Have replicas ended that no gateway routes to, and forget those that are gone."""
        free = [replica for some in self._draining.values() for replica in some if self.routes.unrouted(replica)]
        if free:
            await self._runtime.release(free)
        self.routes.forget(self._gone)
        self._gone.clear()

    # One deployment

    async def _reconcile(self, deployment: Deployment, sets: list[SetStatus]) -> bool:
        """Whether it is still there afterwards."""
        if deployment.terminated or deployment.deleting:
            return await self._leave(deployment, sets)
        revision = await self._revision(deployment.uid, deployment.latest_revision)
        view = _View(deployment, revision, sets)
        versions = self._versions_of(revision)
        given = {}
        for version in versions:
            progress = self._build(view, version)
            secrets = await self._secrets(view, version)
            if progress.made and secrets is not None and view.problem is None:
                given[version.target] = (progress.made, secrets)
        await self._restore(view)
        for version in versions:
            for service in version.manifest.services:
                await self._service(view, version, service.name, given.get(version.target))
        await self._obsolete(view, versions)
        await self._revive(view)
        await self._report(view)
        return True

    async def _leave(self, deployment: Deployment, sets: list[SetStatus]) -> bool:
        for one in sets:
            if one.asked or one.replicas:
                await self._runtime.scale(one.key, 0)
        left = sum(not replica.lost for one in sets for replica in one.replicas)
        if deployment.deleting and not left:
            await self._runtime.forget(deployment.uid)
            await self._store.remove_deployment(deployment.uid)
            self._desired.removed(deployment.uid)
            await self._uses.gone(deployment)
            self.topic.notify(deployment.uid)
            log.info("deployment deleted", extra={"deployment": deployment.name})
            return False
        facts = Facts(deployment.generation, deployment.latest_revision, leaving=True, left=left)
        await self._write(deployment, status.summarize(facts, deployment.status, self._clock.now()))
        return True

    def _build(self, view: _View, version: Version) -> Progress:
        progress = self._wanted(view.deployment, view.revision.number, version)
        missing = [one for one in view.sets if any(r.reason in MISSING for r in one.replicas)]
        if missing and progress.made:
            # The builder has thrown it away meanwhile: ask for it again, and tell the runtime where it is then.
            self._builds.forget(progress.made)
            self._applied.difference_update(one.key for one in missing)
            progress = self._wanted(view.deployment, view.revision.number, version)
        if version.target == MAIN:
            view.build = progress.build
        if progress.made and progress.build:
            made = (progress.build, version.bento, version.digest, progress.made.digest)
            self._uses.built(view.deployment.uid, view.revision.number, *made)
        if progress.made and progress.made.verified is not None:
            view.verified.append(progress.made.verified)
        if progress.failed:
            kind = gate.TYPE if progress.reason in gate.REFUSED else "Built"
            view.problem = Condition(kind, False, progress.reason, progress.message)
        elif not progress.made:
            view.building, view.building_message = True, progress.message
        return progress

    def _wanted(self, deployment: Deployment, revision: int, version: Version) -> Progress:
        caller = Principal(deployment.creator, deployment.organization, annotations_pb2.ROLE_SERVICE)
        output = None if deployment.cluster == DEFAULT_CLUSTER else Output.IMAGE
        return self._builds.want(
            self._tasks,
            (deployment.uid, revision),
            version.bento,
            version.digest,
            version.secrets,
            caller,
            deployment.traceparent,
            Way(version.image, version.models_apart, output),
        )

    async def _secrets(self, view: _View, version: Version) -> list[identity_pb2.Secret] | None:
        try:
            secrets = await self._revealed(version.secrets, view.deployment)
        except NotFound as exc:
            view.problem = view.problem or Condition("Available", False, "SECRET_NOT_FOUND", str(exc))
            return None
        view.problem = view.problem or specs.problem_of(version, secrets)
        return secrets

    async def _revealed(self, names: tuple[str, ...], deployment: Deployment) -> list[identity_pb2.Secret]:
        """The secrets with their values. Asking leaves an audit entry, so what is settled is not asked for again."""
        if not names:
            return []
        now, key = self._clock.monotonic(), (deployment.generation, *names)
        settled = deployment.status.settled and deployment.status.observed_generation == deployment.generation
        kept = self._secrets_known.setdefault(deployment.uid, {})
        known = kept.get(key)
        if not settled:
            self._attention.later(deployment.uid, SECRETS_S)
        if known is None or (not settled and now - known[0] >= SECRETS_S):
            answer = await self._vault.RevealSecrets(identity_pb2.RevealSecretsRequest(names=names))
            for old in [old for old in kept if old[0] != deployment.generation]:
                del kept[old]
            known = kept[key] = (now, list(answer.secrets))
        return known[1]

    async def _service(
        self, view: _View, version: Version, service: str, given: tuple[Made, list[identity_pb2.Secret]] | None
    ) -> None:
        deployment, latest = view.deployment, view.revision.number
        key = specs.key_of(deployment.uid, latest, version.target, service)
        new = next((one for one in view.sets if one.key == key), None)
        old = [
            one
            for one in sorted(view.sets, key=lambda one: one.revision)
            if one.target == version.target and one.service == service and one.revision != latest
        ]
        template = version.services.get(service, pb.ServiceTemplate())
        called = bool(version.manifest.dependents(service))
        autoscaling = self._autoscaling(deployment, version, service)
        acted_on = autoscaling if self._runtime.scales(deployment.place) else None
        least = specs.desired_of(deployment, version, service)
        remembered = deployment.status.scale.get(f"{version.target}/{service}")
        desired = scaling.desired_of(acted_on, least, remembered, new, old)
        plan = rollout.plan_of(template.deployment_strategy, desired, called=called)
        plan = scaling.plan_of(plan, acted_on)
        # A new replica counts once gateways know it: before, an old one must not go, and nobody should be told RUNNING.
        seen_new = replace(_seen(new, key), ready=self._routed(new))
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
        view.services.append(fact)
        if given is None:
            return
        spec = specs.spec_of(
            deployment,
            latest,
            version,
            service,
            made=given[0],
            secrets=given[1],
            instance_types=self._instance_types,
            drain_s=self._settings.drain_s,
        )
        may_start = (new is not None and new.asked > 0) or self._reachable(view, version, service)
        held = [one.key for one in old if await self._is_called(view, one)]
        steps = rollout.next_steps(plan, seen_new, seen_old, may_start=may_start, held=held)
        asked = {step.key: step.replicas for step in scaling.kept(steps, old, acted_on)}
        # Its autoscaler is stopped by the first step of the rollout after this one.
        lent = acted_on if fact.complete or (new is not None and new.autoscaled and not old) else None
        known = key in self._applied and self._lent.get(key) == lent
        if key in asked or (new is not None and not known):
            await self._runtime.apply(replace(spec, autoscaling=lent), asked.get(key, seen_new.asked))
            self._applied.add(key)
            self._lent[key] = lent
        for one in old:
            if one.key in asked:
                await self._runtime.scale(one.key, asked[one.key])
        for changed, replicas in asked.items():
            view.acted.append(f"{service} {'new' if changed == key else 'old'} {replicas}")

    def _autoscaling(self, deployment: Deployment, version: Version, service: str) -> Autoscaling | None:
        """Who should scale it."""
        size = self._instance_types.get(version.services.get(service, pb.ServiceTemplate()).instance_type)
        names = self._settings.metric_names
        return scaling.autoscaling_of(specs.scaling_of(deployment, version, service), size, names)

    def _reachable(self, view: _View, version: Version, service: str) -> bool:
        """Whether all that the service calls is there, and gateways know the way."""
        for name in version.manifest.service(service).dependencies:
            key = specs.key_of(view.deployment.uid, view.revision.number, version.target, name)
            one = next((one for one in view.sets if one.key == key), None)
            if not self._routed(one):
                return False
        return True

    def _routed(self, one: SetStatus | None) -> int:
        """How many replicas answer and can be reached through every gateway."""
        replicas = one.replicas if one is not None else ()
        return sum(replica.phase is Phase.READY and self.routes.routed(replica.replica) for replica in replicas)

    async def _is_called(self, view: _View, one: SetStatus) -> bool:
        """Whether services of the same revision may still call this set."""
        revision = await self._revision(one.deployment_uid, one.revision)
        bento = revision.bentos.get(one.target)
        callers = bento.parsed().dependents(one.service) if bento is not None else ()
        return any(
            other.revision == one.revision and other.target == one.target and other.service in callers
            for other in view.sets
            if other.replicas or other.asked
        )

    async def _obsolete(self, view: _View, versions: Sequence[Version]) -> None:
        """End sets of targets and services which the latest revision does not have, once it is rolled out."""
        wanted = {(version.target, one.name) for version in versions for one in version.manifest.services}
        complete = all(fact.complete for fact in view.services) and bool(view.services)
        targets = {version.target for version in versions}
        for one in view.sets:
            if (one.target, one.service) in wanted or (one.target in targets and not complete):
                continue
            if one.asked and not await self._is_called(view, one):
                await self._runtime.scale(one.key, 0)

    async def _restore(self, view: _View) -> None:
        """Bring back what served before a restart, where the latest revision has not taken over yet."""
        deployment = view.deployment
        if deployment.uid in self._restored:
            return
        serving, latest = deployment.status.serving_revision, deployment.latest_revision
        if serving in (0, latest) or any(one.revision == serving and one.asked for one in view.sets):
            self._restored.add(deployment.uid)
            return
        for version in self._versions_of(await self._revision(deployment.uid, serving)):
            progress = self._wanted(deployment, serving, version)
            if progress.failed:
                continue
            if not progress.made:
                return
            for service in version.manifest.services:
                desired = specs.desired_of(deployment, version, service.name)
                await self._apply_old(view, serving, version, progress.made, service.name, desired)
        self._restored.add(deployment.uid)
        view.sets[:] = [one for one in await self._runtime.observe() if one.deployment_uid == deployment.uid]

    async def _revive(self, view: _View) -> None:
        """Tell the runtime again what adopted sets of former revisions run, so that it can start them again."""
        for one in view.sets:
            if one.revision == view.revision.number or one.key in self._applied or not one.asked:
                continue
            for version in self._versions_of(await self._revision(one.deployment_uid, one.revision)):
                if version.target != one.target:
                    continue
                if made := self._wanted(view.deployment, one.revision, version).made:
                    scaled = self._autoscaling(view.deployment, version, one.service) if one.autoscaled else None
                    await self._apply_old(view, one.revision, version, made, one.service, one.asked, scaled)

    async def _apply_old(
        self,
        view: _View,
        revision: int,
        version: Version,
        made: Made,
        service: str,
        replicas: int,
        autoscaling: Autoscaling | None = None,
    ) -> None:
        secrets = await self._secrets(_View(view.deployment, view.revision, []), version)
        if secrets is None:
            return
        spec = specs.spec_of(
            view.deployment,
            revision,
            version,
            service,
            made=made,
            secrets=secrets,
            instance_types=self._instance_types,
            drain_s=self._settings.drain_s,
        )
        await self._runtime.apply(replace(spec, autoscaling=autoscaling), replicas)
        self._applied.add(spec.key)

    async def _report(self, view: _View) -> None:
        deployment, before = view.deployment, view.deployment.status
        ready = []
        for one in view.sets:
            if one.target == MAIN and one.count(Phase.READY):
                manifest = (await self._revision(one.deployment_uid, one.revision)).bentos[MAIN].parsed()
                if one.service == manifest.entry:
                    ready.append(one.revision)
        complete = bool(view.services) and all(fact.complete for fact in view.services)
        complete = complete and view.problem is None and not view.building
        facts = Facts(
            deployment.generation,
            deployment.latest_revision,
            tuple(view.services),
            view.building,
            view.building_message,
            view.problem,
            gate.worst(view.verified),
            serving_revision=status.serving_revision(
                deployment.latest_revision, before.serving_revision, complete, ready
            ),
            crashes_until_failed=self._settings.crashes_until_failed,
            refused_port=deployment.port if self.routes.refused(deployment.port) else 0,
            url_by_name=self._addresses.by_name(deployment.name),
            exposed=self._exposed(deployment),
        )
        after = status.summarize(facts, before, self._clock.now())
        if view.build and view.build != deployment.build:
            await self._store.write_build(deployment.uid, view.build)
            self._desired.observed(deployment.uid, build=view.build)
            self.topic.notify(deployment.uid)
        if view.acted:  # A step may have met a set that could not take it yet, and nobody would say so.
            self._attention.later(deployment.uid, PASS_S)
        if view.acted or after.state != before.state:
            with telemetry.continue_trace(
                deployment.traceparent,
                "reconcile deployment",
                **{"ekiben.deployment": f"deployments/{deployment.name}", "ekiben.state": after.state},
            ) as span:
                span.set_attribute("ekiben.steps", view.acted)
                log.info(
                    "deployment reconciled",
                    extra={"deployment": deployment.name, "state": after.state, "steps": "; ".join(view.acted)},
                )
        await self._write(deployment, after)

    async def _write(self, deployment: Deployment, after: Status) -> None:
        if after != deployment.status:
            await self._store.write_status(deployment.uid, after)
            self._desired.observed(deployment.uid, status=after)
            self._attention.tell(deployment.uid)  # What is decided from it may be another now.
            self.topic.notify(deployment.uid)

    async def _revision(self, uid: str, number: int) -> Revision:
        found = self._revisions.get(uid, {}).get(number)
        if found is None:
            found = await self._store.get_revision(uid, number)
            if found is None:
                raise NotFound(f"Revision {number} of {uid} does not exist.", reason="REVISION_NOT_FOUND")
            if len(self._revisions.get(uid, ())) >= REVISIONS:
                for known in (self._revisions, self._versions):
                    known.pop(uid, None)
            self._keep([found])
        return found

    def _keep(self, revisions: Iterable[Revision]) -> None:
        for one in revisions:
            self._revisions.setdefault(one.deployment_uid, {})[one.number] = one

    def _versions_of(self, revision: Revision) -> list[Version]:
        known = self._versions.setdefault(revision.deployment_uid, {})
        if revision.number not in known:
            known[revision.number] = specs.versions_of(revision)
        return known[revision.number]

    # Routes

    def _exposed(self, deployment: Deployment) -> Condition | None:
        """What came of its exposure."""
        exposed = self._addresses.exposed(deployment)
        if exposed is None:
            self._exposures.pop(deployment.uid, None)
            return None
        came = self._runtime.exposure(exposed)
        self._exposures[deployment.uid] = exposed, came
        return Condition(CONDITION, came.done, came.reason, came.message)

    async def _route(self, deployment: Deployment, sets: Sequence[SetStatus]) -> pb.Route:
        latest = await self._revision(deployment.uid, deployment.latest_revision)
        versions = {latest.number: self._versions_of(latest)}
        for number in {one.revision for one in sets} - versions.keys():
            versions[number] = self._versions_of(await self._revision(deployment.uid, number))
        return routing.route_of(deployment, latest, versions, sets, self._addresses.hosts(deployment))


def _by_deployment(observed: Iterable[SetStatus]) -> dict[str, list[SetStatus]]:
    found: dict[str, list[SetStatus]] = {}
    for one in observed:
        found.setdefault(one.deployment_uid, []).append(one)
    return found


def _replicas_of(sets: Iterable[SetStatus]) -> dict[str, Phase]:
    return {replica.replica: replica.phase for one in sets for replica in one.replicas}


def _seen(one: SetStatus | None, key: str) -> SetView:
    if one is None:
        return SetView(key, 0)
    draining, lost = one.count(Phase.DRAINING), sum(replica.lost for replica in one.replicas)
    return SetView(key, one.asked, len(one.replicas) - draining, one.count(Phase.READY), draining - lost, lost)
