"""Pages of a list: sizes clamped, tokens opaque and bound to the request that they came from (AIP-158).

size = pages.page_size(request.page_size)
after = pages.decode(request, datetime, str)        # None on the first page
...
next_page_token = pages.encode(request, last.create_time, last.name) if more else ""
"""

import base64
import binascii
import hashlib
import json
from datetime import datetime
from typing import Any, TypeVar, overload

from google.protobuf.message import Message

from ekiben.errors import InvalidArgument

First = TypeVar("First", int, str, datetime)
Second = TypeVar("Second", int, str, datetime)

DEFAULT_SIZE, MAX_SIZE = 50, 1000
_SUM_BYTES = 12


def page_size(sent: int) -> int:
    """How many to return: 0 means 50, more than 1,000 is taken as 1,000.

    Raises:
        InvalidArgument: negative (PAGE_SIZE_INVALID).
    """
    if sent < 0:
        raise InvalidArgument(
            "page_size must not be negative.",
            reason="PAGE_SIZE_INVALID",
            violations=[("page_size", "must not be negative")],
            page_size=sent,
        )
    return min(sent or DEFAULT_SIZE, MAX_SIZE)


def encode(request: Message, *position: int | str | datetime) -> str:
    """A token for the page after `position`: the values of the fields that the list is ordered by."""
    body = json.dumps(position, separators=(",", ":"), default=datetime.isoformat).encode()
    return base64.urlsafe_b64encode(_sum(request, body) + body).decode().rstrip("=")


@overload
def decode(request: Message, first: type[First], /) -> tuple[First] | None: ...
@overload
def decode(request: Message, first: type[First], second: type[Second], /) -> tuple[First, Second] | None: ...
def decode(request: Message, *kinds: type[Any]) -> tuple[Any, ...] | None:
    """The position in `request.page_token`, a value of each of the `kinds`; None when the token is empty.

    Raises:
        InvalidArgument: not a token of this list with these arguments (PAGE_TOKEN_INVALID).
    """
    token: str = getattr(request, "page_token", "")
    if not token:
        return None
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        body = raw[_SUM_BYTES:]
        # The sum binds the token to the other arguments. It is no signature: whoever knows how may make one up, gets
        # a page from another place of the same list by it, and nothing that is not a value of the kind.
        if raw[:_SUM_BYTES] == _sum(request, body):
            values = json.loads(body)
            return tuple(_value(value, kind) for value, kind in zip(values, kinds, strict=True))
    except (binascii.Error, ValueError, TypeError, RecursionError):
        pass
    raise InvalidArgument(
        "page_token is not a token of this list with these arguments; begin again without one.",
        reason="PAGE_TOKEN_INVALID",
        violations=[("page_token", "must be the next_page_token of the page before")],
    )


def _value(value: Any, kind: type[Any]) -> Any:
    """A value of a position. Raises ValueError, or TypeError, for one that no database compares with."""
    if kind is datetime:
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise ValueError("without a time zone")
        return moment
    if type(value) is not kind:
        raise ValueError("of another kind")
    if kind is int and not -(1 << 63) <= value < 1 << 63:
        raise ValueError("more than 64 bits")
    if kind is str and b"\0" in value.encode():  # lone surrogates do not encode
        raise ValueError("holds NUL")
    return value


def _sum(request: Message, body: bytes) -> bytes:
    bound = type(request)()
    bound.CopyFrom(request)
    for free in ("page_token", "page_size"):
        if free in bound.DESCRIPTOR.fields_by_name:
            bound.ClearField(free)
    digest = hashlib.sha256(bound.DESCRIPTOR.full_name.encode())
    digest.update(bound.SerializeToString(deterministic=True))
    digest.update(b"\0" + body)
    return digest.digest()[:_SUM_BYTES]
