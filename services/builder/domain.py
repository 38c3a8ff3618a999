"""Builds, leases and environments: what they are and how they may change. Pure."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import IntEnum, StrEnum

from ekiben.errors import FailedPrecondition

RECIPE_VERSION = 1
"""Part of every digest and of the key by which builds are found again: raise it when equal bentos must get another
environment."""
ASSEMBLER_VERSION = 3
"""Grows when the same input gives other layers; part of the key under which a layer is remembered, and of that by which
builds of images are found again."""


class State(StrEnum):
    """How far a build has come. The names are those of the API."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


ENDED = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})
"""States which nothing leaves."""


class Output(StrEnum):
    """What a build makes. The names are those of the API."""

    ENVIRONMENT = "ENVIRONMENT"
    IMAGE = "IMAGE"
    IMAGE_AND_MODELS = "IMAGE_AND_MODELS"
    """The bento's image without its models, and of each model an image to be mounted there."""

    @property
    def is_image(self) -> bool:
        """Whether it is one that containers run."""
        return self is not Output.ENVIRONMENT


class Priority(IntEnum):
    """Which build goes first. The numbers are those of the API."""

    BATCH = 1
    NORMAL = 2
    INTERACTIVE = 3


HEAD_START = timedelta(hours=1)
"""What a priority is worth: so much later may a build be asked for and still go before one of the next lower."""


class Step(StrEnum):
    """What a build does, in the words that a reader sees."""

    WAITING = "waiting for a worker"
    FETCHING = "fetching the bento"
    RUNNING_COMMANDS = "running the bento's commands"
    FINDING_PYTHON = "finding a Python"
    RESOLVING = "resolving requirements"
    INSTALLING = "installing packages"
    CHECKING = "checking the environment"
    ASSEMBLING = "assembling the image"
    DONE = "ready"


BEGINS_AT: Mapping[Step, int] = {
    Step.WAITING: 0,
    Step.FETCHING: 2,
    Step.FINDING_PYTHON: 8,
    Step.RESOLVING: 12,
    Step.INSTALLING: 30,
    Step.CHECKING: 92,
    Step.DONE: 100,
}
"""Percent at which each step begins: from cold builds of small bentos, where downloading takes most of the time."""

IMAGE_BEGINS_AT: Mapping[Step, int] = {
    Step.WAITING: 0,
    Step.FETCHING: 2,
    Step.RUNNING_COMMANDS: 4,
    Step.RESOLVING: 8,
    Step.INSTALLING: 20,
    Step.ASSEMBLING: 40,
    Step.DONE: 100,
}
"""The same of an image, where compiling and packing do."""


@dataclass(frozen=True)
class Environment:
    """A Python environment which is there."""

    digest: str
    """`sha256:<hex>` of lock, Python version and platform."""
    python_version: str
    bentoml_version: str
    package_count: int
    size_bytes: int


@dataclass(frozen=True)
class Failure:
    """Why a build failed: the reason for programs, a sentence for people."""

    reason: str
    """One of `failures.CODES`."""
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageLayer:
    """A layer of an image, as it is stored."""

    digest: str
    size_bytes: int
    media_type: str
    content: str = ""
    """What it holds, in words; empty for a layer of the base image."""
    platform: str = ""
    model: str = ""
    """Resource name of the model, for one of an image that is mounted."""
    image: str = ""
    """Digest of that image."""


@dataclass(frozen=True)
class Image:
    """An image which is there."""

    id: str
    organization: str
    place: str
    """Where it is kept: see `places.Place.name`."""
    digest: str
    media_type: str
    bento: str
    """Resource name."""
    bento_digest: str
    repository: str
    """`default/iris`."""
    tag: str
    """Empty once another image has it."""
    platforms: Sequence[str]
    size_bytes: int
    layers: Sequence[ImageLayer]
    base: str
    models: Sequence[str]
    """Resource names."""
    build: str
    """Id of the build that gave it last."""
    create_time: datetime
    use_time: datetime


@dataclass(frozen=True)
class Build:
    """One run from a bento to its output."""

    id: str
    uid: str
    organization: str
    bento: str
    """Resource name, with the version spelled out."""
    bento_digest: str
    """Of the content that was there when the build was asked for; once it succeeded, of what it was made from."""
    creator: str
    create_time: datetime
    secrets: Sequence[str] = ()
    force: bool = False
    traceparent: str = ""
    state: State = State.QUEUED
    step: str = Step.WAITING
    progress_percent: int = 0
    failure: Failure | None = None
    environment: Environment | None = None
    cached: bool = False
    start_time: datetime | None = None
    end_time: datetime | None = None
    attempts: int = 0
    """How many workers have taken it."""
    version: int = 0
    """Grows with each change; a watcher compares it."""
    site: str = ""
    """Id of the folder in which its environment is made: see `app.py`."""
    output: Output = Output.ENVIRONMENT
    platforms: Sequence[str] = ()
    """What its image runs on; none for an environment."""
    base: str = ""
    """The rule by which the base of its image is chosen, as it was set when the build was asked for."""
    image: str = ""
    """Id of its image, once it is there."""
    priority: Priority = Priority.NORMAL
    models: Sequence[str] = ()
    """`NAME@DIGEST` of each model of an image's bento. Part of the dedup key, and not kept besides."""

    @property
    def ended(self) -> bool:
        """Whether nothing about it will change any more."""
        return self.state in ENDED

    def check_cancellable(self) -> None:
        """Raises FailedPrecondition (BUILD_ENDED) for one that has ended."""
        if self.ended:
            raise FailedPrecondition(
                f"Build builds/{self.id} has ended as {self.state}; there is nothing to cancel.",
                reason="BUILD_ENDED",
                build=f"builds/{self.id}",
                state=str(self.state),
            )


@dataclass(frozen=True)
class Lease:
    """A worker's right to advance a build."""

    build: Build
    token: str
    """Given anew with each lease; every write carries it."""


MOST_ATTEMPTS = 5
"""A build whose worker died this often (out of memory, say) is FAILED instead of being taken up for ever."""


def progress(step: Step, done: int = 0, of: int = 0, output: Output = Output.ENVIRONMENT) -> int:
    """Percent for `done` of `of` parts of a step; never reaches the next step's beginning."""
    begins_at = IMAGE_BEGINS_AT if output.is_image else BEGINS_AT
    steps = list(begins_at)
    begin = begins_at.get(step, 0)
    if step is Step.DONE or of <= 0 or step not in begins_at:
        return begin
    end = begins_at[steps[steps.index(step) + 1]]
    return begin + int((end - 1 - begin) * min(1.0, max(0.0, done / of)))


def dedup_key(build: Build) -> str:
    """Equal for requests that one build can answer: the same content, secrets by name, and way of making recipes.

    An image says which bento it is of, so equal content under two names makes two images. Bento and models may be
    pushed again while they are built: what a build can answer that succeeded goes by what it found.
    """
    lines = [f"recipe {RECIPE_VERSION}", build.bento_digest, *sorted(set(build.secrets))]
    if build.output.is_image:
        lines += [f"image {ASSEMBLER_VERSION}", build.bento, build.base, *sorted(build.platforms)]
        lines += ["models apart"] if build.output is Output.IMAGE_AND_MODELS else []
        lines += sorted(build.models)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def model_of(name: str, digest: str) -> str:
    """One of `Build.models`."""
    return f"{name}@{digest}"


def turn_of(build: Build) -> datetime:
    """By which those that wait are ordered: when it was asked for, less the head start of its priority.

    So what waits moves up, and no stream of more urgent builds can keep another waiting for ever.
    """
    return build.create_time - HEAD_START * (build.priority - Priority.NORMAL)


def kept_no_longer(newest_first: Sequence[Image], newest: int, until: datetime) -> list[Image]:
    """Which images of one repository may go: those after the `newest` that no build gave since `until`."""
    return [image for image in newest_first[newest:] if image.use_time < until]


def cancelled(build: Build, now: datetime) -> Build:
    """The build, stopped by somebody."""
    build.check_cancellable()
    return replace(build, state=State.CANCELLED, end_time=now)
