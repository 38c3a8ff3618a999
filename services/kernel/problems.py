"""Errors as RFC 9457 problems: the one mapping from our classes to HTTP.

status, headers, problem = problem_of(error, request_id=request_id)
return web.Response(status=status, headers=headers, body=json.dumps(problem))
"""

import math
import uuid
from typing import Any

import grpc

from ekiben.channel import from_rpc_error
from ekiben.errors import EkibenError, Internal

CONTENT_TYPE = "application/problem+json"
DOCS = "https://ekiben.dev/docs"

_STATUS = {
    "INVALID_ARGUMENT": (400, "The request is wrong"),
    "FAILED_PRECONDITION": (400, "The state does not allow it"),
    "UNAUTHENTICATED": (401, "Not authenticated"),
    "PERMISSION_DENIED": (403, "Not permitted"),
    "NOT_FOUND": (404, "Not found"),
    "ALREADY_EXISTS": (409, "Already exists"),
    "ABORTED": (409, "Changed by another"),
    "RESOURCE_EXHAUSTED": (429, "Exhausted"),
    "CANCELLED": (499, "Cancelled"),
    "UNIMPLEMENTED": (501, "Not offered"),
    "UNAVAILABLE": (503, "Unavailable"),
    "DEADLINE_EXCEEDED": (504, "Out of time"),
    "DATA_LOSS": (500, "Data are damaged"),
    "INTERNAL": (500, "Internal error"),
}


_STATUS_OF_REASON = {
    "STORAGE_FULL": (507, "The disk is full"),
    "DISK_FULL": (507, "The disk is full"),
    "LENGTH_REQUIRED": (411, "The length is missing"),
    "ENCODING_UNSUPPORTED": (415, "The encoding is not supported"),
}
"""Reasons for which HTTP has a status of its own: 429 would tell a client that it asks too often."""


def http_status(error: EkibenError) -> int:
    """The HTTP status of an error."""
    return _status_and_title(error)[0]


def _status_and_title(error: EkibenError) -> tuple[int, str]:
    return _STATUS_OF_REASON.get(error.reason) or _STATUS.get(error.code_name, _STATUS["INTERNAL"])


def problem_of(
    error: BaseException, *, request_id: str = "", inference: bool = False
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers (its content type too) and members of the problem for `error`.

    Anything that is neither ours nor gRPC's is an internal error: its text stays inside.

    Args:
        request_id: of the HTTP request, for `instance`; the error's own goes first.
        inference: also set `error`, which the Open Inference Protocol asks for.
    """
    if isinstance(error, grpc.RpcError):
        error = from_rpc_error(error)
    if not isinstance(error, EkibenError):
        error = Internal("Something went wrong in the server; its log tells more.", reason="INTERNAL")
    status, title = _status_and_title(error)
    problem: dict[str, Any] = {
        "type": f"{DOCS}/errors#{error.reason.lower().replace('_', '-')}",
        "title": title,
        "status": status,
        "detail": error.message,
        "code": error.code_name,
        "reason": error.reason,
    }
    request_id = error.request_id or request_id
    if request_id:
        problem["instance"] = _instance(request_id)
    if error.metadata:
        problem["metadata"] = dict(error.metadata)
    if error.violations:
        problem["violations"] = [{"field": field, "description": text} for field, text in error.violations]
    if inference:
        problem["error"] = error.message
    headers = {"Content-Type": CONTENT_TYPE}
    if request_id:
        headers["X-Request-Id"] = request_id
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="ekiben"'
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return status, headers, problem


def _instance(request_id: str) -> str:
    try:
        return f"urn:uuid:{uuid.UUID(request_id)}"
    except ValueError:
        return f"urn:ekiben:request:{request_id}"
