"""What replicas run in, asked of the builder: one task for each revision that waits for it.

That is an environment for replicas that are processes, and an image for those that are containers.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ekiben.builder.v1 import builder_pb2, images_pb2
from ekiben.errors import DataLoss, EkibenError, FailedPrecondition, NotFound, ResourceExhausted
from services.deployer.domain import Condition
from services.deployer.gate import REFUSED, Gate
from services.kernel import telemetry
from services.kernel.clock import Clock
from services.kernel.identity import Principal
from services.kernel.peers import on_behalf_of

log = logging.getLogger(__name__)

AGAIN_S = 300.0
"""A failed build is tried anew after this long: what failed may have been the network."""
LOOK_AGAIN_S = 15.0
"""An image that was refused is looked at again after this long."""
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
"""Also after a build that found no room: only somebody's freeing some, of which nobody tells, lets it succeed."""
UNWANTED_S = 60.0
"""What a look at a deployment did not ask for, nor any during this time, is nobody's any more."""


@dataclass(frozen=True)
class Made:
    """What a build gave."""

    digest: str
    """`sha256:<hex>` of the environment or of the image."""
    environment: str = ""
    """The environment's place."""
    image: str = ""
    """The image's place."""
    image_name: str = ""
    """`images/{image}`."""
    model_images: tuple[tuple[str, str], ...] = ()
    """Models that the image leaves out: name, and digest of the image that has it."""
    verified: Condition | None = None
    """Who signed the image; None where nobody asks."""


@dataclass
class Progress:
    """How far a build has come."""

    uid: str = ""
    """Whose it is: a deployment's."""
    build: str = ""
    made: Made | None = None
    """What it gave, once it has."""
    built: bool = False
    """Whether the build has ended."""
    message: str = ""
    failed: bool = False
    reason: str = "BUILD_FAILED"
    wanted_at: float = 0.0
    task: "asyncio.Task[None] | None" = None


class Output(Enum):
    """What replicas run in."""

    ENVIRONMENT = builder_pb2.Build.ENVIRONMENT
    IMAGE = builder_pb2.Build.IMAGE
    IMAGE_AND_MODELS = builder_pb2.Build.IMAGE_AND_MODELS


@dataclass(frozen=True)
class Way:
    """How a revision wants to get what it runs."""

    image: str = ""
    """An image that is there already, as `docker://HOST/NAME@DIGEST`; empty to have one built."""
    models_apart: bool = False
    output: "Output | None" = None
    """None for what the deployer's own runtime takes."""


BUILT = Way()
Key = tuple[str, int, str, str, tuple[str, ...], Way]
"""Deployment and revision, bento and its digest, secrets, and the way."""


class Builds:
    """Builds by revision, bento and secrets. `changed` is called with the uid of a deployment for which one comes
    further.

    Each revision asks for itself, so that it gets what the builder made last: the builder answers at once with what it
    has, and a build that somebody forced meanwhile is used by the deployments and revisions after it.
    """

    def __init__(self, stub: Any, images: Any, output: Output, clock: Clock, gate: Gate | None = None) -> None:
        """`images` is the stub of the builder's images, which is asked where the output is IMAGE, and `gate` says
        whether an image may be run; without one all may."""
        self._gate = gate
        self._stub, self._images, self._output, self._clock = stub, images, output, clock
        self.changed: Callable[[str], None] = lambda uid: None
        self._progress: dict[str, dict[Key, Progress]] = {}
        """By the uid of the deployment."""

    def want(
        self,
        tasks: asyncio.TaskGroup,
        revision: tuple[str, int],
        bento: str,
        digest: str,
        secrets: Sequence[str],
        caller: Principal,
        parent: str,
        way: Way = BUILT,
    ) -> Progress:
        """The progress of a build, which is asked for if it was not yet."""
        key = (*revision, bento, digest, tuple(secrets), way)
        known = self._progress.setdefault(revision[0], {})
        progress = known.get(key)
        if progress is None:
            progress = known[key] = Progress(uid=revision[0])
            progress.task = tasks.create_task(self._follow(progress, bento, secrets, caller, parent, way))
        progress.wanted_at = self._clock.monotonic()
        return progress

    def prune(self, uid: str) -> None:
        """Stop asking for what a deployment does not want any more, as a look at it has just shown."""
        long_ago = self._clock.monotonic() - UNWANTED_S
        known = self._progress.get(uid, {})
        for key, progress in list(known.items()):
            if progress.wanted_at < long_ago:
                _end(progress)
                del known[key]

    def gone(self, uid: str) -> None:
        """Ask for nothing more for a deployment: what failed for one that is deleted is not tried for ever."""
        for progress in self._progress.pop(uid, {}).values():
            _end(progress)

    def forget(self, made: Made) -> None:
        """Ask anew for what is not there any more."""
        for known in self._progress.values():
            for key, progress in list(known.items()):
                if progress.made == made:
                    del known[key]
                    self.changed(progress.uid)

    async def _follow(
        self, progress: Progress, bento: str, secrets: Sequence[str], caller: Principal, parent: str, way: Way
    ) -> None:
        pause = FIRST_PAUSE_S
        while True:
            try:
                what = "build environment" if self._output_of(way) is Output.ENVIRONMENT else "build image"
                with telemetry.continue_trace(parent, what, **{"ekiben.bento": bento}):
                    with on_behalf_of(caller):
                        progress.built = bool(way.image)
                        if way.image:
                            progress.made = await self._given(way.image)
                            progress.failed, progress.message = False, ""
                            self.changed(progress.uid)
                            return
                        verified = None
                        if self._gate and self._output_of(way) is Output.ENVIRONMENT:
                            verified = self._gate.look_at_environment(bento)
                        build = await self._build(progress, bento, secrets, way)
                        progress.built = True
                        made = await self._made(build, way, verified)
            except EkibenError as exc:
                if exc.reason in REFUSED:
                    # An image may be signed, or a key trusted, at any time; another build would change nothing.
                    self._fail(progress, str(exc), exc.reason)
                    pause = LOOK_AGAIN_S
                elif isinstance(exc, NotFound | FailedPrecondition | DataLoss):
                    self._fail(progress, str(exc), exc.reason)
                    pause = AGAIN_S
                else:
                    away = "The image cannot be looked at" if progress.built else "The builder cannot be asked"
                    progress.message = f"{away}: {exc}"
                    self.changed(progress.uid)
                    pause = min(LONGEST_PAUSE_S, pause * 2)
            except Exception:
                log.exception("build could not be followed", extra={"bento": bento})
                self._fail(progress, "It cannot be built for a fault in the platform.", "INTERNAL")
                pause = AGAIN_S
            else:
                if made is not None:
                    progress.made, progress.failed = made, False
                    self.changed(progress.uid)
                    return
                cancelled = build.state == builder_pb2.Build.CANCELLED
                text = f"{build.name} was cancelled." if cancelled else f"{build.name}: {build.failure.message}"
                self._fail(progress, text, "BUILD_CANCELLED" if cancelled else "BUILD_FAILED")
                pause = LONGEST_PAUSE_S if build.failure.code == ResourceExhausted.code else AGAIN_S
            await self._clock.sleep(pause)

    def _output_of(self, way: Way) -> Output:
        return way.output or self._output

    def _fail(self, progress: Progress, message: str, reason: str) -> None:
        progress.message, progress.failed, progress.reason = message, True, reason
        self.changed(progress.uid)

    async def _build(self, progress: Progress, bento: str, secrets: Sequence[str], way: Way) -> builder_pb2.Build:
        output = Output.IMAGE_AND_MODELS if way.models_apart else self._output_of(way)
        asked = builder_pb2.CreateBuildRequest(
            bento=bento, secrets=secrets, output=output.value, priority=builder_pb2.Build.INTERACTIVE
        )
        build = await self._stub.CreateBuild(asked)
        progress.build = build.name
        while build.state in (builder_pb2.Build.QUEUED, builder_pb2.Build.RUNNING):
            call = self._stub.WatchBuild(builder_pb2.WatchBuildRequest(name=build.name))
            try:
                async for build in call:
                    progress.message = f"{build.name}: {build.step or 'queued'}."
                    self.changed(progress.uid)
            finally:
                call.cancel()
        return build  # type: ignore[no-any-return]

    async def _made(self, build: builder_pb2.Build, way: Way, verified: Condition | None) -> Made | None:
        if build.state != builder_pb2.Build.SUCCEEDED:
            return None
        if self._output_of(way) is Output.ENVIRONMENT:
            return Made(build.environment.digest, environment=build.environment.path, verified=verified)
        image = await self._images.GetImage(images_pb2.GetImageRequest(name=build.image))
        apart = tuple((layer.model, layer.image) for layer in image.layers if layer.image)
        mounted = [digest for _, digest in apart]
        verified = await self._gate.look(image.location, image.digest, mounted) if self._gate else None
        return Made(image.digest, image=image.location, image_name=image.name, model_images=apart, verified=verified)

    async def _given(self, image: str) -> Made:
        """An image that somebody else made, once it may be run."""
        digest = image.partition("@")[2]
        verified = await self._gate.look(image, digest) if self._gate else None
        return Made(digest, image=image, verified=verified)


def _end(progress: Progress) -> None:
    if progress.task is not None:
        progress.task.cancel()
