"""How requests pass: streams, uploads, websockets, gRPC, admission, weights, and changes under load."""

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import socket
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from aiohttp import web

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.errors import Unauthenticated, Unavailable
from ekiben.registry.v1 import registry_pb2, registry_pb2_grpc
from services.gateway import messages
from services.gateway.admission import Admission, serve_admission
from services.gateway.settings import Settings
from services.kernel.identity import Principal
from tests.fixtures_gateway import (
    Plane,
    client,
    echo,
    free_port,
    gateway_settings,
    open_plane,
    plane,
    route,
    serve,
    until,
)

__all__ = ["client", "gateway_settings", "plane"]


async def test_an_upload_of_any_size_is_streamed_and_envoys_memory_stays_flat(
    plane: Plane, client: aiohttp.ClientSession
) -> None:
    total, started = 200 << 20, asyncio.Event()

    async def swallow(request: web.Request) -> web.Response:
        started.set()
        size = 0
        async for chunk in request.content.iter_chunked(1 << 16):
            size += len(chunk)
        return web.json_response({"size": size})

    async def chunks() -> Any:
        block = b"\x00" * (1 << 20)
        for i in range(total >> 20):
            if i == 8:  # The replica has begun to read though the upload has not ended.
                async with asyncio.timeout(10):
                    await started.wait()
            yield block

    async with serve(swallow) as address:
        await plane.deployer.publish(route("iris", address))
        assert plane.envoy._process is not None
        before = resident(plane.envoy._process.pid)
        async with client.post(plane.url + "/x", data=chunks(), headers=plane.host("iris")) as answer:
            assert (await answer.json())["size"] == total
        assert resident(plane.envoy._process.pid) - before < 30 << 20


async def test_websockets_pass_both_ways(plane: Plane, client: aiohttp.ClientSession) -> None:
    async def talk(request: web.Request) -> web.StreamResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        async for message in ws:
            await ws.send_str(message.data + "!")
        return ws

    async with serve(talk) as address:
        await plane.deployer.publish(route("iris", address))
        async with client.ws_connect(plane.url + "/ws", headers=plane.host("iris")) as ws:
            for text in ("a", "b" * 70_000):
                await ws.send_str(text)
                assert await ws.receive_str() == text + "!"


async def test_replicas_on_unix_sockets_are_reached_and_internal_routes_listen_on_one(
    plane: Plane, client: aiohttp.ClientSession
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="gw", dir="/tmp"))
    inner = folder / "inside" / "dep.sock"
    async with serve(echo, f"unix:{folder / 'replica.sock'}") as address:
        internal = pb.InternalRoute(
            revision="deployments/iris/revisions/1",
            target="main",
            service="Dep",
            socket_path=str(inner),
            endpoints=[pb.Endpoint(replica="iris-dep-0", address=address)],
        )
        await plane.deployer.publish(route("iris", address, internal_routes=[internal]))
        async with client.post(plane.url + "/x", headers=plane.host("iris")) as answer:
            assert answer.status == 200
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(inner))) as dependent:
            async with dependent.post("http://dep/x", data=b"\x80pickle") as answer:
                assert (await answer.json())["size"] == 7
        # Containers with a user of their own are given the folder, which nobody else may enter.
        assert inner.stat().st_mode & 0o777 == 0o666
        assert inner.parent.stat().st_mode & 0o777 == 0o700
    await asyncio.sleep(0)
    assert not any("internal" in path.name for path in plane.settings.captures_dir.iterdir())


async def test_weights_split_and_a_header_or_a_query_parameter_names_the_target(
    plane: Plane, client: aiohttp.ClientSession
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        addresses = {}
        for name in ("main", "canary"):

            async def answer_by(request: web.Request, name: str = name) -> web.Response:
                return web.Response(text=name)

            addresses[name] = await stack.enter_async_context(serve(answer_by))

        def targets(canary: str = addresses["canary"]) -> list[pb.Target]:
            return [
                pb.Target(
                    target=name,
                    revision="deployments/iris/revisions/1",
                    weight=weight,
                    endpoints=[pb.Endpoint(replica=name, address=address)] if address else [],
                )
                for name, address, weight in (("main", addresses["main"], 80), ("canary", canary, 20))
            ]

        async def ask(path: str = "/", **headers: str) -> str:
            async with client.get(plane.url + path, headers={**plane.host("iris"), **headers}) as answer:
                return await answer.text()

        await plane.deployer.publish(route("iris", targets=targets()))
        seen = Counter([await ask() for _ in range(300)])
        assert 25 <= seen["canary"] <= 110
        await plane.deployer.publish(route("iris", targets=targets(""), route_type="random"))
        assert {await ask() for _ in range(20)} == {"main"}
        await plane.deployer.publish(route("iris", targets=targets(), route_type="header", route_by="x-version"))
        assert {await ask() for _ in range(20)} == {"main"}
        assert await ask(**{"x-version": "canary"}) == "canary"
        assert await ask(**{"x-version": "unknown"}) == "main"
        await plane.deployer.publish(route("iris", targets=targets(), route_type="query", route_by="v"))
        assert await ask("/?v=canary") == "canary"
        assert await ask("/?v=main") == await ask("/") == "main"


async def test_replicas_change_under_load_without_a_failed_request(plane: Plane, client: aiohttp.ClientSession) -> None:
    statuses: Counter[int] = Counter()
    stop = asyncio.Event()

    async def slowly(request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(0.02)
        return web.Response(text="ok")

    async def load() -> None:
        while not stop.is_set():
            async with client.post(plane.url + "/x", data=b"x" * 1000, headers=plane.host("iris")) as answer:
                await answer.read()
                statuses[answer.status] += 1

    def revision(number: int, address: str) -> pb.Route:
        changed = route("iris", address)
        changed.targets[0].revision = f"deployments/iris/revisions/{number}"
        return changed

    async with contextlib.AsyncExitStack() as stack:
        old = await stack.enter_async_context(contextlib.AsyncExitStack())
        await plane.deployer.publish(revision(1, await old.enter_async_context(serve(slowly))))
        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(load())
            for number in range(2, 7):
                new = await stack.enter_async_context(contextlib.AsyncExitStack())
                address = await new.enter_async_context(serve(slowly))
                # More replicas of the same revision, then the next one.
                await plane.deployer.publish(revision(number, address))
                await old.aclose()  # Acknowledged, so it may go; it ends what it has.
                old = new
            stop.set()
    assert set(statuses) == {200}
    assert statuses[200] > 50


async def test_a_killed_envoy_serves_again_within_two_seconds(plane: Plane, client: aiohttp.ClientSession) -> None:
    async with serve(echo) as address:
        own = free_port()
        await plane.deployer.publish(route("iris", address, port=own))
        assert plane.envoy._process is not None
        os.kill(plane.envoy._process.pid, signal.SIGKILL)
        async with asyncio.timeout(2):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with client.get(f"http://127.0.0.1:{own}/") as answer:
                        if answer.status == 200 and plane.envoy.restarts == 1:
                            break
                await asyncio.sleep(0.01)
        async with client.get(plane.url, headers=plane.host("iris")) as answer:
            assert answer.status == 200
        await plane.deployer.publish(route("iris", not_ready_detail="gone"))
        async with client.get(plane.url, headers=plane.host("iris")) as answer:
            assert answer.status == 503


async def test_envoy_outlives_its_gateway_and_is_adopted_by_the_next(
    gateway_settings: Settings, client: aiohttp.ClientSession
) -> None:
    async with serve(echo) as address, contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(open_plane(gateway_settings))
        await first.deployer.publish(route("iris", address, port=free_port()))
        assert first.envoy._process is not None
        pid = first.envoy._process.pid
        first.envoy._process.detach()  # As a SIGKILL of the gateway does.
        first.envoy._process = None
        async with client.get(first.url, headers=first.host("iris")) as answer:
            assert answer.status == 200
        async with open_plane(gateway_settings) as second:
            assert second.envoy.adopted
            assert second.envoy._process is not None
            assert second.envoy._process.pid == pid
            async with client.get(second.url, headers=second.host("iris")) as answer:
                assert answer.status == 200
            await second.deployer.publish(route("other", address))
            async with client.get(second.url, headers=second.host("other")) as answer:
                assert answer.status == 200


async def test_without_the_deployer_the_last_routes_are_served_from_the_start(
    gateway_settings: Settings, client: aiohttp.ClientSession
) -> None:
    async with serve(echo) as address:
        own = free_port()
        async with open_plane(gateway_settings) as first:
            await first.deployer.publish(route("iris", address, port=own))
        async with open_plane(gateway_settings) as second:
            second.deployer.table = pb.RouteTable(version=-1)
            async with client.get(f"http://127.0.0.1:{own}", headers=second.host("iris")) as answer:
                assert answer.status == 200


async def test_draining_lets_requests_in_flight_end_and_takes_no_new_connection(
    plane: Plane, client: aiohttp.ClientSession
) -> None:
    entered = asyncio.Event()

    async def slowly(request: web.Request) -> web.Response:
        entered.set()
        await asyncio.sleep(1)
        return web.Response(text="done")

    async with serve(slowly) as address:
        await plane.deployer.publish(route("iris", address))
        request = asyncio.create_task(client.get(plane.url, headers=plane.host("iris")))
        await entered.wait()
        draining = asyncio.create_task(plane.envoy.drain())
        await until(lambda: not connects(plane.settings.port))
        answer = await request
        assert await answer.text() == "done"
        await draining


class Accounts:
    """Knows one token."""

    def __init__(self) -> None:
        self.away = False

    async def authenticate(self, token: str) -> Principal:
        if self.away:
            raise Unavailable("away", reason="TEST")
        if token != "ekb_good":
            raise Unauthenticated("no", reason="TOKEN_INVALID")
        return Principal("users/a", "organizations/default", 2, "apiTokens/1", "my töken")


async def test_a_deployment_may_ask_for_a_token_which_its_replicas_never_see(
    gateway_settings: Settings, client: aiohttp.ClientSession
) -> None:
    accounts = Accounts()
    socket_path = gateway_settings.admission_socket
    gateway_settings.run_dir.mkdir(exist_ok=True)
    peer = messages.Peer("admission", f"unix:{socket_path}", http2=False)
    async with (
        serve(echo) as address,
        serve_admission(Admission(accounts), socket_path),
        open_plane(gateway_settings, peer) as plane,
    ):
        await plane.deployer.publish(route("iris", address, access_authorization=True), route("open", address))

        async def ask(**headers: str) -> tuple[int, dict[str, Any], Any]:
            sent = {**plane.host("iris"), **headers}
            async with client.post(plane.url + "/p?q=1", data=b"x" * 100_000, headers=sent) as answer:
                return answer.status, json.loads(await answer.text() or "{}"), answer.headers

        status, problem, headers = await ask()
        assert (status, problem["reason"], headers["www-authenticate"]) == (401, "API_TOKEN_REQUIRED", "Bearer")
        assert headers["content-type"] == "application/problem+json"
        assert (await ask(authorization="Bearer wrong"))[0] == 401
        for sent in ({"authorization": "Bearer ekb_good"}, {"x-yatai-api-token": "ekb_good"}):
            status, got, _ = await ask(**sent, **{"ekiben-api-token": "somebody else"})
            assert (status, got["size"]) == (200, 100_000)
            assert not {"authorization", "x-yatai-api-token", "ekiben-api-token"} & set(got["headers"])
        accounts.away = True
        status, problem, _ = await ask(authorization="Bearer ekb_other")
        assert (status, problem["reason"]) == (503, "ADMISSION_UNAVAILABLE")
        async with client.post(plane.url, headers=plane.host("open")) as answer:
            assert answer.status == 200
        log = plane.settings.captures_dir / "current.jsonl"
        await until(lambda: log.read_bytes().count(b"\n") == 3)
        assert json.loads(log.read_bytes().splitlines()[0])["token"] == "my t%C3%B6ken"


class Models(registry_pb2_grpc.ModelsServicer):
    async def GetModel(self, request: Any, context: Any) -> registry_pb2.Model:
        seen = dict(context.invocation_metadata())
        return registry_pb2.Model(
            name=request.name, labels={k: str(v) for k, v in seen.items() if k.startswith("ekiben")}
        )


async def test_grpc_reaches_public_methods_only(gateway_settings: Settings) -> None:
    server = grpc.aio.server()
    registry_pb2_grpc.add_ModelsServicer_to_server(Models(), server)
    gateway_settings.run_dir.mkdir(exist_ok=True)
    address = f"unix:{gateway_settings.run_dir / 'suite.sock'}"
    server.add_insecure_port(address)
    await server.start()
    peers = [messages.Peer(name, address, http2=True) for name in ("registry", "recorder")]
    try:
        async with open_plane(gateway_settings, *peers) as plane:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{plane.settings.port}") as channel:
                stub = registry_pb2_grpc.ModelsStub(channel)
                model = await stub.GetModel(
                    registry_pb2.GetModelRequest(name="m"), metadata=[("ekiben-user", "users/admin")], timeout=5
                )
                assert model.name == "m"
                assert not model.labels
                for path, code in (
                    ("/ekiben.recorder.v1.Predictions/RecordPredictions", grpc.StatusCode.PERMISSION_DENIED),
                    ("/ekiben.identity.v1.Accounts/Authenticate", grpc.StatusCode.PERMISSION_DENIED),
                    ("/ekiben.deployer.v1.Routes/WatchRoutes", grpc.StatusCode.PERMISSION_DENIED),
                    ("/opentelemetry.proto.collector.trace.v1.TraceService/Export", grpc.StatusCode.UNIMPLEMENTED),
                    ("/ekiben.registry.v1.Models/Nothing", grpc.StatusCode.UNIMPLEMENTED),
                ):
                    with pytest.raises(grpc.aio.AioRpcError) as failure:
                        await channel.unary_unary(path)(b"", timeout=5)
                    assert failure.value.code() is code
                await server.stop(0)
                with pytest.raises(grpc.aio.AioRpcError) as failure:
                    await stub.GetModel(registry_pb2.GetModelRequest(name="m"), timeout=5)
                assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    finally:
        await server.stop(0)


INVALID_PARENTS = (
    "nonsense",
    f"00-{'0' * 32}-{'cd' * 8}-01",
    f"00-{'ab' * 16}-{'0' * 16}-01",
    f"00-{'ab' * 16}-{'xy' * 8}-01",
    f"00-{'ab' * 16}-{'cd' * 8}-01-more",
    f"cc-{'ab' * 16}-{'cd' * 8}-01-more",
)


async def test_spans_go_to_the_recorder_with_the_token_and_replicas_continue_the_callers_trace(
    gateway_settings: Settings, client: aiohttp.ClientSession
) -> None:
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc

    spans: list[Any] = []
    exports: list[int] = []
    tokens: set[Any] = set()

    class Receiver(otlp_grpc.TraceServiceServicer):
        async def Export(self, request: otlp.ExportTraceServiceRequest, context: Any) -> Any:
            exports.append(len(spans))
            tokens.add(dict(context.invocation_metadata()).get("authorization"))
            for resource in request.resource_spans:
                name = {a.key: a.value.string_value for a in resource.resource.attributes}.get("service.name")
                spans.extend((name, span) for scope in resource.scope_spans for span in scope.spans)
            return otlp.ExportTraceServiceResponse()

    server = grpc.aio.server()
    otlp_grpc.add_TraceServiceServicer_to_server(Receiver(), server)
    gateway_settings.run_dir.mkdir(exist_ok=True)
    address = f"unix:{gateway_settings.run_dir / 'suite.sock'}"
    server.add_insecure_port(address)
    await server.start()
    peer = messages.Peer("recorder", address, http2=True)
    try:
        async with (
            serve(echo) as replica,
            open_plane(
                dataclasses.replace(gateway_settings),
                peer,
                trace_cluster="recorder",
                service_token="eks_x",
                trace_percent=0,
            ) as plane,
        ):
            await plane.deployer.publish(route("iris", replica))

            async def ask(flags: str = "", parent: str = "") -> str:
                headers = plane.host("iris")
                if parent or flags:
                    headers["traceparent"] = parent or f"00-{'ab' * 16}-{'cd' * 8}-{flags}"
                async with client.post(plane.url + "/x?code=hush", headers=headers) as answer:
                    return str((await answer.json())["headers"]["traceparent"])

            assert (await ask()).endswith("-00")
            assert (await ask("00")).split("-")[1::2] == ["ab" * 16, "00"]
            seen = await ask("01")
            assert seen.split("-")[1::2] == ["ab" * 16, "01"]
            await until(lambda: len(spans) >= 1, 15)
            log = plane.settings.captures_dir / "current.jsonl"
            await until(lambda: log.read_bytes().count(b"\n") == 3)
            for invalid in INVALID_PARENTS:
                fresh = await ask(parent=invalid)
                assert fresh.endswith("-00"), invalid
                assert fresh.split("-")[1] not in ("0" * 32, "ab" * 16)
            exports_before, spans_before = len(exports), len(spans)
            for number in range(1, 41):
                await ask(parent=f"00-{number:032x}-{'cd' * 8}-01")
            await until(lambda: len(spans) == spans_before + 40, 15)
            assert len(exports) - exports_before < 8, "Envoy sends few spans at a time."
            del spans[spans_before:]
            traces = [json.loads(text)["trace"] for text in log.read_bytes().splitlines()]
    finally:
        await server.stop(0)
    assert tokens == {"Bearer eks_x"}
    assert {name for name, _ in spans} == {"gateway"}
    by_id = {span.span_id.hex(): span for _, span in spans}
    assert len(by_id) == 1
    ingress = by_id[seen.split("-")[2]]
    assert ingress.parent_span_id.hex() == "cd" * 8
    assert ingress.name == "POST deployments/iris/x"
    attributes = {each.key: each.value.string_value for each in ingress.attributes}
    assert attributes["ekiben.deployment"] == "deployments/iris"
    assert attributes["ekiben.replica"] == "iris-0"
    assert attributes["http.url"].endswith("/x")
    assert not any(b"hush" in span.SerializeToString() for span in by_id.values())
    assert {span.trace_id.hex() for span in by_id.values()} == {"ab" * 16}
    assert traces[1:3] == ["ab" * 16] * 2
    assert len(traces[0]) == 32


async def test_spans_wait_for_a_recorder_that_is_away_or_cannot_take_them(
    gateway_settings: Settings, client: aiohttp.ClientSession
) -> None:
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc

    traces: list[str] = []
    refused = asyncio.Event()

    class Receiver(otlp_grpc.TraceServiceServicer):
        async def Export(self, request: otlp.ExportTraceServiceRequest, context: Any) -> Any:
            if not refused.is_set():
                refused.set()
                await context.abort(grpc.StatusCode.UNAVAILABLE, "The database is away.")
            await asyncio.sleep(2)  # A recorder with much to do. Envoy's limit for each try is its longest pause.
            scopes = (scope for resource in request.resource_spans for scope in resource.scope_spans)
            traces.extend(span.trace_id.hex() for scope in scopes for span in scope.spans)
            return otlp.ExportTraceServiceResponse()

    gateway_settings.run_dir.mkdir(exist_ok=True)
    address = f"unix:{gateway_settings.run_dir / 'suite.sock'}"
    peer = messages.Peer("recorder", address, http2=True)
    server = grpc.aio.server()
    otlp_grpc.add_TraceServiceServicer_to_server(Receiver(), server)
    async with serve(echo) as replica, open_plane(gateway_settings, peer, trace_cluster="recorder") as plane:
        await plane.deployer.publish(route("iris", replica))
        asked = [f"{number:032x}" for number in range(1, 6)]
        for trace in asked:
            headers = {**plane.host("iris"), "traceparent": f"00-{trace}-{'cd' * 8}-01"}
            async with client.post(plane.url + "/x", headers=headers) as answer:
                assert answer.status == 200

        async def tried() -> bool:
            counters = await plane.envoy.admin.counters(r"^cluster\.recorder\.upstream_cx_connect_fail$")
            return any(counters.values())

        async with asyncio.timeout(30):
            while not await tried():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        server.add_insecure_port(address)
        await server.start()
        try:
            await until(lambda: len(traces) >= len(asked), 60)
        finally:
            await server.stop(0)
    assert refused.is_set()
    assert sorted(traces) == asked


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    return 0


def connects(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
