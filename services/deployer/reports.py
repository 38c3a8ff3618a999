"""Writes what is observed of deployments: their status, and which build they run."""

import logging

from services.deployer import decisions, gate, status
from services.deployer.addresses import Addresses
from services.deployer.attention import Attention
from services.deployer.decisions import View
from services.deployer.desired import Desired
from services.deployer.domain import Deployment, Status
from services.deployer.exposures import Exposures
from services.deployer.rolling import Rolled
from services.deployer.routes import Routes
from services.deployer.settings import Settings
from services.deployer.status import Facts
from services.deployer.store import Store
from services.deployer.supplies import Supplied
from services.kernel import telemetry
from services.kernel.clock import Clock
from services.kernel.watches import Topic

log = logging.getLogger(__name__)

AGAIN_S = 1.0
"""A step may have met a set that could not take it yet, and nobody would say so."""


class Reports:
    """See the module. Whoever watches a deployment is told of what was written."""

    def __init__(
        self,
        store: Store,
        desired: Desired,
        attention: Attention,
        topic: Topic,
        routes: Routes,
        exposures: Exposures,
        addresses: Addresses,
        settings: Settings,
        clock: Clock,
    ) -> None:
        self._store, self._desired, self._attention, self._topic = store, desired, attention, topic
        self._routes, self._exposures, self._addresses = routes, exposures, addresses
        self._settings, self._clock = settings, clock

    async def rolled(self, view: View, supplied: Supplied, rolled: Rolled) -> None:
        """After a look at a deployment that should run."""
        deployment, before = view.deployment, view.deployment.status
        latest = deployment.latest_revision
        complete = rolled.complete and supplied.problem is None and not supplied.building
        ready = decisions.ready_revisions(view)
        facts = Facts(
            deployment.generation,
            latest,
            tuple(rolled.services),
            supplied.building,
            supplied.building_message,
            supplied.problem,
            gate.worst(supplied.verified),
            serving_revision=status.serving_revision(latest, before.serving_revision, complete, ready),
            crashes_until_failed=self._settings.crashes_until_failed,
            refused_port=deployment.port if self._routes.refused(deployment.port) else 0,
            url_by_name=self._addresses.by_name(deployment.name),
            exposed=self._exposures.look(deployment),
        )
        after = status.summarize(facts, before, self._clock.now())
        if supplied.build and supplied.build != deployment.build:
            await self._store.write_build(deployment.uid, supplied.build)
            self._desired.observed(deployment.uid, build=supplied.build)
            self._topic.notify(deployment.uid)
        if rolled.acted:
            self._attention.later(deployment.uid, AGAIN_S)
        if rolled.acted or after.state != before.state:
            with telemetry.continue_trace(
                deployment.traceparent,
                "reconcile deployment",
                **{"ekiben.deployment": f"deployments/{deployment.name}", "ekiben.state": after.state},
            ) as span:
                span.set_attribute("ekiben.steps", rolled.acted)
                log.info(
                    "deployment reconciled",
                    extra={"deployment": deployment.name, "state": after.state, "steps": "; ".join(rolled.acted)},
                )
        await self._write(deployment, after)

    async def left(self, deployment: Deployment, replicas: int) -> None:
        """After a look at one that should not run, of which so many replicas are there nevertheless."""
        facts = Facts(deployment.generation, deployment.latest_revision, leaving=True, left=replicas)
        await self._write(deployment, status.summarize(facts, deployment.status, self._clock.now()))

    async def _write(self, deployment: Deployment, after: Status) -> None:
        if after != deployment.status:
            await self._store.write_status(deployment.uid, after)
            self._desired.observed(deployment.uid, status=after)
            self._attention.tell(deployment.uid)  # What is decided from it may be another now.
            self._topic.notify(deployment.uid)
