"""The clock that tests move."""

import asyncio
from datetime import timedelta

from services.kernel.clock import SYSTEM, ManualClock
from tests.fixtures_kernel import until


async def test_sleepers_wake_in_their_order_and_see_their_own_time(manual_clock: ManualClock) -> None:
    woken: list[tuple[str, float]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await manual_clock.sleep(seconds)
        woken.append((name, manual_clock.monotonic()))

    async with asyncio.TaskGroup() as group:
        for name, seconds in (("late", 3.0), ("soon", 1.0), ("never", 9.0)):
            group.create_task(sleeper(name, seconds))
        await until(lambda: manual_clock.sleepers == 3, "three sleepers")
        await manual_clock.advance(5)
        assert woken == [("soon", 1.0), ("late", 3.0)]
        assert manual_clock.monotonic() == 5
        await manual_clock.advance(4)


async def test_a_loop_sleeps_again_within_one_advance(manual_clock: ManualClock) -> None:
    turns = 0

    async def loop() -> None:
        nonlocal turns
        while True:
            turns += 1
            await manual_clock.sleep(1)

    task = asyncio.create_task(loop())
    await asyncio.sleep(0)
    await manual_clock.advance(10)
    task.cancel()
    assert turns == 11


def test_a_jump_of_the_wall_clock_leaves_the_monotonic_one(manual_clock: ManualClock) -> None:
    before = manual_clock.now()
    manual_clock.jump(timedelta(hours=-1))
    assert manual_clock.now() == before - timedelta(hours=1) and manual_clock.monotonic() == 0


def test_the_system_clock_is_aware() -> None:
    assert SYSTEM.now().utcoffset() == timedelta(0)
