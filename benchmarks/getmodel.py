"""(e) One model version read, over gRPC and HTTP, beside the same call of an MLflow server (`model-versions/get`)."""

import asyncio
import json
import tempfile
import time
import urllib.request
from pathlib import Path

import aiohttp
import grpc

from benchmarks.measure import Table, cpu_s, descendants
from benchmarks.peers import mlflow_server
from ekiben.registry.v1 import registry_pb2, registry_pb2_grpc
from tests.platform import Platform

CALLS = 2000
CONNECTIONS = 8


async def over_grpc(platform: Platform) -> None:
    """Read it again and again over one HTTP/2 connection."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{platform.port}") as channel:
        models = registry_pb2_grpc.ModelsStub(channel)
        request = registry_pb2.GetModelRequest(name="modelRepositories/bench/models/v1")
        metadata = (("authorization", f"Bearer {platform.token}"),)

        async def reader() -> None:
            for _ in range(CALLS // CONNECTIONS):
                await models.GetModel(request, metadata=metadata)

        await asyncio.gather(*(reader() for _ in range(CONNECTIONS)))


async def over_http(url: str, headers: dict[str, str]) -> None:
    """Read it again and again over kept connections."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS), headers=headers) as session:

        async def reader() -> None:
            for _ in range(CALLS // CONNECTIONS):
                async with session.get(url) as response:
                    assert response.status == 200, await response.text()
                    await response.read()

        await asyncio.gather(*(reader() for _ in range(CONNECTIONS)))


def mlflow_post(url: str, path: str, body: dict[str, str]) -> None:
    """One call of MLflow's REST API."""
    request = urllib.request.Request(
        f"{url}/api/2.0/mlflow/{path}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=30).read()


def run(rounds: int) -> None:
    """All three on the same machine, one after the other, in each round."""
    table = Table(f"GetModel: {CALLS} reads over {CONNECTIONS} connections")
    figures: dict[str, tuple[list[float], list[float]]] = {"grpc": ([], []), "http": ([], []), "mlflow": ([], [])}

    def measured(name: str, pid: int, load: "asyncio.Future[None] | object") -> None:
        before, began = cpu_s(descendants(pid)), time.perf_counter()
        asyncio.run(load)  # type: ignore[arg-type]
        figures[name][0].append(CALLS / (time.perf_counter() - began))
        figures[name][1].append((cpu_s(descendants(pid)) - before) / CALLS * 1e6)

    with tempfile.TemporaryDirectory() as folder:
        platform = Platform(Path(folder) / "data")
        try:
            platform.start()
            assert platform.process is not None
            made = platform.api("POST", "/v1/modelRepositories/bench/models?modelId=v1", {"manifest": "{}"})
            assert made.status == 200, made
            with mlflow_server(Path(folder) / "mlflow") as (url, pid):
                mlflow_post(url, "registered-models/create", {"name": "bench"})
                mlflow_post(url, "model-versions/create", {"name": "bench", "source": "s3://bench/model"})
                for _ in range(rounds):
                    measured("grpc", platform.process.pid, over_grpc(platform))
                    measured(
                        "http",
                        platform.process.pid,
                        over_http(
                            f"{platform.url}/v1/modelRepositories/bench/models/v1",
                            {"authorization": f"Bearer {platform.token}"},
                        ),
                    )
                    measured(
                        "mlflow", pid, over_http(f"{url}/api/2.0/mlflow/model-versions/get?name=bench&version=1", {})
                    )
        finally:
            platform.close()
    for name in ("grpc", "http"):
        table.add(f"{name}, calls per second", figures[name][0], figures["mlflow"][0], "1/s", "MLflow over HTTP")
        table.add(
            f"{name}, CPU per call (Envoy included)", figures[name][1], figures["mlflow"][1], "µs", "MLflow over HTTP"
        )
    table.print()
