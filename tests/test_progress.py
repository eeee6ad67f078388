"""Progress of long work where stderr is a terminal, and where it is none."""

import sys

import pytest

from tess.progress import Progress, duration


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def lines_of(capsys, seconds_per_unit, total=100, done=0):
    clock = Clock()
    with Progress(total, "training", "updates", done=done, clock=clock) as progress:
        for _ in range(total - done):
            clock.now += seconds_per_unit
            progress.advance()
    return capsys.readouterr().err.splitlines()


def test_a_line_has_done_total_rate_and_remaining_time(capsys):
    first, *_ = lines_of(capsys, 2.0)
    assert first == "training: 15 of 100 updates, 0.5 updates/s, 2 min 50 s left"


@pytest.mark.parametrize(
    ("seconds_per_unit", "lines"), [(0.1, 0), (1.0, 3), (2.0, 6), (29.0, 50), (45.0, 100)]
)
def test_lines_are_at_least_thirty_seconds_apart(capsys, seconds_per_unit, lines):
    assert len(lines_of(capsys, seconds_per_unit)) == lines


def test_what_was_done_before_counts_for_the_work_and_not_for_the_rate(capsys):
    first, *_ = lines_of(capsys, 30.0, total=1_200, done=1_000)
    assert first == "training: 1,001 of 1,200 updates, 0.0333 updates/s, 1 h 39 min left"


def test_a_terminal_has_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(4, "training", "updates", done=1) as progress:
        progress.advance(3)
    shown = capsys.readouterr().err
    assert "training: 100%" in shown and "4/4" in shown and "updates/s" in shown
    assert "left" not in shown


def test_a_duration_has_two_units_at_most():
    assert [duration(s) for s in (0, 59.4, 60, 3_599, 3_600, 90_000)] == [
        "0 s", "59 s", "1 min 0 s", "59 min 59 s", "1 h 0 min", "25 h 0 min",
    ]
