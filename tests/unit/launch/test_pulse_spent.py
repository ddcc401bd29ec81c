"""A rank's pulse as a book: where its time went."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from launch import pulse as pulse_module
from launch.pulse import Pulse, read_beat


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1000.0 + self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(pulse_module, "time", clock)
    return clock


def live(pulse: Pulse, clock: Clock, *moves: tuple[str, int, float]) -> None:
    """Enter each phase at a step, and stay for so many seconds."""
    for phase, step, seconds in moves:
        pulse.enter(phase, step)
        clock.now += seconds


def test_the_seconds_of_all_phases_add_up_to_the_time_since_the_rank_began(tmp_path: Path, clock: Clock) -> None:
    pulse = Pulse(tmp_path / "pulse")
    clock.now += 0.5  # before the first word
    live(pulse, clock, ("start", 0, 1), ("load", 0, 2), ("first-step", 7, 3), ("first-step", 8, 1), ("step", 9, 4))
    live(pulse, clock, ("evaluate", 9, 5), ("save", 9, 0.25), ("step", 10, 4), ("export", 10, 6), ("done", 10, 0))
    beat = read_beat(tmp_path / "pulse")
    assert beat is not None
    assert beat.spent == {
        "start": 1.5, "load": 2.0, "first-step": 4.0, "step": 8.0, "evaluate": 5.0, "save": 0.25, "export": 6.0,
    }  # fmt: skip
    assert math.isclose(sum(beat.spent.values()), clock.now - 50.0)
    assert (beat.began_at, beat.from_step, beat.step) == (1050.0, 7, 10)
    assert pulse.spent == beat.spent


def test_what_a_rank_is_in_the_middle_of_is_not_counted_yet(tmp_path: Path, clock: Clock) -> None:
    pulse = Pulse(tmp_path / "pulse")
    live(pulse, clock, ("load", 0, 2), ("evaluate", 0, 100))
    beat = read_beat(tmp_path / "pulse")
    assert beat is not None
    assert (beat.phase, beat.spent, beat.from_step) == ("evaluate", {"load": 2.0}, None)


def test_a_step_that_waited_for_a_save_was_no_training_then(tmp_path: Path, clock: Clock) -> None:
    pulse = Pulse(tmp_path / "pulse")
    live(pulse, clock, ("first-step", 0, 1), ("step", 1, 3))
    pulse.blocked(2.0)  # of this very step: nothing is counted yet, so nothing is moved
    assert pulse.spent == {"first-step": 1.0}
    live(pulse, clock, ("save", 2, 1), ("step", 3, 1), ("step", 4, 0))
    pulse.blocked(0.5)
    pulse.blocked(-1.0)
    assert pulse.spent == {"first-step": 1.0, "step": 3.5, "save": 1.5}
