"""Where the platform is: one address for gRPC, HTTP and bytes."""

import os
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit

from ekiben.errors import InvalidArgument

DEFAULT_ENDPOINT = "http://127.0.0.1:7400"
"""Where `ekiben up` listens unless told otherwise."""
UNIX = "http+unix:"
"""Scheme of URLs whose host is the path of a Unix socket, quoted."""


@dataclass(frozen=True)
class Endpoint:
    """A parsed endpoint: `http(s)://host[:port]`, `host:port`, or `unix:/path` (gRPC only)."""

    target: str
    """The gRPC target: `host:port` or `unix:/path`."""
    tls: bool
    """Whether both gRPC and HTTP are spoken over TLS."""

    @classmethod
    def parse(cls, text: str) -> "Endpoint":
        """Read an endpoint as people write it; a bare host gets the port of its scheme.

        Raises:
            InvalidArgument: not an endpoint (ENDPOINT_INVALID).
        """
        text = text.strip()
        if text.startswith("unix:"):
            return cls(text, tls=False)
        parts = urlsplit(text if "//" in text else f"http://{text}")
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if parts.scheme not in ("http", "https") or not host:
            raise InvalidArgument(
                f"{text!r} is not an endpoint. Write http://HOST:PORT or https://HOST.",
                reason="ENDPOINT_INVALID",
                endpoint=text,
            )
        tls = parts.scheme == "https"
        shown = f"[{host}]" if ":" in host else host
        return cls(f"{shown}:{port or (443 if tls else 80)}", tls=tls)

    @property
    def url(self) -> str:
        """The root URL of the public port, without a slash at its end."""
        return f"{'https' if self.tls else 'http'}://{self.target}"

    @property
    def loopback(self) -> bool:
        """True where the server is on this machine, so that sending bytes costs no more than reading them."""
        host = self.target.rpartition(":")[0].strip("[]")
        return self.target.startswith("unix:") or host in ("localhost", "::1") or host.startswith("127.")

    def is_near(self, url: str) -> bool:
        """True where a URL that is whole leads to the registry of this machine."""
        return self.loopback and url.startswith((UNIX, self.url))

    def resolve(self, url: str) -> str:
        """A signed URL made whole: a path is appended to the public address, a whole URL stays as it is."""
        return urljoin(self.url + "/", url)

    def shortcut(self, url: str, socket_path: str) -> str:
        """`url` at a Unix socket of this machine, as `http+unix:`; empty where we cannot open that."""
        if not socket_path or not self.loopback or not os.access(socket_path, os.W_OK):
            return ""
        return f"{UNIX}//{quote(socket_path, safe='')}{url}"
