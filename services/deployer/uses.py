"""What deployments use, told to the registry, which keeps it from being deleted and shows it as lineage.

A revision is *claimed* before it is written. After that this loop *reports* what every deployment uses, whenever that
changed and now and then without, so that nothing depends on a single call: a report that was lost is made again, what a
crash claimed in vain lapses, and the owners of uses whose deployment is gone are found and ended.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ekiben.errors import EkibenError, Unimplemented
from ekiben.registry.v1 import lineage_pb2 as pb
from services.deployer.domain import Deployment, Revision
from services.deployer.store import Store
from services.kernel import telemetry
from services.kernel.clock import Clock
from services.kernel.watches import Signal

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""How often deployments are looked at; a report is sent where something changed."""
AGAIN_S = 300.0
"""After so long a report is sent whether or not something changed: the registry may have been put back from a copy."""
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
        self._told: dict[str, tuple[object, float]] = {}
        self._builds: dict[tuple[str, int], dict[str, tuple[str, str, str]]] = {}
        self._builds_told: set[str] = set()

    def wake(self) -> None:
        """Something about a deployment changed."""
        self._signal.notify()

    def built(self, deployment_uid: str, revision: int, build: str, bento: str, digest: str, environment: str) -> None:
        """A revision runs the environment, by its digest, that a build made of a bento with this digest."""
        known = self._builds.setdefault((deployment_uid, revision), {})
        if build and build not in known:
            known[build] = (bento, digest, environment)
            self._signal.notify()

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
        self._told.pop(deployment.uid, None)
        for key in [key for key in self._builds if key[0] == deployment.uid]:
            del self._builds[key]
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
                    await self._report_all()
                    now = self._clock.monotonic()
                    if swept is None or now - swept >= SWEEP_S:
                        await self._sweep()
                        swept = now
            except EkibenError as exc:
                log.info("uses could not be reported", extra={"reason": exc.reason, "error": str(exc)})
                await self._clock.sleep(LOOK_S)
            await self._signal.wait(at_most_s=LOOK_S)

    async def _report_all(self) -> None:
        now = self._clock.monotonic()
        for deployment in await self._store.list_deployments():
            builds = {key[1]: dict(built) for key, built in self._builds.items() if key[0] == deployment.uid}
            state = (deployment.generation, deployment.status.serving_revision, builds)
            told = self._told.get(deployment.uid)
            if told is not None and told[0] == state and now - told[1] < AGAIN_S:
                continue
            await self._report(deployment, builds)
            self._told[deployment.uid] = (state, now)

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
