"""Sends what OTLP brought to another OTLP endpoint as well, without making anyone wait.

Requests go on byte for byte. They wait in a bounded queue in memory; while the endpoint is away it fills, and what does
not fit is dropped and counted: the recorder keeps its own copy anyway.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Protocol

import aiohttp
import grpc
import grpc.aio
from prometheus_client import Counter

from ekiben.errors import EkibenError, Unavailable
from services.kernel.clock import Clock

log = logging.getLogger(__name__)

MAX_QUEUED_BYTES = 16 << 20
_TIMEOUT_S = 10.0
# OTLP specification, "Failures": these ask for another try; RESOURCE_EXHAUSTED also without RetryInfo, to lose less.
_RETRYABLE = {
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNAVAILABLE,
}
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0

_outcomes = Counter("ekiben_otlp_forwarded_total", "OTLP requests for the other endpoint.", ["signal", "outcome"])


class Signal(StrEnum):
    """What a request carries; the value is the last part of its OTLP/HTTP path."""

    TRACES = "traces"
    LOGS = "logs"


for _signal in Signal:
    for _outcome in ("sent", "dropped", "refused"):
        _outcomes.labels(_signal.value, _outcome)


class Sender(Protocol):
    """How a request gets to the endpoint."""

    async def send(self, signal: Signal, body: bytes) -> None:
        """Deliver one serialized OTLP request.

        Raises:
            Unavailable: not now; the same may be sent again.
            EkibenError: the endpoint refuses this request, and would again.
        """
        ...


class HttpSender:
    """OTLP over HTTP: `POST {endpoint}/v1/traces` and `/v1/logs`."""

    def __init__(self, session: aiohttp.ClientSession, endpoint: str, headers: Mapping[str, str]) -> None:
        self._session = session
        self._endpoint = endpoint.rstrip("/").removesuffix("/v1/traces")
        self._headers = {**headers, "content-type": "application/x-protobuf"}

    async def send(self, signal: Signal, body: bytes) -> None:
        """Deliver one request; see Sender."""
        url = f"{self._endpoint}/v1/{signal.value}"
        try:
            timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
            async with self._session.post(url, data=body, headers=self._headers, timeout=timeout) as response:
                if response.status < 400:
                    return
                text = (await response.content.read(300)).decode(errors="replace")
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise Unavailable(f"The OTLP endpoint does not answer: {exc!r}.", reason="OTLP_ENDPOINT_AWAY") from exc
        # OTLP specification, "Retryable Response Codes".
        error = Unavailable if response.status in (429, 502, 503, 504) else EkibenError
        raise error(f"The OTLP endpoint answered {response.status}: {text}", reason="OTLP_ENDPOINT_REFUSED")


class GrpcSender:
    """OTLP over gRPC."""

    def __init__(self, channel: grpc.aio.Channel, headers: Mapping[str, str]) -> None:
        # No serializers: bytes in, bytes out.
        self._export = {
            Signal.TRACES: channel.unary_unary(
                "/opentelemetry.proto.collector.trace.v1.TraceService/Export", None, None
            ),
            Signal.LOGS: channel.unary_unary("/opentelemetry.proto.collector.logs.v1.LogsService/Export", None, None),
        }
        self._metadata = tuple(headers.items())

    async def send(self, signal: Signal, body: bytes) -> None:
        """Deliver one request; see Sender."""
        try:
            await self._export[signal](body, metadata=self._metadata, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as exc:
            error = Unavailable if exc.code() in _RETRYABLE else EkibenError
            text = f"The OTLP endpoint answered {exc.code().name}: {exc.details()}"
            raise error(text, reason="OTLP_ENDPOINT_REFUSED") from exc


@asynccontextmanager
async def open_sender(endpoint: str, headers: Mapping[str, str]) -> AsyncIterator[Sender]:
    """A sender for `http://…`, `https://…` (OTLP over HTTP), `grpc://…`, `grpcs://…`, `host:port` or `unix:/path`."""
    scheme, separator, rest = endpoint.partition("://")
    if separator and scheme in ("http", "https"):
        async with aiohttp.ClientSession() as session:
            yield HttpSender(session, endpoint, headers)
    elif separator and scheme == "grpcs":
        async with grpc.aio.secure_channel(rest, grpc.ssl_channel_credentials()) as channel:
            yield GrpcSender(channel, headers)
    else:
        async with grpc.aio.insecure_channel(rest if separator else endpoint) as channel:
            yield GrpcSender(channel, headers)


class Forwarder:
    """The queue and the loop that empties it."""

    def __init__(self, sender: Sender, clock: Clock, *, max_queued_bytes: int = MAX_QUEUED_BYTES) -> None:
        self._sender = sender
        self._clock = clock
        self._max_queued_bytes = max_queued_bytes
        self._queue: deque[tuple[Signal, bytes]] = deque()
        self._queued_bytes = 0
        self._filled = asyncio.Event()

    def offer(self, signal: Signal, body: bytes) -> None:
        """Take a serialized OTLP request, or drop it when the queue is full. Never waits."""
        if self._queued_bytes + len(body) > self._max_queued_bytes:
            _outcomes.labels(signal.value, "dropped").inc()
            return
        self._queue.append((signal, body))
        self._queued_bytes += len(body)
        self._filled.set()

    async def run(self) -> None:
        """Send what is queued, in order, for ever; while the endpoint is away, try again with growing pauses."""
        pause_s = _FIRST_PAUSE_S
        while True:
            await self._filled.wait()
            if not self._queue:
                self._filled.clear()
                continue
            signal, body = self._queue[0]
            try:
                await self._sender.send(signal, body)
            except Unavailable as exc:
                if pause_s == _FIRST_PAUSE_S:
                    log.warning("cannot forward spans", extra={"detail": str(exc)})
                await self._clock.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            except EkibenError as exc:
                log.warning("forwarded spans were refused", extra={"detail": str(exc)})
                outcome = "refused"
            else:
                outcome = "sent"
            pause_s = _FIRST_PAUSE_S
            self._queue.popleft()
            self._queued_bytes -= len(body)
            _outcomes.labels(signal.value, outcome).inc()
