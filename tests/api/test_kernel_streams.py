"""All four kinds of call through the chain, and how streams end."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from ekiben import errors
from ekiben.api.v1.annotations_pb2 import Role
from ekiben.channel import open_channel
from services.kernel import interceptors
from services.kernel.app import Component, Servicer
from services.kernel.identity import current_principal
from services.kernel.policies import Policy
from tests.fixtures_kernel import Running, run_server, short_path, until

__all__ = ["short_path"]

SERVICE = "test.v1.Echo"


class Echo:
    """Four methods on text; a message "error" raises, "bug" fails."""

    def __init__(self) -> None:
        self.produced = 0
        self.ended = 0

    def _check(self, text: str) -> str:
        if text == "error":
            raise errors.FailedPrecondition("Not now.", reason="ECHO_BUSY", violations=[("echo", "busy")])
        if text == "bug":
            raise KeyError(text)
        return f"{current_principal().user}:{text}"

    async def unary(self, request: str, context: Any) -> str:
        return self._check(request)

    async def expand(self, request: str, context: Any) -> AsyncIterator[str]:
        try:
            for letter in request.split(","):
                yield self._check(letter)
            if request.endswith("forever"):
                while True:
                    self.produced += 1
                    yield "more"
                    await asyncio.sleep(0.005)
            if request.endswith("silent"):
                await asyncio.sleep(60)
        finally:
            self.ended += 1

    async def written(self, request: str, context: Any) -> None:
        await context.write(self._check(request))
        await context.write("written")

    async def collect(self, requests: AsyncIterator[str], context: Any) -> str:
        return ",".join([self._check(request) async for request in requests])

    async def chat(self, requests: AsyncIterator[str], context: Any) -> AsyncIterator[str]:
        async for request in requests:
            yield self._check(request)


def _text(raw: bytes) -> str:
    return raw.decode()


def _raw(text: str | bytes) -> bytes:
    # grpc.aio's server encodes a str before it asks the serializer.
    return text.encode() if isinstance(text, str) else text


def add(echo: Any, server: aio.Server) -> None:
    text: Any = {"request_deserializer": _text, "response_serializer": _raw}
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(echo.unary, **text),
        "Expand": grpc.unary_stream_rpc_method_handler(echo.expand, **text),
        "Written": grpc.unary_stream_rpc_method_handler(echo.written, **text),
        "Collect": grpc.stream_unary_rpc_method_handler(echo.collect, **text),
        "Chat": grpc.stream_stream_rpc_method_handler(echo.chat, **text),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


@pytest.fixture
async def echo(monkeypatch: pytest.MonkeyPatch) -> Echo:
    def policy(method: str) -> Policy:
        return Policy(Role.ROLE_VIEWER)

    monkeypatch.setattr(interceptors, "policy_of", policy)
    return Echo()


@pytest.fixture
async def running(short_path: Path, echo: Echo) -> AsyncIterator[Running]:
    async with run_server(short_path, Component("echo", [Servicer(SERVICE, add, echo)])) as server:
        yield server


@pytest.fixture
async def channel(running: Running) -> AsyncIterator[aio.Channel]:
    async with open_channel(running.address, token="ekb_viewer") as channel:
        yield channel


def method(channel: aio.Channel, kind: str, name: str) -> Any:
    return getattr(channel, kind)(f"/{SERVICE}/{name}", _raw, _text)


async def texts(*values: str) -> AsyncIterator[str]:
    for value in values:
        yield value


async def call(channel: aio.Channel, name: str, *values: str) -> list[str]:
    """The answers of one method to `values`, whatever its kind."""
    match name:
        case "Unary":
            return [await method(channel, "unary_unary", name)(values[0])]
        case "Expand" | "Written":
            return [answer async for answer in method(channel, "unary_stream", name)(",".join(values))]
        case "Collect":
            return [await method(channel, "stream_unary", name)(texts(*values))]
        case _:
            return [answer async for answer in method(channel, "stream_stream", name)(texts(*values))]


KINDS = ["Unary", "Expand", "Written", "Collect", "Chat"]


@pytest.mark.parametrize("name", KINDS)
async def test_each_kind_answers_and_knows_its_caller(channel: aio.Channel, name: str) -> None:
    assert (await call(channel, name, "a"))[0] == "users/viewer:a"


@pytest.mark.parametrize("name", KINDS)
async def test_each_kind_raises_the_class_that_was_raised(channel: aio.Channel, name: str) -> None:
    with pytest.raises(errors.FailedPrecondition) as caught:
        await call(channel, name, "error")
    assert (caught.value.reason, caught.value.violations) == ("ECHO_BUSY", [("echo", "busy")])


@pytest.mark.parametrize("name", KINDS)
async def test_each_kind_turns_a_bug_into_internal(channel: aio.Channel, name: str) -> None:
    with pytest.raises(errors.Internal):
        await call(channel, name, "bug")


@pytest.mark.parametrize("name", KINDS)
async def test_each_kind_refuses_without_a_token_and_writes_it_down(running: Running, name: str) -> None:
    async with open_channel(running.address) as channel:
        with pytest.raises(errors.Unauthenticated):
            await call(channel, name, "a")
    assert [entry.outcome for entry in running.audit.entries] == ["UNAUTHENTICATED"]


async def test_an_error_in_the_middle_of_a_stream_comes_after_what_was_sent(channel: aio.Channel) -> None:
    got = []
    with pytest.raises(errors.FailedPrecondition):
        async for answer in method(channel, "unary_stream", "Expand")("a,b,error"):
            got.append(answer)
    assert got == ["users/viewer:a", "users/viewer:b"]


async def test_writing_and_reading_by_hand_work_too(channel: aio.Channel) -> None:
    chat = method(channel, "stream_stream", "Chat")()
    await chat.write("a")
    assert await chat.read() == "users/viewer:a"
    await chat.write("error")
    with pytest.raises(errors.FailedPrecondition):
        await chat.read()
    assert await chat.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_leaving_a_stream_early_stops_the_server(channel: aio.Channel, echo: Echo) -> None:
    async for answer in method(channel, "unary_stream", "Expand")("forever"):
        if answer == "more":
            break
    await until(lambda: echo.ended, "the servicer to end")
    produced = echo.produced
    await asyncio.sleep(0.05)
    assert echo.produced == produced


@pytest.mark.parametrize("request_text", ["forever", "silent"])
async def test_at_shutdown_streams_end_with_unavailable_within_no_time(
    running: Running, channel: aio.Channel, request_text: str
) -> None:
    got: list[str] = []

    async def follow() -> None:
        async for answer in method(channel, "unary_stream", "Expand")(request_text):
            got.append(answer)

    task = asyncio.create_task(follow())
    await until(lambda: got, "a first answer")
    before = asyncio.get_running_loop().time()
    running.stop.set()
    with pytest.raises(errors.Unavailable) as caught:
        await asyncio.wait_for(task, 5)
    assert caught.value.reason == "SERVER_STOPPING"
    assert asyncio.get_running_loop().time() - before < 4


async def test_a_stream_has_no_deadline_but_keeps_the_one_that_a_caller_sets(channel: aio.Channel) -> None:
    with pytest.raises(errors.DeadlineExceeded):
        async for _ in method(channel, "unary_stream", "Expand")("silent", timeout=0.2):
            pass
