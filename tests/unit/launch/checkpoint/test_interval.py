"""How often to save."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.checkpoint.interval import OVERHEAD, daly, interval

DAY = 24 * 3600.0
costs = st.floats(1e-3, 1e5)
times = st.floats(1.0, 1e8)


def share_of_useful_work(interval_s: float, cost_s: float, mtbf_s: float) -> float:
    """Of the wall time, where failures come at random and restarts cost nothing."""
    # A segment of work and save is done when no failure falls into it; until then it is begun again.
    return interval_s / (mtbf_s * math.expm1((interval_s + cost_s) / mtbf_s))


@pytest.mark.parametrize("cost_s", [0.1, 5.0, 60.0, 600.0])
@pytest.mark.parametrize("mtbf_s", [3600.0, DAY, 30 * DAY])
def test_no_other_interval_is_much_better(cost_s: float, mtbf_s: float) -> None:
    chosen = share_of_useful_work(daly(cost_s, mtbf_s), cost_s, mtbf_s)
    tried = (cost_s * 1.05**n for n in range(-60, 300))
    best = max(share_of_useful_work(one, cost_s, mtbf_s) for one in tried if one < 20 * mtbf_s)
    assert chosen >= 0.999 * best


def test_young_is_its_first_term() -> None:
    assert daly(1.0, 1e8) == pytest.approx(math.sqrt(2e8), rel=1e-3)


@given(costs, times)
def test_it_is_a_positive_time_no_longer_than_failures_are_apart_or_so(cost_s: float, mtbf_s: float) -> None:
    assert 0 < daly(cost_s, mtbf_s) <= 1.5 * mtbf_s


@given(times)
def test_it_hardly_jumps_where_saving_costs_as_much_as_failing(mtbf_s: float) -> None:
    assert daly(2 * mtbf_s * (1 - 1e-9), mtbf_s) == pytest.approx(daly(2 * mtbf_s, mtbf_s), rel=0.2)


@given(blocked_s=st.floats(0, 1e4), written_s=st.floats(0, 1e5), mtbf_s=times)
def test_training_waits_for_a_bounded_share_and_saves_do_not_pile_up(
    blocked_s: float, written_s: float, mtbf_s: float
) -> None:
    found = interval(blocked_s, written_s, mtbf_s)
    assert blocked_s <= OVERHEAD * found * (1 + 1e-9)
    assert found >= written_s


def test_what_costs_nothing_is_done_often_not_always() -> None:
    assert 10 < interval(0.0, 0.1, DAY) < 60
