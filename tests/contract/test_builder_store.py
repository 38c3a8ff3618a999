"""The builder's store, on SQLite and PostgreSQL alike."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from services.builder.domain import Build, Environment, Failure, Image, ImageLayer, Output, Priority, State, Step
from services.builder.store import ImageRows, Store, metadata
from services.kernel.db import Database, open_database

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
LATER = NOW + timedelta(seconds=30)
ORGANIZATION = "organizations/default"
ENVIRONMENT = Environment("sha256:" + "e" * 64, "3.11.7", "1.4.39", 79, 111_003_465)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with open_database(database_url) as database:
        await database.migrate("services.builder.migrations")
        yield database


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database)


def build(number: int, **changes: object) -> Build:
    made = Build(
        id=f"b{number}",
        uid=f"uid-{number}",
        organization=ORGANIZATION,
        bento=f"bentoRepositories/iris/bentos/v{number}",
        bento_digest=f"sha256:{number:064x}",
        creator="users/admin",
        create_time=NOW + timedelta(seconds=number),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


async def test_migrations_make_the_tables_of_the_store(database: Database) -> None:
    assert await database.schema_differences("services.builder.migrations", metadata) == []


async def test_a_build_comes_back_as_it_was_kept(store: Store) -> None:
    kept = build(1, secrets=("secrets/pypi",), force=True, traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    assert await store.insert(kept)
    assert await store.get(ORGANIZATION, "b1") == kept
    assert await store.get("organizations/other", "b1") is None


async def test_a_second_build_of_the_same_is_refused_while_the_first_goes_on(store: Store) -> None:
    assert await store.insert(build(1))
    assert not await store.insert(build(2, bento_digest=build(1).bento_digest))
    assert await store.insert(build(3, bento_digest=build(1).bento_digest, force=True))
    assert await store.cancel(ORGANIZATION, "b1", NOW)
    assert await store.insert(build(2, bento_digest=build(1).bento_digest))


async def test_each_build_is_leased_once_oldest_first(store: Store) -> None:
    for number in (2, 1, 3):
        await store.insert(build(number))
    leases = await asyncio.gather(*(store.lease(f"t{n}", "owner", NOW) for n in range(5)))
    assert sorted(lease.build.id for lease in leases if lease) == ["b1", "b2", "b3"]
    assert all(lease.build.state is State.RUNNING and lease.build.attempts == 1 for lease in leases if lease)


async def test_a_lease_without_a_sign_of_life_goes_to_another_and_the_first_writes_nothing_more(store: Store) -> None:
    await store.insert(build(1))
    assert await store.lease("first", "a", NOW)
    before = await store.signs_of_life()
    assert await store.renew("b1", "first")
    signs = await store.signs_of_life()
    assert signs["b1"] != before["b1"]
    assert await store.take_over("b1", before["b1"], "second", "b", LATER) is None
    takers = [store.take_over("b1", signs["b1"], f"second{n}", "b", LATER) for n in range(3)]
    (second,) = [lease for lease in await asyncio.gather(*takers) if lease is not None]
    token = second.token
    assert second.build.attempts == 2
    assert second.build.start_time == NOW
    assert not await store.renew("b1", "first")
    assert not await store.report("b1", "first", Step.RESOLVING, 12)
    assert not await store.succeed("b1", "first", ENVIRONMENT, False, NOW)
    assert not await store.fail("b1", "first", Failure("UV_FAILED", "x"), NOW)
    assert not await store.give_back("b1", "first")
    assert await store.report("b1", token, Step.RESOLVING, 12)
    found = await store.get(ORGANIZATION, "b1")
    assert found is not None
    assert (found.step, found.progress_percent) == (Step.RESOLVING, 12)


async def test_success_keeps_the_environment_which_others_share(store: Store) -> None:
    for number in (1, 2):
        await store.insert(build(number))
        lease = await store.lease(f"t{number}", "a", NOW)
        assert lease is not None
        assert await store.succeed(lease.build.id, lease.token, ENVIRONMENT, number == 2, NOW)
    one, two = await store.get(ORGANIZATION, "b1"), await store.get(ORGANIZATION, "b2")
    assert one is not None
    assert two is not None
    assert (one.state, one.environment, one.cached, one.progress_percent) == (State.SUCCEEDED, ENVIRONMENT, False, 100)
    assert (two.environment, two.cached) == (ENVIRONMENT, True)
    assert [found.id for found in await store.reusable(ORGANIZATION, _key(one))] == ["b1"]


async def test_failure_is_kept_word_for_word(store: Store) -> None:
    await store.insert(build(1))
    await store.lease("t", "a", NOW)
    failure = Failure("REQUIREMENT_NOT_FOUND", "The requirement «x» does not exist.", {"requirement": "x"})
    assert await store.fail("b1", "t", failure, LATER)
    found = await store.get(ORGANIZATION, "b1")
    assert found is not None
    assert (found.state, found.failure, found.end_time) == (State.FAILED, failure, LATER)
    assert await store.reusable(ORGANIZATION, _key(found)) == []


async def test_a_cancelled_build_is_not_revived_by_its_worker(store: Store) -> None:
    await store.insert(build(1))
    await store.lease("t", "a", NOW)
    assert await store.cancel(ORGANIZATION, "b1", NOW)
    assert not await store.cancel(ORGANIZATION, "b1", NOW)
    assert not await store.renew("b1", "t")
    assert not await store.succeed("b1", "t", ENVIRONMENT, False, NOW)
    assert await store.lease("u", "a", LATER) is None


async def test_a_former_life_s_builds_are_queued_again_and_no_other_s(store: Store) -> None:
    for number in (1, 2):
        await store.insert(build(number))
    await store.lease("t1", "mine", NOW)
    await store.lease("t2", "theirs", NOW)
    assert await store.requeue("mine") == 1
    lease = await store.lease("t3", "mine", NOW)
    assert lease is not None
    assert (lease.build.id, lease.build.attempts) == ("b1", 2)
    assert await store.lease("t4", "mine", NOW) is None


async def test_each_site_builds_its_own_and_sees_all(database: Database) -> None:
    here, there = Store(database, "here"), Store(database, "there")
    assert await here.insert(build(1))
    assert await there.insert(build(2, bento_digest=build(1).bento_digest))
    assert not await there.insert(build(3, bento_digest=build(1).bento_digest))
    lease = await there.lease("t", "b", NOW)
    assert lease is not None
    assert lease.build.id == "b2"
    assert await there.lease("u", "b", NOW) is None
    assert list(await here.signs_of_life()) == []
    assert [found.id for found in await here.list(ORGANIZATION, "", None, 9)] == ["b2", "b1"]
    assert [found.id for found in await here.reusable(ORGANIZATION, _key(build(1)))] == ["b1"]


async def test_giving_back_does_not_count_as_an_attempt(store: Store) -> None:
    await store.insert(build(1))
    await store.lease("t", "a", NOW)
    assert await store.give_back("b1", "t")
    lease = await store.lease("u", "a", NOW)
    assert lease is not None
    assert lease.build.attempts == 1


async def test_lists_are_newest_first_and_go_on_where_they_ended(store: Store) -> None:
    for number in range(1, 6):
        await store.insert(build(number, create_time=NOW))
    first = await store.list(ORGANIZATION, "", None, 3)
    assert [found.id for found in first] == ["b5", "b4", "b3"]
    rest = await store.list(ORGANIZATION, "", (first[-1].create_time, first[-1].id), 3)
    assert [found.id for found in rest] == ["b2", "b1"]
    assert [found.id for found in await store.list(ORGANIZATION, build(2).bento, None, 3)] == ["b2"]


async def test_every_change_but_a_renewal_gives_a_new_version(store: Store) -> None:
    await store.insert(build(1))
    versions = []
    for change in (
        store.lease("t", "a", NOW),
        store.report("b1", "t", Step.RESOLVING, 12),
        store.succeed("b1", "t", ENVIRONMENT, False, NOW),
    ):
        await change
        found = await store.get(ORGANIZATION, "b1")
        assert found is not None
        versions.append(found.version)
    assert versions == [1, 2, 3]


async def test_an_image_of_an_older_assembler_answers_no_request(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build(1, output=Output.IMAGE)
    await store.insert(made)
    assert await store.reusable(ORGANIZATION, _key(made))
    monkeypatch.setattr("services.builder.domain.ASSEMBLER_VERSION", 1_000)
    assert not await store.reusable(ORGANIZATION, _key(made))
    assert await store.insert(replace(made, id="b2"))


def _key(of: Build) -> str:
    from services.builder.domain import dedup_key

    return dedup_key(of)


async def test_urgent_builds_go_first_and_who_waited_an_hour_goes_before_them(store: Store) -> None:
    batch = build(1, priority=Priority.BATCH)
    waited = build(2, priority=Priority.BATCH, create_time=NOW - timedelta(hours=3))
    normal, urgent = build(3), build(4, priority=Priority.INTERACTIVE)
    for each in (batch, waited, normal, urgent):
        assert await store.insert(each)
    order = [lease.build.id for number in range(3) if (lease := await store.lease(str(number), "w", NOW)) is not None]
    assert order == ["b2", "b4", "b3"]
    await store.raise_priority(batch, Priority.INTERACTIVE)
    raised = await store.get(ORGANIZATION, "b1")
    assert raised is not None and raised.priority is Priority.INTERACTIVE and raised.version == 1


async def test_an_image_comes_with_the_end_of_its_build_and_takes_the_tag_of_the_one_before(database: Database) -> None:
    store, rows = Store(database), ImageRows(database, "oci:here")
    made = set()
    for number, digest in ((1, "a"), (2, "b"), (3, "a")):
        asked = build(number, output=Output.IMAGE, platforms=("linux/amd64",), bento_digest=f"sha256:{digest * 64}")
        assert await store.insert(replace(asked, bento="bentoRepositories/iris/bentos/v1", force=True))
        lease = await store.lease(f"t{number}", "w", NOW)
        assert lease is not None
        image = Image(
            id=digest * 20,
            organization=ORGANIZATION,
            place="oci:here",
            digest=f"sha256:{digest * 64}",
            media_type="m",
            bento=lease.build.bento,
            bento_digest=lease.build.bento_digest,
            repository="default/iris",
            tag="v1",
            platforms=("linux/amd64",),
            size_bytes=5,
            layers=(ImageLayer("sha256:" + "c" * 64, 5, "m", "bento iris:v1", "linux/amd64"),),
            base="base",
            models=(),
            build=lease.build.id,
            create_time=NOW + timedelta(seconds=number),
            use_time=NOW + timedelta(seconds=number),
        )
        assert not await store.succeed(lease.build.id, "another", None, False, NOW, image)
        assert (await rows.get(ORGANIZATION, image.id) is None) == (image.id not in made)
        assert await store.succeed(lease.build.id, lease.token, None, False, NOW, image)
        made.add(image.id)
    first, second = await rows.get(ORGANIZATION, "a" * 20), await rows.get(ORGANIZATION, "b" * 20)
    assert first is not None and second is not None
    assert (first.tag, first.build, first.create_time) == ("v1", "b3", NOW + timedelta(seconds=1))
    assert (first.use_time, second.tag) == (NOW + timedelta(seconds=3), "")
    assert [image.id[0] for image in await rows.list(ORGANIZATION, first.bento, None, 5)] == ["b", "a"]
    assert list(await store.builds_of_image(ORGANIZATION, first.id, 5)) == ["b3", "b1"]
    assert await ImageRows(database, "oci:elsewhere").get(ORGANIZATION, first.id) is None
    assert await rows.delete(ORGANIZATION, first.id) and not await rows.delete(ORGANIZATION, first.id)
