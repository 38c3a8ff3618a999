"""SIGKILL of the deployer and of every part of a replica: all ends in the right state, and no process is left."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.errors import EkibenError
from services.kernel import processes, shim
from tests.fixtures_deployer import (
    SOURCES,
    Built,
    DeployerProcess,
    Registry,
    Suite,
    built,
    calling,
    deployer_folders,
    registry,
    running_builds,
)

__all__ = ["built", "deployer_folders", "registry"]

pytestmark = pytest.mark.timeout(240)

Running = tuple[Suite, DeployerProcess]


@pytest.fixture
async def running(registry: Registry, deployer_folders: tuple[Path, Path]) -> AsyncIterator[Running]:
    """A deployer in a process of its own, its neighbours in this one."""
    async with running_builds(registry) as (builds, peer):
        process = DeployerProcess(registry, peer, *deployer_folders, liveness_s=4.0)
        await process.start()
        try:
            async with calling(registry, process.address, process.settings, builds) as suite:
                yield suite, process
        finally:
            process.kill()


def tree(suite: Suite) -> dict[str, list[int]]:
    """Pids of each replica that runs, its shim left out."""
    mark, found = processes.mark_of("deployer", suite.data_dir), {}
    for pid, of, id in processes._marked(processes.MARK):
        if of == mark and not shim.is_zombie(pid):
            found.setdefault(id, []).append(pid)
    return found


def shims(suite: Suite) -> list[int]:
    """Pids of the shims."""
    mark = processes.mark_of("deployer", suite.data_dir)
    return [pid for pid, of, _ in processes._marked(processes.SHIM_MARK) if of == mark and not shim.is_zombie(pid)]


async def eventually(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {what}") from None


async def answers(suite: Suite, name: str, timeout_s: float = 60.0) -> None:
    """Wait until a deployment serves."""
    async with asyncio.timeout(timeout_s):
        while True:
            with contextlib.suppress(OSError, StopIteration, TimeoutError, EkibenError, RuntimeError):
                if (await suite.call(name, "/slow", {"seconds": 0}, 2.0))[0] == 200:
                    return
            await asyncio.sleep(0.1)


async def running_again(suite: Suite, name: str) -> pb.Deployment:
    """The deployment once it runs, over a restart of the deployer."""
    async with asyncio.timeout(90):
        while True:
            with contextlib.suppress(EkibenError, AssertionError):
                return await suite.running(name)
            await asyncio.sleep(0.2)


async def test_a_killed_deployer_adopts_its_replicas(running: Running, built: Callable[..., Built]) -> None:
    suite, process = running
    await suite.create("kept", await suite.push(built("plain")))
    await suite.running("kept")
    before = tree(suite)
    process.kill()
    await process.start()
    await running_again(suite, "kept")
    await answers(suite, "kept")
    assert tree(suite) == before
    (replica,) = await suite.replicas("kept")
    assert (replica.state, replica.restart_count) == (pb.Replica.READY, 0)


@pytest.mark.parametrize("moment_s", [0.0, 0.7, 2.5])
async def test_a_deployer_killed_in_the_middle_of_an_update_ends_it(
    running: Running, built: Callable[..., Built], moment_s: float
) -> None:
    suite, process = running
    first = await suite.push(built("plain"))
    second = await suite.push(built("plain", SOURCES["plain"].replace('"done"', '"done again"')))
    await suite.create("updated", first)
    await suite.running("updated")
    sent = pb.Deployment(name="deployments/updated", template=pb.Template(bento=second))
    await suite.deployments.UpdateDeployment(pb.UpdateDeploymentRequest(deployment=sent))
    await asyncio.sleep(moment_s)
    process.kill()
    await process.start()
    deployment = await running_again(suite, "updated")
    assert deployment.serving_revision.endswith("/2")
    assert await suite.call("updated", "/slow", {"seconds": 0}) == (200, "done again")
    await eventually(lambda: len(tree(suite)) == 1, "one replica")
    assert len(await suite.replicas("updated")) == 1


async def test_a_deployer_killed_in_the_middle_of_a_deploy_ends_it(
    running: Running, built: Callable[..., Built]
) -> None:
    suite, process = running
    await suite.create("new", await suite.push(built("plain")))
    process.kill()
    await process.start()
    await running_again(suite, "new")
    await answers(suite, "new")
    assert len(tree(suite)) == 1


@pytest.mark.parametrize("victim", ["supervisor", "worker", "shim", "everything"])
async def test_a_replica_whose_parts_are_killed_is_whole_again(
    running: Running, built: Callable[..., Built], victim: str
) -> None:
    suite, _ = running
    await suite.create("hurt", await suite.push(built("plain")))
    await suite.running("hurt")
    (replica,) = await suite.replicas("hurt")
    (pids,) = tree(suite).values()
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids}
    supervisor = [pid for pid, line in lines.items() if b"launcher.py" in line]
    worker = [pid for pid, line in lines.items() if b"_bentoml_impl.worker" in line]
    assert len(supervisor) == len(worker) == 1
    victims = {"supervisor": supervisor, "worker": worker, "shim": shims(suite)}
    for pid in victims.get(victim, [*shims(suite), *pids]):
        os.kill(pid, signal.SIGKILL)
    await suite.until("hurt", lambda d: d.state != pb.Deployment.RUNNING)
    await suite.running("hurt")
    await answers(suite, "hurt")
    (again,) = await suite.replicas("hurt")
    assert again.restart_count == replica.restart_count + 1
    assert not any(shim.start_ticks(pid) and not shim.is_zombie(pid) for pid in pids)
    assert len(tree(suite)) == len(shims(suite)) == 1


async def test_a_replica_that_hangs_is_started_again(running: Running, built: Callable[..., Built]) -> None:
    suite, _ = running
    await suite.create("stuck", await suite.push(built("plain")))
    await suite.running("stuck")
    hanging = asyncio.create_task(suite.call("stuck", "/hang", {}, 120))
    unhealthy = await suite.until("stuck", lambda d: d.state == pb.Deployment.UNHEALTHY)
    assert any(" answer" in condition.message for condition in unhealthy.conditions)
    await suite.running("stuck")
    await answers(suite, "stuck")
    await asyncio.wait([hanging])
    assert hanging.exception() is not None


async def test_a_deployer_killed_for_good_leaves_no_process(running: Running, built: Callable[..., Built]) -> None:
    suite, process = running
    await suite.create("left", await suite.push(built("plain")))
    await suite.running("left")
    process.kill()
    await eventually(lambda: not tree(suite) and not shims(suite), "no process", 30)


async def test_deployer_and_shims_killed_together_leave_no_stray(running: Running, built: Callable[..., Built]) -> None:
    suite, process = running
    await suite.create("both", await suite.push(built("plain")))
    await suite.running("both")
    (before,) = tree(suite).values()
    process.kill()
    for pid in shims(suite):
        os.kill(pid, signal.SIGKILL)
    await process.start()
    await running_again(suite, "both")
    await answers(suite, "both")
    (after,) = tree(suite).values()
    assert not set(before) & set(after)


async def test_a_stopped_deployer_stops_its_replicas_and_brings_back_what_served(
    running: Running, built: Callable[..., Built]
) -> None:
    suite, process = running
    await suite.create("back", await suite.push(built("plain")))
    await suite.running("back")
    broken = await suite.push(built("needy"))
    template = pb.Template(bento=broken, envs=[pb.EnvVar(name="LICENSE", value="1")])
    await suite.deployments.UpdateDeployment(
        pb.UpdateDeploymentRequest(deployment=pb.Deployment(name="deployments/back", template=template))
    )
    await suite.until("back", lambda d: d.state == pb.Deployment.FAILED, 90)
    assert await suite.call("back", "/slow", {"seconds": 0}) == (200, "done")
    assert process.stop() == 0
    assert tree(suite) == {}
    await process.start()
    await answers(suite, "back")
    deployment = await suite.get("back")
    assert deployment.serving_revision.endswith("/1")
    assert deployment.latest_revision.endswith("/2")
