"""Several deployers on one PostgreSQL: one has the cluster, the others answer, and take it when it is gone."""

import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import pytest

from ekiben.deployer.v1 import deployer_pb2 as pb
from ekiben.errors import EkibenError, Unavailable
from services.kernel import processes
from tests.fixtures_deployer import (
    Built,
    DeployerProcess,
    Registry,
    Suite,
    built,
    calling,
    registry,
    running_builds,
    running_deployer,
)
from tests.fixtures_kernel import until
from tests.postgres import PostgresServer

__all__ = ["built", "registry"]

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return f"{postgres.create(f'deployer_{os.urandom(6).hex()}')}&schema=ekiben_deployer"


@contextmanager
def folders(tmp_path: Path, name: str) -> Iterator[tuple[Path, Path]]:
    """Data and run directory of one machine."""
    run_dir = Path(tempfile.mkdtemp(prefix="ekd-", dir="/tmp"))
    try:
        yield tmp_path / name, run_dir
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


@pytest.fixture
async def machines(tmp_path: Path) -> AsyncIterator[dict[str, tuple[Path, Path]]]:
    """Two machines; no replica lives on."""
    with folders(tmp_path, "one") as one, folders(tmp_path, "two") as two:
        yield {"one": one, "two": two}
        for data_dir, _ in (one, two):
            await processes.end_strays(processes.mark_of("deployer", data_dir))


def replicas_on(data_dir: Path) -> set[str]:
    """Ids of the replicas that run on a machine."""
    mark = processes.mark_of("deployer", data_dir)
    return {id for _, of, id in processes._marked(processes.MARK) if of == mark}


async def has_the_cluster(suite: Suite) -> bool:
    """Whether this deployer looks after the replicas."""
    try:
        await suite.deployments.ListReplicas(pb.ListReplicasRequest(parent="deployments/web"))
    except EkibenError as exc:
        return exc.reason == "DEPLOYMENT_NOT_FOUND"
    return True


async def test_all_answer_one_acts_and_another_takes_over(
    registry: Registry,
    built: Callable[..., Built],
    url: str,
    machines: dict[str, tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.deployer.servicer.WATCH_S", 3600.0)  # only news can wake
    options = {"database_url": url, "owner_lease_s": 5.0}
    async with AsyncExitStack() as ending:
        two = await ending.enter_async_context(running_deployer(registry, *machines["two"], name="two", **options))
        await until(lambda: has_the_cluster(two), "the first one has it")
        async with running_deployer(registry, *machines["one"], name="one", **options) as one:
            bento = await one.push(built("plain"))
            await one.create("web", bento)  # at the one that stands by
            await one.running("web")
            assert len(await two.replicas("web")) == 1
            with pytest.raises(Unavailable) as caught:
                await one.deployments.ListReplicas(pb.ListReplicasRequest(parent="deployments/web"), timeout=2)
            assert caught.value.reason == "DEPLOYER_STANDBY"
            assert not replicas_on(machines["one"][0])
            await ending.aclose()  # an orderly end
            assert not replicas_on(machines["two"][0])
            await until(lambda: has_the_cluster(one), "it takes the cluster", 30)
            await until(lambda: replicas_on(machines["one"][0]), "it runs what the other ran", 60)
            await one.running("web")


async def test_one_that_only_slept_finds_its_cluster_taken_and_ends_what_it_has(
    registry: Registry, built: Callable[..., Built], url: str, machines: dict[str, tuple[Path, Path]]
) -> None:
    async with running_builds(registry) as (builds, peer):
        sleeper = DeployerProcess(
            registry, peer, *machines["two"], database_url=url, owner_lease_s=2.0, orphan_grace_s=600
        )
        await sleeper.start()
        try:
            async with calling(registry, sleeper.address, sleeper.settings, builds) as first:
                await first.create("web", await first.push(built("plain")))
                await first.running("web")
                assert sleeper.process is not None
                sleeper.process.send_signal(signal.SIGSTOP)
                async with running_deployer(
                    registry, *machines["one"], name="one", database_url=url, owner_lease_s=2.0
                ) as second:
                    await until(lambda: has_the_cluster(second), "it takes the cluster", 60)
                    await until(lambda: replicas_on(machines["one"][0]), "it runs what the other ran", 60)
                    sleeper.process.send_signal(signal.SIGCONT)
                    await until(lambda: not replicas_on(machines["two"][0]), "the sleeper ends what it has", 60)
                    assert not await has_the_cluster(first)
                    await second.running("web")
                    assert len(await second.replicas("web")) == 1
        finally:
            sleeper.kill()
