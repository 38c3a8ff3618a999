"""Deleted versions."""

from ekiben.registry.v1 import deletions_pb2 as pb
from services.registry.domain import Deleted
from services.registry.messages.catalog import to_timestamp


def deleted_version(found: Deleted) -> pb.DeletedVersion:
    """The message of a deleted version."""
    return pb.DeletedVersion(
        name=f"deletedVersions/{found.uid}",
        resource=found.resource,
        digest=found.digest,
        size_bytes=found.size_bytes,
        labels=found.labels,
        create_time=to_timestamp(found.create_time),
        delete_time=to_timestamp(found.delete_time),
        expire_time=to_timestamp(found.expire_time),
        deleter=found.deleter,
    )
