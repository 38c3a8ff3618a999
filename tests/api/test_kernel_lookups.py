"""Look-ups on both databases: what they find, and what happens to them when the database goes away."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from ekiben import errors
from services.kernel.db import Database, UtcDateTime, open_database
from tests.fixtures_registry import until

metadata = sa.MetaData()
things = sa.Table(
    "things",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("good", sa.Boolean, nullable=False),
    sa.Column("create_time", UtcDateTime, nullable=False),
)
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
ONE = sa.select(things, sa.func.length(things.c.name).label("size")).where(things.c.name == sa.bindparam("name"))
TIMES = sa.select(things.c.name).where(things.c.create_time >= sa.bindparam("since", type_=UtcDateTime))
FEW = sa.select(things.c.name).where(things.c.name.in_(["a", "c"]), things.c.good == sa.bindparam("good")).limit(5)
PIDS = sa.select(sa.func.pg_backend_pid().label("pid")).where(sa.literal_column("1") == sa.bindparam("one"))


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with open_database(database_url) as opened:
        async with opened.transaction() as connection:
            await connection.run_sync(metadata.create_all)
            rows = [{"name": name, "good": name != "b", "create_time": NOW} for name in "abc"]
            await connection.execute(things.insert(), rows)
        yield opened


@pytest.fixture
async def postgresql(database: Database) -> Database:
    if database.dialect != "postgresql":
        pytest.skip("SQLite is in this process and does not go away")
    return database


async def test_values_and_columns_have_the_types_of_the_statement(database: Database) -> None:
    row = (await database.lookups.execute(ONE, {"name": "b"})).first()
    assert (row.name, row.good, row.create_time, row.size) == ("b", False, NOW, 1)
    assert (await database.lookups.execute(ONE, {"name": "x"})).first() is None
    assert len((await database.lookups.execute(TIMES, {"since": NOW})).all()) == 3
    assert len((await database.lookups.execute(TIMES, {"since": NOW.replace(year=2027)})).all()) == 0
    assert sorted(row.name for row in await database.lookups.execute(FEW, {"good": True})) == ["a", "c"]
    assert list(await database.lookups.execute(FEW, {"good": False})) == []


async def test_what_a_statement_does_not_say_is_refused(database: Database) -> None:
    with pytest.raises(KeyError):
        await database.lookups.execute(ONE, {"name": "a"})
        await database.lookups.execute(ONE, {})
    listed = sa.select(things.c.name).where(things.c.name.in_(sa.bindparam("names", expanding=True)))
    with pytest.raises(ValueError, match="no list"):
        await database.lookups.execute(listed, {"names": ["a"]})
    with pytest.raises(sa.exc.DBAPIError):
        await database.lookups.execute(sa.select(sa.column("none")).select_from(sa.table("nothing")), {})
    assert (await database.lookups.execute(ONE, {"name": "a"})).first()


async def test_a_look_up_sees_what_was_committed_before_it(database: Database) -> None:
    async with database.transaction() as connection:
        await connection.execute(things.insert().values(name="d", good=True, create_time=NOW))
        assert (await database.lookups.execute(ONE, {"name": "d"})).first() is None
    assert (await database.lookups.execute(ONE, {"name": "d"})).first()


async def test_many_at_once_share_a_few_connections_and_a_cancelled_one_harms_none(database: Database) -> None:
    async def find(name: str) -> str:
        return str((await database.lookups.execute(ONE, {"name": name})).all()[0].name)

    tasks = [asyncio.ensure_future(find("abc"[i % 3])) for i in range(90)]
    await asyncio.sleep(0)
    for task in tasks[::5]:
        task.cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    for i, name in enumerate(found):
        assert name == "abc"[i % 3] or isinstance(name, asyncio.CancelledError)
    assert sum(isinstance(name, str) for name in found) >= 72
    assert await asyncio.gather(*(find(name) for name in "abc")) == ["a", "b", "c"]


async def test_a_connection_that_was_cut_is_replaced(postgresql: Database) -> None:
    first = (await postgresql.lookups.execute(PIDS, {"one": 1})).all()[0].pid
    async with postgresql.transaction() as connection:
        await connection.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": first})
    second = (await postgresql.lookups.execute(PIDS, {"one": 1})).all()[0].pid
    assert second != first


async def test_one_that_is_cut_while_it_asks_asks_again_and_a_server_away_is_unavailable(postgresql: Database) -> None:
    slow = sa.select(things.c.name, sa.func.pg_sleep(sa.bindparam("s")).label("slept")).where(things.c.name == "a")
    busy = asyncio.ensure_future(postgresql.lookups.execute(slow, {"s": 1.5}))
    running = sa.text("SELECT pid FROM pg_stat_activity WHERE query LIKE '%pg_sleep%' AND pid <> pg_backend_pid()")

    async def cut() -> bool:
        async with postgresql.transaction() as connection:
            pids = list((await connection.execute(running)).scalars())
            for pid in pids:
                await connection.execute(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        return bool(pids)

    await until(cut)
    # It was on a new connection, which is not tried twice: whoever asked may do so.
    with pytest.raises(errors.Unavailable) as refused:
        await busy
    assert refused.value.reason == "DATABASE_UNAVAILABLE"
    assert (await postgresql.lookups.execute(ONE, {"name": "a"})).first()
