"""Processes killed in the middle: what was committed is there, what was not is gone, and the next one starts."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import sqlalchemy as sa

from services.kernel.db import open_database
from tests.fixtures_kernel import until

WRITER = """
import asyncio, sys
import sqlalchemy as sa
from services.kernel.db import open_database

async def main():
    async with open_database(sys.argv[1]) as database:
        async with database.transaction() as connection:
            await connection.execute(sa.text("CREATE TABLE IF NOT EXISTS pairs (n INTEGER, half INTEGER)"))
        for n in range(100000):
            async with database.transaction() as connection:
                for half in (0, 1):
                    await connection.execute(sa.text("INSERT INTO pairs VALUES (:n, :half)"), {"n": n, "half": half})
            print(n, flush=True)

asyncio.run(main())
"""


async def test_a_writer_killed_at_any_moment_leaves_whole_transactions_and_no_lock(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'x.db'}"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    told = -1
    for round_number in range(3):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, url, stdout=subprocess.PIPE, env=env
        )
        assert process.stdout is not None
        for _ in range(20 + round_number):
            told = int(await asyncio.wait_for(process.stdout.readline(), 20))
        process.send_signal(signal.SIGKILL)
        await process.wait()
        async with open_database(url) as database:
            async with database.transaction() as connection:
                count = sa.text("SELECT n, count(*) AS halves FROM pairs GROUP BY n")
                rows = (await connection.execute(count)).all()
                assert {row.n for row in rows} >= set(range(told + 1))
                assert len({row.halves for row in rows}) == 1  # never half of a pair
                await connection.execute(sa.text("DELETE FROM pairs"))


SERVER = """
import asyncio, sys
from contextlib import asynccontextmanager
from pathlib import Path
from services.kernel.app import Component, serve
from services.kernel.settings import ServerSettings

class Nobody:
    async def authenticate(self, token): ...
    async def record(self, entry): ...

@asynccontextmanager
async def component():
    yield Component("a")

folder = Path(sys.argv[1])
settings = ServerSettings(service_token_file=folder / "t", listen=f"unix:{folder}/s.sock")
asyncio.run(serve([component()], settings, authenticator=Nobody(), auditor=Nobody()))
"""


async def test_a_server_killed_leaves_a_socket_that_the_next_one_takes_over(tmp_path: Path) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from ekiben.channel import open_channel
    from ekiben.errors import EkibenError

    (tmp_path / "t").write_text("eks_x")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    address = f"unix:{tmp_path}/s.sock"

    async with open_channel(address) as channel:  # one channel through it all, as a peer has
        stub = health_pb2_grpc.HealthStub(channel)

        async def serving() -> bool:
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=1)
            except EkibenError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

        for _ in range(2):
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", SERVER, str(tmp_path), env=env)
            try:
                await until(serving, "the server")
            finally:
                process.kill()
                await process.wait()
            assert (tmp_path / "s.sock").exists()
