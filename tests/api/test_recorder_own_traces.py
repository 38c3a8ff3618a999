"""The suite's own spans: a call within a trace is kept down to its SQL; what loops say to one another leaves none."""

from pathlib import Path

from opentelemetry import trace

from ekiben.errors import NotFound
from ekiben.names import Trace
from ekiben.recorder.v1 import recorder_pb2 as pb
from ekiben.recorder.v1.recorder_pb2_grpc import PredictionsStub, TracesStub
from services.kernel import telemetry
from services.kernel.peers import open_peers, with_no_call
from services.kernel.settings import PeerSettings, ServerSettings
from services.recorder import messages
from tests.fixtures_recorder import Process, eventually, prediction, recorder_process

__all__ = ["recorder_process"]


async def test_a_call_is_traced_through_grpc_and_sql_and_a_loop_is_not(
    recorder_process: Process, tmp_path: Path
) -> None:
    process = recorder_process
    process.start()
    token_file = tmp_path / "token"
    token_file.write_text("eks_test")
    spans = telemetry.setup(
        "gateway", ServerSettings(service_token_file=token_file, otlp_endpoint=process.address, log_level="WARNING")
    )
    try:
        async with open_peers(
            PeerSettings(service_token_file=token_file, recorder=process.address), caller="gateway"
        ) as peers:
            predictions, traces = PredictionsStub(peers.recorder), TracesStub(peers.recorder)
            record = pb.RecordPredictionsRequest(predictions=[messages.prediction_to_proto(prediction(1), bodies=True)])
            with with_no_call():
                await predictions.RecordPredictions(record, wait_for_ready=True)
            with telemetry.tracer().start_as_current_span("request") as span:
                await predictions.ListPredictions(pb.ListPredictionsRequest())
                trace_id = trace.format_trace_id(span.get_span_context().trace_id)

            async def found() -> pb.Trace | None:
                with with_no_call():
                    try:
                        return await traces.GetTrace(pb.GetTraceRequest(name=str(Trace(trace_id))))
                    except NotFound:
                        return None

            async def whole() -> bool:
                one = await found()
                return one is not None and one.span_count >= 4

            await eventually(whole)
            one = await found()
            assert one is not None
            assert one.root == "request"
            assert list(one.services) == ["gateway", "recorder"]
            hops = [(each.service, each.kind) for each in one.spans[:3]]
            assert hops == [("gateway", "INTERNAL"), ("gateway", "CLIENT"), ("recorder", "SERVER")]
            sql = [each for each in one.spans if "db.statement" in each.attributes]
            assert sql
            assert {each.parent_span_id for each in sql} == {one.spans[2].span_id}
            with with_no_call():
                listed = await traces.ListTraces(pb.ListTracesRequest())
            assert [each.name for each in listed.traces] == [one.name]
    finally:
        await spans.close()
