"""Repositories, models and bentos."""

from collections.abc import Collection
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from ekiben.errors import InvalidArgument
from ekiben.registry.v1 import registry_pb2 as pb
from services.registry.catalog import etag
from services.registry.domain import Content, Draft, Repository, Version

WRITABLE = frozenset({"description", "labels", "annotations", "manifest"})
"""What an update of a version may change."""
REPOSITORY_WRITABLE = frozenset({"description", "labels", "annotations"})

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_timestamp(moment: datetime | None) -> Timestamp | None:
    """A timestamp, or nothing."""
    if moment is None:
        return None
    since = moment - _EPOCH  # a third of what Timestamp.FromDatetime takes, five times in each model
    return Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1000)


def from_timestamp(stamp: Timestamp, field: str) -> datetime:
    """An aware datetime, to the microsecond. Raises InvalidArgument beyond the years 1 to 9999 (TIME_INVALID)."""
    try:
        return stamp.ToDatetime(UTC)
    except (ValueError, OverflowError) as exc:
        raise InvalidArgument(
            f"{field} is not a time between the years 1 and 9999.",
            reason="TIME_INVALID",
            violations=[(field, "not a time between the years 1 and 9999")],
        ) from exc


def repository_draft(
    message: pb.ModelRepository | pb.BentoRepository, fields: Collection[str] = REPOSITORY_WRITABLE
) -> Draft:
    """What a caller wrote of a repository, in these fields."""
    return Draft(
        description=message.description if "description" in fields else None,
        labels=dict(message.labels) if "labels" in fields else None,
        annotations=dict(message.annotations) if "annotations" in fields else None,
    )


def version_draft(message: pb.Model | pb.Bento, fields: Collection[str] = WRITABLE) -> Draft:
    """What a caller wrote of a version, in these fields; its build time where there is one."""
    return Draft(
        description=message.description if "description" in fields else None,
        labels=dict(message.labels) if "labels" in fields else None,
        annotations=dict(message.annotations) if "annotations" in fields else None,
        manifest=message.manifest if "manifest" in fields else None,
        build_time=(
            from_timestamp(message.build_time, "build_time")
            if "build_time" in fields and message.HasField("build_time")
            else None
        ),
    )


def model_repository(found: Repository) -> pb.ModelRepository:
    """The message of a model repository."""
    return pb.ModelRepository(
        name=found.name,
        uid=found.uid,
        description=found.description,
        labels=found.labels,
        annotations=found.annotations,
        create_time=to_timestamp(found.create_time),
        update_time=to_timestamp(found.update_time),
        creator=found.creator,
        etag=etag(found),
        latest_model=found.kind.version_name(found.repository, found.latest) if found.latest else "",
        model_count=found.version_count,
    )


def bento_repository(found: Repository) -> pb.BentoRepository:
    """The message of a bento repository."""
    return pb.BentoRepository(
        name=found.name,
        uid=found.uid,
        description=found.description,
        labels=found.labels,
        annotations=found.annotations,
        create_time=to_timestamp(found.create_time),
        update_time=to_timestamp(found.update_time),
        creator=found.creator,
        etag=etag(found),
        latest_bento=found.kind.version_name(found.repository, found.latest) if found.latest else "",
        bento_count=found.version_count,
    )


def content(found: Content) -> pb.Content:
    """The message of a version's content."""
    return pb.Content(
        state=pb.Content.State.Value(found.state.value),
        digest=found.digest,
        size_bytes=found.size_bytes,
        failure=found.failure,
        upload_start_time=to_timestamp(found.upload_start_time),
        upload_end_time=to_timestamp(found.upload_end_time),
        open_upload=f"uploads/{found.open_upload}" if found.open_upload else "",
    )


def model(found: Version) -> pb.Model:
    """The message of a model."""
    return pb.Model(
        name=found.name,
        uid=found.uid,
        description=found.description,
        labels=found.labels,
        annotations=found.annotations,
        create_time=to_timestamp(found.create_time),
        update_time=to_timestamp(found.update_time),
        creator=found.creator,
        etag=etag(found),
        manifest=found.manifest,
        build_time=to_timestamp(found.build_time),
        content=content(found.content),
        module=found.facts.module,
        aliases=found.aliases,
    )


def bento(found: Version) -> pb.Bento:
    """The message of a bento."""
    return pb.Bento(
        name=found.name,
        uid=found.uid,
        description=found.description,
        labels=found.labels,
        annotations=found.annotations,
        create_time=to_timestamp(found.create_time),
        update_time=to_timestamp(found.update_time),
        creator=found.creator,
        etag=etag(found),
        manifest=found.manifest,
        build_time=to_timestamp(found.build_time),
        content=content(found.content),
        bentoml_version=found.facts.bentoml_version,
        models=found.facts.models,
        aliases=found.aliases,
    )
