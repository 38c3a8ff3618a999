"""Builds and lines of their logs as messages of the API."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from google.protobuf.timestamp_pb2 import Timestamp

from ekiben import errors
from ekiben.builder.v1 import builder_pb2 as pb
from services.builder import failures
from services.builder.domain import Build, Environment, State
from services.builder.logs import LogLine

_STATES: Mapping[State, "pb.Build.State.ValueType"] = {
    State.QUEUED: pb.Build.QUEUED,
    State.RUNNING: pb.Build.RUNNING,
    State.SUCCEEDED: pb.Build.SUCCEEDED,
    State.FAILED: pb.Build.FAILED,
    State.CANCELLED: pb.Build.CANCELLED,
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


def line_to_proto(line: LogLine) -> pb.BuildLogLine:
    """A line of a log."""
    return pb.BuildLogLine(index=line.index, time=_timestamp(line.time), text=line.text)


def _timestamp(time: datetime) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(time)
    return message
