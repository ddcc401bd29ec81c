"""When to decide again: at that time the answer is another one, and before it is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.schedule.decide import decide
from orchestrator.schedule.gang import Queue, Rules, Why
from orchestrator.schedule.history import History, Ran
from orchestrator.schedule.yard import MOMENT_S, Yard
from tests.builders import a_gang, a_node, hold


def a_yard(slots: int = 1, **keys: Any) -> Yard:
    return Yard([a_node(slots=slots)], **keys)


def shorter() -> Yard:
    """j1 is protected from shorter ones up to 900, and j9 patient up to 860."""
    yard = a_yard()
    hold(yard, a_gang("j1", ran_s=1e7))
    yard.wait(a_gang("j9", queued_at=800.0))
    return yard


def patient() -> Yard:
    yard = a_yard()
    hold(yard, a_gang("j1", ran_s=1e7), since=-1e4)
    yard.wait(a_gang("j9", queued_at=800.0))
    return yard


def higher() -> Yard:
    """j1 is protected from higher classes up to 860, though j9 is patient for longer."""
    yard = a_yard()
    hold(yard, a_gang("j1"), since=800.0)
    yard.wait(a_gang("j9", priority=1, queued_at=839.0))
    return yard


def reclaimed() -> Yard:
    yard = a_yard(queues=[Queue("own", guaranteed=1)])
    hold(yard, a_gang("j1", queue="r"), since=800.0)
    yard.wait(a_gang("j9", queue="own", queued_at=839.0))
    return yard


def shrunk() -> Yard:
    yard = a_yard(2)
    hold(yard, a_gang("j1", 1, 2), since=800.0)
    yard.wait(a_gang("j9", queued_at=839.0))
    return yard


def sinks() -> Yard:
    """j1 has run for long enough, and is as short as j9 until its class of run times ends."""
    yard = a_yard(rules=Rules(min_run_s=0.0, patience_s=0.0))
    hold(yard, a_gang("j1"), since=839.0)
    yard.wait(a_gang("j9", queued_at=839.0))
    return yard


def rises() -> Yard:
    """j9 is no shorter than j1, until it has waited for so long that it is lifted."""
    yard = a_yard(rules=Rules(starving_s=1000.0))
    hold(yard, a_gang("j1", ran_s=1e7), since=-1e4)
    yard.wait(a_gang("j9", ran_s=1e7, queued_at=-100.0))
    return yard


def grows() -> Yard:
    yard = a_yard(2)
    hold(yard, a_gang("j1", 1, 2), processes=1, since=300.0)
    return yard


CASES: dict[Callable[[], Yard], tuple[Why, float | None]] = {
    shorter: (Why.SHORTER, 900.0),
    patient: (Why.SHORTER, 860.0),
    higher: (Why.HIGHER_CLASS, 860.0),
    reclaimed: (Why.QUOTA, 860.0),
    shrunk: (Why.SHRINK, 860.0),
    sinks: (Why.SHORTER, None),
    rises: (Why.SHORTER, 900.0 + MOMENT_S),
    grows: (Why.GROW, 900.0),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_answer_changes_at_next_at_and_not_before(case: Callable[[], Yard]) -> None:
    why, when = CASES[case]
    yard, now, looks = case(), 840.0, 0
    while not (decisions := decide(yard, now)).stops:
        assert decisions.next_at is not None
        assert decisions.next_at > now
        for part in (0.01, 0.5, 0.99):
            between = decide(case(), now + part * (decisions.next_at - now))
            assert (between.starts, between.stops) == ((), ())
        now, looks = decisions.next_at, looks + 1
        assert looks < 10
    assert [stop.why for stop in decisions.stops] == [why]
    assert now > 840.0
    assert when is None or now == pytest.approx(when, abs=1e-9)


def test_nothing_to_wait_for_is_said() -> None:
    assert decide(a_yard(), 840.0).next_at is None
    yard = a_yard()
    hold(yard, a_gang("j1", preemptible=False))
    assert decide(yard, 840.0).next_at is None, "nobody waits"
    yard = a_yard(rules=Rules(preempt=False, resize=False, levels=1))
    hold(yard, a_gang("j1"))
    yard.wait(a_gang("j9", queued_at=839.0))
    assert decide(yard, 840.0).next_at is None, "only an end can help"


def test_where_the_end_is_known_a_gang_is_the_better_the_nearer_it_is() -> None:
    """j1 is long at first; then it is not stopped any more for j9, which has the same level."""
    rules = Rules(patience_s=0.0, min_run_s=0.0)
    for now, stops in ((10.0, 1), (9990.0, 0)):
        yard = a_yard(rules=rules)
        hold(yard, a_gang("j1", oracle_s=1e4))
        decide(yard, 5.0)
        yard.wait(a_gang("j9", oracle_s=200.0, queued_at=now))
        assert len(decide(yard, now).stops) == stops


def test_levels_are_looked_at_once_however_often_a_gang_saves() -> None:
    """Each saving holds the same slots anew."""
    yard = a_yard(2)
    decide(yard, 0.0)
    held = hold(yard, a_gang("j1"))
    yard.wait(a_gang("j9", 2))
    for at in range(1, 1000):
        decide(yard, at * 0.01)
        yard.hold(replace(held, saved_at=at * 0.01))
    assert len(yard._due) <= 2
    assert len(yard._due._heap) < 100


def test_who_has_left_is_looked_at_no_more() -> None:
    yard = a_yard(3)
    decide(yard, 0.0)
    hold(yard, a_gang("j1", 3))
    yard.wait(a_gang("j7", 2))
    yard.wait(a_gang("j8", ran_s=1e6))
    decide(yard, 1.0)
    yard.leave("j7")
    yard.release("j1")
    hold(yard, a_gang("j2", 3, ran_s=1e6, preemptible=False), since=1.0)
    anew = a_yard(3)
    hold(anew, a_gang("j2", 3, ran_s=1e6, preemptible=False), since=1.0)
    anew.wait(a_gang("j8", ran_s=1e6))
    assert decide(yard, 2.0) == decide(anew, 2.0)


def test_history_that_is_learned_ranks_all_anew() -> None:
    yard = a_yard(2, history=History())
    for job in ("j1", "j2", "j9"):
        yard.wait(a_gang(job, name="y"))
    hold(yard, yard.waiting["j1"])
    decide(yard, 100.0)
    before = yard.level("j9")
    for _ in range(50):
        yard.history.add(Ran("default", "y", 1, 1e6))
    hold(yard, yard.waiting["j2"])  # meanwhile others come and go
    yard.release("j2")
    yard.stopping("j1")
    yard.release("j1")
    decide(yard, 100.0)
    assert yard.level("j9") > before


def test_what_was_announced_happens_at_the_very_moment_however_it_rounds() -> None:
    """The time is a sum; tested as a difference it was not there yet, and the next look was minutes away."""
    since = 228.61523766247777
    yard = a_yard(1, rules=Rules(min_run_for_class_s=100.0, patience_s=0.0))
    hold(yard, a_gang("j1"), since=since)
    yard.wait(a_gang("j2", priority=100, queued_at=since))
    told = decide(yard, since)
    assert told.next_at == since + 100.0
    assert [stop.job_id for stop in decide(yard, told.next_at).stops] == ["j1"]
