"""URLs that carry their own permission: one method on one path until a time, signed with HMAC-SHA256.

They let a client of any kind move bytes without a token in sight of proxies and logs, and say nothing but
what is in them. A HEAD counts as a GET.
"""

import base64
import hashlib
import hmac
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from urllib.parse import urlencode

from ekiben.errors import PermissionDenied


class Signer:
    """Signs with one key; of several that a callable gives, with the first, and believes all: a rotation of keys ends
    no upload."""

    def __init__(self, keys: bytes | Callable[[], Sequence[bytes]]) -> None:
        self._keys = (lambda: (keys,)) if isinstance(keys, bytes) else keys

    def sign(self, method: str, path: str, expire_time: datetime) -> str:
        """Path and query that allow `method` on `path` until then, to the second."""
        expires = int(expire_time.timestamp())
        signature = _signature(self._keys()[0], method, path, expires)
        return f"{path}?{urlencode({'expires': expires, 'signature': signature})}"

    def check(self, method: str, path: str, expires: str, signature: str, now: datetime) -> None:
        """Pass when `method` on `path` is allowed now.

        Raises:
            PermissionDenied: SIGNATURE_INVALID, or URL_EXPIRED.
        """
        seconds = int(expires) if expires.isascii() and expires.isdigit() and len(expires) <= 12 else 0
        sent, signed = signature.encode("utf-8", "replace"), "GET" if method == "HEAD" else method
        fits = [hmac.compare_digest(_signature(key, signed, path, seconds).encode(), sent) for key in self._keys()]
        if not any(fits):
            raise PermissionDenied(
                "The URL's signature does not fit. Ask the registry to sign a new one.", reason="SIGNATURE_INVALID"
            )
        if seconds <= now.timestamp():
            expired = datetime.fromtimestamp(seconds, UTC).isoformat()
            raise PermissionDenied(
                f"The URL expired at {expired}. Ask the registry to sign a new one.",
                reason="URL_EXPIRED",
                expire_time=expired,
            )


def _signature(key: bytes, method: str, path: str, expires: int) -> str:
    mac = hmac.digest(key, f"{method}\n{path}\n{expires}".encode(), hashlib.sha256)
    return base64.urlsafe_b64encode(mac).decode().rstrip("=")
