"""How often gangs fail, as their history tells."""

from __future__ import annotations

import pytest

from orchestrator.recover.classify import Outcome
from orchestrator.recover.reliability import PRIOR_S, Ran, mean_time_between_failures

DAY = 24 * 3600.0


def test_of_nothing_the_prior() -> None:
    assert mean_time_between_failures([], 1) == PRIOR_S
    assert mean_time_between_failures([], 8) == PRIOR_S / 8, "any of eight nodes ends the gang"


def test_many_failures_outweigh_it() -> None:
    history = [Ran(3600, 2, Outcome.NODE_LOST)] * 100
    assert mean_time_between_failures(history, 2) == pytest.approx(3600, rel=0.2)


def test_what_no_checkpoint_mends_does_not_count() -> None:
    calm = [Ran(30 * DAY, 1, Outcome.SUCCEEDED), Ran(60, 1, Outcome.USER_ERROR), Ran(DAY, 4, Outcome.STOPPED)]
    assert mean_time_between_failures(calm, 1) == pytest.approx(30 * DAY + 60 + 4 * DAY + PRIOR_S)
    assert (
        mean_time_between_failures([*calm, Ran(60, 1, Outcome.KILLED)], 1) < mean_time_between_failures(calm, 1) / 1.9
    )
