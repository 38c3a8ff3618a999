"""How a process starts, tells its readiness, and ends."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from ekiben import errors
from ekiben.channel import open_channel
from ekiben.identity.v1 import identity_pb2 as pb
from ekiben.identity.v1 import identity_pb2_grpc as stubs
from services.kernel import telemetry
from services.kernel.app import Component, Servicer, serve
from services.kernel.db import open_database
from services.kernel.endings import NotStarted
from services.kernel.settings import ServerSettings, SettingsError
from tests.fixtures_kernel import run_server, short_path, until

__all__ = ["short_path"]


class Accounts(stubs.AccountsServicer):
    """Slow to answer, when asked to be."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.release = asyncio.Event()

    async def GetUser(self, request: pb.GetUserRequest, context: Any) -> pb.User:
        self.entered.set()
        await self.release.wait()
        return pb.User(name=request.name)


def servicer(accounts: Accounts) -> Servicer:
    return Servicer("ekiben.identity.v1.Accounts", stubs.add_AccountsServicer_to_server, accounts)


async def status(address: str, service: str) -> str:
    async with open_channel(address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


async def test_health_follows_each_component_and_the_whole(short_path: Path) -> None:
    broken = True

    async def ready() -> None:
        if broken:
            raise errors.Unavailable("The disk is full.", reason="DISK_FULL")

    one = Component("registry", [servicer(Accounts())], ready=ready)
    two = Component("builder")
    async with run_server(short_path, one, two) as running:

        async def is_status(service: str, expected: str) -> bool:
            return await status(running.address, service) == expected

        await until(lambda: is_status("builder", "SERVING"), "the builder to serve")
        for service in ("", "registry", "ekiben.identity.v1.Accounts"):
            assert await status(running.address, service) == "NOT_SERVING"
        broken = False
        for service in ("", "registry", "ekiben.identity.v1.Accounts"):
            await until(lambda s=service: is_status(s, "SERVING"), f"{service} to serve")
        with pytest.raises(errors.NotFound):
            await status(running.address, "nobody")


async def test_one_that_stands_by_is_not_to_be_called_and_has_no_fault(short_path: Path) -> None:
    standby = "Another one has it."
    component = Component("registry", [servicer(Accounts())], standby=lambda: standby)
    listen = f"unix:{short_path}/m.sock"
    async with (
        run_server(short_path, component, metrics_listen=listen) as running,
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(listen.removeprefix("unix:"))) as session,
    ):

        async def said(path: str) -> tuple[int, str]:
            async with session.get(f"http://x{path}") as response:
                return response.status, (await response.json())["components"]["registry"]

        async def serves(service: str) -> bool:
            return await status(running.address, service) == "SERVING"

        async def stands_by() -> bool:
            return await said("/readyz?standbyok=true") == (200, standby)

        await until(stands_by, "it to start")
        assert await said("/readyz") == (503, standby)
        for service in ("", "registry", "ekiben.identity.v1.Accounts"):
            assert not await serves(service)
        standby = ""
        for service in ("", "registry", "ekiben.identity.v1.Accounts"):
            await until(lambda s=service: serves(s), f"{service} to serve")
        assert await said("/readyz") == await said("/readyz?standbyok=true") == (200, "ready")


async def test_what_a_component_makes_is_for_its_user_only(short_path: Path) -> None:
    folder = short_path / "open"
    folder.mkdir(mode=0o755)
    done = asyncio.Event()
    made: list[Path] = []

    async def keep() -> None:
        async with open_database(f"sqlite:///{folder}/made/kept.db") as database:
            await database.ping()
            made.extend([folder / "made", *(folder / "made").iterdir()])
            assert [path for path in made if path.stat().st_mode & 0o077] == []
            done.set()
            await asyncio.Event().wait()

    async with run_server(short_path, Component("registry", loops=[keep])):
        await asyncio.wait_for(done.wait(), 10)
    assert folder / "made" / "kept.db" in made


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_tells_the_services_and_itself_to_anyone(short_path: Path, version: str) -> None:
    own = f"grpc.reflection.{version}.ServerReflection"
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="ekiben.identity.v1.Accounts"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=own),
    ]
    async with run_server(short_path, Component("registry", [servicer(Accounts())])) as running:
        async with open_channel(running.address) as channel:
            call = channel.stream_stream(
                f"/{own}/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )(iter(asked))
            answers = [answer async for answer in call]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {"ekiben.identity.v1.Accounts", "grpc.health.v1.Health", own} <= names
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(answer.file_descriptor_response.file_descriptor_proto[0])
        for answer in answers[1:]
    ]
    assert "Accounts" in {service.name for service in files[0].service}
    assert files[1].package == f"grpc.reflection.{version}"
    assert files[1].service[0].method[0].input_type == f".grpc.reflection.{version}.ServerReflectionRequest"


async def test_the_watchers_port_tells_metrics_health_and_why_not_ready(short_path: Path) -> None:
    async def ready() -> None:
        raise errors.Unavailable("The disk is full.")

    listen = f"unix:{short_path}/m.sock"
    async with run_server(short_path, Component("registry", ready=ready), metrics_listen=listen):
        connector = aiohttp.UnixConnector(f"{short_path}/m.sock")
        async with aiohttp.ClientSession("http://x", connector=connector) as session:

            async def reason() -> Any:
                async with session.get("/readyz") as response:
                    assert response.status == 503
                    return (await response.json())["components"]["registry"] == "The disk is full."

            await until(reason, "the reason")
            async with session.get("/healthz") as response:
                assert response.status == 200
            async with session.get("/metrics") as response:
                text = await response.text()
    assert "grpc_server_handled_total" in text and "# TYPE grpc_server_handling_seconds histogram" in text


async def test_the_end_comes_in_order(short_path: Path) -> None:
    order: list[str] = []
    accounts = Accounts()

    @asynccontextmanager
    async def opened(name: str) -> AsyncIterator[Component]:
        async def loop() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                order.append(f"loop {name}")

        async def drain() -> None:
            order.append(f"drain {name}")

        try:
            yield Component(name, [servicer(accounts)] if name == "a" else [], [loop], drain=drain)
        finally:
            order.append(f"close {name}")

    stop = asyncio.Event()
    up = asyncio.Event()

    async def started() -> None:
        up.set()

    (short_path / "t").write_text("eks_x")
    settings = ServerSettings(service_token_file=short_path / "t", listen=f"unix:{short_path}/s", grace_s=5)
    serving = asyncio.create_task(
        serve(
            [opened("a"), opened("b")],
            settings,
            started=started,
            stop=stop,
            authenticator=_Nobody(),
            auditor=_Nobody(),
        )
    )
    await asyncio.wait_for(up.wait(), 5)
    async with open_channel(f"unix:{short_path}/s", token="eks_x") as channel:
        call = asyncio.ensure_future(stubs.AccountsStub(channel).GetUser(pb.GetUserRequest(name="users/a")))
        await asyncio.wait_for(accounts.entered.wait(), 5)
        stop.set()
        await until(lambda: "loop a" in order and "loop b" in order, "loops to end")
        assert not serving.done()
        accounts.release.set()
        assert (await call).name == "users/a"  # a call in flight finishes
    await asyncio.wait_for(serving, 5)
    assert order[:2] == ["drain b", "drain a"]
    assert set(order[2:4]) == {"loop a", "loop b"}
    assert order[4:] == ["close b", "close a"]


class _Nobody:
    async def authenticate(self, token: str) -> Any:
        raise errors.Unauthenticated("Nobody.")

    async def record(self, entry: object) -> None:
        pass


async def test_a_call_that_outlasts_the_grace_is_cut(short_path: Path) -> None:
    accounts = Accounts()
    async with run_server(short_path, Component("a", [servicer(accounts)]), grace_s=0.1) as running:
        async with open_channel(running.address, token="ekb_viewer") as channel:
            waiting = asyncio.ensure_future(
                stubs.AccountsStub(channel).GetUser(pb.GetUserRequest(name="users/a"), timeout=20)
            )
            await asyncio.wait_for(accounts.entered.wait(), 5)
            running.stop.set()
            with pytest.raises((errors.Cancelled, errors.Unavailable, errors.DeadlineExceeded)):
                await asyncio.wait_for(waiting, 10)


@pytest.mark.parametrize("how", ["raises", "returns"])
async def test_a_loop_that_dies_ends_the_process_with_its_error(short_path: Path, how: str) -> None:
    async def loop() -> None:
        if how == "raises":
            raise KeyError("a bug")

    with pytest.raises(ExceptionGroup) as caught:
        async with run_server(short_path, Component("a", loops=[loop])) as running:
            assert running.task is not None
            await asyncio.wait({running.task}, timeout=5)
    (cause,) = caught.value.exceptions
    assert isinstance(cause, KeyError if how == "raises" else RuntimeError)


async def test_a_component_that_cannot_open_closes_those_before_it(short_path: Path) -> None:
    closed = []

    @asynccontextmanager
    async def good() -> AsyncIterator[Component]:
        try:
            yield Component("a")
        finally:
            closed.append("a")

    @asynccontextmanager
    async def bad() -> AsyncIterator[Component]:
        raise errors.Unavailable("No database.")
        yield

    settings = ServerSettings(service_token_file=short_path / "t", listen=f"unix:{short_path}/s")
    with pytest.raises(NotStarted, match="No database"):
        await serve([good(), bad()], settings, authenticator=_Nobody(), auditor=_Nobody())
    assert closed == ["a"]


async def test_an_address_in_use_is_told_as_such(short_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SettingsError, match="cannot listen"):
            async with run_server(short_path, Component("a"), listen=f"127.0.0.1:{taken.getsockname()[1]}"):
                pass


async def test_a_sockets_path_that_is_too_long_is_told_as_such(short_path: Path) -> None:
    with pytest.raises(SettingsError, match="longer than"):
        async with run_server(short_path, Component("a"), listen=f"unix:{short_path}/{'x' * 120}"):
            pass


async def test_a_free_port_is_told(short_path: Path) -> None:
    async with run_server(short_path, Component("a"), listen="127.0.0.1:0") as running:
        assert int(running.address.rpartition(":")[2]) > 0
        assert await status(running.address, "a") in ("SERVING", "NOT_SERVING")


async def test_loops_and_drains_belong_to_their_component_and_to_no_call(short_path: Path) -> None:
    seen: list[str] = []

    async def loop() -> None:
        seen.append(telemetry.current_component())
        await asyncio.Event().wait()

    async with run_server(short_path, Component("a", loops=[loop]), Component("b", loops=[loop])):
        await until(lambda: len(seen) == 2, "both loops")
    assert sorted(seen) == ["a", "b"]


MAIN = """
import asyncio, sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from services.kernel.app import Component, run_service

@dataclass(frozen=True)
class Settings:
    word: str

@asynccontextmanager
async def open_example(settings, peers):
    async def drain():
        print("drained", flush=True)
        if settings.word == "slow":
            await asyncio.sleep(60)
    yield Component("example", drain=drain)
    print("closed", flush=True)

run_service("example", open_example, Settings)
"""


@pytest.fixture
def start(short_path: Path) -> Callable[..., "Awaitable[asyncio.subprocess.Process]"]:
    (short_path / "main.py").write_text(MAIN)
    (short_path / "t").write_text("eks_x")

    async def run(word: str | None) -> asyncio.subprocess.Process:
        env = {key: value for key, value in os.environ.items() if not key.startswith("EKIBEN_")}
        env |= {
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "EKIBEN_SERVER_LISTEN": f"unix:{short_path}/s.sock",
            "EKIBEN_SERVER_SERVICE_TOKEN_FILE": str(short_path / "t"),
            "EKIBEN_PEERS_SERVICE_TOKEN_FILE": str(short_path / "t"),
            "EKIBEN_PEERS_REGISTRY": f"unix:{short_path}/none.sock",
        }
        if word is not None:
            env["EKIBEN_EXAMPLE_WORD"] = word
        return await asyncio.create_subprocess_exec(
            sys.executable, str(short_path / "main.py"), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_a_process_in_order_with_code_0(start: Any, short_path: Path, number: int) -> None:
    process = await start("quick")
    await until((short_path / "s.sock").exists, "the socket")
    await until(lambda: _serving(short_path), "the process to serve")
    process.send_signal(number)
    out, err = await asyncio.wait_for(process.communicate(), 15)
    assert (process.returncode, out.decode().split()) == (0, ["drained", "closed"]), err.decode()


async def test_a_second_signal_cuts_a_slow_drain_short(start: Any, short_path: Path) -> None:
    process = await start("slow")
    await until(lambda: _serving(short_path), "the process to serve")
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert (await asyncio.wait_for(process.stdout.readline(), 10)).strip() == b"drained"
    process.send_signal(signal.SIGTERM)
    await asyncio.wait_for(process.communicate(), 15)
    assert process.returncode != 0


async def test_wrong_settings_end_a_process_with_code_2_and_every_fault(start: Any) -> None:
    process = await start(None)
    _, err = await asyncio.wait_for(process.communicate(), 15)
    assert process.returncode == 2
    assert "EKIBEN_EXAMPLE_WORD is required" in err.decode() and "Traceback" not in err.decode()


async def _serving(folder: Path) -> bool:
    if not (folder / "s.sock").exists():
        return False
    return await status(f"unix:{folder}/s.sock", "example") == "SERVING"
