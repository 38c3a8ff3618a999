"""What an Update may touch: field masks (AIP-134, AIP-161) and etags (AIP-154)."""

import hashlib
from collections.abc import Collection

from google.api import field_behavior_pb2
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from ekiben.errors import Aborted, InvalidArgument

_IGNORED = (field_behavior_pb2.OUTPUT_ONLY, field_behavior_pb2.IDENTIFIER)


def paths(resource: Message, update_mask: FieldMask | None, allowed: Collection[str]) -> set[str]:
    """Fields of `resource` to change, all of them in `allowed`.

    An absent or empty mask means the populated fields, `*` means all that may change (absent ones are cleared).
    Paths of OUTPUT_ONLY and IDENTIFIER fields are passed over, and so is `etag`.

    Raises:
        InvalidArgument: a path that is no field, or one that may not change (UPDATE_MASK_INVALID).
    """
    if update_mask is None or not update_mask.paths:
        return {field.name for field, _ in resource.ListFields() if field.name in allowed}
    chosen: set[str] = set()
    for path in update_mask.paths:
        if path == "*":
            chosen.update(allowed)
        elif path in allowed:
            chosen.add(path)
        elif not _ignored(resource, path):
            raise InvalidArgument(
                f"update_mask has the path {path!r}, which cannot change; these can: {', '.join(sorted(allowed))}.",
                reason="UPDATE_MASK_INVALID",
                violations=[("update_mask", f"{path!r} is not one of {', '.join(sorted(allowed))}")],
                path=path,
            )
    return chosen


def check_etag(sent: str, current: str) -> None:
    """Pass when nothing was sent or it matches.

    Raises:
        Aborted: the resource has changed since it was read (ETAG_MISMATCH).
    """
    if sent and sent != current:
        raise Aborted(
            "The resource has changed since you read it; read it again, then redo the change.",
            reason="ETAG_MISMATCH",
            etag=sent,
        )


def etag_of(*parts: object) -> str:
    """A quoted etag of what identifies a state: a version counter, or the values themselves."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()
    return f'"{digest[:16]}"'


def _ignored(resource: Message, path: str) -> bool:
    field = resource.DESCRIPTOR.fields_by_name.get(path.partition(".")[0])
    if field is None:
        return False
    if field.name == "etag":
        return True
    behaviours = field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
    return any(behaviour in _IGNORED for behaviour in behaviours)
