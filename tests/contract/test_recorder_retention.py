"""Retention forgets by age, then by size, the oldest first, on both databases."""

import asyncio
from datetime import timedelta

from services.kernel.clock import ManualClock
from services.kernel.db import Database
from services.recorder.domain import PredictionFilter, TraceFilter
from services.recorder.retention import Retention
from services.recorder.store import PredictionStore, TraceStore, UsageStore, Writer
from tests.fixtures_recorder import NOW_US, Payload, eventually, prediction, recorder_database, span

__all__ = ["recorder_database"]

MINUTE_US = 60_000_000


async def left(database: Database) -> tuple[set[str], set[str]]:
    writer = Writer(database)
    predictions = await PredictionStore(database, writer).page(
        PredictionFilter("default"), before=None, limit=1000, bodies=False
    )
    traces = await TraceStore(database, writer).page(TraceFilter("default"), before=None, limit=1000)
    return {row.prediction.id for row in predictions}, {each.root for each in traces}


async def test_the_old_goes_by_age_and_the_oldest_by_size(
    recorder_database: Database, manual_clock: ManualClock
) -> None:
    writer = Writer(recorder_database)
    predictions, traces = PredictionStore(recorder_database, writer), TraceStore(recorder_database, writer)
    usage = UsageStore(recorder_database)
    body = Payload(body=b"x" * 10_000, body_size_bytes=10_000)
    for minute in range(10):
        now_us = NOW_US + minute * MINUTE_US
        await predictions.add([prediction(minute, request=body)], now_us)
        await traces.add([span(minute + 1, trace=minute + 1, attributes={"a": "x" * 10_000})], now_us)
    manual_clock.jump(timedelta(days=30, minutes=3))

    async def sweep(retention_days: float, max_stored_bytes: int) -> tuple[set[str], set[str]]:
        await Retention(
            predictions,
            traces,
            usage,
            manual_clock,
            retention_days=retention_days,
            max_stored_bytes=max_stored_bytes,
        ).sweep()
        return await left(recorder_database)

    assert len((await sweep(0, 0))[0]) == 10
    assert await sweep(30, 0) == ({f"p{n}" for n in range(3, 10)}, {f"span {n + 1}" for n in range(3, 10)})
    total = sum((await usage.totals()).values())
    assert 7 * 20_000 < total < 7 * 24_000
    assert await sweep(30, 90_000) == ({f"p{n}" for n in range(6, 10)}, {f"span {n + 1}" for n in range(6, 10)})
    assert await sweep(30, 90_000) == await left(recorder_database)
    assert sum((await usage.totals()).values()) <= 90_000
    assert await sweep(30, 1) == (set(), set())
    assert await usage.totals() == {}


async def test_the_loop_sweeps_each_minute(recorder_database: Database, manual_clock: ManualClock) -> None:
    writer = Writer(recorder_database)
    predictions = PredictionStore(recorder_database, writer)
    retention = Retention(
        predictions,
        TraceStore(recorder_database, writer),
        UsageStore(recorder_database),
        manual_clock,
        retention_days=1,
        max_stored_bytes=0,
    )
    await predictions.add([prediction(1)], NOW_US)
    task = asyncio.create_task(retention.run())

    async def swept() -> bool:
        return manual_clock.sleepers > 0

    async def forgotten() -> bool:
        return not (await left(recorder_database))[0]

    try:
        await eventually(swept)
        assert not await forgotten()
        manual_clock.jump(timedelta(days=1, minutes=2))
        await manual_clock.advance(60)
        await eventually(forgotten)
    finally:
        task.cancel()
