"""What it costs to create and to find a model among a million versions, beside MLflow on the same PostgreSQL.

`python -m benchmarks.registry.catalog [--scale 0.01] [--rounds 3] [--data FOLDER] [--connections 1 8]`:
scale 1 is 100,000 models with 1,000,000 versions. With a folder, what was seeded there before is used again.
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import statistics
import tempfile
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import asyncpg
import grpc

from benchmarks.measure import cpu_s, descendants
from benchmarks.peers import mlflow_server
from benchmarks.registry.postgres import postgres_server
from benchmarks.registry.seed import ALIAS, HOT, Seed, seed_mlflow, seed_postgres
from ekiben.registry.v1 import registry_pb2 as pb
from ekiben.registry.v1 import registry_pb2_grpc
from tests.platform import Platform

CALLS, CONNECTIONS = 400, (1, 8)
PATIENCE_S = 20.0
"""A round ends then, however few calls that were: some take seconds."""

Call = Callable[[random.Random], Awaitable[None]]
OPERATIONS = ("create", "get", "alias lookup", "search by three labels", "newest of one model")


@dataclass
class Figures:
    """Of one operation on one server, over all rounds."""

    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    server_ms: list[float] = field(default_factory=list)
    database_ms: list[float] = field(default_factory=list)

    def row(self) -> str:
        """As a row of the table."""
        ordered = sorted(self.seconds)
        p50, p95, p99 = (1000 * ordered[int(len(ordered) * share)] for share in (0.5, 0.95, 0.99))
        medians = (statistics.median(values) for values in (self.rates, self.server_ms, self.database_ms))
        rate, server, database = medians
        return f"{rate:.4g}/s | {p50:.3g} | {p95:.3g} | {p99:.3g} | {server:.3g} | {database:.3g}"


def picked(seed: Seed, dice: random.Random) -> tuple[str, dict[str, str]]:
    """A model, and the labels of some version: what is asked for is there."""
    found = seed.labels_of(dice.randrange(seed.versions))
    return seed.model(dice.randrange(1, seed.models)), {key: found[key] for key in ("team", "stage", "region")}


def over_grpc(channel: grpc.aio.Channel, token: str, seed: Seed) -> dict[str, Call]:
    """Ekiben's calls over gRPC."""
    models = registry_pb2_grpc.ModelsStub(channel)
    metadata = (("authorization", f"Bearer {token}"),)
    fresh = itertools.count(time.time_ns())

    async def create(dice: random.Random) -> None:
        parent = f"modelRepositories/{picked(seed, dice)[0]}"
        model = pb.Model(labels={"team": "team-1", "stage": "dev"}, manifest="{}")
        request = pb.CreateModelRequest(parent=parent, model_id=f"g{next(fresh)}", model=model)
        await models.CreateModel(request, metadata=metadata)

    async def get(dice: random.Random) -> None:
        name = f"modelRepositories/{HOT}/models/v{dice.randrange(1, seed.versions // 100)}"
        await models.GetModel(pb.GetModelRequest(name=name), metadata=metadata)

    async def alias(dice: random.Random) -> None:
        name = f"modelRepositories/{picked(seed, dice)[0]}/models/{ALIAS}"
        await models.GetModel(pb.GetModelRequest(name=name), metadata=metadata)

    async def search(dice: random.Random) -> None:
        wanted = " ".join(f"label:{key}={value}" for key, value in picked(seed, dice)[1].items())
        request = pb.ListModelsRequest(parent="modelRepositories/-", filter=wanted)
        found = await models.ListModels(request, metadata=metadata)
        assert found.models

    async def newest(_: random.Random) -> None:
        await models.ListModels(pb.ListModelsRequest(parent=f"modelRepositories/{HOT}"), metadata=metadata)

    return dict(zip(OPERATIONS, (create, get, alias, search, newest), strict=True))


def over_http(session: aiohttp.ClientSession, url: str, seed: Seed) -> dict[str, Call]:
    """Ekiben's calls over HTTP, through Envoy and the gateway."""
    fresh = itertools.count(time.time_ns())

    async def call(method: str, path: str, body: object = None) -> None:
        async with session.request(method, f"{url}/v1/modelRepositories/{path}", json=body) as response:
            assert response.status == 200, await response.text()
            await response.read()

    async def create(dice: random.Random) -> None:
        body = {"labels": {"team": "team-1", "stage": "dev"}, "manifest": "{}"}
        await call("POST", f"{picked(seed, dice)[0]}/models?modelId=h{next(fresh)}", body)

    async def get(dice: random.Random) -> None:
        await call("GET", f"{HOT}/models/v{dice.randrange(1, seed.versions // 100)}")

    async def alias(dice: random.Random) -> None:
        await call("GET", f"{picked(seed, dice)[0]}/models/{ALIAS}")

    async def search(dice: random.Random) -> None:
        wanted = " ".join(f"label:{key}={value}" for key, value in picked(seed, dice)[1].items())
        await call("GET", f"-/models?filter={urllib.parse.quote(wanted)}")

    async def newest(_: random.Random) -> None:
        await call("GET", f"{HOT}/models")

    return dict(zip(OPERATIONS, (create, get, alias, search, newest), strict=True))


def of_mlflow(session: aiohttp.ClientSession, url: str, seed: Seed) -> dict[str, Call]:
    """The same of MLflow."""

    async def call(method: str, path: str, body: object = None, **params: str) -> None:
        async with session.request(method, f"{url}/api/2.0/mlflow/{path}", json=body, params=params) as response:
            assert response.status == 200, await response.text()
            await response.read()

    async def create(dice: random.Random) -> None:
        tags = [{"key": "team", "value": "team-1"}, {"key": "stage", "value": "dev"}]
        body = {"name": picked(seed, dice)[0], "source": "s3://models/x", "tags": tags}
        await call("POST", "model-versions/create", body)

    async def get(dice: random.Random) -> None:
        await call("GET", "model-versions/get", name=HOT, version=str(dice.randrange(1, seed.versions // 100)))

    async def alias(dice: random.Random) -> None:
        await call("GET", "registered-models/alias", name=picked(seed, dice)[0], alias=ALIAS)

    async def search(dice: random.Random) -> None:
        wanted = " and ".join(f"tags.{key} = '{value}'" for key, value in picked(seed, dice)[1].items())
        await call("GET", "model-versions/search", filter=wanted, max_results="50")

    async def newest(_: random.Random) -> None:
        order = "creation_timestamp DESC"
        await call("GET", "model-versions/search", filter=f"name = '{HOT}'", order_by=order, max_results="50")

    return dict(zip(OPERATIONS, (create, get, alias, search, newest), strict=True))


def cpu_of_each(pid: int) -> dict[int, float]:
    """CPU seconds of a process and each below it: one that ends meanwhile takes only its own away."""
    return {each: cpu_s([each]) for each in descendants(pid)}


async def measure(
    call: Call, figures: Figures, pid: int, database: int, calls: int, connections: int, salt: int
) -> None:
    """Call it again and again over so many connections; what each took, and the CPU of both servers."""
    await call(random.Random(salt))
    before, database_before = cpu_of_each(pid), cpu_of_each(database)
    began = time.perf_counter()
    left = itertools.count()
    done: list[float] = []

    async def caller(number: int) -> None:
        dice = random.Random(1000 * salt + number)
        while next(left) < calls and time.perf_counter() - began < PATIENCE_S:
            start = time.perf_counter()
            await call(dice)
            done.append(time.perf_counter() - start)

    await asyncio.gather(*(caller(number) for number in range(connections)))
    figures.seconds += done
    figures.rates.append(len(done) / (time.perf_counter() - began))
    for root, earlier, found in ((pid, before, figures.server_ms), (database, database_before, figures.database_ms)):
        used = sum(now - earlier.get(each, 0.0) for each, now in cpu_of_each(root).items())
        found.append(used / len(done) * 1000)


async def made(host: str, database: str) -> asyncpg.Connection:
    """A connection to a database, which is made when missing."""
    server = await asyncpg.connect(host=host, user="postgres", database="postgres")
    if not await server.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", database):
        await server.execute(f"CREATE DATABASE {database}")
    await server.close()
    return await asyncpg.connect(host=host, user="postgres", database=database)


async def seeded(host: str, database: str, seed: Seed, start: Callable[[], object]) -> None:
    """Let a server make its tables, unless they are filled already, and fill them."""
    connection = await made(host, database)
    schema, table = ("ekiben_registry", "versions") if database == "ekiben" else ("public", "model_versions")
    await connection.execute(f"SET search_path = {schema}, public")
    if not await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", table):
        await asyncio.to_thread(start)
    if not await connection.fetchval(f"SELECT EXISTS (SELECT 1 FROM {table})"):
        began = time.perf_counter()
        await (seed_postgres if database == "ekiben" else seed_mlflow)(connection, seed)
        print(f"{database}: {seed.versions:,} versions seeded in {time.perf_counter() - began:.0f} s", flush=True)
    await connection.close()


@contextlib.contextmanager
def folder_of(given: Path | None) -> Iterator[Path]:
    """The folder given, or one that goes."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="ekiben-bench-", dir="/tmp") as name:
        Path(name).chmod(0o755)  # PostgreSQL's user passes through it
        yield Path(name)


async def compare(folder: Path, seed: Seed, rounds: int, calls: int, connections: Sequence[int]) -> None:
    """Seed both, then measure each operation on each in turn, and print the table."""
    with contextlib.ExitStack() as stack:
        host, database = stack.enter_context(postgres_server(folder / "postgres"))
        platform = Platform(folder / "data", env={"EKIBEN_DATABASE_URL": f"postgresql://postgres@/ekiben?host={host}"})
        stack.callback(platform.close)
        mlflow_url = f"postgresql+psycopg2://postgres@/mlflow?host={host}"

        def start_mlflow() -> None:
            with mlflow_server(folder / "mlflow", mlflow_url):
                pass

        def start_ekiben() -> None:
            platform.start()
            platform.stop()

        await seeded(host, "ekiben", seed, start_ekiben)
        await seeded(host, "mlflow", seed, start_mlflow)
        await asyncio.to_thread(platform.start)
        assert platform.process is not None
        url, pid = stack.enter_context(mlflow_server(folder / "mlflow", mlflow_url))
        figures: dict[tuple[str, str, int], Figures] = {}
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{platform.port}") as channel,
            aiohttp.ClientSession(headers={"authorization": f"Bearer {platform.token}"}) as session,
            aiohttp.ClientSession() as plain,
        ):
            servers = {
                "gRPC": (over_grpc(channel, platform.token, seed), platform.process.pid),
                "HTTP": (over_http(session, platform.url, seed), platform.process.pid),
                "MLflow": (of_mlflow(plain, url, seed), pid),
            }
            for number in range(rounds):
                for operation in OPERATIONS:
                    for (server, (of_server, server_pid)), at_once in itertools.product(servers.items(), connections):
                        found = figures.setdefault((operation, server, at_once), Figures())
                        await measure(of_server[operation], found, server_pid, database, calls, at_once, number)
        print(f"\n### {seed.models:,} models, {seed.versions:,} versions\n")
        print(
            "| what | server | connections | rate | p50 ms | p95 ms | p99 ms | server's CPU ms | PostgreSQL's CPU ms |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for (operation, server, at_once), found in figures.items():
            print(f"| {operation} | {server} | {at_once} | {found.row()} |", flush=True)


def main() -> None:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.registry.catalog", description=__doc__)
    parser.add_argument("--scale", type=float, default=0.01, help="1 is a million versions (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each (default: %(default)s)")
    parser.add_argument("--calls", type=int, default=CALLS, help="calls in a round (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="a folder that is kept, with what was seeded, for the next run")
    parser.add_argument(
        "--connections", type=int, nargs="+", default=CONNECTIONS, help="how many at once (default: 1 and 8)"
    )
    arguments = parser.parse_args()
    with folder_of(arguments.data) as folder:
        asyncio.run(
            compare(folder, Seed(arguments.scale), arguments.rounds, arguments.calls, tuple(arguments.connections))
        )


if __name__ == "__main__":
    main()
