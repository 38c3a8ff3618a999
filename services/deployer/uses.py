"""What deployments use, told to the registry, which keeps it from being deleted and shows it as lineage.

A revision is *claimed* before it is written. After that this loop *reports* what every deployment uses, as the
reconciler sees it, whenever that changed and now and then without, so that nothing depends on a single call: a report
that was lost is made again, what a crash claimed in vain lapses, and the owners of uses whose deployment is gone are
found and ended.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ekiben.errors import EkibenError, Unavailable, Unimplemented
from ekiben.registry.v1 import lineage_pb2 as pb
from services.deployer.domain import Deployment, Revision
from services.deployer.store import Store
from services.kernel import telemetry
from services.kernel.clock import Clock
from services.kernel.watches import Signal

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""How often the loop turns though nothing is to be reported: a report that failed is made again after this."""
AGAIN_S, AGAIN_EACH_S = 300.0, 5.0
"""After so long, or so long for each deployment where they are many, a report is sent whether or not something changed:
the registry may have been put back from a copy."""
SWEEP_S = 600.0
"""How often owners are looked for whose deployment is gone."""
REVISIONS = 50
"""Of each deployment so many are reported; older ones have ended long ago."""

Built = Mapping[str, tuple[str, str, str]]
"""By build: name and digest of the bento that it was made from, and the digest of the environment that it made."""


class Uses:
    """See the module. `lineage` is the registry's stub."""

    def __init__(self, store: Store, lineage: Any, clock: Clock) -> None:
        self._store, self._lineage, self._clock = store, lineage, clock
        self._signal = Signal()
        self._due: dict[str, Deployment] = {}
        """By uid, as they were seen last."""
        self._told: dict[str, tuple[object, float]] = {}
        self._builds: dict[str, dict[int, dict[str, tuple[str, str, str]]]] = {}
        """By the uid of the deployment, revision and build."""
        self._builds_told: set[str] = set()

    def seen(self, deployment: Deployment) -> None:
        """A deployment was looked at, and its builds were told: it is reported where that is another than before."""
        told, now = self._told.get(deployment.uid), self._clock.monotonic()
        again_s = max(AGAIN_S, AGAIN_EACH_S * len(self._told))
        if told is None or told[0] != self._state(deployment) or now - told[1] >= again_s:
            self._due[deployment.uid] = deployment
            self._signal.notify()

    def built(self, deployment_uid: str, revision: int, build: str, bento: str, digest: str, environment: str) -> None:
        """A revision runs the environment, by its digest, that a build made of a bento with this digest."""
        known = self._builds.setdefault(deployment_uid, {}).setdefault(revision, {})
        if build and build not in known:
            known[build] = (bento, digest, environment)

    async def claim(self, deployment: Deployment, revision: Revision) -> None:
        """Keep what a revision needs from being deleted, before the revision is written.

        Raises:
            NotFound: it was deleted meanwhile (BENTO_NOT_FOUND, MODEL_NOT_FOUND).
        """
        request = pb.ClaimUsesRequest(
            owner=_owner(deployment),
            generation=deployment.generation,
            uses=uses_of(deployment.name, revision, live=True),
        )
        try:
            await self._lineage.ClaimUses(request)
        except Unimplemented:
            log.warning("the registry keeps no uses: it is of an older release")

    async def gone(self, deployment: Deployment) -> None:
        """A deployment was removed. Where this cannot be told now, the loop finds it out."""
        for known in (self._told, self._due, self._builds):
            known.pop(deployment.uid, None)
        try:
            await self._lineage.ReportUses(pb.ReportUsesRequest(owner=_owner(deployment), gone=True))
        except EkibenError as exc:
            log.warning("the end of a deployment's uses is told later", extra={"error": str(exc)})

    async def run(self) -> None:
        """Report until cancelled."""
        swept = None
        while True:
            try:
                with telemetry.untraced():
                    await self.report()
                    now = self._clock.monotonic()
                    if swept is None or now - swept >= SWEEP_S:
                        await self._sweep()
                        swept = now
            except EkibenError as exc:
                log.info("uses could not be reported", extra={"reason": exc.reason, "error": str(exc)})
                await self._clock.sleep(LOOK_S)
            await self._signal.wait(at_most_s=LOOK_S)

    async def report(self) -> None:
        """Report all that are due."""
        for uid, deployment in list(self._due.items()):
            state = self._state(deployment)
            builds = {number: dict(made) for number, made in self._builds.get(uid, {}).items()}
            try:
                await self._report(deployment, builds)
            except Unavailable:
                raise  # So it is with all others.
            except EkibenError as exc:  # Of this one: the others are reported, and it again at the next turn.
                facts = {"deployment": deployment.name, "reason": exc.reason, "error": str(exc)}
                log.warning("uses of a deployment could not be reported", extra=facts)
                continue
            if self._due.get(uid) is deployment:  # Otherwise it was seen again, or removed, meanwhile.
                del self._due[uid]
                self._told[uid] = (state, self._clock.monotonic())

    def _state(self, deployment: Deployment) -> object:
        """What a report is made from."""
        builds = {number: tuple(made) for number, made in self._builds.get(deployment.uid, {}).items()}
        return deployment.generation, deployment.status.serving_revision, builds

    async def _report(self, deployment: Deployment, builds: Mapping[int, Built]) -> None:
        serving = deployment.status.serving_revision or deployment.latest_revision
        oldest = min(serving, deployment.latest_revision)
        uses: list[pb.Use] = []
        for revision in await self._store.list_revisions(deployment.uid, below=None, limit=REVISIONS):
            # Those between the two may still have replicas.
            live = revision.number >= oldest
            uses += uses_of(deployment.name, revision, live=live, builds=builds.get(revision.number, {}))
        owner = _owner(deployment)
        await self._lineage.ReportUses(pb.ReportUsesRequest(owner=owner, generation=deployment.generation, uses=uses))
        for build, (bento, digest, _) in {
            build: made for some in builds.values() for build, made in some.items()
        }.items():
            if build not in self._builds_told:
                use = pb.Use(consumer=build, consumer_uid=build, resource=bento, digest=digest)
                owner = pb.UseOwner(organization=deployment.organization, name=build, uid=build)
                await self._lineage.ReportUses(pb.ReportUsesRequest(owner=owner, uses=[use]))
                self._builds_told.add(build)

    async def _sweep(self) -> None:
        """End the uses of deployments that are gone. Owners first: one that is reported was there before."""
        owners: list[pb.UseOwner] = []
        request = pb.ListUseOwnersRequest(prefix="deployments/", page_size=1000)
        while True:
            page = await self._lineage.ListUseOwners(request)
            owners += page.owners
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        known = {deployment.uid for deployment in await self._store.list_deployments()}
        for owner in owners:
            if owner.uid not in known:
                await self._lineage.ReportUses(pb.ReportUsesRequest(owner=owner, gone=True))


def uses_of(deployment: str, revision: Revision, *, live: bool, builds: Built | None = None) -> Sequence[pb.Use]:
    """What a revision of a deployment uses: the bento of each target, its models, and the builds of these."""
    consumer = f"deployments/{deployment}/revisions/{revision.number}"

    def use(resource: str, digest: str = "") -> pb.Use:
        return pb.Use(consumer=consumer, consumer_uid=revision.uid, resource=resource, digest=digest, live=live)

    found: dict[str, pb.Use] = {}
    for bento in revision.bentos.values():
        found[bento.name] = use(bento.name, bento.digest)
        found.update({model: use(model, digest) for model, digest in bento.models})
    found.update({build: use(build, environment) for build, (_, _, environment) in (builds or {}).items()})
    return list(found.values())


def _owner(deployment: Deployment) -> pb.UseOwner:
    return pb.UseOwner(organization=deployment.organization, name=f"deployments/{deployment.name}", uid=deployment.uid)
