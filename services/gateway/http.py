"""The HTTP front: everything on the public port that is neither a prediction nor gRPC.

`/v1/…` is the API (`transcoder`), `/api/…` and `/ws/…` are BentoML's wire protocol (`bentocloud`), and a few pages are
for people. It listens for Envoy, which terminates the network; no prediction passes here.
"""

import asyncio
import contextlib
import inspect
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from aiohttp import ClientPayloadError, web
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry import trace
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, Counter, Histogram

from ekiben.errors import EkibenError, NotFound
from services.gateway.bentocloud.api import Api
from services.gateway.bentocloud.routes import routes
from services.gateway.bentocloud.uploads import BLOBS_SESSION, STORE_SESSION, blobs_session, store_session
from services.gateway.openapi import document
from services.gateway.pages import Pages
from services.gateway.responses import (
    LARGEST_BODY_BYTES,
    Refusal,
    peer,
    problem_response,
    request_id,
    short_error,
)
from services.gateway.settings import Settings
from services.gateway.transcoder import Transcoder
from services.kernel import telemetry
from services.kernel.identity import token_of
from services.kernel.peers import Peers, with_no_call, with_token

log = logging.getLogger("services.access")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Readiness = Callable[[], Awaitable[Mapping[str, str]]]
Metrics = Callable[[], bytes | Awaitable[bytes]]

_COMPONENTS = ("registry", "builder", "deployer", "recorder")
_HEALTH_TIMEOUT_S = 3.0
_REST_BYTES, _REST_S = 64 << 20, 10.0
# Asked every second or so by supervisors and scrapers; nobody wants to read about it.
_UNOBSERVED = frozenset({"/readyz", "/livez", "/healthz", "/metrics"})

RUNNER: Mapping[str, Any] = {"handler_cancellation": True, "shutdown_timeout": 2.0}
"""Options of aiohttp's runner that the application counts on: a client that leaves cancels its request."""

_requests = Counter("ekiben_http_requests_total", "HTTP requests answered by the gateway.", ["surface", "code"])
_durations = Histogram("ekiben_http_request_duration_seconds", "Time until the whole answer was sent.", ["surface"])


def build_http_app(settings: Settings, peers: Peers, *, metrics: Metrics, readiness: Readiness) -> web.Application:
    """The application. Serve it with `RUNNER`.

    Args:
        settings: of the gateway.
        peers: the other services; each request's calls carry its own token.
        metrics: everything that `/metrics` shows, in Prometheus' text format.
        readiness: for each of the gateway's own parts why it is not ready, empty for one that is.
    """
    app = web.Application(middlewares=[_observed, _answered], client_max_size=LARGEST_BODY_BYTES)
    front = _Front(peers, metrics, readiness)
    app.router.add_routes(front.routes())
    app.router.add_routes(Pages(peers).routes())
    api = Api(peers, blobs=settings.blobs or peers.blobs, upload_strategy=settings.upload_strategy)
    app.router.add_routes(routes(api))
    app.router.add_route("*", "/v1/{rest:.*}", Transcoder(peers).handle)

    async def session(app: web.Application) -> AsyncIterator[None]:
        async with blobs_session(api.blobs) as app[BLOBS_SESSION], store_session() as app[STORE_SESSION]:
            yield

    app.cleanup_ctx.append(session)
    return app


class _Front:
    """What machines ask of the whole: is it alive, is it ready, how is it doing, what can it do."""

    def __init__(self, peers: Peers, metrics: Metrics, readiness: Readiness) -> None:
        self._peers = peers
        self._metrics = metrics
        self._readiness = readiness
        self._document = b""

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/livez", self.livez),
            web.get("/healthz", self.livez),
            web.get("/readyz", self.readyz),
            web.get("/metrics", self.metrics),
            web.get("/openapi.json", self.openapi),
        ]

    async def livez(self, request: web.Request) -> web.Response:
        """This process answers."""
        return web.json_response({"status": "alive"})

    async def readyz(self, request: web.Request) -> web.Response:
        """200 once every part is ready; else 503 with what each part that is not says."""
        with with_no_call():
            own = await self._readiness()
            reasons = await asyncio.gather(*(self._peer(name) for name in _COMPONENTS))
        parts = {**own, **dict(zip(_COMPONENTS, reasons, strict=True))}
        ready = not any(parts.values())
        components = {name: reason or "ready" for name, reason in parts.items()}
        return web.json_response({"ready": ready, "components": components}, status=200 if ready else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        """All metrics of the suite that this gateway can reach."""
        found = self._metrics()
        body = await found if inspect.isawaitable(found) else found
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def openapi(self, request: web.Request) -> web.Response:
        """The API's description for programs; made when first asked for."""
        if not self._document:
            described = await asyncio.to_thread(document)
            self._document = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
        return web.Response(body=self._document, content_type="application/json")

    async def _peer(self, name: str) -> str:
        try:
            stub = health_pb2_grpc.HealthStub(getattr(self._peers, name))
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=_HEALTH_TIMEOUT_S)
        except NotFound:
            return "It does not run here."
        except EkibenError as error:
            return f"It does not answer: {error.message}"
        return "" if answer.status == health_pb2.HealthCheckResponse.SERVING else "It is not ready."


@web.middleware
async def _observed(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A server span that continues the caller's trace, an access line and metrics, for each request."""
    if request.path in _UNOBSERVED:
        return await handler(request)
    surface, started, status = _surface(request.path), time.monotonic(), 499
    headers = {key.lower(): value for key, value in request.headers.items()}
    with (
        telemetry.component("gateway"),
        telemetry.tracer().start_as_current_span(
            f"{request.method} {_operation(request)}",
            context=telemetry.context_of(headers),
            kind=trace.SpanKind.SERVER,
            attributes={
                "http.request.method": request.method,
                "url.path": request.path,
                "client.address": peer(request),
                "ekiben.request_id": request_id(request),
            },
        ) as span,
    ):
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            duration_s = time.monotonic() - started
            span.set_attribute("http.response.status_code", status)
            if status >= 500:
                telemetry.fail_span(span, str(status))
            _requests.labels(surface, str(status)).inc()
            _durations.labels(surface).observe(duration_s)
            _log(request, status, duration_s)


@web.middleware
async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Calls of the handler carry the caller's token, and what it raises becomes an answer."""
    with with_token(token_of(request.headers)):
        try:
            response = await handler(request)
        except web.HTTPNotFound:
            unknown = NotFound(
                f"There is nothing at {request.path!r}; see /docs.", reason="PATH_UNKNOWN", path=request.path
            )
            response = _error(request, unknown)
        except web.HTTPMethodNotAllowed as error:
            allowed = ", ".join(sorted(error.allowed_methods))
            detail = f"{request.method} is not allowed here; {allowed} is."
            response = _error(request, Refusal(405, "METHOD_NOT_ALLOWED", detail, {"Allow": allowed}))
        except Exception as error:
            response = _error(request, error)
    if not response.prepared:
        await _take_rest(request)
        response.headers.setdefault("X-Request-Id", request_id(request))
        response.headers["Server"] = "ekiben"
        if _surface(request.path) != "pages" or request.path == "/api_tokens":
            # Answers hold tokens, codes and signed URLs, and some requests for them no credential in their headers,
            # from which a proxy would know to keep nothing.
            response.headers.setdefault("Cache-Control", "no-store")
    return response


async def _take_rest(request: web.Request) -> None:
    """Read away what the caller still sends, up to a bound: an answer before the end of the request would reach it as
    a connection that is reset, without the words."""
    with contextlib.suppress(TimeoutError, ClientPayloadError, ConnectionError):
        async with asyncio.timeout(_REST_S):
            taken = 0
            while taken < _REST_BYTES and (chunk := await request.content.readany()):
                taken += len(chunk)


def _error(request: web.Request, error: Exception) -> web.Response:
    if request.path.startswith(("/api/", "/ws/")):
        return short_error(request, error)
    return problem_response(request, error)


def _surface(path: str) -> str:
    if path.startswith("/v1/"):
        return "api"
    return "bentocloud" if path.startswith(("/api/", "/ws/")) else "pages"


def _operation(request: web.Request) -> str:
    """What was asked for without its ids, so that spans of one kind share a name; the transcoder knows better."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unknown"


def _log(request: web.Request, status: int, duration_s: float) -> None:
    extra: dict[str, Any] = {
        "method": request.method,
        "path": request.path,
        "code": status,
        "duration_s": duration_s,
        "peer": peer(request),
        "request_id": request_id(request),
    }
    log.info("request", extra=extra)
