"""The recorder over real gRPC: recording, lists, tails, traces, and who may do what."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub

from ekiben.channel import open_channel
from ekiben.errors import InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, Unauthenticated
from ekiben.recorder.v1 import recorder_pb2 as pb
from ekiben.recorder.v1.recorder_pb2_grpc import PredictionsStub
from services.recorder import messages
from tests.fixtures_recorder import NOW_US, Recorder, prediction, recorder, running_recorder

__all__ = ["recorder"]

NEARLY_FULL = os.statvfs_result((4096, 4096, 1 << 20, 1000, 1000, 0, 0, 0, 0, 255))
"""A disk of 4 GiB with 4 MiB left."""


def captured(number: int, **changes: Any) -> pb.Prediction:
    return messages.prediction_to_proto(prediction(number, **changes), bodies=True)


async def record(recorder: Recorder, *predictions: pb.Prediction) -> int:
    request = pb.RecordPredictionsRequest(predictions=predictions)
    return (await recorder.recording.RecordPredictions(request)).recorded_count


async def test_a_recorded_prediction_is_shown_at_once(recorder: Recorder) -> None:
    assert await record(recorder, captured(1), captured(2, status=500)) == 2
    assert await record(recorder, captured(1)) == 0
    shown = await recorder.predictions.GetPrediction(pb.GetPredictionRequest(name="predictions/p1"))
    assert shown == captured(1)
    assert shown.request.text == '{"x": 1}'
    assert (shown.response.text, shown.response.body) == ("", b"\x00\xff")
    listed = await recorder.predictions.ListPredictions(pb.ListPredictionsRequest(status="5xx"))
    (only,) = listed.predictions
    assert (only.name, only.request.body, only.request.body_size_bytes) == ("predictions/p2", b"", 8)
    assert listed.next_page_token == ""


async def test_pages_follow_one_another_and_tokens_are_bound_to_their_filters(recorder: Recorder) -> None:
    await record(recorder, *(captured(n) for n in range(5)))
    request = pb.ListPredictionsRequest(page_size=2, deployment="deployments/iris", include_bodies=True)
    names = []
    while True:
        page = await recorder.predictions.ListPredictions(request)
        names += [each.name for each in page.predictions]
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
        last = page.next_page_token
    assert names == [f"predictions/p{n}" for n in (4, 3, 2, 1, 0)]
    for wrong in (
        pb.ListPredictionsRequest(page_token=last),
        pb.ListPredictionsRequest(page_token="x"),
        pb.ListPredictionsRequest(page_size=-1),
        pb.ListPredictionsRequest(status="20"),
        pb.ListPredictionsRequest(trace_id="20"),
        pb.ListPredictionsRequest(deployment="iris"),
    ):
        with pytest.raises(InvalidArgument):
            await recorder.predictions.ListPredictions(wrong)


async def test_a_list_of_one_revision(recorder: Recorder) -> None:
    first, second = (f"deployments/iris/revisions/{number}" for number in (1, 2))
    await record(recorder, *(captured(n, revision=first if n % 2 else second) for n in range(4)))
    await record(recorder, captured(9, revision="deployments/other/revisions/1", deployment="deployments/other"))
    for deployment in ("", "deployments/iris"):
        request = pb.ListPredictionsRequest(revision=first, deployment=deployment)
        found = (await recorder.predictions.ListPredictions(request)).predictions
        assert [each.name for each in found] == ["predictions/p3", "predictions/p1"]
    for wrong, reason in (("iris/1", "NAME_INVALID"), ("deployments/other/revisions/1", "REVISION_OF_ANOTHER")):
        with pytest.raises(InvalidArgument) as caught:
            request = pb.ListPredictionsRequest(revision=wrong, deployment="deployments/iris")
            await recorder.predictions.ListPredictions(request)
        assert caught.value.reason == reason


async def test_a_page_with_bodies_ends_before_it_outgrows_a_message(recorder: Recorder) -> None:
    body = messages.prediction_to_proto(prediction(0), bodies=True)
    body.request.body = b"x" * (1 << 20)
    for number in range(12):
        body.name = f"predictions/large{number}"
        await record(recorder, body)
    request = pb.ListPredictionsRequest(page_size=1000, include_bodies=True)
    seen = 0
    while True:
        page = await recorder.predictions.ListPredictions(request)
        assert page.ByteSize() < 12 << 20
        seen += len(page.predictions)
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
    assert seen == 12


async def test_times_bound_a_list(recorder: Recorder) -> None:
    await record(recorder, *(captured(n) for n in range(5)))
    start, end = (Timestamp(seconds=NOW_US // 1_000_000 + n) for n in (1, 3))
    page = await recorder.predictions.ListPredictions(pb.ListPredictionsRequest(start_time=start, end_time=end))
    assert [each.name for each in page.predictions] == ["predictions/p2", "predictions/p1"]
    far = Timestamp(seconds=253402300799)
    page = await recorder.predictions.ListPredictions(pb.ListPredictionsRequest(start_time=far))
    assert not page.predictions


async def test_one_bad_prediction_refuses_the_batch_and_says_which(recorder: Recorder) -> None:
    for change in ({"name": "p1"}, {"deployment": "iris"}, {"status": -1}, {"organization": "x"}):
        bad = captured(2)
        for field, value in change.items():
            setattr(bad, field, value)
        with pytest.raises(InvalidArgument) as refused:
            await record(recorder, captured(1), bad)
        assert "organization" in change or refused.value.violations[0][0].startswith("predictions[1].")
    assert not (await recorder.predictions.ListPredictions(pb.ListPredictionsRequest())).predictions
    # A trace id that is none costs the prediction its trace, not its place in the log.
    odd = captured(3)
    odd.trace_id = "nonsense"
    assert await record(recorder, odd) == 1


async def test_only_services_record_and_each_sees_its_own_organization(recorder: Recorder) -> None:
    await record(recorder, captured(1))
    for call, request in (
        (recorder.predictions.RecordPredictions, pb.RecordPredictionsRequest()),
        (TraceServiceStub(recorder.viewer).Export, ExportTraceServiceRequest()),  # type: ignore[no-untyped-call]
    ):
        with pytest.raises(PermissionDenied):
            await call(request)  # type: ignore[operator]
    async with open_channel(recorder.address, token="ekb_other") as other, open_channel(recorder.address) as nobody:
        theirs = PredictionsStub(other)
        assert not (await theirs.ListPredictions(pb.ListPredictionsRequest())).predictions
        with pytest.raises(NotFound) as missing:
            await theirs.GetPrediction(pb.GetPredictionRequest(name="predictions/p1"))
        assert missing.value.reason == "PREDICTION_NOT_FOUND"
        with pytest.raises(Unauthenticated):
            await PredictionsStub(nobody).ListPredictions(pb.ListPredictionsRequest())


async def test_a_tail_gives_what_comes_once_and_in_order(recorder: Recorder) -> None:
    await record(recorder, captured(0))
    call = recorder.predictions.TailPredictions(pb.TailPredictionsRequest(deployment="deployments/iris"))
    try:
        await call.initial_metadata()  # from here on it listens
        stream = aiter(call)
        async with asyncio.timeout(10):
            await record(recorder, captured(3), captured(1), captured(8, deployment="deployments/other"))
            seen = [await anext(stream), await anext(stream)]
            await record(recorder, captured(2))
            seen.append(await anext(stream))
        assert [each.name for each in seen] == [f"predictions/p{n}" for n in (3, 1, 2)]
        assert {each.request.body for each in seen} == {b""}
    finally:
        call.cancel()


async def test_a_tail_sees_what_another_replica_recorded(recorder: Recorder, tmp_path: Path) -> None:
    async with running_recorder(tmp_path, otlp_http_listen="") as other:
        call = other.predictions.TailPredictions(pb.TailPredictionsRequest(include_bodies=True))
        try:
            await call.initial_metadata()
            await record(recorder, captured(1))
            async with asyncio.timeout(2):
                async for each in call:
                    assert each == captured(1)
                    break
        finally:
            call.cancel()


async def test_a_trace_that_is_not_there_is_not_found(recorder: Recorder) -> None:
    with pytest.raises(NotFound) as missing:
        await recorder.traces.GetTrace(pb.GetTraceRequest(name=f"traces/{5:032x}"))
    assert missing.value.reason == "TRACE_NOT_FOUND"
    with pytest.raises(InvalidArgument):
        await recorder.traces.GetTrace(pb.GetTraceRequest(name="traces/5"))


async def test_below_the_reserve_recording_is_refused_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_recorder(tmp_path, min_free_bytes=64 << 20) as recorder:
        await record(recorder, captured(1))
        with monkeypatch.context() as scarce:
            scarce.setattr("services.recorder.store.writes.os.statvfs", lambda _: NEARLY_FULL)
            with pytest.raises(ResourceExhausted) as refused:
                await record(recorder, captured(2))
            assert refused.value.reason == "DISK_FULL"
            # What retention frees inside of the database is used again.
            scarce.setattr("services.recorder.store.writes._ENOUGH_FREE_BYTES", 0)
            await record(recorder, captured(3))
        await record(recorder, captured(2))
        assert len((await recorder.predictions.ListPredictions(pb.ListPredictionsRequest())).predictions) == 3
