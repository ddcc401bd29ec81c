"""When a loss has exploded, and what is remembered of it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.guard import LEAST, Explosion, Guard
from launch.optimisation import Divergence
from launch.sampler import Sampler

SPEC = Divergence(factor=3.0, window=10, steps=2, then="rollback", max_rollbacks=1)


def seen(losses: list[float], spec: Divergence | None = SPEC) -> Guard:
    guard = Guard(spec)
    for step, loss in enumerate(losses, start=1):
        guard.sees(step, loss)
    return guard


def test_so_many_bad_losses_in_a_row_are_an_explosion() -> None:
    assert seen([1.0] * 8 + [9.0]).found is None
    assert seen([1.0] * 8 + [9.0, 1.0, 9.0]).found is None
    assert seen([1.0] * 8 + [9.0, 8.0]).found == Explosion(9, 10, 8.0, 1.0)
    assert "8 at step 10, after a median of 1, and as bad since step 9" in str(seen([1.0] * 8 + [9.0, 8.0]).found)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad_from_the_first_step_on(bad: float) -> None:
    found = seen([bad, bad]).found
    assert found is not None
    assert (found.first, found.last) == (1, 2)


def test_bad_losses_do_not_become_the_usual_ones() -> None:
    """One bad loss now and then is none of the median's."""
    assert seen([1.0] * 8 + [9.0, 1.0] * 30 + [9.0, 9.0]).found is not None


def test_a_median_of_few_is_none() -> None:
    assert seen([1.0] * (LEAST - 1) + [9.0, 9.0]).found is None


@given(st.lists(st.floats(0.1, 10.0), max_size=40))
def test_without_a_spec_nothing_is_found(losses: list[float]) -> None:
    assert seen([*losses, math.nan], spec=None).found is None


def test_a_guard_that_goes_on_knows_what_the_one_before_knew() -> None:
    before = seen([1.0] * 8 + [9.0])
    after = Guard(SPEC)
    after.go_on(9, [1.0] * 8 + [9.0], [(3, 4)], 1)
    for guard in (before, after):
        guard.sees(10, 9.0)
    assert before.found == after.found == Explosion(9, 10, 9.0, 1.0)
    assert [after.leaves_out(step) for step in (2, 3, 4, 5)] == [False, True, True, False]
    assert not after.may_go_back


def test_samples_of_so_many_steps() -> None:
    sampler = Sampler("f", 0, rows=10, global_batch_size=4)
    consumed = 0
    for step in range(9):
        assert sampler.consumed_after(step) == consumed
        consumed += len(sampler.batch(consumed))
