"""What is kept of a prediction, and that it gets to the recorder, through a real Envoy."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from ekiben.errors import FailedPrecondition, InvalidArgument, Unavailable
from ekiben.recorder.v1 import recorder_pb2 as pb
from services.gateway import captures
from services.gateway.captures import CaptureLog, Captures
from services.gateway.envoy import capture_module
from services.gateway.settings import Settings
from services.kernel.clock import SYSTEM
from tests.fixtures_gateway import Plane, client, echo, plane, route, serve, settings_of, until

__all__ = ["client", "plane"]


@pytest.fixture(params=["module", "script"])
def gateway_settings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Settings]:
    """What captures: each test runs with the compiled filter and with the script."""
    if request.param == "module":
        try:
            capture_module("module")
        except FailedPrecondition as exc:
            pytest.skip(exc.message)
    with settings_of(tmp_path, capture_with=request.param) as settings:
        yield settings


class Recorder:
    """Keeps predictions by name, as the recorder does; may be away."""

    def __init__(self) -> None:
        self.kept: dict[str, pb.Prediction] = {}
        self.away = False
        self.lose_answers = False
        self.refuse = ""
        self.calls = 0

    async def RecordPredictions(self, request: pb.RecordPredictionsRequest) -> None:
        self.calls += 1
        if self.away:
            raise Unavailable("away", reason="TEST")
        if self.refuse and any(each.path == self.refuse for each in request.predictions):
            raise InvalidArgument("bad", reason="TEST")
        self.kept.update({each.name: each for each in request.predictions})
        if self.lose_answers:
            raise Unavailable("lost", reason="TEST")

    async def wait_for(self, count: int, timeout_s: float = 10) -> list[pb.Prediction]:
        await until(lambda: len(self.kept) >= count, timeout_s)
        return sorted(self.kept.values(), key=lambda each: each.start_time.ToNanoseconds())


@contextlib.asynccontextmanager
async def sending(plane: Plane, recorder: Recorder, **options: int) -> AsyncIterator[Captures]:
    """The loop at work on the plane's log."""
    sizes = {"segment_bytes": 64 << 20, "backlog_bytes": 1 << 30, **options}
    log = CaptureLog(plane.settings.captures_dir)
    sender = Captures(log, recorder, lambda: plane.envoy.admin.post("/reopen_logs"), SYSTEM, **sizes)  # type: ignore[arg-type]
    task = asyncio.create_task(sender.run())
    try:
        yield sender
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


async def test_a_prediction_is_kept_whole_and_soon(
    plane: Plane, client: aiohttp.ClientSession, recorder: Recorder
) -> None:
    async with serve(echo) as address, sending(plane, recorder):
        await plane.deployer.publish(route("iris", address))
        headers = {
            **plane.host("iris"),
            "authorization": "Bearer ekb_secret",
            "cookie": "secret=1",
            "x-api-key": "secret",
            "x-note": 'kept "so" \\ and so',
            "content-type": "application/json",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        }
        began = time.time()
        async with client.post(plane.url + "/predict?x=1", data=b'{"a": 1}', headers=headers) as answer:
            body = await answer.read()
        (kept,) = await recorder.wait_for(1, timeout_s=2)
    assert kept.name == f"predictions/{answer.headers['x-request-id']}"
    assert kept.deployment == "deployments/iris"
    assert kept.organization == "organizations/default"
    assert kept.revision == "deployments/iris/revisions/1"
    assert kept.target == "main"
    assert kept.bento == "bentoRepositories/iris/bentos/v1"
    assert list(kept.models) == ["modelRepositories/m/models/v1"]
    assert kept.replica == "iris-0"
    assert (kept.method, kept.path, kept.protocol, kept.status) == ("POST", "/predict?x=1", "HTTP/1.1", 200)
    assert kept.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert kept.peer == "127.0.0.1"
    assert kept.response_flags == ""
    assert abs(kept.start_time.ToNanoseconds() / 1e9 - began) < 1
    assert 0 < kept.time_to_first_byte.ToMicroseconds() <= kept.latency.ToMicroseconds() < 1_000_000
    assert kept.request.body == b'{"a": 1}'
    assert kept.request.body_size_bytes == 8
    assert not kept.request.truncated
    assert kept.request.content_type == "application/json"
    assert kept.request.headers["x-note"] == 'kept "so" \\ and so'
    assert kept.request.headers["host"] == headers["Host"]
    assert kept.response.body == body
    assert kept.response.content_type == "application/json; charset=utf-8"
    assert {kept.request.headers[name] for name in ("cookie", "x-api-key")} == {"[redacted]"}
    assert "secret" not in str(kept.request)


@pytest.mark.parametrize("size", [0, 1, 65536, 65537, 3 << 20])
async def test_bodies_of_any_bytes_are_cut_at_the_limit_and_measured_whole(
    plane: Plane, client: aiohttp.ClientSession, recorder: Recorder, size: int
) -> None:
    data = os.urandom(size)

    async def mirror(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    async with serve(mirror) as address, sending(plane, recorder):
        await plane.deployer.publish(route("iris", address))
        async with client.post(plane.url + "/x", data=data, headers=plane.host("iris")) as answer:
            assert await answer.read() == data
        (kept,) = await recorder.wait_for(1)
    for side in (kept.request, kept.response):
        assert side.body == data[:65536]
        assert side.body_size_bytes == size
        assert side.truncated == (size > 65536)


async def test_multipart_is_kept_as_it_passed(plane: Plane, client: aiohttp.ClientSession, recorder: Recorder) -> None:
    form = aiohttp.FormData()
    form.add_field("image", b"\x89PNG\x00\xff", filename="x.png", content_type="image/png")
    async with serve(echo) as address, sending(plane, recorder):
        await plane.deployer.publish(route("iris", address))
        async with client.post(plane.url + "/x", data=form, headers=plane.host("iris")) as answer:
            got = await answer.json()
        (kept,) = await recorder.wait_for(1)
    assert b"\x89PNG\x00\xff" in kept.request.body
    assert len(kept.request.body) == got["size"] == kept.request.body_size_bytes
    assert kept.request.content_type.startswith("multipart/form-data; boundary=")


async def test_a_deployments_policy_decides_how_much_is_kept(
    plane: Plane, client: aiohttp.ClientSession, recorder: Recorder
) -> None:
    async with serve(echo) as address, sending(plane, recorder):
        await plane.deployer.publish(
            route("off", address, capture={"disabled": True}),
            route("none", address, capture={"sample_percent": 0}),
            route("some", address, capture={"sample_percent": 30}),
            route("bare", address, capture={"max_body_bytes": 0}),
            route("short", address, capture={"max_body_bytes": 3, "redacted_headers": ["X-Mine"]}),
        )

        async def post(name: str) -> None:
            headers = {**plane.host(name), "x-mine": "private", "x-yours": "public"}
            async with client.post(plane.url + f"/{name}", data=b"12345", headers=headers) as answer:
                assert answer.status == 200

        for name, count in (("off", 20), ("none", 20), ("some", 200), ("bare", 1), ("short", 1)):
            await asyncio.gather(*(post(name) for _ in range(count)))
        await until(lambda: {"/bare", "/short"} <= {each.path for each in recorder.kept.values()})
    assert (plane.settings.data_dir / "envoy.log").read_text() == ""
    kept = list(recorder.kept.values())
    paths = [each.path for each in kept]
    assert "/off" not in paths
    assert "/none" not in paths
    assert 25 <= paths.count("/some") <= 100
    bare = kept[paths.index("/bare")]
    assert (bare.request.body, bare.request.body_size_bytes, bare.request.truncated) == (b"", 5, True)
    assert bare.request.headers["x-mine"] == "private"
    short = kept[paths.index("/short")]
    assert short.request.body == b"123"
    assert short.request.headers["x-mine"] == "[redacted]"
    assert short.request.headers["x-yours"] == "public"
    assert all(each.request.body == b"12345" for each in kept if each.path == "/some")


async def test_a_stream_is_not_held_back_and_a_caller_who_leaves_is_kept_with_what_passed(
    plane: Plane, client: aiohttp.ClientSession, recorder: Recorder
) -> None:
    async def stream(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                await answer.write(f"data: {time.monotonic()}\n\n".encode())
                await asyncio.sleep(0.05)
        return answer

    async with serve(stream) as address, sending(plane, recorder):
        await plane.deployer.publish(route("iris", address))
        async with client.post(plane.url + "/stream", data=b"go", headers=plane.host("iris")) as answer:
            lags = []
            async for line in answer.content:
                if line.startswith(b"data: "):
                    lags.append(time.monotonic() - float(line[6:]))
                if len(lags) == 10:
                    break
            answer.close()
        (kept,) = await recorder.wait_for(1)
    assert sorted(lags)[5] < 0.03
    assert kept.request.body == b"go"
    assert kept.response.body.startswith(b"data: ")
    assert kept.response.body.count(b"data: ") >= 9
    assert "DC" in kept.response_flags or "DR" in kept.response_flags
    assert kept.latency.ToMicroseconds() >= 400_000
    assert kept.time_to_first_byte.ToMicroseconds() < 400_000
    assert (kept.request.truncated, kept.response.truncated) == (False, True)


@pytest.mark.parametrize("sized", [True, False], ids=["content length", "chunked"])
async def test_a_request_whose_caller_leaves_in_its_middle_is_kept_as_cut_off(
    plane: Plane, recorder: Recorder, sized: bool
) -> None:
    came = asyncio.Event()

    async def wait(request: web.Request) -> web.Response:
        await request.content.readany()
        came.set()
        return web.Response(body=await request.read())

    async with serve(wait) as address, sending(plane, recorder):
        await plane.deployer.publish(route("iris", address))
        _, writer = await asyncio.open_connection("127.0.0.1", plane.settings.port)
        how, part = ("content-length: 100", "0123") if sized else ("transfer-encoding: chunked", "4\r\n0123\r\n")
        writer.write(f"POST /x HTTP/1.1\r\nhost: {plane.host('iris')['Host']}\r\n{how}\r\n\r\n{part}".encode())
        await asyncio.wait_for(came.wait(), 30)
        writer.close()
        (kept,) = await recorder.wait_for(1)
    assert (kept.status, kept.request.truncated, kept.response.truncated) == (0, True, False)
    assert not kept.HasField("time_to_first_byte")


async def test_http2_is_kept_too(plane: Plane, recorder: Recorder) -> None:
    import httpx

    async with serve(echo) as address, sending(plane, recorder):
        await plane.deployer.publish(route("iris", address))
        async with httpx.AsyncClient(http1=False, http2=True) as http2:
            answer = await http2.post(plane.url + "/x", content=b"\x00" * 100_000, headers=plane.host("iris"))
        assert answer.http_version == "HTTP/2"
        assert answer.json()["size"] == 100_000
        (kept,) = await recorder.wait_for(1)
    assert (kept.protocol, kept.request.body_size_bytes) == ("HTTP/2", 100_000)


async def test_a_recorder_that_is_away_slows_nothing_and_loses_nothing(
    plane: Plane, client: aiohttp.ClientSession, recorder: Recorder
) -> None:
    recorder.away = True
    names = set()
    async with serve(echo) as address, sending(plane, recorder, segment_bytes=20_000):
        await plane.deployer.publish(route("iris", address))
        for i in range(60):
            async with client.post(plane.url + f"/{i}", data=b"x" * 500, headers=plane.host("iris")) as answer:
                assert answer.status == 200
                names.add(f"predictions/{answer.headers['x-request-id']}")
            await asyncio.sleep(0.03)  # Long enough for the log to be cut while it is written.
        await until(lambda: len(CaptureLog(plane.settings.captures_dir).sealed()) >= 1)
    recorder.away, recorder.lose_answers = False, True
    async with sending(plane, recorder):
        await until(lambda: recorder.calls > 0)
    recorder.lose_answers = False
    async with sending(plane, recorder):
        await recorder.wait_for(60)
        await until(lambda: not CaptureLog(plane.settings.captures_dir).sealed())
    assert set(recorder.kept) == names


async def test_a_killed_envoy_loses_no_prediction_that_was_written_and_its_torn_line_is_counted(
    plane: Plane, client: aiohttp.ClientSession, recorder: Recorder
) -> None:
    async with serve(echo) as address:
        await plane.deployer.publish(route("iris", address))
        for i in range(20):
            async with client.post(plane.url + f"/{i}", data=b"x", headers=plane.host("iris")) as answer:
                assert answer.status == 200
        log = CaptureLog(plane.settings.captures_dir)
        await until(lambda: log.current.read_bytes().count(b"\n") == 20)
        assert plane.envoy._process is not None
        os.kill(plane.envoy._process.pid, signal.SIGKILL)
        with log.current.open("ab") as file:
            file.write(b'{"id":"torn')
        log.seal()
        await until(lambda: plane.envoy.restarts == 1)
        torn = captures.dropped.labels("torn")._value.get()
        async with sending(plane, recorder):
            async with client.post(plane.url + "/after", data=b"x", headers=plane.host("iris")) as answer:
                assert answer.status == 200
            await recorder.wait_for(21)
        assert captures.dropped.labels("torn")._value.get() == torn + 1


async def test_the_oldest_are_dropped_and_counted_when_too_much_waits(plane: Plane, recorder: Recorder) -> None:
    log = CaptureLog(plane.settings.captures_dir)
    for name in ("a", "b", "c"):
        log.current.write_bytes(b"".join(line(f"{name}{i}") for i in range(100)))
        log.seal()
    size = log.size()
    sender = Captures(log, recorder, _nothing, SYSTEM, segment_bytes=1 << 20, backlog_bytes=size - 1)  # type: ignore[arg-type]
    before = captures.dropped.labels("backlog")._value.get()
    log.commit(captures.Position(0, len(line("a0")) * 10))
    log.current.write_bytes(b"".join(line(f"d{i}") for i in range(30)))
    await sender.keep_house()
    assert captures.dropped.labels("backlog")._value.get() == before + 90
    for _ in range(6):
        await sender.send_some()
    assert len(recorder.kept) == 230


async def test_a_prediction_that_the_recorder_refuses_does_not_hold_up_the_others(
    plane: Plane, recorder: Recorder
) -> None:
    log = CaptureLog(plane.settings.captures_dir)
    log.current.write_bytes(b"".join(line(f"p{i}", path="/bad" if i == 5 else "/") for i in range(10)) + b"nonsense\n")
    recorder.refuse = "/bad"
    sender = Captures(log, recorder, _nothing, SYSTEM, segment_bytes=1 << 20, backlog_bytes=1 << 30)  # type: ignore[arg-type]
    await sender.send_some()
    assert len(recorder.kept) == 9
    assert not await sender.send_some()


def line(name: str, **fields: Any) -> bytes:
    return json.dumps({"id": name, "start": "1.5", "status": 200, "qh": "", **fields}).encode() + b"\n"


async def _nothing() -> None:
    pass


async def test_captures_rest_longer_than_they_work_while_there_is_room(plane: Plane, recorder: Recorder) -> None:
    async with sending(plane, recorder, backlog_bytes=4000) as sender:
        assert sender.rest_s(0.1) == 0.2
        assert sender.rest_s(10) == 0.5
        (plane.settings.captures_dir / "current.jsonl").write_bytes(b"x" * 1000)
        assert sender.rest_s(0.1) == 0.1


async def test_captures_go_on_after_somebody_deleted_their_folder(
    plane: Plane, client: aiohttp.ClientSession, recorder: Recorder
) -> None:
    async with serve(echo) as address, sending(plane, recorder) as sender:
        await plane.deployer.publish(route("iris", address))
        for number in range(5):
            await (await client.post(f"{plane.url}/before/{number}", headers=plane.host("iris"))).read()
        await recorder.wait_for(5)
        shutil.rmtree(plane.settings.captures_dir)
        await until(lambda: (plane.settings.captures_dir / "current.jsonl").exists())
        await (await client.post(f"{plane.url}/after", headers=plane.host("iris"))).read()
        assert (await recorder.wait_for(6))[-1].path == "/after"
        assert sender._log.position.offset > 0
