"""Around each request of a container engine: a span, a line, metrics, and errors as the specification has them."""

import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.hdrs import METH_ALL
from opentelemetry.trace import SpanKind
from prometheus_client import Histogram

from ekiben.errors import DataLoss, EkibenError, NotFound, PermissionDenied, Unauthenticated
from services.builder.access import peer
from services.kernel import telemetry
from services.kernel.identity import Principal
from services.kernel.problems import http_status

log = logging.getLogger(__name__)

PRINCIPAL: web.RequestKey[Principal] = web.RequestKey("principal", Principal)
"""Who sent the request, once that is known."""
_handling = Histogram(
    "ekiben_image_request_duration_seconds",
    "Time to serve one request of a container engine.",
    ["method", "kind", "status"],
    buckets=(0.005, 0.025, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800),
)


class Refusal(Exception):
    """What the specification has a code for."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def as_json(value: Any, status: int = 200) -> web.Response:
    """An answer in JSON."""
    return web.Response(status=status, body=json.dumps(value).encode(), content_type="application/json")


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def _left(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A client that leaves in the middle of a blob is no error of the server's, and the end of its connection."""
    try:
        return await handler(request)
    except ConnectionError:
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=499)


@web.middleware
async def _observed(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A span, a line and metrics for each request; none holds the credentials."""
    started, status = time.monotonic(), 499
    kind = next((each for each in ("manifests", "blobs", "tags", "referrers") if f"/{each}/" in request.path), "other")
    attributes = {"http.request.method": request.method, "url.path": request.path}
    with (
        telemetry.component("builder"),
        telemetry.tracer().start_as_current_span(
            f"{request.method} /v2 {kind}",
            context=telemetry.context_of(request.headers),
            kind=SpanKind.SERVER,
            attributes=attributes,
        ) as span,
    ):
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            span.set_attribute("http.response.status_code", status)
            duration_s = time.monotonic() - started
            method = request.method if request.method in METH_ALL else "OTHER"  # Else anybody could make up labels.
            _handling.labels(method, kind, str(status)).observe(duration_s)
            principal = request.get(PRINCIPAL)
            extra = {"method": request.method, "path": request.path, "status": status, "peer": peer(request)}
            log.info(
                "image asked for",
                extra={**extra, "duration_s": duration_s, "user": principal.user if principal else "-"},
            )


@web.middleware
async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What is raised becomes the specification's JSON."""
    headers = {}
    try:
        response = await handler(request)
    except Refusal as exc:
        response = _error(exc.status, exc.code, str(exc))
        if exc.status == 405:
            response.headers["Allow"] = "GET, HEAD"
    except web.HTTPException as exc:
        if exc.status != 404:
            raise
        response = _error(404, "NAME_UNKNOWN", f"There is nothing at {request.path[:200]!r}.")
    except EkibenError as exc:
        status = http_status(exc)
        if isinstance(exc, Unauthenticated):
            headers["WWW-Authenticate"] = 'Basic realm="ekiben"'
        if exc.retry_after_s is not None or status == 503:
            headers["Retry-After"] = str(max(1, int(exc.retry_after_s or 1)))
        if isinstance(exc, DataLoss):
            log.error("an image cannot be served", extra={"path": request.path, "cause": exc.message})
        response = _error(status, _code(exc), exc.message)
    except (ConnectionError, OSError) as exc:
        if isinstance(exc, ConnectionError):
            raise
        log.exception("an image cannot be read", extra={"path": request.path})
        response = _error(503, "UNAVAILABLE", "The image cannot be read now; ask again.")
    response.headers.update(headers)
    if not response.prepared:
        response.headers["Docker-Distribution-Api-Version"] = "registry/2.0"
        response.headers["Server"] = "ekiben"
        response.headers.setdefault("Cache-Control", "no-store")
        if request.body_exists and not request.content.at_eof():
            response.force_close()  # The rest of a push that nobody wants is not worth reading.
    return response


def _code(error: EkibenError) -> str:
    if isinstance(error, Unauthenticated):
        return "UNAUTHORIZED"
    if isinstance(error, PermissionDenied):
        return "DENIED"
    if isinstance(error, NotFound):
        return "BLOB_UNKNOWN" if error.reason == "BLOB_NOT_FOUND" else "MANIFEST_UNKNOWN"
    return "UNKNOWN" if isinstance(error, DataLoss) else "UNAVAILABLE"


def _error(status: int, code: str, message: str) -> web.Response:
    return as_json({"errors": [{"code": code, "message": message}]}, status)


MIDDLEWARES = (_left, _observed, _answered)
"""In this order, before what finds out who asks."""
