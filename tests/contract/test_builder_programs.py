"""Programs that builds run: what they print is passed on as it comes, and never held whole."""

import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.builder import uv
from services.builder.uv import Programs


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    with tempfile.TemporaryDirectory(prefix="ekb-", dir="/tmp") as run:
        yield Programs(tmp_path, Path(run))


async def test_a_programs_lines_come_as_they_were_printed_and_its_end_is_kept(
    programs: Programs, tmp_path: Path
) -> None:
    seen: list[str] = []
    script = "echo one; printf 'two  \\n' >&2; printf three; exit 3"
    outcome = await programs.run(["sh", "-c", script], cwd=tmp_path, line=seen.append)
    assert (outcome.returncode, outcome.text, seen) == (3, "one\ntwo  \nthree", ["one", "two  ", "three"])


@pytest.mark.parametrize("ahead_bytes", [1 << 20, 16 << 20])  # the file gives way to another several times, or not
async def test_a_program_that_prints_without_end_takes_no_memory_for_it(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead_bytes: int
) -> None:
    monkeypatch.setattr(uv, "_LOG_MAX_BYTES", ahead_bytes)
    count = 0

    def line(_text: str) -> None:
        nonlocal count
        count += 1

    tracemalloc.start()
    try:
        outcome = await programs.run(["seq", "1", "200000"], cwd=tmp_path, line=line)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    lines = outcome.text.splitlines()
    assert lines[-1] == "200000" and lines == sorted(set(lines), key=int)
    assert 0 < len(outcome.text) <= 1 << 20
    if ahead_bytes > 10 << 20:
        assert count == 200_000 and len(lines) == 200_001 - int(lines[0])
    assert peak_bytes < 24 << 20
