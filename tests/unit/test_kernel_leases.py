"""Signs of life: what a clock, a pause or an outage does to a lease."""

import threading
from datetime import timedelta
from pathlib import Path

from services.kernel.clock import ManualClock
from services.kernel.leases import Vigil, id_kept_in


async def test_only_who_stands_still_for_so_long_is_silent() -> None:
    clock = ManualClock()
    vigil = Vigil(30, clock)
    for second in range(0, 30, 2):
        assert vigil.silent({"dead": 7, "living": second}) == []
        await clock.advance(2)
    assert vigil.silent({"dead": 7, "living": 31, "new": 0}) == ["dead"]


async def test_a_clock_that_is_set_takes_nobodys_lease() -> None:
    clock = ManualClock()
    vigil = Vigil(30, clock)
    for jump in (timedelta(hours=1), timedelta(hours=-2)):
        assert vigil.silent({"a": 1}) == []
        clock.jump(jump)
        await clock.advance(2)
        assert vigil.silent({"a": 1}) == []


async def test_who_looked_away_begins_anew() -> None:
    clock = ManualClock()
    vigil = Vigil(30, clock)
    assert vigil.silent({"a": 1}) == []
    await clock.advance(3600)  # the database was away: nobody could renew
    assert vigil.silent({"a": 1}) == []
    for _ in range(14):
        await clock.advance(2)
        assert vigil.silent({"a": 1}) == []
    await clock.advance(2)
    assert vigil.silent({"a": 1}) == ["a"]


def test_all_who_ask_at_once_get_one_id(tmp_path: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(id_kept_in(tmp_path / "site"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert id_kept_in(tmp_path / "site") == found[0]
    assert [path.name for path in tmp_path.iterdir()] == ["site"]
