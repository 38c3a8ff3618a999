"""Aliases on SQLite and on PostgreSQL alike: what they name, what they named, and what is refused."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from ekiben.api.v1.annotations_pb2 import Role
from ekiben.errors import Aborted, EkibenError, FailedPrecondition, NotFound
from services.kernel.clock import ManualClock
from services.kernel.db import Database, open_database
from services.kernel.identity import Principal
from services.registry.aliases import Aliases
from services.registry.app import MIGRATIONS
from services.registry.catalog import Catalog
from services.registry.domain import Draft, Kind
from services.registry.store import catalog as rows

ME = Principal("users/admin", "organizations/default", Role.ROLE_ADMIN)
BOB = Principal("users/bob", "organizations/default", Role.ROLE_DEVELOPER)
OTHER = Principal("users/admin", "organizations/other", Role.ROLE_ADMIN)
# Of a hub, so that it can be deployed without an upload.
READY = Draft(manifest='{"metadata": {"registry": "huggingface"}}')


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with open_database(database_url) as database:
        await database.migrate(MIGRATIONS)
        yield database


@pytest.fixture
async def catalog(database: Database, manual_clock: ManualClock) -> Catalog:
    catalog = Catalog(database, manual_clock)
    for version in ("v1", "v2", "v3"):
        await catalog.create_version(ME, Kind.MODEL, "iris", version, READY)
    return catalog


@pytest.fixture
def aliases(database: Database, manual_clock: ManualClock) -> Aliases:
    return Aliases(database, manual_clock)


async def meant(catalog: Catalog, name: str) -> str:
    return (await catalog.get_version(ME, Kind.MODEL, "iris", name)).version


async def test_an_alias_moves_and_is_read_like_a_version(catalog: Catalog, aliases: Aliases) -> None:
    with pytest.raises(NotFound):
        await meant(catalog, "production")
    await aliases.set(ME, Kind.MODEL, "iris", "production", "v1")
    assert await meant(catalog, "production") == "v1"
    await aliases.set(BOB, Kind.MODEL, "iris", "production", "v2", expected="v1", reason="better")
    await aliases.set(BOB, Kind.MODEL, "iris", "staging", "production")
    await aliases.set(BOB, Kind.MODEL, "iris", "newest", "latest")
    assert [await meant(catalog, name) for name in ("production", "staging", "newest", "v1")] == [
        "v2",
        "v2",
        "v3",
        "v1",
    ]
    assert (await catalog.get_version(ME, Kind.MODEL, "iris", "v2")).aliases == ("production", "staging")
    listed = await catalog.list_versions(ME, Kind.MODEL, "iris", "", 10, None)
    assert [version.aliases for version in listed.items] == [("newest",), ("production", "staging"), ()]
    await catalog.create_version(ME, Kind.MODEL, "other", "production", READY)
    assert (await catalog.get_version(ME, Kind.MODEL, "other", "production")).aliases == ()
    with pytest.raises(NotFound):
        await catalog.get_version(OTHER, Kind.MODEL, "iris", "production")
    with pytest.raises(NotFound):
        await catalog.get_version(ME, Kind.BENTO, "iris", "production")


async def test_history_says_what_an_alias_named_at_any_time(
    catalog: Catalog, aliases: Aliases, manual_clock: ManualClock
) -> None:
    moments = [manual_clock.now()]
    for version in ("v1", "v2", None, "v3"):
        await manual_clock.advance(60)
        if version is None:
            await aliases.delete(BOB, Kind.MODEL, "iris", "production", expected="v2", reason="broken")
        else:
            await aliases.set(ME, Kind.MODEL, "iris", "production", version, reason=f"for {version}")
        moments.append(manual_clock.now())
    await aliases.set(ME, Kind.MODEL, "iris", "production", "v3", reason="again")  # changes nothing
    named = []
    for moment in moments:
        for at in (moment, moment + timedelta(seconds=59)):
            try:
                named.append((await aliases.get(ME, Kind.MODEL, "iris", "production", at)).version)
            except NotFound as error:
                named.append(error.reason)
    gone = "ALIAS_NOT_FOUND"
    assert named == [gone, gone, "v1", "v1", "v2", "v2", gone, gone, "v3", "v3"]
    history = await aliases.changes(ME, Kind.MODEL, "iris", "production", 10, None)
    assert [(c.number, c.before, c.version, c.user, c.reason) for _, c in history] == [
        (4, "", "v3", "users/admin", "for v3"),
        (3, "v2", "", "users/bob", "broken"),
        (2, "v1", "v2", "users/admin", "for v2"),
        (1, "", "v1", "users/admin", "for v1"),
    ]
    (first, _), *_ = await aliases.changes(ME, Kind.MODEL, "iris", None, 2, None)
    assert [c.number for _, c in await aliases.changes(ME, Kind.MODEL, None, None, 2, first)] == [3, 2]


async def test_time_goes_on_in_a_history_when_the_clock_goes_back(
    catalog: Catalog, aliases: Aliases, manual_clock: ManualClock
) -> None:
    await aliases.set(ME, Kind.MODEL, "iris", "production", "v1")
    before = manual_clock.now()
    manual_clock.jump(timedelta(hours=-1))
    moved = await aliases.set(ME, Kind.MODEL, "iris", "production", "v2")
    assert moved.create_time > before
    assert (await aliases.get(ME, Kind.MODEL, "iris", "production", before)).version == "v1"
    assert (await aliases.get(ME, Kind.MODEL, "iris", "production", moved.create_time)).version == "v2"


async def test_an_alias_and_a_version_never_have_one_name(catalog: Catalog, aliases: Aliases) -> None:
    with pytest.raises(FailedPrecondition) as version:
        await aliases.set(ME, Kind.MODEL, "iris", "v1", "v2")
    assert version.value.reason == "ALIAS_IS_VERSION"
    await aliases.set(ME, Kind.MODEL, "iris", "production", "v1")
    with pytest.raises(FailedPrecondition) as alias:
        await catalog.create_version(ME, Kind.MODEL, "iris", "production", READY)
    assert alias.value.reason == "VERSION_IS_ALIAS"
    for round_ in range(8):
        name = f"both{round_}"
        results = await asyncio.gather(
            catalog.create_version(ME, Kind.MODEL, "iris", name, READY),
            aliases.set(ME, Kind.MODEL, "iris", name, "v1"),
            return_exceptions=True,
        )
        assert sorted(isinstance(result, FailedPrecondition) for result in results) == [False, True], results
        assert (await meant(catalog, name)) == (name if isinstance(results[1], Exception) else "v1")


async def test_what_an_alias_names_is_not_deleted(catalog: Catalog, aliases: Aliases) -> None:
    await aliases.set(ME, Kind.MODEL, "iris", "production", "v1")
    with pytest.raises(FailedPrecondition) as refused:
        await catalog.delete_version(ME, Kind.MODEL, "iris", "v1", "")
    assert (refused.value.reason, refused.value.metadata["aliases"]) == ("MODEL_ALIASED", "production")
    with pytest.raises(FailedPrecondition) as by_alias:
        await catalog.delete_version(ME, Kind.MODEL, "iris", "production", "")
    assert by_alias.value.reason == "VERSION_REQUIRED"
    with pytest.raises(FailedPrecondition) as updated:
        await catalog.update_version(ME, Kind.MODEL, "iris", "production", Draft(description="x"), "")
    assert updated.value.reason == "VERSION_REQUIRED"
    await aliases.set(ME, Kind.MODEL, "iris", "production", "v2")
    await catalog.delete_version(ME, Kind.MODEL, "iris", "v1", "")
    for round_ in range(8):
        name = f"w{round_}"
        await catalog.create_version(ME, Kind.MODEL, "iris", name, READY)
        results = await asyncio.gather(
            catalog.delete_version(ME, Kind.MODEL, "iris", name, ""),
            aliases.set(ME, Kind.MODEL, "iris", "moving", name),
            return_exceptions=True,
        )
        refusals = [result for result in results if isinstance(result, EkibenError)]
        assert [refusal.reason for refusal in refusals] in (["MODEL_ALIASED"], ["MODEL_NOT_FOUND"]), results
        if refusals[0].reason == "MODEL_ALIASED":
            assert await meant(catalog, "moving") == name


async def test_one_of_many_moves_from_the_same_version_wins(catalog: Catalog, aliases: Aliases) -> None:
    first = await asyncio.gather(
        *(aliases.set(ME, Kind.MODEL, "iris", "p", version, expected="") for version in ("v1", "v2", "v3")),
        return_exceptions=True,
    )
    (won,) = [change for change in first if not isinstance(change, BaseException)]
    assert sorted(isinstance(change, Aborted) for change in first) == [False, True, True]
    others = [version for version in ("v1", "v2", "v3") if version != won.version]
    moves = await asyncio.gather(
        *(aliases.set(ME, Kind.MODEL, "iris", "p", version, expected=won.version) for version in others),
        return_exceptions=True,
    )
    assert sorted(isinstance(move, Aborted) for move in moves) == [False, True]
    assert len(await aliases.changes(ME, Kind.MODEL, "iris", "p", 10, None)) == 2
    with pytest.raises(Aborted) as lost:
        await aliases.delete(ME, Kind.MODEL, "iris", "p", expected=won.version, reason="")
    assert lost.value.reason == "ALIAS_MOVED"


async def test_what_has_no_content_gets_no_alias(catalog: Catalog, aliases: Aliases) -> None:
    await catalog.create_version(ME, Kind.MODEL, "iris", "pending", Draft())
    with pytest.raises(FailedPrecondition) as refused:
        await aliases.set(ME, Kind.MODEL, "iris", "production", "pending")
    assert refused.value.reason == "CONTENT_NOT_READY"
    for repository, version in (("iris", "nothing"), ("nothing", "v1")):
        with pytest.raises(NotFound):
            await aliases.set(ME, Kind.MODEL, repository, "production", version)
    with pytest.raises(NotFound):
        await aliases.delete(ME, Kind.MODEL, "iris", "production", expected=None, reason="")


async def test_a_deleted_repository_leaves_the_history_of_its_aliases(
    catalog: Catalog, aliases: Aliases, manual_clock: ManualClock
) -> None:
    await aliases.set(ME, Kind.MODEL, "iris", "production", "v1")
    then = manual_clock.now()
    await manual_clock.advance(60)
    await catalog.delete_repository(BOB, Kind.MODEL, "iris", "", force=True)
    with pytest.raises(NotFound):
        await aliases.get(ME, Kind.MODEL, "iris", "production")
    assert (await aliases.get(ME, Kind.MODEL, "iris", "production", then)).version == "v1"
    (_, last), _ = await aliases.changes(ME, Kind.MODEL, "iris", "production", 10, None)
    assert (last.user, last.before, last.version, last.number) == ("users/bob", "v1", "", 2)
    again = await catalog.create_version(ME, Kind.MODEL, "iris", "v1", READY)
    moved = await aliases.set(ME, Kind.MODEL, "iris", "production", "v1")
    assert (moved.number, moved.version_uid) == (3, again.uid)


async def test_aliases_are_listed_page_by_page(catalog: Catalog, aliases: Aliases) -> None:
    await catalog.create_version(ME, Kind.MODEL, "rose", "v1", READY)
    for repository, alias in (("rose", "a"), ("iris", "b"), ("iris", "a")):
        await aliases.set(ME, Kind.MODEL, repository, alias, "v1")
        await aliases.set(ME, Kind.MODEL, "iris", "a", "v2")
    first = await aliases.list(ME, Kind.MODEL, None, 2, None)
    rest = await aliases.list(ME, Kind.MODEL, None, 2, (first[-1].repository, first[-1].alias))
    assert [(one.repository, one.alias, one.version) for one in (*first, *rest)] == [
        ("iris", "a", "v2"),
        ("iris", "b", "v1"),
        ("rose", "a", "v1"),
    ]
    assert len(await aliases.list(ME, Kind.MODEL, "rose", 10, None)) == 1
    with pytest.raises(NotFound):
        await aliases.list(ME, Kind.MODEL, "nothing", 10, None)


async def test_an_alias_is_looked_up_in_indexes_only(database: Database, catalog: Catalog, aliases: Aliases) -> None:
    """One statement, and no table is read from end to end for it."""
    await aliases.set(ME, Kind.MODEL, "iris", "production", "v1")
    named = {"organization": "default", "kind": "model", "repository": "iris", "version": "production"}
    explain = "EXPLAIN QUERY PLAN " if database.dialect == "sqlite" else "EXPLAIN "
    async with database.transaction() as connection:
        if database.dialect == "postgresql":  # it would read the few rows of this test whole
            await connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        statement = rows._MEANT_VERSION.params(**named)
        text = str(statement.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True}))
        plan = "\n".join(" ".join(map(str, row)) for row in (await connection.exec_driver_sql(explain + text)).all())
    assert "pk_aliases" in plan or "sqlite_autoindex_aliases" in plan, plan
    assert "Seq Scan" not in plan and "SCAN versions" not in plan and "SCAN aliases" not in plan, plan
