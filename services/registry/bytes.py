"""The endpoint through which bytes pass: plain HTTP at signed URLs, on a listener of its own.

    PUT  /blobs/uploads/{upload}/{part}?expires=&signature=    one part; 0 is the whole content
    GET  /blobs/content/{digest}?expires=&signature=           a blob, ranges included; HEAD too

A PUT must say its Content-Length, since BentoML's clients do and a store must know the end of a body that breaks
off. `Content-Digest` or `Repr-Digest` with sha-256 (RFC 9530) is checked. Answers are 200 with an ETag, or a
problem (RFC 9457); a full disk is 507. Nothing of a PUT that did not get 200 is kept.
"""

import base64
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager

from aiohttp import web
from opentelemetry.trace import SpanKind
from prometheus_client import Counter, Histogram

from ekiben.errors import EkibenError, InvalidArgument, NotFound
from services.content.blobs import BlobStore
from services.content.digest import Digest
from services.kernel import telemetry
from services.kernel.clock import Clock
from services.kernel.problems import problem_of
from services.kernel.sites import serve_app
from services.registry.bodies import USED_UP, Bodies
from services.registry.sending import Sender, send_blob
from services.registry.signing import Signer
from services.registry.uploads import Uploads

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 20
"""What aiohttp gathers before it stops reading the socket: twice this waits at most for one request."""
_SHA256 = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/=]+):")

_transferred = Counter("ekiben_blob_bytes", "Bytes moved through signed URLs.", ["direction"])
_handling = Histogram(
    "ekiben_blob_request_duration_seconds",
    "Time to serve one signed URL.",
    ["method", "status"],
    buckets=(0.005, 0.025, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800),
)


class Bytes:
    """The handlers."""

    def __init__(self, uploads: Uploads, blobs: BlobStore, signer: Signer, clock: Clock) -> None:
        self._uploads = uploads
        self._blobs = blobs
        self._signer = signer
        self._clock = clock
        self._bodies = Bodies()
        self._sender = Sender()

    def app(self) -> web.Application:
        """The application."""
        app = web.Application(middlewares=[_observed, _answers_problems])
        app.router.add_put(r"/blobs/uploads/{upload:[A-Za-z0-9-]{1,64}}/{part:\d{1,5}}", self.put)
        app.router.add_get("/blobs/content/{digest}", self.get)
        return app

    async def put(self, request: web.Request) -> web.Response:
        """Take one part."""
        self._check(request)
        size_bytes = request.content_length
        if size_bytes is None:
            raise InvalidArgument("The request has no Content-Length: send one.", reason="LENGTH_REQUIRED")
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise InvalidArgument(
                "The body has a Content-Encoding; content is stored as it is sent.", reason="ENCODING_UNSUPPORTED"
            )
        digest = _announced_digest(request)
        async with self._bodies.of(request, size_bytes) as body:
            part = await self._uploads.receive(
                request.match_info["upload"], int(request.match_info["part"]), body, size_bytes, digest
            )
        _transferred.labels("in").inc(part.size_bytes)
        return web.Response(status=200, headers={"ETag": part.etag})

    async def get(self, request: web.Request) -> web.StreamResponse:
        """Give a blob, or a range of it."""
        self._check(request)
        digest = Digest.parse(request.match_info["digest"])
        path = self._blobs.path(digest)
        if path is not None and not path.is_file():
            raise NotFound(f"Blob {digest} does not exist.", reason="BLOB_NOT_FOUND", digest=digest)
        raw = base64.b64encode(bytes.fromhex(digest.hex)).decode()
        headers = {
            "Content-Type": "application/x-tar",
            "Repr-Digest": f"sha-256=:{raw}:",
            # What is named by its digest never changes.
            "Cache-Control": "private, max-age=31536000, immutable",
        }
        if path is None:
            blob = await self._blobs.stat(digest)
            return await send_blob(request, self._blobs, blob, headers, _transferred.labels("out").inc)
        _transferred.labels("out").inc(path.stat().st_size if request.method == "GET" else 0)
        return self._sender.response(path, headers)

    def _check(self, request: web.Request) -> None:
        expires, signature = request.query.get("expires", ""), request.query.get("signature", "")
        self._signer.check(request.method, request.path, expires, signature, self._clock.now())


def _announced_digest(request: web.Request) -> Digest | None:
    for name in ("Content-Digest", "Repr-Digest"):
        if match := _SHA256.search(request.headers.get(name, "")):
            try:
                return Digest.parse(f"sha256:{base64.b64decode(match[1], validate=True).hex()}")
            except ValueError:
                raise InvalidArgument(f"{name} is not readable.", reason="DIGEST_INVALID") from None
    return None


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def _observed(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A span and a line for each request; neither holds the signature."""
    started = time.monotonic()
    with telemetry.component("registry"):
        parent = telemetry.context_of(request.headers)
        name = f"{request.method} /blobs"
        attributes = {"http.request.method": request.method, "url.path": request.path}
        with telemetry.tracer().start_as_current_span(
            name, context=parent, kind=SpanKind.SERVER, attributes=attributes
        ) as span:
            status = 499
            try:
                response = await handler(request)
                status = response.status
                return response
            finally:
                span.set_attribute("http.response.status_code", status)
                seconds = time.monotonic() - started
                _handling.labels(request.method, str(status)).observe(seconds)
                extra = {"method": request.method, "path": request.path, "status": status}
                log.info("bytes moved", extra={**extra, "duration_s": round(seconds, 4)})


@web.middleware
async def _answers_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    request_id = request.headers.get("X-Request-Id", "")
    try:
        response = await handler(request)
        if USED_UP in request:
            response.force_close()
        return response
    except EkibenError as exc:
        status, headers, problem = problem_of(exc, request_id=request_id)
    except (web.HTTPException, ConnectionError):
        raise
    except Exception as exc:
        log.exception("a bug in the bytes endpoint")
        status, headers, problem = problem_of(exc, request_id=request_id)
    response = web.Response(status=status, headers=headers, body=json.dumps(problem).encode())
    if USED_UP in request or (request.body_exists and not request.content.at_eof()):
        # The rest of a body that nobody wants is not worth reading: tell the client, then hang up.
        response.force_close()
    return response


def listen(app: web.Application, address: str) -> AbstractAsyncContextManager[str]:
    """Serve the application at `address` while inside; see `sites.serve_app`."""
    options = {"read_bufsize": _READ_BYTES, "shutdown_timeout": 5.0, "handler_cancellation": True}
    return serve_app(app, address, setting="blobs_listen", **options)
