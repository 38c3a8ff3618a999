"""What the collector frees."""

from ekiben.registry.v1 import garbage_pb2 as pb
from services.registry.domain import Garbage
from services.registry.messages.catalog import to_timestamp


def item(found: Garbage) -> pb.GarbageItem:
    """The message of one thing that goes."""
    return pb.GarbageItem(
        kind=pb.GarbageItem.Kind.Value(found.kind.value),
        name=found.name,
        size_bytes=found.size_bytes,
        last_holder=found.last_holder,
        release_time=to_timestamp(found.release_time),
    )
