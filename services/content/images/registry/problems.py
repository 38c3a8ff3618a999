"""What a registry's answers mean, as errors of ours that say what to do next.

Source: OCI distribution-spec 1.1, "Error Codes".
"""

import asyncio
import datetime
import email.utils
import json
import re
from typing import Any

import aiohttp

from ekiben.errors import (
    EkibenError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from services.content.digest import Digest
from services.content.images.resolving import MAX_MANIFEST_BYTES

TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NUMBER = re.compile(r"[0-9]{1,18}")
_MAX_ERROR_BYTES = 64 << 10
_NEXT: Any = "next"
_LONGEST_RETRY_AFTER_S = 120.0


class Broken(Exception):
    """A request that may be made again: the connection broke, or the server was busy or went wrong."""

    def __init__(self, why: str, retry_after_s: float | None = None, *, busy: bool = False) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s
        self.busy = busy

    def error(self, host: str, what: str) -> EkibenError:
        """What it is when it was tried often enough."""
        if self.busy:
            return ResourceExhausted(
                f"{host} is asked too often and refuses to {what}: {self}. Try again later, or log in: known users "
                "may ask more.",
                reason="REGISTRY_BUSY",
                retry_after_s=self.retry_after_s,
                host=host,
            )
        return Unavailable(
            f"{host} does not {what}: {self}. Check that the registry runs and can be reached, then try again.",
            reason="REGISTRY_UNAVAILABLE",
            retry_after_s=self.retry_after_s,
            host=host,
        )


class Answer:
    """An answer: taken, or not wanted and then with its words."""

    def __init__(self, response: aiohttp.ClientResponse, body: bytes) -> None:
        self.status = response.status
        self.headers = response.headers
        self.content_type = response.content_type
        self._response = response
        self.body = body
        self.errors = _errors(body) if self.status >= 400 else []
        """Code, message and detail of each."""

    @classmethod
    async def of(cls, response: aiohttp.ClientResponse) -> "Answer":
        """One that is not wanted: what there is of it."""
        try:
            body = await response.content.read(_MAX_ERROR_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError):
            body = b""
        return cls(response, body)

    @classmethod
    async def whole(cls, response: aiohttp.ClientResponse, within_s: float) -> "Answer":
        """One that must fit into memory, and come within a time. Raises Broken, or InvalidArgument (MANIFEST_INVALID)
        when it does not fit."""
        body = bytearray()
        try:
            async with asyncio.timeout(within_s) as deadline:
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > MAX_MANIFEST_BYTES:
                        raise InvalidArgument(
                            f"{response.url.host} sent a manifest or a list of more than 4 MiB.",
                            reason="MANIFEST_INVALID",
                        )
        except TimeoutError as exc:
            if deadline.expired():
                raise Broken(f"the answer was not whole after {within_s:g} s, only {len(body)} bytes") from exc
            raise Broken("the answer broke off (TimeoutError)") from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise Broken(f"the answer broke off ({type(exc).__name__})") from exc
        return cls(response, bytes(body))

    @property
    def following(self) -> object | None:
        """The address of the next page of a list. Raises InvalidArgument (MANIFEST_INVALID) where it is none."""
        try:
            links = self._response.links
        except ValueError as exc:
            raise InvalidArgument(
                f"{self._response.url.host} sent a list whose next page has no address: {exc}. A part is no list.",
                reason="MANIFEST_INVALID",
            ) from exc
        return links[_NEXT].get("url") if _NEXT in links else None

    @property
    def codes(self) -> set[str]:
        """The specification's codes in it."""
        return {code for code, _, _ in self.errors}

    def digests(self) -> list[Digest]:
        """Every digest that is named in it."""
        return sorted({Digest.parse(each) for part in self.errors for each in _DIGEST.findall(" ".join(part))})

    def __str__(self) -> str:
        said = "; ".join(": ".join(each for each in (code, message) if each) for code, message, _ in self.errors)
        return f"{said[:300]} ({self.status})" if said else f"status {self.status}"

    def transient(self) -> Broken:
        """It as something to try again."""
        return Broken(str(self), retry_after(self.headers), busy=self.status == 429)

    def error(self, host: str, repository: str, what: str) -> EkibenError:
        """It as an error that stands."""
        if self.status == 401:
            return login_needed(host, repository, str(self))
        if self.status == 403:
            return PermissionDenied(
                f"{host} does not let this login {what}: {self}. Ask its administrator for the right, or log in as "
                f"somebody else (docker login {host}).",
                reason="REGISTRY_REFUSED",
                host=host,
            )
        if self.status == 404:
            return NotFound(
                f"{host} has no repository {repository} to {what}: {self}. Check the name; some registries want "
                "repositories to be made first.",
                reason="REPOSITORY_NOT_FOUND",
                host=host,
                repository=repository,
            )
        if self.status in (507, 413) or "QUOTA" in str(self).upper():
            return ResourceExhausted(
                f"{host} has no room to {what}: {self}. Remove images there, or ask for a larger quota.",
                reason="REGISTRY_FULL",
                host=host,
            )
        return FailedPrecondition(
            f"{host} refuses to {what}: {self}.", reason="REGISTRY_REFUSED", host=host, repository=repository
        )


def _errors(body: bytes) -> list[tuple[str, str, str]]:
    found = []
    try:
        for each in json.loads(body)["errors"]:
            detail = each.get("detail")
            text = detail if isinstance(detail, str) else json.dumps(detail) if detail else ""
            found.append((str(each.get("code") or ""), str(each.get("message") or ""), text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = " ".join(body.decode(errors="replace").split())
        return [("", text[:200], "")] if text and not text.startswith("<") else []
    return found


def login_needed(host: str, repository: str, why: str) -> Unauthenticated:
    """The error for a registry that does not know us."""
    return Unauthenticated(
        f"{host} wants a login for {repository}, and none works: {why}. Log in by `docker login {host}` or "
        f"`podman login {host}`, or name the file of logins in REGISTRY_AUTH_FILE.",
        reason="REGISTRY_LOGIN_NEEDED",
        host=host,
        repository=repository,
    )


def number(text: str) -> int | None:
    """A number in a header; None for anything else, and for what is too large to mean something."""
    return int(text) if _NUMBER.fullmatch(text) else None


def retry_after(headers: Any) -> float | None:
    """Seconds that the server asks to wait, not more than two minutes; None where it asks nothing."""
    text = str(headers.get("Retry-After") or "").strip()
    if not text:
        return None
    if (seconds := number(text)) is not None:
        return min(float(seconds), _LONGEST_RETRY_AFTER_S)
    try:
        until = email.utils.parsedate_to_datetime(text) - datetime.datetime.now(datetime.UTC)
    except (ValueError, TypeError):
        return None
    return min(max(until.total_seconds(), 0.0), _LONGEST_RETRY_AFTER_S)
