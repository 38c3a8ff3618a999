"""Pages of a list: sizes clamped, tokens opaque and bound to the request that they came from (AIP-158).

size = pages.page_size(request.page_size)
after = pages.decode(request)                       # None on the first page
...
next_page_token = pages.encode(request, [last.create_time_us, last.name]) if more else ""
"""

import base64
import binascii
import hashlib
import json
from typing import Any

from google.protobuf.message import Message

from ekiben.errors import InvalidArgument

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


def encode(request: Message, position: Any) -> str:
    """A token for the page after `position`: any JSON value, enough to find the place again."""
    body = json.dumps(position, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(_sum(request, body) + body).decode().rstrip("=")


def decode(request: Message) -> Any:
    """The position in `request.page_token`, None when that is empty.

    Raises:
        InvalidArgument: not a token of this list with these arguments (PAGE_TOKEN_INVALID).
    """
    token: str = getattr(request, "page_token", "")
    if not token:
        return None
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        body = raw[_SUM_BYTES:]
        # The sum holds the other arguments, and so also shows that the position is one that we wrote.
        if raw[:_SUM_BYTES] == _sum(request, body):
            return json.loads(body)
    except (binascii.Error, ValueError):
        pass
    raise InvalidArgument(
        "page_token is not a token of this list with these arguments; begin again without one.",
        reason="PAGE_TOKEN_INVALID",
        violations=[("page_token", "must be the next_page_token of the page before")],
    )


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
