"""A change made in one process wakes who watches in another."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.kernel.db import open_database
from services.kernel.news import News
from tests.fixtures_kernel import until
from tests.postgres import PostgresServer, running_postgres


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[News]:
    """The topic of one process, running."""
    async with open_database(url) as database:
        news = News(database)
        running = asyncio.create_task(news.run())
        try:
            await asyncio.wait_for(news.listening(), 20)
            yield news
        finally:
            running.cancel()
            await asyncio.wait([running])


class Watcher:
    """Counts how often a key's watchers are woken; it never looks by itself."""

    def __init__(self, news: News, key: str) -> None:
        self.woken = 0
        self.task = asyncio.create_task(self._watch(news, key))

    async def _watch(self, news: News, key: str) -> None:
        async for _ in news.changes(key):
            self.woken += 1


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.create(f"news_{os.urandom(6).hex()}")


async def test_who_watches_elsewhere_is_woken_by_its_key(url: str) -> None:
    async with opened(url) as one, opened(url) as two:
        mine, others, all_ = (Watcher(two, key) for key in ("build", "another", ""))
        await until(lambda: mine.woken == others.woken == all_.woken == 1, "all look once")
        one.notify("build")
        await until(lambda: mine.woken == all_.woken == 2, "woken")
        assert others.woken == 1
        one.notify()
        await until(lambda: others.woken == 2, "everybody is woken")
        for watcher in (mine, others, all_):
            watcher.task.cancel()


async def test_schemas_do_not_hear_one_another(url: str) -> None:
    async with opened(f"{url}&schema=a") as one, opened(f"{url}&schema=b") as two, opened(f"{url}&schema=a") as three:
        there, here = Watcher(two, "x"), Watcher(three, "x")
        await until(lambda: there.woken == here.woken == 1, "both look once")
        one.notify("x")
        await until(lambda: here.woken == 2, "woken")
        assert there.woken == 1
        for watcher in (there, here):
            watcher.task.cancel()


async def test_after_a_restart_everybody_looks_and_is_woken_again() -> None:
    with running_postgres() as server:
        url = server.create("news")
        async with opened(url) as one, opened(url) as two:
            watcher = Watcher(two, "x")
            await until(lambda: watcher.woken == 1, "it looks once")
            await asyncio.to_thread(server.restart)
            await until(lambda: watcher.woken == 2, "it looks once the connection is back", 30)
            await asyncio.wait_for(one.listening(), 30)
            one.notify("x")
            await until(lambda: watcher.woken >= 3, "woken", 30)
            watcher.task.cancel()


async def test_on_sqlite_it_is_a_topic(tmp_path: object) -> None:
    async with opened(f"sqlite:///{tmp_path}/x.db") as news:
        watcher = Watcher(news, "x")
        await until(lambda: watcher.woken == 1, "it looks once")
        news.notify("x")
        await until(lambda: watcher.woken == 2, "woken")
        watcher.task.cancel()
