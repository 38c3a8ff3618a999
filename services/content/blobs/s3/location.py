"""Where blobs lie on S3, as a URL says it.

    s3://bucket/prefix?endpoint=…&public_endpoint=…&region=…&path_style=true&part_size=16MiB

All of the query is optional. Credentials are not in it: URLs are shown and logged, so botocore looks for them where it
always does (environment, files of profiles, web identity, the machine's own role).
"""

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from ekiben.errors import InvalidArgument

FORM = "s3://bucket/prefix?endpoint=…&public_endpoint=…&region=…&path_style=true&part_size=16MiB"
MIN_PART_BYTES = 5 << 20
"""S3's: of each part but the last."""
MAX_PART_BYTES = 5 << 30
"""S3's: of a part, and of what one PUT brings."""
DEFAULT_PART_BYTES = 16 << 20
"""Throughput hardly differs from 16 to 64 MiB, and each transfer holds a few parts in memory."""
_BUCKET = re.compile(r"[A-Za-z0-9][-._A-Za-z0-9]{1,253}[A-Za-z0-9]")
_SIZE = re.compile(r"(\d{1,6})(MiB|GiB)")
_KNOWN = {"endpoint", "public_endpoint", "region", "path_style", "part_size"}


@dataclass(frozen=True, slots=True)
class Location:
    """A place in a bucket."""

    bucket: str
    prefix: str = ""
    """In front of every key; empty or with a slash at its end."""
    endpoint: str | None = None
    """URL of the server; None is AWS."""
    public_endpoint: str | None = None
    """URL of the same server as clients see it, for what is signed for them; None is `endpoint`."""
    region: str | None = None
    """None is botocore's own (`AWS_REGION`, the profile), or us-east-1."""
    path_style: bool = False
    """`endpoint/bucket/key` rather than `bucket.endpoint/key`."""
    part_bytes: int = DEFAULT_PART_BYTES

    @classmethod
    def parse(cls, url: str) -> "Location":
        """Read a URL. Raises InvalidArgument (BLOBS_URL_INVALID), without what might be a secret."""
        parts = urlsplit(url)
        try:
            secret = parts.username is not None or parts.password is not None
            port = parts.port
        except ValueError:
            secret, port = False, 0
        if secret:
            raise _invalid(
                "it holds credentials, which would be logged. Take them out and set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            )
        bucket = parts.netloc
        if port is not None or _BUCKET.fullmatch(bucket) is None:
            raise _invalid(f"{bucket[:80]!r} is no name of a bucket")
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        if unknown := sorted(set(options) - _KNOWN):
            # The names only: a value may be a key.
            raise _invalid(f"it has the unknown option {unknown[0][:40]!r}")
        prefix = unquote(parts.path).strip("/")
        if any(segment in ("", ".", "..") for segment in prefix.split("/")) and prefix:
            raise _invalid(f"the prefix {prefix[:80]!r} has an empty segment or one of dots")
        return cls(
            bucket=bucket,
            prefix=f"{prefix}/" if prefix else "",
            endpoint=_endpoint(options, "endpoint"),
            public_endpoint=_endpoint(options, "public_endpoint"),
            region=options.get("region") or None,
            path_style=_truth(options.get("path_style", "false")),
            part_bytes=_size(options.get("part_size", "")),
        )


def _endpoint(options: dict[str, str], name: str) -> str | None:
    text = options.get(name, "")
    if not text:
        return None
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.path.strip("/"):
        raise _invalid(f"its {name} is not of the form https://host:port")
    return text.rstrip("/")


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise _invalid(f"its path_style is {text[:20]!r}, neither true nor false")
    return text.lower() == "true"


def _size(text: str) -> int:
    if not text:
        return DEFAULT_PART_BYTES
    match = _SIZE.fullmatch(text)
    size = int(match[1]) << (20 if match[2] == "MiB" else 30) if match else 0
    if not MIN_PART_BYTES <= size <= MAX_PART_BYTES:
        raise _invalid(f"its part_size is {text[:20]!r}, not from 5MiB to 5GiB")
    return size


def _invalid(why: str) -> InvalidArgument:
    return InvalidArgument(
        f"The blobs' URL is refused: {why}. Its form is {FORM}.", reason="BLOBS_URL_INVALID", cause=why
    )
