"""Builds and lines of their logs as messages of the API."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from google.protobuf.timestamp_pb2 import Timestamp

from ekiben import errors
from ekiben.builder.v1 import builder_pb2 as pb
from ekiben.builder.v1 import images_pb2
from services.builder import failures
from services.builder.domain import Build, Environment, Image, Output, Priority, State
from services.builder.logs import LogLine
from services.builder.places import pin_of

_STATES: Mapping[State, "pb.Build.State.ValueType"] = {
    State.QUEUED: pb.Build.QUEUED,
    State.RUNNING: pb.Build.RUNNING,
    State.SUCCEEDED: pb.Build.SUCCEEDED,
    State.FAILED: pb.Build.FAILED,
    State.CANCELLED: pb.Build.CANCELLED,
}

_OUTPUTS: Mapping[Output, "pb.Build.Output.ValueType"] = {
    Output.ENVIRONMENT: pb.Build.ENVIRONMENT,
    Output.IMAGE: pb.Build.IMAGE,
    Output.IMAGE_AND_MODELS: pb.Build.IMAGE_AND_MODELS,
}

_PRIORITIES: Mapping[Priority, "pb.Build.Priority.ValueType"] = {
    Priority.BATCH: pb.Build.BATCH,
    Priority.NORMAL: pb.Build.NORMAL,
    Priority.INTERACTIVE: pb.Build.INTERACTIVE,
}


def build_to_proto(build: Build, environment_path: Path | None) -> pb.Build:
    """The build; `environment_path` is where its environment lies, if it has one."""
    message = pb.Build(
        name=f"builds/{build.id}",
        uid=build.uid,
        bento=build.bento,
        state=_STATES[build.state],
        step=build.step,
        progress_percent=build.progress_percent,
        cached=build.cached,
        create_time=_timestamp(build.create_time),
        creator=build.creator,
        output=_OUTPUTS[build.output],
        platforms=build.platforms,
        image=f"images/{build.image}" if build.image else "",
        priority=_PRIORITIES[build.priority],
    )
    if build.start_time is not None:
        message.start_time.CopyFrom(_timestamp(build.start_time))
    if build.end_time is not None:
        message.end_time.CopyFrom(_timestamp(build.end_time))
    if build.failure is not None:
        message.failure.CopyFrom(errors.to_status(failures.to_error(build.failure)))
    if build.environment is not None and environment_path is not None:
        message.environment.CopyFrom(environment_to_proto(build.environment, environment_path))
    return message


def output_of(value: int) -> Output:
    """The output that a request names. Raises InvalidArgument (OUTPUT_INVALID) for one of another release."""
    if not value:
        return Output.ENVIRONMENT
    for output, number in _OUTPUTS.items():
        if number == value:
            return output
    raise errors.InvalidArgument(
        f"There is no output {value} here.",
        reason="OUTPUT_INVALID",
        violations=[("output", "must be ENVIRONMENT, IMAGE or IMAGE_AND_MODELS")],
        output=value,
    )


def priority_of(value: int) -> Priority:
    """The priority that a request names. Raises InvalidArgument (PRIORITY_INVALID) for one of another release."""
    if not value:
        return Priority.NORMAL
    try:
        return Priority(value)
    except ValueError:
        raise errors.InvalidArgument(
            f"There is no priority {value} here.",
            reason="PRIORITY_INVALID",
            violations=[("priority", "must be BATCH, NORMAL or INTERACTIVE")],
            priority=value,
        ) from None


def environment_to_proto(environment: Environment, path: Path) -> pb.Environment:
    """The environment, and where it lies."""
    return pb.Environment(
        digest=environment.digest,
        path=str(path),
        python_version=environment.python_version,
        bentoml_version=environment.bentoml_version,
        package_count=environment.package_count,
        size_bytes=environment.size_bytes,
    )


def image_to_proto(image: Image, location: str) -> images_pb2.Image:
    """The image; `location` is where other programs find it."""
    return images_pb2.Image(
        name=f"images/{image.id}",
        bento=image.bento,
        bento_digest=image.bento_digest,
        digest=image.digest,
        platforms=image.platforms,
        size_bytes=image.size_bytes,
        layers=[
            images_pb2.Image.Layer(
                digest=layer.digest,
                size_bytes=layer.size_bytes,
                media_type=layer.media_type,
                content=layer.content,
                platform=layer.platform,
                model=layer.model,
                image=layer.image,
            )
            for layer in image.layers
        ],
        references=[f"{image.repository}:{tag}" for tag in (image.tag, pin_of(image.id)) if tag],
        location=location,
        base=image.base,
        models=image.models,
        build=f"builds/{image.build}",
        create_time=_timestamp(image.create_time),
        use_time=_timestamp(image.use_time),
    )


def line_to_proto(line: LogLine) -> pb.BuildLogLine:
    """A line of a log."""
    return pb.BuildLogLine(index=line.index, time=_timestamp(line.time), text=line.text)


def _timestamp(time: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(time)
    return message
