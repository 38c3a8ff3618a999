"""Spans reach an OTLP receiver, joined to their trace, with the component that made them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_stubs
from opentelemetry.proto.trace.v1 import trace_pb2

from ekiben import errors
from ekiben.channel import open_channel, traceparent
from ekiben.identity.v1 import identity_pb2 as pb
from ekiben.identity.v1 import identity_pb2_grpc as stubs
from services.kernel import telemetry
from services.kernel.app import Component, Servicer
from services.kernel.db import Database, open_database
from services.kernel.peers import Peers
from tests.fixtures_kernel import Running, run_server, short_path, until

__all__ = ["short_path"]

PARENT = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"


class Receiver(otlp_stubs.TraceServiceServicer):
    """An OTLP receiver like the recorder's."""

    def __init__(self) -> None:
        self.spans: list[trace_pb2.Span] = []
        self.calls = 0

    async def Export(self, request: otlp.ExportTraceServiceRequest, context: Any) -> otlp.ExportTraceServiceResponse:
        self.calls += 1
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return otlp.ExportTraceServiceResponse()

    def named(self, name: str) -> list[trace_pb2.Span]:
        return [span for span in self.spans if span.name == name]


def recorder(receiver: Receiver) -> Component:
    """The component that serves it."""
    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    return Component("recorder", [Servicer(service, otlp_stubs.add_TraceServiceServicer_to_server, receiver)])


_SCHEMA = (
    sa.select(sa.column("name")).select_from(sa.table("sqlite_schema")).where(sa.column("name") == sa.bindparam("n"))
)


class Accounts(stubs.AccountsServicer):
    """Calls another hop, and the database."""

    peers: Peers
    database: Database

    async def GetCaller(self, request: pb.GetCallerRequest, context: Any) -> pb.Principal:
        async with self.database.read() as connection:
            await connection.execute(sa.text("SELECT name FROM sqlite_master WHERE name = :name"), {"name": "hidden"})
        await self.database.lookups.execute(_SCHEMA, {"n": "hidden"})
        await stubs.AccountsStub(self.peers.registry).Authenticate(pb.AuthenticateRequest(token="x"))
        return pb.Principal(user=telemetry.current_trace_id(), organization=telemetry.current_traceparent())

    async def Authenticate(self, request: pb.AuthenticateRequest, context: Any) -> pb.Principal:
        return pb.Principal()

    async def GetUser(self, request: pb.GetUserRequest, context: Any) -> pb.User:
        raise errors.NotFound("No.", reason="USER_NOT_FOUND")


@pytest.fixture
async def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
async def running(short_path: Path, receiver: Receiver, tmp_path: Path) -> AsyncIterator[Running]:
    accounts = Accounts()
    components = (
        Component(
            "registry", [Servicer("ekiben.identity.v1.Accounts", stubs.add_AccountsServicer_to_server, accounts)]
        ),
        recorder(receiver),
    )
    async with open_database(f"sqlite:///{tmp_path}/x.db") as accounts.database:
        # One process that exports to itself, as standalone does.
        async with run_server(short_path, *components, otlp_endpoint=f"unix:{short_path}/s.sock") as server:
            accounts.peers = Peers(server.peers, "registry")
            yield server
            await accounts.peers.close()


def attributes(span: trace_pb2.Span) -> dict[str, str]:
    return {item.key: item.value.string_value or str(item.value.int_value) for item in span.attributes}


async def test_one_trace_spans_hops_and_sql_and_is_readable_within_two_seconds(
    running: Running, receiver: Receiver
) -> None:
    async with open_channel(running.address, token="ekb_viewer") as channel:
        traceparent.set(PARENT)
        answer = await stubs.AccountsStub(channel).GetCaller(pb.GetCallerRequest())
        traceparent.set("")
    assert answer.user == "a" * 32 and answer.organization.startswith("00-" + "a" * 32)
    await until(lambda: len(receiver.spans) >= 5, "the spans", seconds=2)
    server = receiver.named("ekiben.identity.v1.Accounts/GetCaller")[0]
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == ("a" * 32, "b" * 16)
    assert attributes(server)["ekiben.component"] == "registry"
    assert attributes(server)["enduser.id"] == "users/viewer"
    (sql,) = receiver.named("SELECT sqlite_master")
    (lookup,) = receiver.named("SELECT sqlite_schema")
    assert sql.parent_span_id == lookup.parent_span_id == server.span_id
    assert "hidden" not in f"{sql}{lookup}" and "SELECT name" in attributes(sql)["db.statement"]
    client, inner = sorted(receiver.named("ekiben.identity.v1.Accounts/Authenticate"), key=lambda span: -span.kind)
    assert (client.kind, inner.kind) == (trace_pb2.Span.SPAN_KIND_CLIENT, trace_pb2.Span.SPAN_KIND_SERVER)
    assert client.parent_span_id == server.span_id and inner.parent_span_id == client.span_id
    assert {span.trace_id.hex() for span in receiver.spans} == {"a" * 32}


async def test_an_error_marks_its_span(running: Running, receiver: Receiver) -> None:
    async with open_channel(running.address, token="ekb_viewer") as channel:
        with pytest.raises(errors.NotFound):
            await stubs.AccountsStub(channel).GetUser(pb.GetUserRequest(name="users/a"))
    (span,) = await until(lambda: receiver.named("ekiben.identity.v1.Accounts/GetUser"), "the span")
    assert (span.status.code, span.status.message) == (trace_pb2.Status.STATUS_CODE_ERROR, "USER_NOT_FOUND")
    assert attributes(span)["rpc.grpc.status_code"] == "5"


async def test_exporting_makes_no_spans_of_its_own(running: Running, receiver: Receiver) -> None:
    with telemetry.continue_trace("", "one"):
        pass
    await until(lambda: receiver.named("one"), "the span")
    calls = receiver.calls
    await asyncio.sleep(0.7)  # more than the exporter's own period: a trace of the export would come now
    assert receiver.calls == calls and {span.name for span in receiver.spans} == {"one"}


async def test_a_loop_joins_the_trace_of_the_call_that_caused_its_work(running: Running, receiver: Receiver) -> None:
    with telemetry.component("builder"), telemetry.continue_trace(PARENT, "build", **{"ekiben.build": "builds/1"}):
        assert telemetry.current_trace_id() == "a" * 32
    with telemetry.continue_trace("", "alone"), telemetry.untraced():
        assert telemetry.current_trace_id() == ""
    with telemetry.continue_trace("no traceparent", "bad"):
        assert telemetry.current_trace_id() not in ("", "a" * 32)
    (build,) = await until(lambda: receiver.named("build"), "the span")
    assert (build.trace_id.hex(), build.parent_span_id.hex()) == ("a" * 32, "b" * 16)
    assert attributes(build) == {"ekiben.build": "builds/1", "ekiben.component": "builder"}


async def test_sampling_drops_new_traces_but_honours_a_callers_decision(short_path: Path, receiver: Receiver) -> None:
    options: dict[str, Any] = {"otlp_endpoint": f"unix:{short_path}/s.sock", "trace_sample_percent": 0.0}
    async with run_server(short_path, recorder(receiver), **options):
        with telemetry.continue_trace("", "dropped"):
            flags = int(telemetry.current_traceparent().rpartition("-")[2], 16)
            assert not flags & 1  # the other bit says that the trace id is random
        with telemetry.continue_trace(PARENT, "kept"):
            pass
        with telemetry.continue_trace(PARENT[:-2] + "00", "refused by the caller"):
            pass
        await until(lambda: receiver.spans, "the span")
    assert [span.name for span in receiver.spans] == ["kept"]


async def test_an_end_is_not_held_up_by_a_receiver_that_is_away(short_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with run_server(short_path, Component("a"), otlp_endpoint=f"unix:{short_path}/none"):
        with telemetry.continue_trace("", "one"):
            pass
        before = loop.time()
    assert loop.time() - before < 4
