"""Traces: spans of this process, exported over OTLP, joined to the traces of whoever called.

The service shown for a span is its attribute `ekiben.component` where present, else the resource's
`service.name`: in standalone one process runs several services. The exporter's own calls, health checks and OTLP
receivers are never traced. Without a set-up (in a client, in a test) spans cost nothing and say nothing.
"""

import asyncio
import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import Counter

from services.kernel import logs
from services.kernel.identity import read_service_token
from services.kernel.settings import ServerSettings

log = logging.getLogger(__name__)

_PROPAGATOR = TraceContextTextMapPropagator()
_EXPORT_METHOD = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
# A trace is looked at right after the call that made it: half a second is soon, and still a batch under load.
_SCHEDULE_DELAY_MS = 500
_QUEUE = 16384
# How long one batch is tried while the receiver restarts; the queue holds what comes meanwhile.
_EXPORT_PATIENCE_S = 15.0
_FROM = re.compile(r"[()]|\bFROM\b|'[^']*'")
_LONGEST_COLUMNS = 200
_TABLE = re.compile(r"\b(?:FROM|INTO|UPDATE|TABLE)\s+\"?(\w+)", re.IGNORECASE)

_dropped = Counter("ekiben_spans_dropped_total", "Spans that no receiver took.")
_component: ContextVar[str] = ContextVar("ekiben_component", default="")
_provider: trace.TracerProvider = trace.NoOpTracerProvider()
_tracer: trace.Tracer = _provider.get_tracer("ekiben")


class Telemetry:
    """The process's tracing while it runs; closing it gives the former one back."""

    def __init__(self, provider: TracerProvider, former: trace.TracerProvider) -> None:
        self._provider = provider
        self._former = former
        self._patience_s = 2.0

    async def flush(self) -> None:
        """Export what has ended so far, waiting at most two seconds."""
        await self._patiently(self._provider.force_flush)

    async def close(self) -> None:
        """Export the rest and stop, waiting at most two seconds, and no more after a `flush` that waited in vain."""
        if _provider is self._provider:
            _install(self._former)
        await self._patiently(self._provider.shutdown)

    async def _patiently(self, work: Any) -> None:
        # A daemon thread, not the default executor: an exporter in its last try must not hold the process.
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def run() -> None:
            try:
                work()
            finally:
                try:
                    loop.call_soon_threadsafe(done.set)
                except RuntimeError:
                    log.debug("spans were exported after the event loop had closed")

        threading.Thread(target=run, daemon=True, name="ekiben-telemetry").start()
        try:
            async with asyncio.timeout(self._patience_s):
                await done.wait()
        except TimeoutError:
            self._patience_s = 0.1  # one wait is enough for a receiver that is away
            log.warning("the trace receiver did not take the last spans in time")


def setup(service_name: str, settings: ServerSettings) -> Telemetry:
    """Begin logging and tracing as `service_name`; close what is returned at the end."""
    logs.setup(settings)
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(settings.trace_sample_percent / 100)),
        resource=Resource({"service.name": service_name, "service.namespace": "ekiben"}),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(_ComponentProcessor())
    if settings.otlp_endpoint:
        exporter = GrpcSpanExporter(settings)
        provider.add_span_processor(
            BatchSpanProcessor(exporter, max_queue_size=_QUEUE, schedule_delay_millis=_SCHEDULE_DELAY_MS)
        )
    telemetry = Telemetry(provider, _provider)
    _install(provider)
    return telemetry


def _install(provider: trace.TracerProvider) -> None:
    global _provider, _tracer
    _provider, _tracer = provider, provider.get_tracer("ekiben")


def tracer() -> trace.Tracer:
    """The tracer of this process, as it is now: ask anew rather than keep it."""
    return _tracer


@contextmanager
def component(name: str) -> Iterator[None]:
    """Spans begun inside belong to the component `name`."""
    token = _component.set(name)
    try:
        yield
    finally:
        _component.reset(token)


def set_component(name: str) -> None:
    """Spans begun from here on, in this task, belong to the component `name`."""
    _component.set(name)


def current_component() -> str:
    """The component whose code runs, or empty."""
    return _component.get()


def current_traceparent() -> str:
    """W3C `traceparent` of the current span, to keep with work that continues later; empty outside of a trace."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent", "")


def current_trace_id() -> str:
    """The trace that runs, in 32 hex digits; empty outside of one."""
    span = trace.get_current_span().get_span_context()
    return trace.format_trace_id(span.trace_id) if span.is_valid else ""


def context_of(carrier: Mapping[str, str]) -> Context:
    """The OpenTelemetry context that `traceparent` and `tracestate` in `carrier` describe; empty when absent or bad."""
    return _PROPAGATOR.extract(carrier, context=Context())


@contextmanager
def continue_trace(traceparent: str, name: str, **attributes: str | int | float | bool) -> Iterator[trace.Span]:
    """A span that joins the trace of the call that caused this work, or begins a trace when there was none.

    For loops: a worker keeps `current_traceparent()` with the row that asks for the work.
    An exception marks the span as failed and goes on.
    """
    parent = context_of({"traceparent": traceparent}) if traceparent else Context()
    with tracer().start_as_current_span(name, context=parent, attributes=attributes) as span:
        yield span


@contextmanager
def untraced() -> Iterator[None]:
    """Code inside belongs to no trace: what a loop does of its own accord."""
    token = otel_context.attach(Context())
    try:
        yield
    finally:
        otel_context.detach(token)


def start_sql_span(system: str, statement: str) -> trace.Span | None:
    """A span for one statement, without its values; None outside of a recorded trace.

    None too for the BEGIN of a reader on SQLite, which waits for nobody: one span in two of all would be that.
    """
    if statement == "BEGIN" or not trace.get_current_span().is_recording():
        return None
    name, verb, shown = _shown(statement)
    return tracer().start_span(
        name,
        kind=trace.SpanKind.CLIENT,
        attributes={"db.system": system, "db.operation": verb, "db.statement": shown},
    )


@lru_cache(maxsize=512)
def _shown(statement: str) -> tuple[str, str, str]:
    """A statement's name, verb, and text for a reader: a long list of columns says less than the conditions after it,
    and would be most of what is kept of a call."""
    verb = statement.lstrip().split(None, 1)[0].upper() if statement.strip() else "SQL"
    begin, end = statement.find("SELECT") + len("SELECT"), _from(statement) if verb == "SELECT" else 0
    shown = f"{statement[:begin]} … {statement[end:]}" if end - begin > _LONGEST_COLUMNS else statement
    table = _TABLE.search(shown)
    return (f"{verb} {table[1]}" if table else verb), verb, shown[:2000]


def _from(statement: str) -> int:
    """Where the FROM of the outermost SELECT stands; 0 where there is none."""
    depth = 0
    for found in _FROM.finditer(statement):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth == 0 and found[0] == "FROM":
            return found.start()
    return 0


def fail_span(span: trace.Span, description: str) -> None:
    """Mark `span` as failed."""
    span.set_status(trace.Status(trace.StatusCode.ERROR, description))


class _ComponentProcessor(SpanProcessor):
    """Writes into each span which component's code began it."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        name = _component.get()
        if name:
            span.set_attribute("ekiben.component", name)


class GrpcSpanExporter(SpanExporter):
    """Sends spans to the recorder over OTLP, showing the service token. Runs in the batch processor's thread."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._metadata = (("authorization", f"Bearer {read_service_token(settings.service_token_file)}"),)
        self._send: Any = None
        self._closed = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send one batch, trying again while the receiver is away."""
        import grpc
        from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

        if self._send is None:
            self._send = _channel(self._settings).unary_unary(_EXPORT_METHOD, None, None)
        message = encode_spans(spans).SerializeToString()
        deadline = time.monotonic() + _EXPORT_PATIENCE_S
        while True:
            try:
                self._send(message, timeout=5.0, metadata=self._metadata)
                return SpanExportResult.SUCCESS
            except grpc.RpcError as exc:
                retry = exc.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
                if not retry or time.monotonic() > deadline or self._closed.wait(0.3):
                    _dropped.inc(len(spans))
                    log.warning("spans were not taken", extra={"code": exc.code().name, "spans": len(spans)})
                    return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        """Give up what is being tried."""
        self._closed.set()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Nothing waits here; the batch processor holds the queue."""
        return True


def _channel(settings: ServerSettings) -> Any:
    import grpc

    options = [
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.enable_http_proxy", 0),
    ]
    if settings.otlp_ca_file is None or settings.otlp_endpoint.startswith("unix:"):
        return grpc.insecure_channel(settings.otlp_endpoint, options=options)
    files = (settings.otlp_ca_file, settings.tls_key_file, settings.tls_cert_file)
    credentials = grpc.ssl_channel_credentials(*(file.read_bytes() if file else None for file in files))
    return grpc.secure_channel(settings.otlp_endpoint, credentials, options=options)
