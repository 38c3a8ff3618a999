"""Builders in processes of their own, to be killed and started again."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ekiben.builder.v1 import builder_pb2 as pb
from ekiben.builder.v1.builder_pb2_grpc import BuildsStub
from ekiben.channel import open_channel
from tests.fixtures_builder import Registry
from tests.fixtures_kernel import until

if TYPE_CHECKING:
    from ekiben.builder.v1.builder_pb2_grpc import BuildsAsyncStub

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Process:
    """A builder in a process of its own, started again and again."""

    registry: Registry
    data_dir: Path
    step: str = ""
    settings: dict[str, object] = field(default_factory=dict)
    running: subprocess.Popen[bytes] | None = None
    name: str = "b"
    """Of this one among several on one folder."""

    @property
    def address(self) -> str:
        return f"unix:{self.registry.run_dir}/builder-{self.name}"

    def start(self) -> None:
        peers = self.registry.peers
        given = {
            "builder": {
                "database_url": f"sqlite:///{self.data_dir}/builder.db",
                "data_dir": str(self.data_dir),
                "run_dir": str(self.registry.run_dir / self.name),
                **self.settings,
            },
            "peers": {"registry": peers.registry, "blobs": peers.blobs},
            "listen": self.address,
            "service_token_file": str(peers.service_token_file),
            "step": self.step,
            "once": str(self.data_dir.parent / "once"),
        }
        file = self.data_dir.parent / f"builder-{self.name}.json"
        file.write_text(json.dumps(given))
        with (self.data_dir.parent / "builder.log").open("ab") as log:
            self.running = subprocess.Popen(
                [sys.executable, "-m", "tests.builder_process", str(file)], cwd=ROOT, stdout=log, stderr=log
            )

    async def died(self) -> None:
        running = self.running
        assert running is not None
        await until(lambda: running.poll() is not None, "the builder is killed", 30)
        assert running.returncode == -signal.SIGKILL, (self.data_dir.parent / "builder.log").read_text()

    def end(self) -> None:
        if self.running is not None and self.running.poll() is None:
            self.running.kill()
            self.running.wait()


@asynccontextmanager
async def builds(process: Process) -> AsyncIterator["BuildsAsyncStub"]:
    async with open_channel(process.address, token=process.registry.admin_token) as channel:
        yield BuildsStub(channel)


async def created(process: Process, bento: str, **request: Any) -> str:
    """The name of a new build; the builder may still be starting."""
    # A channel that finds nobody tries again later and later; and a call waits for half a minute.
    await until(Path(process.address.removeprefix("unix:")).exists, "the builder listens", 90)
    async with builds(process) as stub:
        async with asyncio.timeout(90):
            build = await stub.CreateBuild(pb.CreateBuildRequest(bento=bento, **request), wait_for_ready=True)
    return build.name


async def ended(process: Process, name: str) -> tuple[pb.Build, list[str]]:
    async with builds(process) as stub:
        async with asyncio.timeout(120):
            request = pb.WatchBuildRequest(name=name)
            build = [build async for build in stub.WatchBuild(request, wait_for_ready=True)][-1]
            lines = [line.text async for line in stub.ReadBuildLog(pb.ReadBuildLogRequest(name=name))]
    return build, lines
