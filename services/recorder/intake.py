"""Use case of both OTLP receivers: keep what an export carries, and pass it on."""

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from services.kernel.clock import Clock
from services.recorder import otlp
from services.recorder.forwarder import Forwarder, Signal
from services.recorder.predictions import Predictions
from services.recorder.traces import Traces


class Intake:
    """Takes exports of traces and logs, whichever way they came."""

    def __init__(
        self, predictions: Predictions, traces: Traces, forwarder: Forwarder | None, clock: Clock, *, organization: str
    ) -> None:
        self._predictions = predictions
        self._traces = traces
        self._forwarder = forwarder
        self._clock = clock
        self._organization = organization

    async def traces(self, request: ExportTraceServiceRequest) -> ExportTraceServiceResponse:
        """Keep the spans; the answer counts those refused.

        Raises:
            ResourceExhausted, Unavailable: nothing was kept; the exporter sends the same again.
        """
        spans, invalid = otlp.spans_of(request, organization=self._organization)
        refused = await self._traces.record(spans, invalid=invalid)
        # After it is kept: an export that is tried again would otherwise be forwarded twice.
        if self._forwarder:
            self._forwarder.offer(Signal.TRACES, request.SerializeToString())
        response = ExportTraceServiceResponse()
        if refused:
            response.partial_success.rejected_spans = refused
            response.partial_success.error_message = "The trace is full, or a span has no valid ids."
        return response

    async def logs(self, request: ExportLogsServiceRequest) -> ExportLogsServiceResponse:
        """Keep what `bentoml.monitor()` logged; the answer counts the other records, which are only forwarded.

        Raises:
            ResourceExhausted, Unavailable: nothing was kept; the exporter sends the same again.
        """
        now_ns = int(self._clock.now().timestamp() * 1_000_000_000)
        entries, others = otlp.monitor_entries_of(request, organization=self._organization, now_ns=now_ns)
        if entries:
            await self._predictions.record_monitor_entries(entries)
        if self._forwarder:
            self._forwarder.offer(Signal.LOGS, request.SerializeToString())
        response = ExportLogsServiceResponse()
        if others:
            response.partial_success.rejected_log_records = others
            response.partial_success.error_message = "Only records of bentoml.monitor() are kept."
        return response
