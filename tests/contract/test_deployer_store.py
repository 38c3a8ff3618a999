"""The deployer's tables, the same on SQLite and PostgreSQL."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta

import pytest

from ekiben.errors import Aborted, Unavailable
from services.deployer.domain import Bento, Condition, Deployment, Revision, Status
from services.deployer.ownership import Ownership
from services.deployer.store import Store, metadata
from services.kernel.clock import ManualClock
from services.kernel.db import open_database
from tests.deployment_rows import NOW, a_deployment, a_revision


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    """A store with empty tables."""
    async with open_database(database_url) as database:
        await database.migrate("services.deployer.migrations")
        assert await database.schema_differences("services.deployer.migrations", metadata) == []
        yield Store(database)


def deployment(name: str, port: int = 0) -> Deployment:
    return a_deployment(name, port=port, labels={"a": "b"})


def revision(of: Deployment, number: int = 1) -> Revision:
    bento = Bento("bentoRepositories/b/bentos/v", "sha256:00", "{}", (("modelRepositories/m/models/v", "sha256:11"),))
    return a_revision(of, number=number, bento=bento)


async def test_what_is_written_is_read(store: Store) -> None:
    one = deployment("one", 7500)
    assert await store.add_deployment(one, revision(one))
    assert await store.get_deployment(one.organization, "one") == one
    assert await store.get_revision(one.uid, 1) == revision(one)
    assert await store.ports() == {7500}
    status = Status("RUNNING", (Condition("Available", True, "READY", "", NOW),), {"S": (1, 1, 1, 1)}, 1, 1, True)
    await store.write_status(one.uid, status)
    assert await store.list_deployments() == [replace(one, status=status)]


async def test_names_and_ports_are_had_once(store: Store) -> None:
    one = deployment("one", 7500)
    assert await store.add_deployment(one, revision(one))
    for taken in (replace(one, uid="other"), replace(deployment("two", 7500))):
        assert not await store.add_deployment(taken, revision(taken))
    portless = [deployment("three"), deployment("four")]
    assert all([await store.add_deployment(other, revision(other)) for other in portless])


async def test_an_exposed_host_is_had_once_until_it_is_left(store: Store) -> None:
    one, two = (replace(deployment(name), exposed_host=f"{name}.example.com") for name in ("one", "two"))
    assert await store.add_deployment(one, revision(one)) and await store.add_deployment(two, revision(two))
    third = replace(deployment("three"), exposed_host=one.exposed_host)
    assert not await store.add_deployment(third, revision(third))
    assert await store.host_taken("one.example.com", two.uid) and not await store.host_taken("one.example.com", one.uid)
    # Two that looked at once: the second one hears of it, and nothing of its change is written.
    thief = replace(two, generation=2, exposed_host=one.exposed_host, labels={})
    with pytest.raises(Aborted):
        await store.change_deployment(thief, 1, revision(two, 2))
    assert await store.get_deployment(two.organization, "two") == two
    await store.change_deployment(replace(one, generation=2, exposed_host=None), 1)
    await store.change_deployment(thief, 1)
    assert await store.host_taken("one.example.com", one.uid)


async def test_a_change_of_what_changed_meanwhile_is_aborted_and_writes_nothing(store: Store) -> None:
    one = deployment("one")
    await store.add_deployment(one, revision(one))
    await store.change_deployment(replace(one, generation=2, latest_revision=2), 1, revision(one, 2))
    with pytest.raises(Aborted):
        await store.change_deployment(replace(one, generation=2, terminated=True), 1, revision(one, 3))
    assert [found.number for found in await store.list_revisions(one.uid, below=None, limit=9)] == [2, 1]
    await store.remove_deployment(one.uid)
    assert await store.list_deployments() == []


async def test_versions_of_the_route_table_only_grow(store: Store) -> None:
    assert [await store.next_route_version(0) for _ in range(3)] == [1, 2, 3]
    assert await store.next_route_version(1_800_000_000_000_000) == 1_800_000_000_000_001
    assert await store.next_route_version(7) == 1_800_000_000_000_002


async def test_deployers_that_start_at_once_make_one_cluster_and_one_has_it(store: Store) -> None:
    made = await asyncio.gather(*(store.ensure_cluster("default", f"uid-{n}", NOW) for n in range(4)))
    assert len(set(made)) == 1
    assert await store.owner_of("default") == ("", 0)
    taken = await asyncio.gather(*(store.take_cluster("default", f"d{n}", "", 0) for n in range(4)))
    assert taken.count(True) == 1
    versions = await asyncio.gather(*(store.next_route_version(0) for _ in range(4)))
    assert sorted(versions) == [1, 2, 3, 4]


async def test_a_cluster_goes_to_another_only_by_silence_or_by_leave(store: Store) -> None:
    clock = ManualClock()
    await store.ensure_cluster("default", "uid", NOW)
    one, two = (Ownership(store, "default", name, clock, lease_s=15) for name in ("one", "two"))
    await one.look()
    await two.look()
    assert (one.held, two.held) == (True, False)
    for _ in range(10):  # while signs of life come, also over a clock that is set
        clock.jump(timedelta(hours=1))
        await clock.advance(3)
        await one.look()
        await two.look()
    assert (one.held, two.held) == (True, False)
    for _ in range(6):  # now they do not
        await clock.advance(3)
        await two.look()
    assert two.held
    with pytest.raises(Unavailable):
        Ownership(store, "default", "three", clock, lease_s=15).check()
    await one.look()  # it only slept
    assert not one.held
    again = Ownership(store, "default", "two", clock, lease_s=15)  # a restart on the same folder
    await again.look()
    assert again.held
    await again.release()
    await one.look()
    assert one.held
