"""Several builders on one PostgreSQL: who builds what, who sees what, and what a dead one leaves."""

import asyncio
import os
from datetime import timedelta
from pathlib import Path

import pytest

from ekiben.builder.v1 import builder_pb2 as pb
from ekiben.errors import FailedPrecondition
from services.kernel.clock import SystemClock
from tests.fixtures_builder import PackageIndex, Registry, bento_folder, registry, running_builder
from tests.fixtures_builder import index as index
from tests.fixtures_kernel import until
from tests.postgres import PostgresServer

__all__ = ["registry"]


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return f"{postgres.create(f'builder_{os.urandom(6).hex()}')}&schema=ekiben_builder"


async def test_builders_on_two_machines_build_each_for_itself_and_show_all(
    registry: Registry, index: PackageIndex, url: str, tmp_path: Path
) -> None:
    bento = await registry.push(bento_folder(tmp_path / "bento"))
    async with (
        running_builder(registry, tmp_path / "a", database_url=url) as one,
        running_builder(registry, tmp_path / "b", name="c", database_url=url) as two,
    ):
        first = await one.build(bento)
        assert first.state == pb.Build.SUCCEEDED
        assert first.environment.path.startswith(f"{tmp_path}/a/")
        # The other's machine has no such folder: it makes its own, and shows the first one without a path.
        second = await two.build(bento)
        assert second.name != first.name
        assert second.environment.path.startswith(f"{tmp_path}/b/")
        shown = await two.builds.GetBuild(pb.GetBuildRequest(name=first.name))
        assert shown.state == pb.Build.SUCCEEDED
        assert not shown.HasField("environment")
        assert (await one.builds.CreateBuild(pb.CreateBuildRequest(bento=bento))).name == first.name
        with pytest.raises(FailedPrecondition) as caught:
            await two.log(first.name)
        assert caught.value.reason == "BUILD_LOG_ELSEWHERE"
        assert await one.log(first.name)


async def test_a_watch_at_another_replica_hears_of_each_change_and_a_cancel_stops_the_worker(
    registry: Registry, index: PackageIndex, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.builder.queue._LOOK_AGAIN_S", 3600)  # only news can wake
    bento = await registry.push(bento_folder(tmp_path / "bento"))
    held = asyncio.Event()

    async def hold(step: str) -> None:
        if step == "resolve":
            held.set()
            await asyncio.Event().wait()

    async with (
        running_builder(registry, tmp_path / "a", hold, database_url=url, lease_s=3600) as one,
        running_builder(registry, tmp_path / "b", name="c", database_url=url, lease_s=3600) as two,
    ):
        build = await one.builds.CreateBuild(pb.CreateBuildRequest(bento=bento))
        await asyncio.wait_for(held.wait(), 30)
        watching = asyncio.create_task(two.ended(build.name))
        await two.builds.CancelBuild(pb.CancelBuildRequest(name=build.name))
        assert (await watching).state == pb.Build.CANCELLED

        async def told() -> bool:
            return any("cancelled" in line for line in await one.log(build.name))

        await until(told, "the worker hears of it", 30)


class Skewed(SystemClock):
    """A machine whose clock is wrong by an hour."""

    def __init__(self, by: timedelta) -> None:
        self._by = by

    def now(self):  # type: ignore[no-untyped-def]
        return super().now() + self._by


async def test_a_clock_that_is_an_hour_off_takes_no_build_from_anybody(
    registry: Registry, index: PackageIndex, url: str, tmp_path: Path
) -> None:
    bento = await registry.push(bento_folder(tmp_path / "bento"))
    held, go_on = asyncio.Event(), asyncio.Event()

    async def hold(step: str) -> None:
        if step == "resolve":
            held.set()
            await go_on.wait()

    folder = tmp_path / "shared"
    async with (
        running_builder(registry, folder, hold, database_url=url, lease_s=3) as one,
        running_builder(
            registry, folder, hold, name="c", database_url=url, lease_s=3, clock=Skewed(timedelta(hours=1))
        ) as two,
        running_builder(
            registry, folder, hold, name="d", database_url=url, lease_s=3, clock=Skewed(timedelta(hours=-1))
        ),
    ):
        build = await one.builds.CreateBuild(pb.CreateBuildRequest(bento=bento))
        await asyncio.wait_for(held.wait(), 30)
        clock, waited = asyncio.get_running_loop(), 0.0
        begun = clock.time()
        async for seen in two.builds.WatchBuild(pb.WatchBuildRequest(name=build.name)):
            waited = clock.time() - begun
            assert seen.state in (pb.Build.RUNNING, pb.Build.SUCCEEDED)
            if seen.state == pb.Build.RUNNING and not go_on.is_set():
                asyncio.get_running_loop().call_later(7, go_on.set)  # more than two leases long
        assert waited > 6
        assert seen.state == pb.Build.SUCCEEDED
        assert not any("attempt" in line for line in await one.log(build.name))
