"""Logs of replicas in files: what of the past is read, and what comes."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from services.deployer.runtimes import logs

START = datetime(2026, 11, 26, 12, tzinfo=UTC)


def write(log: Path, *seconds: int) -> None:
    """Append a line for each second after the start."""
    with log.open("a") as file:
        for second in seconds:
            file.write(f"{START + timedelta(seconds=second):%Y-%m-%dT%H:%M:%S.%fZ} {log.stem} {second}\n")


@pytest.fixture
def two(tmp_path: Path) -> dict[str, Path]:
    """Logs of two replicas."""
    found = {id: tmp_path / f"{id}.log" for id in ("a", "b")}
    write(found["a"], 0, 2, 4)
    write(found["b"], 1, 3)
    return found


async def past(files: dict[str, Path], lines: int, since: int | None = None) -> list[str]:
    after = None if since is None else START + timedelta(seconds=since)
    return [text async for _, _, text in logs.read(lambda: files, lines, False, after)]


async def test_lines_are_counted_for_each_replica_and_given_by_time(two: dict[str, Path]) -> None:
    assert await past(two, -1) == ["a 0", "b 1", "a 2", "b 3", "a 4"]
    assert await past(two, 1) == ["b 3", "a 4"]
    assert await past(two, 0) == []


async def test_nothing_from_before_a_time_is_given(two: dict[str, Path]) -> None:
    assert await past(two, -1, since=2) == ["a 2", "b 3", "a 4"]
    assert await past(two, 1, since=4) == ["a 4"]
    assert await past(two, -1, since=5) == []


async def test_who_follows_without_a_past_gets_what_comes(two: dict[str, Path]) -> None:
    reading = logs.read(lambda: two, 0, True)
    first = asyncio.ensure_future(anext(reading))
    while not first.done():  # From the moment on that it is followed.
        write(two["b"], 5)
        await asyncio.wait([first], timeout=0.05)
    assert first.result()[2] == "b 5"
    await reading.aclose()
