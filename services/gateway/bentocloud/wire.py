"""What requests and replies of the wire protocol have in common. Pure functions."""

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from ekiben.errors import InvalidArgument

Reply = dict[str, Any]

KUBE_NAMESPACE = "default"
"""The namespace that clients echo; nothing is looked up by it."""


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; empty for no body, which old clients send as JSON all the same.

    Raises:
        InvalidArgument: not a JSON object (JSON_MALFORMED).
    """
    if not body.strip():
        return {}
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"The body is not JSON: {error}.", reason="JSON_MALFORMED") from error
    if not isinstance(value, dict):
        raise InvalidArgument("The body must be a JSON object.", reason="JSON_MALFORMED")
    return value


def member(body: Mapping[str, Any], name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
    """A member of a request, or the default where it is absent or null.

    Raises:
        InvalidArgument: of another type (FIELD_INVALID).
    """
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise InvalidArgument(
            f"{name!r} must be {wanted}, not {type(value).__name__}.",
            reason="FIELD_INVALID",
            violations=[(name, f"must be {wanted}")],
        )
    return value


def required(body: Mapping[str, Any], name: str, kind: type | tuple[type, ...] = str) -> Any:
    """A member of a request that must be there and not empty."""
    value = member(body, name, kind)
    if value is None or value == "":
        raise InvalidArgument(f"{name!r} is missing.", reason="FIELD_MISSING", violations=[(name, "is missing")])
    return value


def number(query: Mapping[str, str], name: str, default: int) -> int:
    """A number of the query; an empty one counts as absent.

    Raises:
        InvalidArgument: not a number, or negative (FIELD_INVALID).
    """
    text = query.get(name, "")
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise InvalidArgument(f"{name!r} must be a number of at least 0, not {text[:32]!r}.", reason="FIELD_INVALID")
    return int(text)


def time_of(stamp: Timestamp) -> str:
    """ISO 8601 in UTC; the epoch where a time was never set, for the client does arithmetic with it."""
    return stamp.ToJsonString()


def time_or_none(stamp: Timestamp) -> str | None:
    """ISO 8601 in UTC, or None where the time was never set."""
    return stamp.ToJsonString() if stamp.seconds or stamp.nanos else None


def read_time(text: str, *, local: bool = False) -> Timestamp:
    """A time as clients write it: without a zone it is UTC, or with `local` in this machine's zone.

    Raises:
        InvalidArgument: not a time (FIELD_INVALID).
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidArgument(f"{text[:64]!r} is not a time.", reason="FIELD_INVALID") from error
    if moment.tzinfo is None:
        moment = moment.astimezone() if local else moment.replace(tzinfo=UTC)
    stamp = Timestamp()
    try:
        stamp.FromDatetime(moment)
    except (ValueError, OverflowError) as error:
        raise InvalidArgument(f"{text[:64]!r} is not a time that can be kept.", reason="FIELD_INVALID") from error
    return stamp


def read_labels(items: Iterable[Any]) -> dict[str, str]:
    """Labels from `[{"key": …, "value": …}]`."""
    labels = {}
    for item in items:
        if not isinstance(item, dict):
            raise InvalidArgument("Each label must be an object with key and value.", reason="FIELD_INVALID")
        labels[str(required(item, "key"))] = str(member(item, "value", (str, int, float, bool), ""))
    return labels


def labels_of(labels: Mapping[str, str]) -> list[dict[str, str]]:
    """Labels as `[{"key": …, "value": …}]`, by key."""
    return [{"key": key, "value": labels[key]} for key in sorted(labels)]


def resource(
    kind: str,
    name: str,
    uid: str,
    *,
    created: Timestamp | None = None,
    updated: Timestamp | None = None,
    labels: Mapping[str, str] | None = None,
) -> Reply:
    """The members that every resource has."""
    return {
        "uid": uid or name,
        "created_at": time_of(created or Timestamp()),
        "updated_at": time_or_none(updated or Timestamp()),
        "deleted_at": None,
        "name": name,
        "resource_type": kind,
        "labels": labels_of(labels or {}),
    }


def page(items: list[Reply], *, start: int = 0, total: int | None = None) -> Reply:
    """A list reply."""
    return {"start": start, "count": len(items), "total": len(items) if total is None else total, "items": items}


def last(name: str) -> str:
    """The last id of a resource name: `1` of `modelRepositories/iris/models/1`."""
    return name.rsplit("/", 1)[-1]
