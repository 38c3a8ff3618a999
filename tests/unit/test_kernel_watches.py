"""Wake-ups miss nothing and wake nobody else."""

import asyncio

from services.kernel.watches import Signal, Topic


async def test_a_watcher_turns_at_once_and_after_each_notify() -> None:
    topic = Topic()
    changes = topic.changes("a")
    await anext(changes)
    topic.notify("a")
    topic.notify("a")
    await asyncio.wait_for(anext(changes), 1)
    waiting = asyncio.ensure_future(anext(changes))
    await asyncio.sleep(0)
    topic.notify("b")
    await asyncio.sleep(0)
    assert not waiting.done()
    topic.notify("a")
    await asyncio.wait_for(waiting, 1)
    await changes.aclose()  # type: ignore[attr-defined]
    assert topic._waiting == {}


async def test_a_notify_while_the_watcher_reads_is_not_missed() -> None:
    topic = Topic()
    state, seen = 0, []
    async for _ in topic.changes("a"):
        seen.append(state)
        if state == 3:
            break
        state += 1
        topic.notify("a")
    assert seen == [0, 1, 2, 3]


async def test_the_empty_key_hears_all_and_wakes_all() -> None:
    topic = Topic()
    everything, one = topic.changes(), topic.changes("a")
    await anext(everything)
    await anext(one)
    topic.notify("a")
    await asyncio.wait_for(anext(everything), 1)
    await asyncio.wait_for(anext(one), 1)
    topic.notify()
    await asyncio.wait_for(anext(one), 1)


async def test_a_watcher_turns_after_the_given_time_without_any_notify() -> None:
    changes = Topic().changes("a", at_most_s=0.01)
    await anext(changes)
    await asyncio.wait_for(anext(changes), 5)


async def test_a_signal_returns_once_for_any_number_of_notifies() -> None:
    signal = Signal()
    signal.notify()
    signal.notify()
    assert await signal.wait(0.01) is True
    assert await signal.wait(0.01) is False
