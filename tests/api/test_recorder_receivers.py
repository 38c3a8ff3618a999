"""OTLP from real exporters and from bad senders, over gRPC and HTTP."""

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from google.protobuf import json_format
from google.rpc import status_pb2
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.trace import SpanKind

from ekiben.recorder.v1 import recorder_pb2 as pb
from services.recorder import receiver
from tests.api.test_recorder_api import NEARLY_FULL
from tests.fixtures_recorder import Recorder, eventually, free_port, recorder, running_recorder
from tests.unit.test_recorder_otlp import SPAN, TRACE, OtlpSpan, export, monitor_record

__all__ = ["recorder"]


@pytest.fixture
async def http(recorder: Recorder) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"authorization": f"Bearer {recorder.otlp_token}", "content-type": "application/x-protobuf"}
    async with aiohttp.ClientSession(recorder.otlp_http, headers=headers) as session:
        yield session


def one_span(**changes: Any) -> bytes:
    return export(OtlpSpan(**{"trace_id": TRACE, "span_id": SPAN, "name": "x", **changes})).SerializeToString()


async def names_of_spans(recorder: Recorder) -> list[str]:
    listed = await recorder.traces.ListTraces(pb.ListTracesRequest())
    found = [await recorder.traces.GetTrace(pb.GetTraceRequest(name=each.name)) for each in listed.traces]
    return [span.display_name for trace in found for span in trace.spans]


async def test_the_real_grpc_exporter_is_understood(recorder: Recorder) -> None:
    exporter = OTLPSpanExporter(
        endpoint=recorder.address, insecure=True, headers={"authorization": "Bearer eks_test"}, timeout=5
    )
    results = []

    class Recording(SimpleSpanProcessor):
        def on_end(self, span: Any) -> None:
            results.append(exporter.export([span]))

    provider = TracerProvider(resource=Resource.create({"service.name": "client"}), shutdown_on_exit=False)
    provider.add_span_processor(Recording(exporter))
    tracer = provider.get_tracer("test")

    def call() -> None:
        with tracer.start_as_current_span("outer", kind=SpanKind.CLIENT, attributes={"n": 1}):
            try:
                with tracer.start_as_current_span("inner"):
                    raise ValueError("boom")
            except ValueError:
                pass

    await asyncio.to_thread(call)
    assert results == [SpanExportResult.SUCCESS] * 2
    (listed,) = (await recorder.traces.ListTraces(pb.ListTracesRequest())).traces
    assert (listed.root, listed.span_count, listed.error_count, list(listed.services)) == ("outer", 2, 1, ["client"])
    assert not listed.spans
    trace = await recorder.traces.GetTrace(pb.GetTraceRequest(name=listed.name))
    outer, inner = trace.spans
    assert (outer.kind, outer.attributes["n"], inner.parent_span_id) == ("CLIENT", "1", outer.span_id)
    assert (inner.error, inner.attributes["exception.message"]) == (True, "boom")
    assert trace.duration.ToNanoseconds() >= outer.duration.ToNanoseconds() > 0


@pytest.mark.parametrize("coding", ["", "gzip", "deflate"])
async def test_spans_come_over_http_in_any_coding(recorder: Recorder, http: aiohttp.ClientSession, coding: str) -> None:
    body = {"": bytes, "gzip": gzip.compress, "deflate": zlib.compress}[coding](one_span())
    headers = {"content-encoding": coding} if coding else {}
    for _ in range(2):  # an exporter whose answer was lost
        async with http.post("/v1/traces", data=body, headers=headers) as response:
            assert response.status == 200
            assert ExportTraceServiceResponse.FromString(await response.read()) == ExportTraceServiceResponse()
    assert await names_of_spans(recorder) == ["x"]


async def test_spans_come_as_json(recorder: Recorder, http: aiohttp.ClientSession) -> None:
    document = json_format.MessageToDict(ExportTraceServiceRequest.FromString(one_span()))
    document["resourceSpans"][0]["scopeSpans"][0]["spans"][0] |= {"traceId": TRACE.hex(), "spanId": SPAN.hex()}
    async with http.post("/v1/traces", json=document, headers={"content-type": "application/json"}) as response:
        assert (response.status, await response.json()) == (200, {})
    assert await names_of_spans(recorder) == ["x"]
    async with http.post("/v1/traces", data=b"{", headers={"content-type": "application/json"}) as response:
        assert response.status == 400
        assert (await response.json())["code"] == 3


async def test_what_was_refused_is_counted_in_the_answer(recorder: Recorder, http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/traces", data=one_span(span_id=b"")) as response:
        answer = ExportTraceServiceResponse.FromString(await response.read())
        assert (response.status, answer.partial_success.rejected_spans) == (200, 1)


async def test_monitor_records_land_beside_the_prediction_of_their_trace(
    recorder: Recorder, http: aiohttp.ClientSession
) -> None:
    seen = pb.Prediction(name="predictions/p", deployment="deployments/iris", status=200, trace_id=TRACE.hex())
    seen.start_time.GetCurrentTime()
    await recorder.recording.RecordPredictions(pb.RecordPredictionsRequest(predictions=[seen]))
    request = monitor_record()
    request.resource_logs[0].scope_logs[0].log_records.add().body.string_value = "not a monitor's"
    for _ in range(2):
        async with http.post("/v1/logs", data=request.SerializeToString()) as response:
            answer = ExportLogsServiceResponse.FromString(await response.read())
            assert (response.status, answer.partial_success.rejected_log_records) == (200, 1)
    shown = await recorder.predictions.GetPrediction(pb.GetPredictionRequest(name="predictions/p"))
    (entry,) = shown.monitor_entries
    assert (entry.monitor, json.loads(entry.data)["x"]) == ("iris_prediction", 2.5)


@pytest.mark.parametrize("token", ["", "Bearer", "Bearer x", "Basic eDp5", "Bearer eks_test", "Bearer é"])
async def test_without_the_otlp_token_nothing_is_taken(recorder: Recorder, token: str) -> None:
    async with aiohttp.ClientSession(recorder.otlp_http) as session:
        headers = {"authorization": token, "content-type": "application/x-protobuf"}
        async with session.post("/v1/traces", data=one_span(), headers=headers) as response:
            assert response.status == 401
            assert status_pb2.Status.FromString(await response.read()).code == 16
    assert await names_of_spans(recorder) == []


async def test_bad_senders_get_a_clear_answer(recorder: Recorder, http: aiohttp.ClientSession) -> None:
    bomb = gzip.compress(b"\0" * (64 << 20))
    for body, headers, status in (
        (b"\xff\xff", {}, 400),
        (b"not gzip", {"content-encoding": "gzip"}, 400),
        (one_span(), {"content-type": "text/plain"}, 415),
        (bomb, {"content-encoding": "gzip"}, 413),
        (b"\0" * (receiver.MAX_BODY_BYTES + 1), {}, 413),
    ):
        async with http.post("/v1/traces", data=body, headers=headers) as response:
            assert response.status == status, headers
    async with http.get("/v1/traces") as response:
        assert response.status == 405
    async with http.post("/v1/metrics", data=b"") as response:
        assert response.status == 200
    async with http.post("/v1/traces", data=one_span()) as response:
        assert response.status == 200


async def test_a_full_disk_asks_the_exporter_to_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_recorder(tmp_path, min_free_bytes=64 << 20) as recorder:
        monkeypatch.setattr("services.recorder.store.writes.os.statvfs", lambda _: NEARLY_FULL)
        headers = {"authorization": f"Bearer {recorder.otlp_token}", "content-type": "application/x-protobuf"}
        async with aiohttp.ClientSession(recorder.otlp_http, headers=headers) as session:
            async with session.post("/v1/traces", data=one_span()) as response:
                assert (response.status, response.headers["retry-after"]) == (503, "30")


@pytest.fixture
async def elsewhere() -> AsyncIterator[tuple[str, "asyncio.Queue[tuple[str, bytes, str]]"]]:
    """Another OTLP endpoint over HTTP: its URL and what it got."""
    got: asyncio.Queue[tuple[str, bytes, str]] = asyncio.Queue()

    async def take(request: web.Request) -> web.Response:
        await got.put((request.path, await request.read(), request.headers.get("api-key", "")))
        return web.Response(status=200)

    app = web.Application()
    app.router.add_post("/{path:.*}", take)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    yield f"http://127.0.0.1:{port}", got
    await runner.cleanup()


async def test_one_setting_sends_all_to_another_endpoint_over_http(
    tmp_path: Path, elsewhere: tuple[str, "asyncio.Queue[tuple[str, bytes, str]]"]
) -> None:
    endpoint, got = elsewhere
    (tmp_path / "headers").write_text("Api-Key: secret\n")
    settings = {"otlp_forward_endpoint": endpoint, "otlp_forward_headers_file": tmp_path / "headers"}
    async with running_recorder(tmp_path, **settings) as recorder:
        headers = {"authorization": f"Bearer {recorder.otlp_token}", "content-type": "application/x-protobuf"}
        async with aiohttp.ClientSession(recorder.otlp_http, headers=headers) as session:
            await (await session.post("/v1/traces", data=one_span())).read()
            await (await session.post("/v1/logs", data=monitor_record().SerializeToString())).read()
        async with asyncio.timeout(10):
            assert await got.get() == ("/v1/traces", one_span(), "secret")
            path, body, _ = await got.get()
        assert (path, ExportLogsServiceRequest.FromString(body)) == ("/v1/logs", monitor_record())


async def test_one_setting_sends_all_to_another_endpoint_over_grpc(recorder: Recorder, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    (tmp_path / "headers").write_text("authorization: Bearer eks_test\n")
    settings = {"otlp_forward_endpoint": recorder.address, "otlp_forward_headers_file": tmp_path / "headers"}
    async with running_recorder(tmp_path / "second", **settings) as first:
        headers = {"authorization": f"Bearer {first.otlp_token}", "content-type": "application/x-protobuf"}
        async with aiohttp.ClientSession(first.otlp_http, headers=headers) as session:
            await (await session.post("/v1/traces", data=one_span())).read()

        async def arrived() -> bool:
            return await names_of_spans(recorder) == ["x"]

        await eventually(arrived)
