"""The data plane as it is served: the real gateway with its Envoy and the real recorder; only the routes are given.

`python -m benchmarks.plane FOLDER PUBLIC_PORT UPSTREAM PORT:PERCENT…`: a deployment for each port, which captures so
many percent of its predictions.
"""

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from google.protobuf.empty_pb2 import Empty

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.deployer.v1.deployer_pb2_grpc import add_RoutesServicer_to_server
from services.gateway.app import open_gateway
from services.gateway.settings import Settings as GatewaySettings
from services.kernel.app import Component, Servicer, serve
from services.kernel.peers import open_peers
from services.kernel.settings import PeerSettings, ServerSettings
from services.recorder.app import open_recorder
from services.recorder.settings import Settings as RecorderSettings


class Routes:
    """Stands in for the deployer."""

    def __init__(self, table: pb.RouteTable) -> None:
        self._table = table

    async def WatchRoutes(self, request: pb.WatchRoutesRequest, context: Any) -> AsyncIterator[pb.RouteTable]:
        """The table, which never changes."""
        yield self._table
        await asyncio.Event().wait()

    async def AcknowledgeRoutes(self, request: pb.AcknowledgeRoutesRequest, context: Any) -> Empty:
        """Nothing waits for it."""
        return Empty()


def route(port: int, percent: float, upstream: str) -> pb.Route:
    """A deployment with one replica, at a port of its own."""
    name = f"bench-{port}"
    target = pb.Target(
        target="main",
        revision=f"deployments/{name}/revisions/1",
        bento=f"bentoRepositories/{name}/bentos/v1",
        models=["modelRepositories/bench/models/v1"],
        weight=100,
        service="Bench",
        endpoints=[pb.Endpoint(replica=f"{name}-0", address=upstream)],
    )
    return pb.Route(
        deployment=f"deployments/{name}",
        organization="organizations/default",
        hosts=[f"{name}-default.localhost"],
        port=port,
        capture=pb.CapturePolicy(sample_percent=percent),
        targets=[target],
    )


@asynccontextmanager
async def open_deployer(table: pb.RouteTable) -> AsyncIterator[Component]:
    """The stand-in as a component."""
    yield Component(
        "deployer", servicers=[Servicer("ekiben.deployer.v1.Routes", add_RoutesServicer_to_server, Routes(table))]
    )


async def run(folder: Path, port: int, upstream: str, deployments: list[str]) -> None:
    """Serve until SIGTERM, in one process as `ekiben up` does. One worker of Envoy, as the peers have."""
    token = folder / "service-token"
    token.write_text("eks_benchmark_" + "0" * 32)
    with tempfile.TemporaryDirectory(prefix="ekb") as run_dir:  # Short: a socket's path has at most 107 bytes.
        suite = f"unix:{run_dir}/suite.sock"
        server = ServerSettings(service_token_file=token, listen=suite, otlp_endpoint=suite, log_level="WARNING")
        addresses = PeerSettings(
            service_token_file=token, deployer=suite, recorder=suite, registry=suite, builder=suite
        )
        recorder = RecorderSettings(database_url=f"sqlite+aiosqlite:///{folder}/recorder.db")
        gateway = GatewaySettings(
            data_dir=folder / "gateway", run_dir=Path(run_dir) / "g", port=port, envoy_concurrency=1, orphan_grace_s=1.0
        )
        pairs = [each.split(":") for each in deployments]
        table = pb.RouteTable(version=1, routes=[route(int(own), float(share), upstream) for own, share in pairs])
        async with open_peers(addresses, caller="benchmark") as peers:
            await serve(
                [open_deployer(table), open_recorder(recorder, peers), open_gateway(gateway, peers)],
                server,
                peers=peers,
            )


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]))
