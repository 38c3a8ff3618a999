"""What replicas need before they start: what they run in, of the builder, and their secrets, of the vault."""

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ekiben.api.v1 import annotations_pb2
from ekiben.errors import NotFound
from ekiben.identity.v1 import identity_pb2
from services.deployer import gate, specs
from services.deployer.attention import Attention
from services.deployer.builds import Builds, Made, Output, Progress, Way
from services.deployer.domain import DEFAULT_CLUSTER, MAIN, Condition, Deployment
from services.deployer.runtimes import SetStatus
from services.deployer.specs import Version
from services.deployer.uses import Uses
from services.kernel.clock import Clock
from services.kernel.identity import Principal

SECRETS_S = 15.0
"""While a rollout goes on, a secret that was missing or wrong is noticed after so long."""
MISSING = ("ENVIRONMENT_MISSING", "IMAGE_MISSING")
"""Reasons of replicas for which the builder must be asked again."""


@dataclass(frozen=True)
class Given:
    """All that the replicas of a version need."""

    made: Made
    secrets: Sequence[identity_pb2.Secret]


@dataclass
class Supplied:
    """What there is of what the latest revision needs."""

    given: dict[str, Given] = field(default_factory=dict)
    """By target: those that can start."""
    build: str = ""
    """The build of main."""
    building: bool = False
    building_message: str = ""
    problem: Condition | None = None
    """What keeps it from starting at all."""
    verified: list[Condition] = field(default_factory=list)


class Supplies:
    """See the module. `vault` is the registry's stub for secrets."""

    def __init__(self, builds: Builds, vault: Any, uses: Uses, attention: Attention, clock: Clock) -> None:
        self._builds, self._vault, self._uses = builds, vault, uses
        self._attention, self._clock = attention, clock
        self._tasks: asyncio.TaskGroup
        self._secrets: dict[str, dict[tuple[object, ...], tuple[float, list[identity_pb2.Secret]]]] = {}
        """By the uid of the deployment, then generation and names."""

    def open(self, tasks: asyncio.TaskGroup) -> None:
        """Wait for builds in tasks of this group."""
        self._tasks = tasks

    def reset(self) -> None:
        """Ask for secrets anew."""
        self._secrets.clear()

    def forget(self, uid: str) -> None:
        """Keep no secrets of a deployment."""
        self._secrets.pop(uid, None)

    def ask_again(
        self, deployment: Deployment, versions: Iterable[Version], sets: Iterable[SetStatus]
    ) -> Collection[str]:
        """Ask again for what the builder has thrown away while replicas run in it. Gives the keys of their sets."""
        missing = {one.key for one in sets if any(replica.reason in MISSING for replica in one.replicas)}
        if not missing:
            return ()
        thrown = [
            made for version in versions if (made := self.build(deployment, version, deployment.latest_revision).made)
        ]
        for made in thrown:
            self._builds.forget(made)
        return missing if thrown else ()

    async def look(self, deployment: Deployment, versions: Iterable[Version]) -> Supplied:
        """Ask for what the latest revision needs, and see what of it is there."""
        found = Supplied()
        for version in versions:
            made = self._look_at_build(deployment, version, found)
            try:
                secrets = await self.secrets(deployment, version)
            except NotFound as exc:
                found.problem = found.problem or Condition("Available", False, "SECRET_NOT_FOUND", str(exc))
                continue
            found.problem = found.problem or specs.problem_of(version, secrets)
            if made and found.problem is None:
                found.given[version.target] = Given(made, secrets)
        return found

    def _look_at_build(self, deployment: Deployment, version: Version, found: Supplied) -> Made | None:
        revision = deployment.latest_revision
        progress = self.build(deployment, version, revision)
        made = progress.made
        if version.target == MAIN:
            found.build = progress.build
        if made and progress.build:
            self._uses.built(deployment.uid, revision, progress.build, version.bento, version.digest, made.digest)
        if made and made.verified is not None:
            found.verified.append(made.verified)
        if progress.failed:
            kind = gate.TYPE if progress.reason in gate.REFUSED else "Built"
            found.problem = Condition(kind, False, progress.reason, progress.message)
        elif not made:
            found.building, found.building_message = True, progress.message
        return made

    def build(self, deployment: Deployment, version: Version, revision: int) -> Progress:
        """How far that has come what a version of a revision runs in; it is asked for if it was not yet."""
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

    async def secrets(self, deployment: Deployment, version: Version) -> Sequence[identity_pb2.Secret]:
        """The secrets with their values. Asking leaves an audit entry, so what is settled is not asked for again.

        Raises:
            NotFound: there is none of this name (SECRET_NOT_FOUND).
        """
        if not version.secrets:
            return []
        now, key = self._clock.monotonic(), (deployment.generation, *version.secrets)
        settled = deployment.status.settled and deployment.status.observed_generation == deployment.generation
        kept = self._secrets.setdefault(deployment.uid, {})
        known = kept.get(key)
        if not settled:
            self._attention.later(deployment.uid, SECRETS_S)
        if known is None or (not settled and now - known[0] >= SECRETS_S):
            answer = await self._vault.RevealSecrets(identity_pb2.RevealSecretsRequest(names=version.secrets))
            for old in [old for old in kept if old[0] != deployment.generation]:
                del kept[old]
            known = kept[key] = (now, list(answer.secrets))
        return known[1]
