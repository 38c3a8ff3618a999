"""What goes wrong around the gateway hurts no prediction."""

import asyncio
import contextlib
import os
import signal
import sys

import aiohttp
import pytest

from ekiben.recorder.v1 import recorder_pb2 as pb
from services.gateway import envoy
from services.gateway.captures import CaptureLog, Captures
from services.kernel.clock import SYSTEM
from tests.fixtures_gateway import Plane, client, echo, gateway_settings, open_plane, route, serve, until

__all__ = ["client", "gateway_settings"]


class Recorder:
    def __init__(self) -> None:
        self.names: set[str] = set()

    async def RecordPredictions(self, request: pb.RecordPredictionsRequest) -> None:
        self.names.update(each.path for each in request.predictions)


async def run(*argv: str) -> bool:
    quiet = asyncio.subprocess.DEVNULL
    return await (await asyncio.create_subprocess_exec(*argv, stdout=quiet, stderr=quiet)).wait() == 0


async def failures(plane: Plane) -> int:
    return (await plane.envoy.admin.counters("filesystem.write_failed"))["filesystem.write_failed"]


async def test_a_full_disk_stops_captures_not_traffic_is_counted_and_passes(
    gateway_settings: object, client: aiohttp.ClientSession
) -> None:
    folder = gateway_settings.captures_dir  # type: ignore[attr-defined]
    folder.mkdir(parents=True)
    if os.getuid() != 0 or not await run("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)):
        pytest.skip("needs the right to mount a small file system")
    try:
        async with serve(echo) as address, open_plane(gateway_settings) as plane:  # type: ignore[arg-type]
            await plane.deployer.publish(route("iris", address))

            async def post(path: str) -> None:
                async with client.post(plane.url + path, data=b"x" * 20_000, headers=plane.host("iris")) as answer:
                    assert answer.status == 200

            failed = 0
            for i in range(200):
                await post(f"/{i}")
                failed = await failures(plane)
                if failed:
                    break
            assert failed
            for i in range(20):
                await post(f"/full/{i}")
            log, recorder = CaptureLog(folder), Recorder()
            reopen = plane.envoy.admin.post
            sender = Captures(
                log,
                recorder,  # type: ignore[arg-type]
                lambda: reopen("/reopen_logs"),
                SYSTEM,
                segment_bytes=100_000,
                backlog_bytes=1 << 30,
            )
            sending = asyncio.create_task(sender.run())
            await until(lambda: len(recorder.names) >= 5)
            # What was kept is sent, its file deleted, and there is room again.
            await until(lambda: log.size() < 100_000)
            await post("/after")
            await until(lambda: "/after" in recorder.names)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
    finally:
        await run("umount", "-l", str(folder))


REPLICA = """
import asyncio, sys
from aiohttp import web

async def main():
    async def answer(request):
        await request.read()
        await asyncio.sleep(0.005)
        return web.Response(text="ok")
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, sys.argv[1]).start()
    print("listening", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_killed_replica_fails_only_the_requests_that_it_had(
    gateway_settings: object, client: aiohttp.ClientSession
) -> None:
    statuses: list[int] = []
    settings = gateway_settings
    processes = []
    for i in range(2):
        path = settings.run_dir / f"{i}.sock"  # type: ignore[attr-defined]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", REPLICA, str(path), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"listening\n"
        processes.append((process, f"unix:{path}"))
    try:
        async with open_plane(settings) as plane:  # type: ignore[arg-type]
            await plane.deployer.publish(route("iris", *(address for _, address in processes)))

            async def load() -> None:
                for _ in range(40):
                    async with client.post(plane.url, data=b"x", headers=plane.host("iris")) as answer:
                        statuses.append(answer.status)

            async with asyncio.TaskGroup() as group:
                for _ in range(8):
                    group.create_task(load())
                await until(lambda: len(statuses) > 50)
                processes[0][0].send_signal(signal.SIGKILL)
    finally:
        for process, _ in processes:
            if process.returncode is None:
                process.kill()
            await process.wait()
    assert len(statuses) == 320
    assert statuses.count(200) >= 320 - 8  # At most what was in flight on it.
    assert set(statuses[-100:]) == {200}


async def test_an_envoy_that_hangs_is_started_again(
    gateway_settings: object, client: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envoy, "PROBE_S", 0.2)
    monkeypatch.setattr(envoy, "HANG_S", 1.0)
    async with serve(echo) as address, open_plane(gateway_settings) as plane:  # type: ignore[arg-type]
        await plane.deployer.publish(route("iris", address))
        assert plane.envoy._process is not None
        hanging = plane.envoy._process.pid
        os.kill(hanging, signal.SIGSTOP)

        async def answers() -> bool:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                headers = plane.host("iris")
                async with client.post(plane.url, headers=headers, timeout=aiohttp.ClientTimeout(total=1)) as answer:
                    return answer.status == 200
            return False

        async with asyncio.timeout(40):
            while not await answers():  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert plane.envoy.restarts == 1
        assert not os.path.exists(f"/proc/{hanging}")  # noqa: PTH110


async def test_a_replica_that_answers_nonsense_is_a_problem_not_a_hang(
    gateway_settings: object, client: aiohttp.ClientSession
) -> None:
    async def nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"\x00nonsense\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(nonsense, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, open_plane(gateway_settings) as plane:  # type: ignore[arg-type]
        await plane.deployer.publish(route("iris", f"127.0.0.1:{port}"))
        async with client.post(plane.url, data=b"x", headers=plane.host("iris")) as answer:
            assert answer.status in (502, 503)
            assert answer.content_type == "application/problem+json"
            assert (await answer.json(content_type=None))["reason"] == "REPLICA_UNREACHABLE"
