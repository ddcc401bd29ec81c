"""Which rank is slow."""

from __future__ import annotations

import random

import pytest

from launch.pace import RATIO, STEPS, WARM_UP, Pace


def after(steps: int, *times: float, noise: float = 0.1) -> Pace:
    pace, draw = Pace(), random.Random(0)
    for _ in range(steps):
        pace.see([time * (1 + draw.uniform(-noise, noise)) for time in times])
    return pace


def test_the_slow_one_is_found_once_enough_was_seen() -> None:
    assert after(WARM_UP + STEPS - 1, 0.1, 0.1, 0.3).slowest() is None
    found = after(WARM_UP + STEPS, 0.1, 0.1, 0.3).slowest()
    assert found is not None
    assert found.rank == 2
    assert found.ratio == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize("times", [(0.1, 0.12), (0.1, 0.1, 0.14), (1e-5, 9e-4), (0.1,), (0.0, 0.5)])
def test_who_is_not_slow(times: tuple[float, ...]) -> None:
    assert after(200, *times).slowest() is None


def test_one_slow_step_is_nothing_and_who_has_recovered_is_not_slow() -> None:
    pace = after(100, 0.1, 0.1)
    pace.see([0.1, 1.0])
    assert pace.slowest() is None
    for _ in range(3 * STEPS):
        pace.see([0.1, 0.3])
    assert pace.slowest() is not None
    for _ in range(5 * STEPS):
        pace.see([0.1, 0.1])
    assert pace.slowest() is None
    assert RATIO > 1
