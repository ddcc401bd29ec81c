"""Margins that are learned from measured peaks."""

from __future__ import annotations

import random

import pytest

from orchestrator.memory.calibrate import LEAST, Score, margin_factor


def a_score(value: float) -> Score:
    return Score(predicted_bytes=1000, margin_bytes=100, measured_bytes=round(1000 + 100 * value))


def test_few_attempts_teach_nothing() -> None:
    assert margin_factor([]) == 1.0
    assert margin_factor([a_score(0.2)] * 8) == 1.0


def test_ten_attempts_leave_room_for_the_worst_of_them() -> None:
    scores = [a_score(0.01 * i) for i in range(10)]
    assert margin_factor(scores) == pytest.approx(0.09)
    assert margin_factor([*scores, a_score(2.0)]) == pytest.approx(2.0)


def test_many_attempts_leave_out_the_worst_tenth() -> None:
    assert margin_factor([a_score(0.01 * i) for i in range(99)]) == pytest.approx(0.89)


def test_less_than_predicted_makes_it_smaller_within_bounds() -> None:
    assert margin_factor([a_score(-0.5)] * 20) == pytest.approx(-0.5)
    assert margin_factor([a_score(-50.0)] * 20) == LEAST


def test_no_more_than_a_tenth_of_new_attempts_exceeds_it() -> None:
    draw = random.Random(5)
    trials = exceeded = 0
    for _ in range(1000):
        scores = [a_score(draw.gauss(0.3, 0.5)) for _ in range(12)]
        exceeded += a_score(draw.gauss(0.3, 0.5)).value > margin_factor(scores)
        trials += 1
    assert 0.03 < exceeded / trials < 0.13
