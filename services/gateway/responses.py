"""What the HTTP front's answers have in common: errors as problem documents, and who asked.

Source: RFC 9457.
"""

import asyncio
import json
import logging
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import grpc
from aiohttp import web

from ekiben.channel import REQUEST_ID_KEY
from ekiben.errors import EkibenError, InvalidArgument
from services.kernel import problems
from services.kernel.identity import token_of

log = logging.getLogger(__name__)

LARGEST_BODY_BYTES = 8 << 20
"""Most bytes of a JSON body."""

_REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
_REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9][-._A-Za-z0-9]{0,63}")


class Refusal(Exception):
    """An error that only HTTP knows: a method, a length or a media type that does not fit."""

    def __init__(self, status: int, reason: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class Problem:
    """A problem document with its status and headers."""

    status: int
    document: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


def problem_of(request: web.Request, error: BaseException) -> Problem:
    """The problem that an error is to the caller. A bug is logged and says nothing but its request id."""
    id_ = request_id(request)
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        size = f"{LARGEST_BODY_BYTES >> 20} MiB"
        error = Refusal(413, "BODY_TOO_LARGE", f"The body is larger than {size}, the most that a request may hold.")
    elif isinstance(error, web.HTTPException):
        error = Refusal(error.status, "HTTP_ERROR", error.text or error.reason, error.headers)
    if isinstance(error, Refusal):
        # HTTP's own refusals have no gRPC code; they are documents like the others all the same.
        wrong = InvalidArgument(str(error), reason=error.reason)
        _, headers, document = problems.problem_of(wrong, request_id=id_)
        document |= {"status": error.status, "title": HTTPStatus(error.status).phrase}
        return Problem(error.status, document, {**headers, **error.headers})
    if not isinstance(error, EkibenError | grpc.RpcError):
        log.error("bug in the HTTP front", exc_info=error, extra={"path": request.path, "request_id": id_})
    status, headers, document = problems.problem_of(error, request_id=id_)
    return Problem(status, document, headers)


def problem_response(request: web.Request, error: BaseException) -> web.Response:
    """The error as a response of the API."""
    if isinstance(error, asyncio.CancelledError):
        raise error
    problem = problem_of(request, error)
    body = json.dumps(problem.document, ensure_ascii=False).encode() + b"\n"
    return web.Response(body=body, status=problem.status, headers=problem.headers)


def short_error(request: web.Request, error: BaseException) -> web.Response:
    """The error for BentoML's client, which shows its user the body as it is: one line of JSON."""
    problem = problem_of(request, error)
    body = json.dumps({"error": problem.document["detail"]}, ensure_ascii=False).encode()
    headers = {**problem.headers, "Content-Type": "application/json"}
    return web.Response(body=body, status=problem.status, headers=headers)


def request_id(request: web.Request) -> str:
    """The id of the request: the one that it brought, else a new one."""
    if _REQUEST_ID not in request:
        given = request.headers.get("X-Request-Id", "")
        request[_REQUEST_ID] = given if _REQUEST_ID_FORM.fullmatch(given) else str(uuid.uuid4())
    return request[_REQUEST_ID]


def call_metadata(request: web.Request) -> tuple[tuple[str, str], ...]:
    """gRPC metadata for calls in the name of who sent the request.

    `authorization` is there, empty, even when the request has no token: without one the channel would add the
    gateway's own, and everybody would be a service.
    """
    token = token_of(request.headers)
    return (
        ("authorization", f"Bearer {token}" if token else ""),
        (REQUEST_ID_KEY, request_id(request)),
        ("x-forwarded-for", peer(request)),
    )


def peer(request: web.Request) -> str:
    """Address of the client, as the data plane in front of us saw it."""
    return request.headers.get("X-Forwarded-For", "").rpartition(",")[2].strip() or request.remote or "unknown"


def public_url(request: web.Request) -> str:
    """Where the client reaches us, without a slash at the end."""
    scheme = request.headers.get("X-Forwarded-Proto", request.scheme)
    return f"{'https' if scheme == 'https' else 'http'}://{request.host}"


def client_left(request: web.Request) -> bool:
    """Whether nobody waits for the response any more."""
    return request.transport is None or request.transport.is_closing()
