"""Quotas."""

from collections.abc import Collection, Mapping

from ekiben import names
from ekiben.errors import InvalidArgument
from ekiben.registry.v1 import quotas_pb2 as pb
from services.registry.domain import Quota
from services.registry.messages.catalog import to_timestamp
from services.registry.quotas import etag

# The field of the message, and what it limits.
_LIMITS = {"max_stored_bytes": "bytes", "max_versions": "versions", "max_repositories": "repositories"}
WRITABLE = frozenset(_LIMITS)


def organization_of(name: str) -> str:
    """The organization in `organizations/{organization}/quota`, or `-`. Raises InvalidArgument (NAME_INVALID)."""
    parent, slash, last = name.rpartition("/")
    if not slash or last != "quota":
        raise InvalidArgument(
            f"{name[:200]!r} is not a name of the form organizations/{{organization}}/quota.",
            reason="NAME_INVALID",
            violations=[("name", "must have the form organizations/{organization}/quota")],
            name=name,
        )
    return names.Organization.parse(parent, wildcard=True).organization


def limits(sent: pb.Quota, fields: Collection[str]) -> Mapping[str, int | None]:
    """The limits that a caller sets, in these fields; None where one is lifted."""
    return {_LIMITS[field]: getattr(sent, field) if sent.HasField(field) else None for field in fields}  # type: ignore[arg-type]


def quota(found: Quota) -> pb.Quota:
    """The message of a quota."""
    return pb.Quota(
        name=f"organizations/{found.organization}/quota",
        max_stored_bytes=found.limits.bytes,
        max_versions=found.limits.versions,
        max_repositories=found.limits.repositories,
        stored_bytes=found.used.bytes,
        version_count=found.used.versions,
        repository_count=found.used.repositories,
        update_time=to_timestamp(found.update_time),
        updater=found.updater,
        etag=etag(found),
    )
