"""How a replica is given up."""

import asyncio
from pathlib import Path
from typing import Any, cast

from aiohttp import web

from services.deployer.runtimes import Phase
from services.deployer.runtimes.replica import Limits, Replica
from services.deployer.runtimes.serving import Telemetry
from services.deployer.runtimes.starting import Folders, ProcessStarter
from services.kernel.clock import SYSTEM
from services.kernel.processes import SupervisedProcess


class Process:
    """A process that ends well once it is told to."""

    returncode: int | None = None
    out_of_memory = shim_lost = False

    def __init__(self) -> None:
        self._ended = asyncio.Event()

    async def wait(self) -> int:
        await self._ended.wait()
        return 0

    async def stop(self, grace_s: float) -> int:
        self.returncode = 0
        self._ended.set()
        await asyncio.sleep(0)
        return 0


def replica(folder: Path, limits: Limits) -> Replica:
    folders = Folders(folder, folder, folder, folder / "s", folder / "log", folder, folder)
    starter = ProcessStarter(folder, folder, cast("Any", None), Telemetry())
    return Replica("iris-1", "m", folders, limits, SYSTEM, starter, lambda: None, None)


async def test_replica_that_never_gets_ready_says_so_and_what_it_answered(tmp_path: Path) -> None:
    async def unready(request: web.Request) -> web.Response:
        return web.Response(status=404)

    app = web.Application()
    app.router.add_get("/readyz", unready)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "s")).start()
    one = replica(tmp_path, Limits(start_timeout_s=0.5))
    try:
        await one._watch(cast("SupervisedProcess", Process()))
    finally:
        await runner.cleanup()
    seen = one.status()
    assert seen.phase is Phase.CRASHED
    assert "was not ready within" in seen.message and "answered /readyz with 404" in seen.message
    assert seen.failed_starts == 1, "one failed start, not one for giving up and one for the end"
