"""Use cases over builds: ask for one, look at it, follow it, stop it."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from ekiben import names
from ekiben.errors import FailedPrecondition, NotFound
from ekiben.registry.v1 import registry_pb2, registry_pb2_grpc
from services.builder.domain import Build, Output, Priority, State, dedup_key, model_of
from services.builder.environments import Environments
from services.builder.logs import BuildLogs, LogLine
from services.builder.places import Place
from services.builder.platforms import here
from services.builder.store import ImageRows, Store
from services.builder.targets import Target
from services.content.images import Platform
from services.kernel import telemetry
from services.kernel.clock import Clock
from services.kernel.identity import Principal
from services.kernel.peers import on_behalf_of
from services.kernel.watches import Topic

QUEUED = "queued"
"""The topic's key that wakes workers; a build's own key is its id."""
_LOOK_AGAIN_S = 1.0
"""How soon a watcher sees what another process wrote; changes of this process wake it at once."""
_LOG_POLL_S = 0.1
"""A reader sees a line this late at most; the file is on this machine, so looking costs nothing."""


def lease_of(build: str) -> str:
    """The topic's key that wakes who holds the build's lease, to see whether it still does."""
    return f"{build}/lease"


@dataclass(frozen=True)
class Wanted:
    """What is asked of a build."""

    secrets: Sequence[str] = ()
    force: bool = False
    output: Output = Output.ENVIRONMENT
    platforms: Sequence[str] = ()
    """For an image; none for this machine's."""
    priority: Priority = Priority.NORMAL


class Queue:
    """The builds of all organizations, as callers see them."""

    def __init__(
        self,
        store: Store,
        images: ImageRows,
        environments: Environments,
        logs: BuildLogs,
        bentos: "registry_pb2_grpc.BentosAsyncStub",
        models: "registry_pb2_grpc.ModelsAsyncStub",
        changes: Topic,
        clock: Clock,
        place: Place,
        bases: str,
    ) -> None:
        """`bases` is the rule by which bases of images are chosen; empty where none are built."""
        self._store = store
        self._images = images
        self._place = place
        self._bases = bases
        self._environments = environments
        self._logs = logs
        self._bentos = bentos
        self._models = models
        self._changes = changes
        self._clock = clock

    async def get(self, caller: Principal, name: names.Build) -> Build:
        """One build. Raises NotFound (BUILD_NOT_FOUND)."""
        build = await self._store.get(caller.organization, name.build)
        if build is None:
            raise NotFound(f"Build {name} does not exist.", reason="BUILD_NOT_FOUND", build=str(name))
        return build

    async def list(
        self, caller: Principal, bento: str, before: tuple[datetime, str] | None, limit: int
    ) -> Sequence[Build]:
        """At most `limit` builds, newest first, from after the position `before`."""
        return await self._store.list(caller.organization, bento, before, limit)

    async def create(self, caller: Principal, bento: names.Bento, wanted: Wanted) -> Build:
        """A build of the bento as it is now: one that is under way or whose output is there, else a new one.

        Raises:
            NotFound: no such bento (BENTO_NOT_FOUND).
            FailedPrecondition: it has no content (BENTO_NOT_UPLOADED), or images are not made here for such platforms
                (PLATFORM_UNSUPPORTED) or at all (BASES_NOT_SET).
        """
        platforms = self._platforms(wanted)
        with on_behalf_of(caller):
            found = await self._bentos.GetBento(registry_pb2.GetBentoRequest(name=str(bento)))
        if found.content.state != registry_pb2.Content.READY:
            raise FailedPrecondition(
                f"Bento {bento} has no content yet. Push it, then build.", reason="BENTO_NOT_UPLOADED", bento=str(bento)
            )
        build = Build(
            id=f"b{uuid.uuid4().hex[:16]}",
            uid=str(uuid.uuid4()),
            organization=caller.organization,
            bento=found.name,
            bento_digest=found.content.digest,
            creator=caller.user,
            create_time=self._clock.now(),
            secrets=sorted(set(wanted.secrets)),
            force=wanted.force,
            traceparent=telemetry.current_traceparent(),
            output=wanted.output,
            platforms=platforms,
            base=self._bases if wanted.output.is_image else "",
            priority=wanted.priority,
            models=await self._models_of(caller, found) if wanted.output.is_image else (),
        )
        while True:
            if not build.force and (good := await self._reusable(build)) is not None:
                return good
            if await self._store.insert(build):
                self._changes.notify(QUEUED)
                return build
            # Somebody asked for the same between the look and the insert: theirs is found now, unless it ended.

    async def cancel(self, caller: Principal, name: names.Build) -> Build:
        """End a build. Raises FailedPrecondition (BUILD_ENDED) where that is not to be done any more."""
        build = await self.get(caller, name)
        build.check_cancellable()
        done = await self._store.cancel(caller.organization, name.build, self._clock.now())
        build = await self.get(caller, name)
        if not done:
            build.check_cancellable()
        self._changes.notify(name.build)
        self._changes.notify(lease_of(name.build))
        return build

    async def retry(self, caller: Principal, name: names.Build) -> Build:
        """A build of what a build should have made that ended without; see `create`.

        Raises:
            FailedPrecondition: it is under way or ended well (BUILD_NOT_RETRIABLE).
        """
        build = await self.get(caller, name)
        if build.state not in (State.FAILED, State.CANCELLED):
            raise FailedPrecondition(
                f"Build {name} is {build.state}; only one that FAILED or was CANCELLED is tried again. To build anew "
                "what is there, create a build with force.",
                reason="BUILD_NOT_RETRIABLE",
                build=str(name),
                state=str(build.state),
            )
        wanted = Wanted(build.secrets, build.force, build.output, build.platforms, build.priority)
        return await self.create(caller, names.Bento.parse(build.bento), wanted)

    def is_here(self, build: Build) -> bool:
        """Whether its environment and its log lie in this builder's folder."""
        return build.site in ("", self._store.site)

    async def watch(self, caller: Principal, name: names.Build) -> AsyncIterator[Build]:
        """The build now, then after each change, until it has ended."""
        seen = -1
        async for _ in self._changes.changes(name.build, at_most_s=_LOOK_AGAIN_S):
            build = await self.get(caller, name)
            if build.version != seen:
                seen = build.version
                yield build
            if build.ended:
                return

    async def read_log(
        self, caller: Principal, name: names.Build, *, follow: bool, tail_lines: int
    ) -> AsyncIterator[LogLine]:
        """The lines of the build's log; with `follow`, until it has ended.

        Raises:
            NotFound: BUILD_NOT_FOUND.
            FailedPrecondition: another builder's folder has it (BUILD_LOG_ELSEWHERE).
        """
        build = await self.get(caller, name)
        if not self.is_here(build):
            raise FailedPrecondition(
                f"The log of {name} is on the machine that builds it; ask the platform there.",
                reason="BUILD_LOG_ELSEWHERE",
                build=str(name),
            )

        async def more() -> bool:
            await asyncio.sleep(_LOG_POLL_S)
            nonlocal build
            build = await self.get(caller, name)
            return not build.ended

        async for line in self._logs.read(
            name.build, tail_lines=tail_lines, more=more if follow and not build.ended else None
        ):
            yield line

    async def _reusable(self, wanted: Build) -> Build | None:
        for build in await self._store.reusable(wanted.organization, dedup_key(wanted)):
            # Content may be shared by bentos; each gets a build under its own name.
            if build.bento != wanted.bento and build.state is State.SUCCEEDED:
                continue
            if build.state is not State.SUCCEEDED:
                if build.state is State.QUEUED and build.priority < wanted.priority:
                    await self._store.raise_priority(build, wanted.priority)
                    return await self._store.get(build.organization, build.id)
                return build
            if await self._is_there(build):
                return build
        return None

    async def _models_of(self, caller: Principal, bento: registry_pb2.Bento) -> Sequence[str]:
        models = []
        for name in bento.models:
            digest = ""  # of one that is gone; the build says so
            with contextlib.suppress(NotFound), on_behalf_of(caller):
                digest = (await self._models.GetModel(registry_pb2.GetModelRequest(name=name))).content.digest
            models.append(model_of(name, digest))
        return models

    async def _is_there(self, build: Build) -> bool:
        if build.output.is_image:
            image = await self._images.get(build.organization, build.image)
            return image is not None and await self._place.has(image.repository, image.id)
        return build.environment is not None and self._environments.find(build.environment.digest) is not None

    def _platforms(self, wanted: Wanted) -> Sequence[str]:
        if not wanted.output.is_image:
            return ()
        if not self._bases:
            raise FailedPrecondition(
                "No images are built here, since nobody said on which base: set EKIBEN_BUILDER_BASES, to "
                "docker://docker.io/library/python:{python}-slim, say.",
                reason="BASES_NOT_SET",
            )
        platforms = [Platform.parse(each) for each in wanted.platforms] or [here()]
        for platform in platforms:
            _ = Target(platform, "3").name  # raises for one that nothing can be made for
        return sorted({str(platform) for platform in platforms})
