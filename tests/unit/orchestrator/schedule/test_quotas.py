"""What queues may hold: ceilings, guarantees that are lent or not, borrowing and reclaim."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from orchestrator.job.lifecycle import ReasonCode
from orchestrator.schedule.decide import decide
from orchestrator.schedule.gang import Decisions, Gang, Queue, Rules, Why
from orchestrator.schedule.yard import Yard
from tests.builders import a_gang, a_node, hold

OLD, NOW = -1e6, 5000.0


def a_yard(*queues: Queue, slots: int = 8, **keys: Any) -> Yard:
    return Yard([a_node(slots=slots)], queues=queues, **keys)


def asked(yard: Yard, *gangs: Gang, now: float = NOW) -> Decisions:
    for gang in gangs:
        yard.wait(gang)
    return decide(yard, now)


def started(decisions: Decisions) -> dict[str, int]:
    return {start.job_id: start.placement.world_size for start in decisions.starts}


def codes(decisions: Decisions) -> dict[str, ReasonCode]:
    return {wait.job_id: wait.reason.code for wait in decisions.waits}


def test_a_ceiling_is_the_most_that_a_queue_holds() -> None:
    yard = a_yard(Queue("q", ceiling=4))
    hold(yard, a_gang("j0", 2, queue="q"))
    decisions = asked(yard, a_gang("j1", 1, 8, queue="q"), a_gang("j2", 1, queue="q"), a_gang("j3", 3, queue="r"))
    assert started(decisions) == {"j1": 2, "j3": 3}
    assert codes(decisions) == {"j2": ReasonCode.OVER_QUOTA}
    assert "holds 4 of at most 4; the gang needs 1" in decisions.waits[0].reason.sentence


def test_who_is_over_quota_holds_no_other_queue_up() -> None:
    yard = a_yard(Queue("q", ceiling=2))
    decisions = asked(yard, a_gang("j1", 3, queue="q", priority=9), a_gang("j2", 8, queue="r"))
    assert started(decisions) == {"j2": 8}
    assert decisions.reservation is None


def test_what_is_not_lent_is_kept() -> None:
    yard = a_yard(Queue("own", guaranteed=5, lendable=False))
    decisions = asked(yard, a_gang("j1", 1, 8, queue="r"), a_gang("j2", 1, queue="r"))
    assert started(decisions) == {"j1": 3}
    assert codes(decisions) == {"j2": ReasonCode.OVER_QUOTA}
    assert "may take 0 more" in decisions.waits[0].reason.sentence
    hold(yard, replace(yard.waiting["j1"], max_processes=3))
    assert started(asked(yard, a_gang("j3", 5, queue="own"))) == {"j3": 5}


def test_of_what_is_not_lent_only_what_is_unused_is_kept() -> None:
    yard = a_yard(Queue("own", guaranteed=5, lendable=False))
    hold(yard, a_gang("j0", 4, queue="own"))
    assert started(asked(yard, a_gang("j1", 1, 8, queue="r"))) == {"j1": 3}


def test_what_is_guaranteed_to_one_is_not_kept_from_it_for_another() -> None:
    yard = a_yard(Queue("a", guaranteed=6, lendable=False), Queue("b", guaranteed=6, lendable=False))
    assert started(asked(yard, a_gang("j1", 6, queue="a"))) == {"j1": 6}


def test_nothing_is_lent_of_cordoned_nodes() -> None:
    """Of the 8 slots 4 may be used, all of which are kept."""
    nodes = [a_node("a"), a_node("b")]
    yard = Yard(nodes, queues=[Queue("own", guaranteed=4, lendable=False)], closed=["b"])
    decisions = asked(yard, a_gang("j1", queue="r"))
    assert (started(decisions), codes(decisions)) == ({}, {"j1": ReasonCode.OVER_QUOTA})
    assert started(asked(yard, a_gang("j2", 4, queue="own"))) == {"j2": 4}


def test_a_guarantee_is_lent_and_taken_back() -> None:
    yard = a_yard(Queue("own", guaranteed=4))
    for at in range(4):
        hold(yard, a_gang(f"j{at}", 2, queue="r"), since=OLD, saved_at=NOW - 10 * (at + 1))
    decisions = asked(yard, a_gang("j9", 3, queue="own", ran_s=1e7))
    assert {stop.job_id: stop.why for stop in decisions.stops} == {"j0": Why.QUOTA, "j1": Why.QUOTA}
    assert codes(decisions) == {"j9": ReasonCode.MAKING_ROOM}


def test_nothing_is_taken_back_beyond_the_guarantee() -> None:
    yard = a_yard(Queue("own", guaranteed=4))
    hold(yard, a_gang("j0", 8, queue="r", waited_s=1e6), since=NOW - 100)
    assert asked(yard, a_gang("j9", 5, queue="own")).stops == ()
    assert len(asked(yard, a_gang("j8", 4, queue="own")).stops) == 1


def test_two_gangs_take_back_no_more_than_what_is_guaranteed() -> None:
    yard = a_yard(Queue("own", guaranteed=4))
    for at in range(2):
        hold(yard, a_gang(f"j{at}", 4, queue="r", waited_s=1e6), since=NOW - 100)
    decisions = asked(yard, a_gang("j8", 4, queue="own"), a_gang("j9", 4, queue="own"))
    assert len(decisions.stops) == 1
    yard.stopping(decisions.stops[0].job_id)
    assert decide(yard, NOW + 1).stops == (), "nor a little later"


def test_nobody_is_left_with_less_than_its_own_guarantee() -> None:
    """Both own all that there is, which cannot be: neither takes from the other what is its own."""
    yard = a_yard(Queue("a", guaranteed=6), Queue("b", guaranteed=6), slots=8)
    for at in range(4):
        hold(yard, a_gang(f"j{at}", 2, queue="b", waited_s=1e6), since=NOW - 100)
    assert asked(yard, a_gang("j9", 4, queue="a")).stops == ()
    assert {stop.why for stop in asked(yard, a_gang("j8", 2, queue="a")).stops} == {Why.QUOTA}


def test_what_goes_back_to_one_gang_is_not_there_for_another() -> None:
    yard = a_yard(Queue("a", guaranteed=4), Queue("b", guaranteed=4), slots=6)
    for at in range(3):
        hold(yard, a_gang(f"j{at}", 2, queue="b", waited_s=1e6), since=NOW - 100)
    assert len(asked(yard, a_gang("j8", 2, queue="a"), a_gang("j9", 2, queue="a")).stops) == 1


def test_a_gang_of_which_a_part_is_borrowed_goes_back_whole() -> None:
    """Else the other queue would not get what is its own. It cannot come back in the same way: see above."""
    yard = a_yard(Queue("a", guaranteed=5), Queue("b", guaranteed=3))
    hold(yard, a_gang("j1", 4, queue="b", waited_s=1e6), since=NOW - 100)
    hold(yard, a_gang("j2", 4, queue="a", preemptible=False), since=NOW - 100)
    assert {stop.why for stop in asked(yard, a_gang("j9", 1, queue="a")).stops} == {Why.QUOTA}
    yard.wait(yard.release("j1").gang)
    hold(yard, yard.waiting["j9"], since=NOW)
    decisions = decide(yard, NOW + 100)
    assert (decisions.starts, decisions.stops) == ((), ())


def test_an_elastic_gang_takes_no_more_than_its_own_while_others_ask_for_theirs() -> None:
    for processes, outcome in ((6, {"j1": 1, "j2": 6}), (7, {"j1": 8})):
        yard = a_yard(Queue("a", guaranteed=1), Queue("b", guaranteed=6))
        assert started(asked(yard, a_gang("j1", 1, 8, queue="a"), a_gang("j2", processes, queue="b"))) == outcome


def test_a_higher_class_gives_nothing_back() -> None:
    yard = a_yard(Queue("own", guaranteed=8))
    hold(yard, a_gang("j0", 8, queue="r", priority=1), since=OLD)
    assert asked(yard, a_gang("j9", queue="own")).stops == ()


def test_who_has_just_started_keeps_what_it_borrowed_for_a_while() -> None:
    for ran, stops in ((59, 0), (60, 1)):
        yard = a_yard(Queue("own", guaranteed=8))
        hold(yard, a_gang("j0", 8, queue="r"), since=NOW - ran)
        decisions = asked(yard, a_gang("j9", queue="own", queued_at=NOW))
        assert len(decisions.stops) == stops
        if not stops:
            assert decisions.next_at == NOW + 1


def test_a_large_gang_is_not_passed_over_for_ever_by_small_ones_of_its_queue() -> None:
    """It needs all of what its queue may hold, and small ones come all the time."""
    for queue in (Queue("q", ceiling=4), Queue("own", guaranteed=4, lendable=False)):
        yard = a_yard(queue, rules=Rules(preempt=False))
        count, now = 10, 0.0
        yard.wait(a_gang("j2", 4, queue="q", ran_s=1.0, oracle_s=51.0))
        for at in (3, 4):
            hold(yard, a_gang(f"j{at}", queue="q", oracle_s=50.0), since=-10.0 * at)
        for _ in range(40):
            now += 10.0
            for job_id in [one for one, held in yard.running.items() if now - held.since >= 50]:
                yard.release(job_id)
            for _ in range(2):
                count += 1
                yard.wait(a_gang(f"j{count}", queue="q", queued_at=now, oracle_s=50.0))
            for start in decide(yard, now).starts:
                hold(yard, yard.waiting[start.job_id], since=now)
            if "j2" in yard.running:
                break
        assert "j2" in yard.running, f"it starved behind {queue}"


def test_others_of_its_queue_go_around_one_that_is_over_quota() -> None:
    yard = a_yard(Queue("q", ceiling=4), rules=Rules(preempt=False, levels=1))
    hold(yard, a_gang("j1", 2, queue="q", oracle_s=100.0))
    hold(yard, a_gang("j2", 1, queue="q", oracle_s=900.0))
    large, late, soon = a_gang("j3", 3, queue="q"), a_gang("j4", oracle_s=200.0, queue="q"), 90.0
    assert started(asked(yard, large, late, now=0.0)) == {}
    yard.leave("j4")
    assert started(asked(yard, a_gang("j5", oracle_s=soon, queue="q"), now=0.0)) == {"j5": 1}


def test_what_a_queue_may_never_hold_is_in_nobodys_way() -> None:
    for queues in ([Queue("q", ceiling=4)], [Queue("own", guaranteed=4, lendable=False)]):
        yard = a_yard(*queues)
        decisions = asked(yard, a_gang("j1", 5, queue="q", ran_s=10.0), a_gang("j2", 3, queue="q", ran_s=1e5))
        assert started(decisions) == {"j2": 3}
        assert codes(decisions) == {"j1": ReasonCode.OVER_QUOTA}


def test_a_guarantee_on_paper_alone_is_no_trouble() -> None:
    yard = a_yard(Queue("own", guaranteed=100, lendable=False))
    assert codes(asked(yard, a_gang("j1", queue="r"))) == {"j1": ReasonCode.OVER_QUOTA}
    assert started(asked(yard, a_gang("j2", 8, queue="own"))) == {"j2": 8}
