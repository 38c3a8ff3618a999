"""When the deployer asks the builder, and when it stops."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest

from ekiben.api.v1 import annotations_pb2
from ekiben.builder.v1 import builder_pb2, images_pb2
from ekiben.errors import EkibenError, FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from services.deployer.builds import AGAIN_S, LONGEST_PAUSE_S, LOOK_AGAIN_S, UNWANTED_S, Builds, Output, Progress, Way
from services.deployer.domain import Condition
from services.deployer.gate import Gate
from services.kernel.clock import ManualClock
from services.kernel.identity import Principal

CALLER = Principal("users/admin", "default", annotations_pb2.ROLE_SERVICE)
BENTO = "bentoRepositories/iris/bentos/v1"


class Builder:
    """Answers at once, with what it made last."""

    def __init__(self) -> None:
        self.asked = 0
        self.environment = ""
        self.code = FailedPrecondition.code

    async def CreateBuild(self, request: builder_pb2.CreateBuildRequest) -> builder_pb2.Build:
        self.asked += 1
        build = builder_pb2.Build(name=f"builds/b{self.asked}", state=builder_pb2.Build.FAILED)
        build.failure.code = int(self.code)
        if self.environment:
            build.state, build.environment.path = builder_pb2.Build.SUCCEEDED, self.environment
        return build


class Bench:
    """Builds with a clock that stands still, asked by one revision or another."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.builder, self.clock = Builder(), ManualClock(datetime(2026, 1, 1, tzinfo=UTC))
        self.builds = Builds(self.builder, None, Output.ENVIRONMENT, self.clock)
        self._tasks = tasks

    async def want(self, revision: int) -> Progress:
        progress = self.builds.want(self._tasks, ("u", revision), BENTO, "sha256:0", (), CALLER, "")
        await settle()
        return progress


def environment(progress: Progress) -> str:
    return progress.made.environment if progress.made is not None else ""


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    async with asyncio.TaskGroup() as tasks:
        made = Bench(tasks)
        yield made
        await made.clock.advance(UNWANTED_S + 1)
        made.builds.prune("u")


async def test_next_revision_gets_what_was_built_by_force_meanwhile_and_the_last_one_keeps_its_own() -> None:
    async with bench() as made:
        made.builder.environment = "/environments/first"
        assert environment(await made.want(1)) == "/environments/first"
        made.builder.environment = "/environments/forced"
        assert environment(await made.want(1)) == "/environments/first"
        assert environment(await made.want(2)) == "/environments/forced"


async def test_failed_build_is_tried_again_only_for_as_long_as_somebody_wants_it() -> None:
    async with bench() as made:
        await made.want(1)
        for _ in range(int(AGAIN_S / UNWANTED_S) + 1):
            await made.clock.advance(UNWANTED_S - 1)
            await made.want(1)
            made.builds.prune("u")
        assert made.builder.asked == 2, "it is wanted all the time"
        await made.clock.advance(UNWANTED_S + 1)
        made.builds.prune("u")
        await settle()
        await made.clock.advance(AGAIN_S + 1)
        await settle()
        assert made.builder.asked == 2, "it was asked for again though nobody wanted it"


async def test_a_build_that_found_no_room_is_tried_again_soon() -> None:
    async with bench() as made:
        made.builder.code = ResourceExhausted.code
        await made.want(1)
        await made.clock.advance(LONGEST_PAUSE_S - 1)
        assert made.builder.asked == 1
        made.builder.environment = "/environments/now"
        await made.clock.advance(1)
        assert environment(await made.want(1)) == "/environments/now"


class Images:
    """Builds that give images, and a gate that a test opens."""

    def __init__(self) -> None:
        self.signed = False
        self.image = "oci:layout:acme/x:v1"
        self.error: EkibenError = FailedPrecondition("sha256:1 has no signature.", reason="IMAGE_NOT_SIGNED")

    async def CreateBuild(self, request: builder_pb2.CreateBuildRequest) -> builder_pb2.Build:
        return builder_pb2.Build(name="builds/b1", state=builder_pb2.Build.SUCCEEDED, image="images/i")

    async def GetImage(self, request: images_pb2.GetImageRequest) -> images_pb2.Image:
        return images_pb2.Image(name=request.name, digest="sha256:1", location="oci:layout:acme/x:v1")

    async def look(self, image: str, digest: str, mounted: Sequence[str] = ()) -> Condition:
        assert (image, digest, list(mounted)) == (self.image, "sha256:1", [])
        if not self.signed:
            raise self.error
        return Condition("Verified", True, "SIGNED")


async def test_a_refused_image_runs_soon_after_it_is_signed() -> None:
    async with asyncio.TaskGroup() as tasks:
        images, clock = Images(), ManualClock(datetime(2026, 1, 1, tzinfo=UTC))
        builds = Builds(images, images, Output.IMAGE, clock, images)  # type: ignore[arg-type]
        progress = builds.want(tasks, ("u", 1), BENTO, "sha256:0", (), CALLER, "")
        await settle()
        assert (progress.failed, progress.reason, progress.made) == (True, "IMAGE_NOT_SIGNED", None)
        images.signed = True
        await clock.advance(LOOK_AGAIN_S)
        await settle()
        assert progress.made is not None and not progress.failed
        assert progress.made.verified == Condition("Verified", True, "SIGNED")


async def test_a_prebuilt_image_that_was_refused_runs_once_it_is_signed() -> None:
    async with asyncio.TaskGroup() as tasks:
        images, clock = Images(), ManualClock(datetime(2026, 1, 1, tzinfo=UTC))
        images.image = "docker://registry.test/x@sha256:1"
        builds = Builds(images, images, Output.IMAGE, clock, images)  # type: ignore[arg-type]
        progress = builds.want(tasks, ("u", 1), BENTO, "sha256:0", (), CALLER, "", Way(image=images.image))
        await settle()
        assert (progress.failed, progress.reason, progress.made) == (True, "IMAGE_NOT_SIGNED", None)
        images.signed = True
        await clock.advance(LOOK_AGAIN_S)
        await settle()
        assert progress.made is not None and not progress.failed and not progress.message


async def test_keys_that_cannot_be_read_refuse_and_a_registry_that_is_away_is_waited_for() -> None:
    for error, failed, said in (
        (InvalidArgument("No key in it.", reason="TRUSTED_KEYS_INVALID"), True, "No key in it."),
        (Unavailable("No answer.", reason="REGISTRY_UNAVAILABLE"), False, "The image cannot be looked at: No answer."),
    ):
        async with asyncio.TaskGroup() as tasks:
            images, clock = Images(), ManualClock(datetime(2026, 1, 1, tzinfo=UTC))
            images.error = error
            builds = Builds(images, images, Output.IMAGE, clock, images)  # type: ignore[arg-type]
            progress = builds.want(tasks, ("u", 1), BENTO, "sha256:0", (), CALLER, "")
            await settle()
            assert (progress.failed, progress.message) == (failed, said)
            images.signed = True
            await clock.advance(LOOK_AGAIN_S)
            await settle()
            assert progress.made is not None and not progress.failed


@pytest.mark.parametrize("policy", ["enforce", "warn"])
async def test_an_environment_is_nobody_s_so_that_a_policy_refuses_it_or_tells_of_it(policy: str) -> None:
    async with bench() as made:
        made.builder.environment = "/environments/first"
        made.builds = Builds(made.builder, None, Output.ENVIRONMENT, made.clock, Gate(policy, [], [], made.clock))
        progress = await made.want(1)
        if policy == "enforce":
            assert (progress.failed, progress.reason, made.builder.asked) == (True, "IMAGE_NOT_SIGNED", 0)
            assert "which nobody can sign" in progress.message and BENTO in progress.message
            return
        assert progress.made is not None and progress.made.verified is not None
        assert progress.made.verified.status is False and "runs nevertheless" in progress.made.verified.message
