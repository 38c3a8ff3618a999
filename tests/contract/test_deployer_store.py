"""The deployer's tables, the same on SQLite and PostgreSQL."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from ekiben.errors import Aborted
from services.deployer.domain import Bento, Condition, Deployment, Revision, Status
from services.deployer.store import Store, metadata
from services.kernel.db import open_database

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    """A store with empty tables."""
    async with open_database(database_url) as database:
        await database.migrate("services.deployer.migrations")
        assert await database.schema_differences("services.deployer.migrations", metadata) == []
        yield Store(database)


def deployment(name: str, port: int = 0) -> Deployment:
    return Deployment(
        name=name,
        uid=f"uid-{name}",
        organization="organizations/default",
        labels={"a": "b"},
        cluster="default",
        scaling="{}",
        capture="",
        access_authorization=False,
        dev=False,
        generation=1,
        latest_revision=1,
        terminated=False,
        deleting=False,
        port=port,
        build="",
        traceparent="",
        creator="users/admin",
        create_time=NOW,
        update_time=NOW,
        status=Status("DEPLOYING"),
    )


def revision(of: Deployment, number: int = 1) -> Revision:
    bento = Bento("bentoRepositories/b/bentos/v", "sha256:00", "{}", (("modelRepositories/m/models/v", "sha256:11"),))
    return Revision(of.uid, number, f"revision-{of.uid}-{number}", "{}", {"main": bento}, "users/admin", NOW)


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
