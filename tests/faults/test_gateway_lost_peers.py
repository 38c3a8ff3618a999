"""A machine that vanishes without a word: its requests are answered, and those of slow but living replicas wait on."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator

import aiohttp
import pytest

from services.gateway.settings import Settings
from services.gateway.sockets import noticing_lost_peers
from tests.fixtures_gateway import Plane, client, gateway_settings, open_plane, route

__all__ = ["client", "gateway_settings"]

REPLICA = """
import asyncio, sys
from aiohttp import web

async def answer(request):
    body = await request.text()
    print(body, flush=True)
    if body == "think":
        await asyncio.Event().wait()
    return web.Response(text=body)

async def main():
    app = web.Application()
    app.router.add_post("/", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, sys.argv[1], 8000).start()
    print("listening", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
BODY = b"x" * (16 << 20)
"""More than the kernels of both sides keep for one that does not read."""

SPARES_WHO_DOES_NOT_READ = "TCP_RTO_MAX" in str(noticing_lost_peers())
"""Linux 6.15 and later."""


async def ip(*argv: str) -> bool:
    quiet = asyncio.subprocess.DEVNULL
    return await (await asyncio.create_subprocess_exec("ip", *argv, stdout=quiet, stderr=quiet)).wait() == 0


class Machine:
    """Another machine on a wire: a network namespace with a replica in it."""

    def __init__(self, name: str, address: str, replica: asyncio.subprocess.Process) -> None:
        self.address = f"{address}:8000"
        self._name = name
        self._peer = address
        self._replica = replica

    async def says(self, line: str) -> None:
        """Wait until the replica says something."""
        assert self._replica.stdout is not None
        async with asyncio.timeout(60):
            assert await self._replica.stdout.readline() == f"{line}\n".encode()

    async def vanish(self) -> None:
        """Whatever comes is thrown away without an answer from now on."""
        assert await ip("-n", self._name, "address", "del", f"{self._peer}/30", "dev", "wire")


@contextlib.asynccontextmanager
async def another_machine() -> AsyncIterator[Machine]:
    if os.getuid() != 0:
        pytest.skip("needs the right to make network namespaces")
    own = os.getpid() % 16000 * 4  # A network of four addresses among those that nobody routes (RFC 2544).
    here, there = (f"198.{18 + own // 65536}.{own // 256 % 256}.{own % 256 + i}" for i in (1, 2))
    name, wire = f"ekiben-{os.getpid()}", f"ek{os.getpid()}"
    if not await ip("netns", "add", name):
        pytest.skip("needs the right to make network namespaces")
    replica = None
    try:
        assert await ip("link", "add", wire, "type", "veth", "peer", "name", "wire", "netns", name)
        for within, end, address in (((), wire, here), (("-n", name), "wire", there)):
            assert await ip(*within, "address", "add", f"{address}/30", "dev", end)
            assert await ip(*within, "link", "set", end, "up")
        replica = await asyncio.create_subprocess_exec(
            "ip", "netns", "exec", name, sys.executable, "-c", REPLICA, there, stdout=asyncio.subprocess.PIPE
        )
        machine = Machine(name, there, replica)
        await machine.says("listening")
        yield machine
    finally:
        if replica is not None:
            replica.kill()
            await replica.wait()
        await ip("link", "del", wire)
        await ip("netns", "del", name)


@contextlib.asynccontextmanager
async def patient_replica(reads: asyncio.Event, answers: asyncio.Event) -> AsyncIterator[str]:
    """One that reads nothing of a body, or answers nothing, until it is told to. Gives its address."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reads.wait()
        await reader.readexactly(len(BODY))
        await answers.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_machine_that_vanishes_is_noticed_and_who_is_slow_is_not_cut(
    gateway_settings: Settings, client: aiohttp.ClientSession
) -> None:
    reads, answers, at_once = asyncio.Event(), asyncio.Event(), asyncio.Event()
    at_once.set()

    async def post(plane: Plane, name: str, body: bytes) -> tuple[int, str]:
        async with client.post(plane.url, data=body, headers=plane.host(name)) as answer:
            if answer.content_type == "application/problem+json":
                return answer.status, (await answer.json(content_type=None))["reason"]
            return answer.status, await answer.text()

    async with (
        another_machine() as machine,
        patient_replica(reads, at_once) as unread,
        patient_replica(at_once, answers) as thinking,
        open_plane(gateway_settings) as plane,
    ):
        routes = [route("lost", machine.address), route("unread", unread), route("thinking", thinking)]
        await plane.deployer.publish(*routes)
        slow = ["thinking", *(["unread"] if SPARES_WHO_DOES_NOT_READ else [])]
        living = [asyncio.create_task(post(plane, name, BODY)) for name in slow]
        # One that has arrived, and one that is sent into the void on a connection that was good until then.
        arrived = asyncio.create_task(post(plane, "lost", b"think"))
        await machine.says("think")
        assert await post(plane, "lost", b"hello") == (200, "hello")
        await machine.vanish()
        sent = asyncio.create_task(post(plane, "lost", b"there?"))
        async with asyncio.timeout(150):  # The kernel alone takes 900 s for one of them, 7,875 s for the other.
            assert await asyncio.gather(arrived, sent) == [(503, "CONNECTION_LOST")] * 2
        assert not any(each.done() for each in living)
        reads.set()
        answers.set()
        async with asyncio.timeout(60):
            assert await asyncio.gather(*living) == [(200, "ok")] * len(slow)
