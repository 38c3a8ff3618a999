"""OTLP over HTTP, for replicas: `POST /v1/traces` and `POST /v1/logs`, protobuf or JSON, plain, gzip or deflate.

Source: OTLP specification 1.x, "OTLP/HTTP": errors carry a google.rpc.Status in the request's own encoding, and
429, 502, 503 and 504 ask the exporter to try again. A listener of its own, because replicas run code of strangers: it
offers nothing else, and asks for a token that is good for nothing else.
"""

import hmac
import logging
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from aiohttp import web
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from ekiben.errors import Aborted, EkibenError, ResourceExhausted, Unavailable
from services.kernel.identity import token_of
from services.kernel.sites import serve_app
from services.recorder import otlp
from services.recorder.intake import Intake

log = logging.getLogger(__name__)

# Once unpacked. Exporters send at most 512 spans, a few hundred KiB; a gzip bomb is cut off here.
MAX_BODY_BYTES = 8 << 20
# Bodies in memory at once: with more, exporters are asked to come back.
MAX_IN_FLIGHT = 16
_PROTOBUF, _JSON = "application/x-protobuf", "application/json"

_Request = TypeVar("_Request", bound=Message)


class TooLarge(Exception):
    """A body that is longer than MAX_BODY_BYTES once unpacked."""


def unpacked(body: bytes, coding: str) -> bytes:
    """The body without its content coding: `gzip`, `deflate`, or none.

    Here rather than in aiohttp, which logs a traceback for each body that does not unpack.

    Raises:
        TooLarge: more than MAX_BODY_BYTES; no more than that is unpacked.
        ValueError: another coding, or not of that coding.
    """
    if coding in ("", "identity"):
        return body
    if coding not in ("gzip", "deflate"):
        raise ValueError(f"content coding {coding!r} is not known")
    # 32: gzip's or zlib's header, whichever is there; RFC 9110 has zlib's for `deflate`.
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)
    try:
        data = unpacker.decompress(body, MAX_BODY_BYTES + 1)
    except zlib.error as exc:
        raise ValueError(f"it is not {coding}") from exc
    if len(data) > MAX_BODY_BYTES:
        raise TooLarge
    if not unpacker.eof:
        raise ValueError(f"its {coding} ends too early")
    return data


class Receiver:
    """The HTTP application."""

    def __init__(self, intake: Intake, token: str) -> None:
        self._intake = intake
        self._token = token.encode()
        self._in_flight = 0

    def app(self) -> web.Application:
        """The application, to be served on a listener of its own."""
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post("/v1/traces", self._traces)
        app.router.add_post("/v1/logs", self._logs)
        app.router.add_post("/v1/metrics", self._metrics)
        return app

    async def _traces(self, request: web.Request) -> web.Response:
        return await self._receive(request, ExportTraceServiceRequest(), self._intake.traces)

    async def _logs(self, request: web.Request) -> web.Response:
        return await self._receive(request, ExportLogsServiceRequest(), self._intake.logs)

    async def _metrics(self, request: web.Request) -> web.Response:
        # Accepted and let go: an exporter set up for all three signals would otherwise log an error each minute.
        async def drop(_: ExportMetricsServiceRequest) -> ExportMetricsServiceResponse:
            return ExportMetricsServiceResponse()

        return await self._receive(request, ExportMetricsServiceRequest(), drop)

    async def _receive(
        self, request: web.Request, into: _Request, keep: Callable[[_Request], Awaitable[Message]]
    ) -> web.Response:
        content_type = request.content_type
        if not self._admitted(request):
            return _error(content_type, 401, 16, "Send the OTLP token: `authorization: Bearer …`.")
        if content_type not in (_PROTOBUF, _JSON):
            return _error(_PROTOBUF, 415, 3, f"The content type must be {_PROTOBUF} or {_JSON}.")
        if self._in_flight >= MAX_IN_FLIGHT:
            return _error(content_type, 503, 14, "Too many exports at once; try again.", retry_after_s=1)
        self._in_flight += 1
        try:
            body = unpacked(await request.read(), request.headers.get("content-encoding", ""))
            if content_type == _JSON:
                otlp.parse_json(body, into)
            else:
                into.ParseFromString(body)
            return _answer(content_type, 200, await keep(into))
        except (web.HTTPRequestEntityTooLarge, TooLarge):
            return _error(content_type, 413, 3, f"An export holds at most {MAX_BODY_BYTES} bytes once unpacked.")
        except (DecodeError, ValueError) as exc:
            return _error(content_type, 400, 3, f"The body is not an OTLP request: {exc}.")
        except (Aborted, ResourceExhausted, Unavailable) as exc:
            # 503 for a full disk too: exporters in use (Python's among them) do not try again after 429.
            return _error(content_type, 503, exc.code, str(exc), retry_after_s=int(exc.retry_after_s or 1))
        except EkibenError as exc:
            return _error(content_type, 400, exc.code, str(exc))
        finally:
            self._in_flight -= 1

    def _admitted(self, request: web.Request) -> bool:
        return hmac.compare_digest(token_of(request.headers).encode(), self._token)


@asynccontextmanager
async def listen(receiver: Receiver, address: str) -> AsyncIterator[str]:
    """Serve at `address` while inside; see `sites.serve_app`."""
    # An exporter whose answer is cut off sends again: no need to wait for it at shutdown.
    options = {"auto_decompress": False, "shutdown_timeout": 2}
    async with serve_app(receiver.app(), address, setting="otlp_http_listen", **options) as where:
        log.info("OTLP over HTTP is served", extra={"address": where})
        yield where


def _answer(content_type: str, status: int, message: Message) -> web.Response:
    if content_type == _JSON:
        return web.Response(status=status, text=json_format.MessageToJson(message), content_type=_JSON)
    return web.Response(status=status, body=message.SerializeToString(), content_type=_PROTOBUF)


def _error(content_type: str, status: int, code: int, text: str, *, retry_after_s: int = 0) -> web.Response:
    response = _answer(content_type, status, status_pb2.Status(code=code, message=text))
    if retry_after_s:
        response.headers["retry-after"] = str(retry_after_s)
    return response
