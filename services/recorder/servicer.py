"""gRPC: the recorder's own API, and OTLP's receivers. Each method parses, calls one use case, formats."""

from collections.abc import AsyncIterator
from typing import Any

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from ekiben import names
from ekiben.errors import InvalidArgument
from ekiben.recorder.v1 import recorder_pb2 as pb
from ekiben.recorder.v1 import recorder_pb2_grpc
from services.kernel import pages
from services.kernel.identity import current_principal
from services.recorder import messages
from services.recorder.intake import Intake
from services.recorder.predictions import Predictions
from services.recorder.traces import Traces

# More in one call is one transaction too long: others wait for it.
MAX_BATCH = 10_000


class PredictionsServicer(recorder_pb2_grpc.PredictionsServicer):
    """ekiben.recorder.v1.Predictions."""

    def __init__(self, predictions: Predictions) -> None:
        self._predictions = predictions

    async def GetPrediction(self, request: pb.GetPredictionRequest, context: Any) -> pb.Prediction:
        prediction = await self._predictions.get(_organization(), names.Prediction.parse(request.name))
        return messages.prediction_to_proto(prediction, bodies=True)

    async def ListPredictions(self, request: pb.ListPredictionsRequest, context: Any) -> pb.ListPredictionsResponse:
        wanted = messages.prediction_filter(request, _organization())
        size, before = pages.page_size(request.page_size), pages.decode(request, int, int)
        found, position = await self._predictions.page(wanted, before=before, size=size, bodies=request.include_bodies)
        return pb.ListPredictionsResponse(
            predictions=[messages.prediction_to_proto(each, bodies=request.include_bodies) for each in found],
            next_page_token=pages.encode(request, *position) if position else "",
        )

    async def TailPredictions(self, request: pb.TailPredictionsRequest, context: Any) -> AsyncIterator[pb.Prediction]:
        wanted = messages.prediction_filter(request, _organization())
        after = await self._predictions.end()
        # Tells the caller that whatever is recorded from now on will come.
        await context.send_initial_metadata(())
        async for prediction in self._predictions.tail(wanted, after=after, bodies=request.include_bodies):
            yield messages.prediction_to_proto(prediction, bodies=request.include_bodies)

    async def RecordPredictions(
        self, request: pb.RecordPredictionsRequest, context: Any
    ) -> pb.RecordPredictionsResponse:
        _check_batch(len(request.predictions))
        organization = _organization()
        batch = [
            messages.prediction_from_proto(message, organization=organization, index=index)
            for index, message in enumerate(request.predictions)
        ]
        return pb.RecordPredictionsResponse(recorded_count=await self._predictions.record(batch))


class TracesServicer(recorder_pb2_grpc.TracesServicer):
    """ekiben.recorder.v1.Traces."""

    def __init__(self, traces: Traces) -> None:
        self._traces = traces

    async def GetTrace(self, request: pb.GetTraceRequest, context: Any) -> pb.Trace:
        summary, spans = await self._traces.get(_organization(), names.Trace.parse(request.name))
        return messages.trace_to_proto(summary, spans)

    async def ListTraces(self, request: pb.ListTracesRequest, context: Any) -> pb.ListTracesResponse:
        wanted = messages.trace_filter(request, _organization())
        size, before = pages.page_size(request.page_size), pages.decode(request, int, str)
        found, position = await self._traces.page(wanted, before=before, size=size)
        return pb.ListTracesResponse(
            traces=map(messages.trace_to_proto, found),
            next_page_token=pages.encode(request, *position) if position else "",
        )


class OtlpTraceServicer:
    """opentelemetry.proto.collector.trace.v1.TraceService."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def Export(self, request: ExportTraceServiceRequest, context: Any) -> ExportTraceServiceResponse:
        """Keep spans."""
        return await self._intake.traces(request)


class OtlpLogsServicer:
    """opentelemetry.proto.collector.logs.v1.LogsService."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def Export(self, request: ExportLogsServiceRequest, context: Any) -> ExportLogsServiceResponse:
        """Keep what `bentoml.monitor()` logged."""
        return await self._intake.logs(request)


def _organization() -> str:
    return messages.organization_of(current_principal().organization)


def _check_batch(count: int) -> None:
    if count > MAX_BATCH:
        raise InvalidArgument(
            f"One call records at most {MAX_BATCH} predictions; send fewer at a time.",
            reason="BATCH_TOO_LARGE",
            violations=[("predictions", f"At most {MAX_BATCH}.")],
            count=count,
        )
