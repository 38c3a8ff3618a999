"""What a transfer says in a pipe."""

import pytest

from ekiben.cli.progress import Bar


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_line_every_ten_seconds_says_how_far_how_fast_and_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    bar = Bar("Pushing model iris:v1", 4 << 30, clock=clock)
    with bar as progress:
        progress(1 << 20)
        clock.now = 10.0
        progress((1 << 30) - (1 << 20))
        clock.now = 12.0
        progress(-(1 << 20))
        clock.now = 20.0
        progress((1 << 30) + (1 << 20))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "Pushing model iris:v1 (4.0 GiB)",
        "  1.0 GiB of 4.0 GiB (25 %), 30 s left, 102.4 MiB/s",
        "  2.0 GiB of 4.0 GiB (50 %), 20 s left, 102.4 MiB/s",
    ]
    assert bar.summary == " in 20 s, 102.4 MiB/s"


@pytest.mark.parametrize(("took", "summary"), [(0.4, ""), (1.0, " in 1 s, 1.0 KiB/s")])
def test_what_took_no_time_has_no_rate(took: float, summary: str) -> None:
    clock = Clock()
    bar = Bar("Pushing", 1024, clock=clock)
    with bar as progress:
        progress(1024)
        clock.now = took
    assert bar.summary == summary


def test_of_an_unknown_size_only_what_has_passed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Bar("Pulling", 0, clock=clock) as progress:
        clock.now = 100.0
        progress(100 << 20)
    assert capsys.readouterr().err.splitlines() == ["Pulling", "  100.0 MiB, 1.0 MiB/s"]
