"""The loop: look at what is there, decide by pure functions, act so that doing it twice does no harm.

A pass is level-triggered, and yet costs what has changed rather than what there is: of thousands of deployments it
looks at those whose row, replica sets, builds, routes or exposure are another than at the last look, at those which
that look changed or could not finish, and at a few in turn (see `attention.py`).
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from prometheus_client import Counter, Histogram

from ekiben.errors import EkibenError
from services.deployer.addresses import Addresses
from services.deployer.attention import Attention
from services.deployer.builds import Builds
from services.deployer.decisions import View
from services.deployer.desired import Desired
from services.deployer.domain import Deployment, InstanceType
from services.deployer.exposures import Exposures
from services.deployer.observed import Observed
from services.deployer.ownership import Ownership
from services.deployer.reports import Reports
from services.deployer.revisions import Revisions
from services.deployer.rolling import Rolling
from services.deployer.routes import Routes
from services.deployer.runtimes import Runtime, SetStatus
from services.deployer.settings import Settings
from services.deployer.store import Store
from services.deployer.supplies import Supplies
from services.deployer.traffic import Traffic
from services.deployer.uses import Uses
from services.kernel import telemetry
from services.kernel.clock import Clock
from services.kernel.watches import Signal, Topic

log = logging.getLogger(__name__)

PASS_S = 1.0
"""At the latest after so long it is seen whether something differs, whoever forgot to say that it does."""
GIVE_WAY = 10
"""After so many deployments of a pass others get their turn: calls are answered meanwhile."""
PATIENCE_S = 30.0
"""So long a cluster may take to tell what is there, until the routes of others wait no more for it."""
DRAIN_ACK_S = 3.0
"""At shutdown gateways may stop before they acknowledge; a person is waiting."""
WANTED = "wanted"
"""The topic's key for changes of what is desired; a deployment's own key is its uid."""

_seconds = Histogram("ekiben_reconcile_duration_seconds", "Time of one pass.")
_failures = Counter("ekiben_reconcile_failures_total", "Passes over one deployment that ended in an error.")


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
        self._store, self._runtime, self._builds, self._uses = store, runtime, builds, uses
        self._settings, self._clock = settings, clock
        self._signal = Signal()
        self.ownership = ownership
        ownership.changed = self._signal.notify
        self._owned = False
        self.topic = topic
        """Changes of deployments, by uid; of what is desired also by WANTED."""
        self.routes = Routes(store.next_route_version, clock, self._signal.notify)
        builds.changed = self._notice
        self._attention = Attention(clock)
        self._desired, self._observed = Desired(store, clock), Observed()
        self._revisions = Revisions(store)
        self._supplies = Supplies(builds, vault, uses, self._attention, clock)
        self._rolling = Rolling(runtime, self._revisions, self._supplies, instance_types, settings, self.routes.routed)
        self._traffic = Traffic(self.routes, runtime, self._revisions, addresses)
        self._exposures = Exposures(runtime, addresses, clock)
        self._reports = Reports(
            store, self._desired, self._attention, topic, self.routes, self._exposures, addresses, settings, clock
        )
        self._moved = True
        """Whether the runtime has said that something is another."""
        self._all_known, self._patient_until = False, 0.0
        """Whether all places have told what is there, and how long they may take."""
        self._stopping = False

    def wake(self, uid: str) -> None:
        """The desired state of a deployment changed."""
        self.topic.notify(uid)
        self.topic.notify(WANTED)

    def ask_anew(self) -> None:
        """A runtime has taken over from another, as at a start: it has what is there, and was asked for nothing."""
        self._rolling.tell_again()
        for uid in self._desired.rows:
            self._attention.tell(uid)
        self._signal.notify()

    def observed(self, uid: str) -> Sequence[SetStatus]:
        """The replica sets of a deployment, as of the last pass. Raises Unavailable where another has them."""
        self.ownership.check()
        return self._observed.sets.get(uid, [])

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
        self._supplies.open(tasks)
        tasks.create_task(self._listen())
        tasks.create_task(self._hear())

    async def turn(self) -> None:
        """One pass, or nothing to do with what another has."""
        await (self._pass() if self._may_act() else self._stand_by())

    async def drain(self) -> None:
        """Take every replica out of the routes, then stop them all; what is desired stays. So do replicas that outlive
        the deployer, and their routes."""
        self._stopping = True
        observed = [one for sets in self._observed.sets.values() for one in sets]
        ids = {replica.replica for one in observed if not one.outlives for replica in one.replicas}
        if ids:
            with contextlib.suppress(EkibenError, TimeoutError):
                async with asyncio.timeout(DRAIN_ACK_S):
                    await self._traffic.withdraw(ids, self._clock)
        await self._runtime.release(ids)
        await self._runtime.drain(self._settings.shutdown_drain_s)
        await self._runtime.stand_by()
        await self.ownership.release()

    async def _listen(self) -> None:
        while True:
            await self._runtime.changed()
            self._moved = True
            self._signal.notify()
            # Probes of many replicas come in bursts; one pass does for all of them.
            await asyncio.sleep(0.05)

    async def _hear(self) -> None:
        async for _ in self.topic.changes(WANTED):
            self._desired.tell()
            self._signal.notify()

    def _notice(self, uid: str) -> None:
        self._attention.tell(uid)
        self._signal.notify()

    # Whose the cluster is

    def _may_act(self) -> bool:
        if self.ownership.held and not self._owned:
            self.routes.open()
            for part in (self._desired, self._observed, self._supplies, self._rolling, self._traffic, self._exposures):
                part.reset()
            self._all_known, self._patient_until = False, self._clock.monotonic() + PATIENCE_S
        elif self._owned and not self.ownership.held:
            self.routes.close()
        self._owned = self.ownership.held
        return self._owned

    async def _stand_by(self) -> None:
        """Another deployer has the cluster: end what runs here, as it starts that on its own machine."""
        if self._stopping:
            return
        self.routes.close()
        observed = await self._runtime.observe()
        self._observed.take(observed)
        await self._runtime.stand_by()
        ending = [one for one in observed if not one.outlives]
        await self._rolling.end(ending)
        await self._runtime.release([replica.replica for one in ending for replica in one.replicas])

    # A pass

    async def _pass(self) -> None:
        moved, self._moved = self._moved, False
        observed = await self._runtime.observe()
        if self._stopping:
            return
        if not self._desired.read:
            self._revisions.keep(await self._store.latest_revisions())
        in_turn = self._attention.in_turn(self._desired.rows)
        changed = await self._desired.refresh(in_turn)
        rows, shifts = self._desired.rows, self._observed.take(observed)
        sets = self._observed.sets
        if changed:
            self._exposures.changed()
        if shifts:
            self._traffic.take(shifts)
            self._rolling.keep({one.key for one in observed})
        differing = self._traffic.differing(rows) | self._exposures.differing(moved=moved)
        for uid in changed | in_turn | shifts.keys() | differing:
            self._attention.tell(uid)
        await self._end_orphans(sets.keys() - rows.keys())
        # Until its place has told what is there nothing is done for a deployment, and gateways keep the ways that they
        # know; but then words are needed why it does not go on, and others need their ways.
        unknown, late = self._unknown(), self._clock.monotonic() >= self._patient_until
        waits = unknown if not late or len(unknown) == len(rows) else set()
        due = self._attention.due()
        for uid in due - rows.keys():
            self._forget(uid)
        for count, uid in enumerate(sorted((due & rows.keys()) - (set() if late else unknown)), start=1):
            await self._look(rows[uid], sets.get(uid, []))
            if count % GIVE_WAY == 0:
                await asyncio.sleep(0)
            if self._stopping:
                return
        if not waits and not self._stopping:
            await self._traffic.publish()
        await self._traffic.release()
        await self._exposures.tell(rows.values())

    def _unknown(self) -> set[str]:
        """Deployments whose place has not told yet what is there, since this deployer has the cluster."""
        if self._all_known:
            return set()
        unknown = {uid for uid, row in self._desired.rows.items() if not self._runtime.knows(row.place)}
        self._all_known = not unknown
        return unknown

    async def _end_orphans(self, uids: AbstractSet[str]) -> None:
        """End sets of which there is no row; in the database, as another deployer may have made one just now."""
        if not uids:
            return
        known = (await self._store.generations()).keys()
        if uids & known:
            self._desired.tell()
        for uid in uids - known:
            for one in self._observed.sets[uid]:
                await self._runtime.scale(one.key, 0)

    # One deployment

    async def _look(self, deployment: Deployment, sets: Sequence[SetStatus]) -> None:
        """One deployment, whatever becomes of it."""
        uid = deployment.uid
        self._attention.looking(uid)
        try:
            if not await self._reconcile(deployment, sets):
                self._forget(uid)
                return
            self._builds.prune(uid)
            deployment = self._desired.rows.get(uid, deployment)
            self._uses.seen(deployment)
        except Exception as exc:
            # One broken deployment must not keep the others from being looked after.
            self._failed(deployment, exc)
            if uid in self._desired.rows:  # What it wants is kept from being deleted all the same.
                self._uses.seen(deployment)
        try:
            await self._traffic.look(deployment, sets)
        except Exception as exc:  # It keeps the way in that it has.
            self._failed(deployment, exc)

    async def _reconcile(self, deployment: Deployment, sets: Sequence[SetStatus]) -> bool:
        """Whether it is still there afterwards."""
        if deployment.terminated or deployment.deleting:
            return await self._leave(deployment, sets)
        uid, latest = deployment.uid, deployment.latest_revision
        versions = await self._revisions.versions(uid, latest)
        self._rolling.tell_again(self._supplies.ask_again(deployment, versions, sets))
        supplied = await self._supplies.look(deployment, versions)
        sets = await self._rolling.restore(deployment, sets)
        numbers = {latest, *(one.revision for one in sets)}
        view = View(deployment, {number: await self._revisions.versions(uid, number) for number in numbers}, sets)
        rolled = await self._rolling.roll(view, supplied.given)
        await self._reports.rolled(view, supplied, rolled)
        return True

    async def _leave(self, deployment: Deployment, sets: Sequence[SetStatus]) -> bool:
        await self._rolling.end(sets)
        left = sum(not replica.lost for one in sets for replica in one.replicas)
        if deployment.deleting and not left:
            await self._runtime.forget(deployment.uid)
            await self._store.remove_deployment(deployment.uid)
            self._desired.removed(deployment.uid)
            await self._uses.gone(deployment)
            self.topic.notify(deployment.uid)
            log.info("deployment deleted", extra={"deployment": deployment.name})
            return False
        await self._reports.left(deployment, left)
        return True

    def _forget(self, uid: str) -> None:
        """Its row is gone: nothing is kept of it."""
        self._attention.looking(uid)
        self._builds.gone(uid)
        for part in (self._supplies, self._revisions, self._rolling, self._traffic, self._exposures):
            part.forget(uid)

    def _failed(self, deployment: Deployment, exc: Exception) -> None:
        _failures.inc()
        self._attention.later(deployment.uid, PASS_S)
        facts = {"deployment": deployment.name}
        if isinstance(exc, EkibenError):  # Its sentence says all: no traceback each second of a full disk.
            facts |= {"reason": exc.reason, "error": str(exc)}
            log.warning("deployment could not be reconciled", extra=facts)
        else:
            log.error("deployment could not be reconciled", exc_info=exc, extra=facts)
