"""Tells the runtime what the replica sets of a deployment are, so that the latest revision comes and others go."""

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.errors import NotFound
from services.deployer import decisions, scaling, specs
from services.deployer.decisions import Routed, View
from services.deployer.domain import Deployment, InstanceType
from services.deployer.revisions import Revisions
from services.deployer.runtimes import Runtime, SetStatus
from services.deployer.runtimes.scaling import Autoscaling
from services.deployer.settings import Settings
from services.deployer.specs import Version
from services.deployer.status import ServiceFact
from services.deployer.supplies import Given, Supplies


@dataclass
class Rolled:
    """How far the latest revision is, and what was done now."""

    services: list[ServiceFact] = field(default_factory=list)
    acted: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all is as desired."""
        return bool(self.services) and all(fact.complete for fact in self.services)


class Rolling:
    """See the module. What the runtime was told is kept in memory: after a start it is told again."""

    def __init__(
        self,
        runtime: Runtime,
        revisions: Revisions,
        supplies: Supplies,
        instance_types: Mapping[str, InstanceType],
        settings: Settings,
        routed: Routed,
    ) -> None:
        self._runtime, self._revisions, self._supplies = runtime, revisions, supplies
        self._instance_types, self._settings, self._routed = instance_types, settings, routed
        self._told: dict[str, Autoscaling | None] = {}
        """By key of a set that the runtime knows: who was last told to scale it."""
        self._restored: set[str] = set()
        """Deployments of which it is known that what served before a start serves again."""

    def reset(self) -> None:
        """The runtime was told nothing, and other replicas may be there."""
        self._told.clear()
        self._restored.clear()

    def tell_again(self, keys: Collection[str] | None = None) -> None:
        """The runtime must be told what these sets run; None is all."""
        for key in list(self._told) if keys is None else keys:
            self._told.pop(key, None)

    def keep(self, keys: AbstractSet[str]) -> None:
        """Only these sets are there still."""
        for key in self._told.keys() - keys:
            del self._told[key]

    def forget(self, uid: str) -> None:
        """A deployment is no more."""
        self._restored.discard(uid)

    async def restore(self, deployment: Deployment, sets: Sequence[SetStatus]) -> Sequence[SetStatus]:
        """Bring back what served before a restart, where the latest revision has not taken over yet. Gives the sets
        that are there then."""
        uid, serving = deployment.uid, deployment.status.serving_revision
        if uid in self._restored:
            return sets
        if serving in (0, deployment.latest_revision) or any(one.revision == serving and one.asked for one in sets):
            self._restored.add(uid)
            return sets
        for version in await self._revisions.versions(uid, serving):
            progress = self._supplies.build(deployment, version, serving)
            if progress.failed:
                continue
            if not progress.made:
                return sets
            for service in version.manifest.services:
                desired = specs.desired_of(deployment, version, service.name)
                await self._apply_former(deployment, serving, version, service.name, desired)
        self._restored.add(uid)
        return [one for one in await self._runtime.observe() if one.deployment_uid == uid]

    async def roll(self, view: View, given: Mapping[str, Given]) -> Rolled:
        """The next steps towards the latest revision. `given` is by target what replicas need, where it is there."""
        rolled = Rolled()
        for version in view.latest:
            for service in version.manifest.services:
                await self._roll_service(view, version, service.name, given.get(version.target), rolled)
        for one in decisions.obsolete(view, complete=rolled.complete):
            await self._runtime.scale(one.key, 0)
        await self._revive(view)
        return rolled

    async def end(self, sets: Sequence[SetStatus]) -> None:
        """Nothing of these should run."""
        for one in sets:
            if one.asked or one.replicas:
                await self._runtime.scale(one.key, 0)

    async def _roll_service(
        self, view: View, version: Version, service: str, given: Given | None, rolled: Rolled
    ) -> None:
        deployment, autoscaling = view.deployment, self._autoscaling(view.deployment, version, service)
        scales = self._runtime.scales(deployment.place)
        next = decisions.decide(view, version, service, autoscaling, scales=scales, routed=self._routed)
        rolled.services.append(next.fact)
        if given is None:
            return
        key, asked, new = next.key, next.asked, next.fact.new
        if key in asked or (new is not None and self._told.get(key, ...) != next.lent):
            replicas = asked.get(key, new.asked if new is not None else 0)
            await self._apply(deployment, deployment.latest_revision, version, service, given, replicas, next.lent)
        for changed, replicas in asked.items():
            if changed != key:
                await self._runtime.scale(changed, replicas)
            rolled.acted.append(f"{service} {'new' if changed == key else 'old'} {replicas}")

    async def _revive(self, view: View) -> None:
        """Tell the runtime again what adopted sets of former revisions run, so that it can start them again."""
        deployment = view.deployment
        for one in view.sets:
            if one.revision == deployment.latest_revision or one.key in self._told or not one.asked:
                continue
            if (version := view.version_of(one)) is not None:
                scaled = self._autoscaling(deployment, version, one.service) if one.autoscaled else None
                await self._apply_former(deployment, one.revision, version, one.service, one.asked, scaled)

    async def _apply_former(
        self,
        deployment: Deployment,
        revision: int,
        version: Version,
        service: str,
        replicas: int,
        autoscaling: Autoscaling | None = None,
    ) -> None:
        """Of a former revision, once what it needs is there."""
        made = self._supplies.build(deployment, version, revision).made
        if made is None:
            return
        try:
            given = Given(made, await self._supplies.secrets(deployment, version))
        except NotFound:
            return  # They were deleted with the revision that used them.
        await self._apply(deployment, revision, version, service, given, replicas, autoscaling)

    async def _apply(
        self,
        deployment: Deployment,
        revision: int,
        version: Version,
        service: str,
        given: Given,
        replicas: int,
        autoscaling: Autoscaling | None,
    ) -> None:
        spec = specs.spec_of(
            deployment,
            revision,
            version,
            service,
            made=given.made,
            secrets=given.secrets,
            instance_types=self._instance_types,
            drain_s=self._settings.drain_s,
        )
        await self._runtime.apply(replace(spec, autoscaling=autoscaling), replicas)
        self._told[spec.key] = autoscaling

    def _autoscaling(self, deployment: Deployment, version: Version, service: str) -> Autoscaling | None:
        """Who should scale it."""
        size = self._instance_types.get(version.services.get(service, pb.ServiceTemplate()).instance_type)
        names = self._settings.metric_names
        return scaling.autoscaling_of(specs.scaling_of(deployment, version, service), size, names)
