"""The first gang that cannot start holds a reservation, and others go around it where they do not delay it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.job.lifecycle import ReasonCode
from orchestrator.schedule.decide import decide
from orchestrator.schedule.gang import Decisions, Gang, Queue, Rules
from orchestrator.schedule.history import History, Ran
from orchestrator.schedule.reserve import ends_by, reserve
from orchestrator.schedule.yard import Yard
from tests.builders import a_gang, a_node, an_option, hold

ALONE = Rules(preempt=False, resize=False, levels=1)
"""Nobody stops, and whoever was submitted first is first."""


def a_yard(*slots: int, **keys: Any) -> Yard:
    return Yard([a_node(f"n{at}", slots=count) for at, count in enumerate(slots)], **({"rules": ALONE} | keys))


def around(yard: Yard, *gangs: Gang, now: float = 0.0) -> Decisions:
    for gang in gangs:
        yard.wait(gang)
    return decide(yard, now)


def started(decisions: Decisions) -> dict[str, int]:
    return {start.job_id: start.placement.world_size for start in decisions.starts}


def test_a_reservation_is_for_when_running_gangs_leave_enough() -> None:
    yard = a_yard(4, 4)
    for job, processes, end in (("j1", 4, 100), ("j2", 2, 50), ("j3", 2, 70)):
        hold(yard, a_gang(job, processes, oracle_s=end))
    for processes, at in ((2, 50), (3, 70), (4, 70), (5, 100), (8, 100)):
        decisions = around(yard, a_gang("j9", processes))
        assert decisions.starts == ()
        assert decisions.reservation is not None
        assert (decisions.reservation.job_id, decisions.reservation.at) == ("j9", at)
        assert sum(slots for _, slots in decisions.reservation.slots) == processes
        assert decisions.waits[0].reason.code == ReasonCode.INSUFFICIENT_FREE


def test_only_what_ends_before_takes_the_reserved_slots() -> None:
    yard = a_yard(4)
    hold(yard, a_gang("j1", 3, oracle_s=100))
    head = a_gang("j2", 4, oracle_s=10)
    assert started(around(yard, head, a_gang("j3", oracle_s=101))) == {}
    yard.leave("j3")
    assert started(around(yard, a_gang("j4", oracle_s=100))) == {"j4": 1}


def test_what_the_reservation_leaves_over_is_for_anybody() -> None:
    """At 100, 6 slots are free, and the first takes 4 of them."""
    yard = a_yard(6)
    hold(yard, a_gang("j1", 3, oracle_s=100))
    decisions = around(yard, a_gang("j2", 4, oracle_s=1e5), *(a_gang(f"j{at}", oracle_s=1e6) for at in range(3, 8)))
    assert started(decisions) == {"j3": 1, "j4": 1}


def test_an_elastic_gang_goes_around_with_what_is_left_over() -> None:
    yard = a_yard(6)
    hold(yard, a_gang("j1", 3, oracle_s=100))
    assert started(around(yard, a_gang("j2", 4), a_gang("j3", 1, 3, oracle_s=1e6))) == {"j3": 2}


def test_other_nodes_are_not_reserved() -> None:
    yard = a_yard(4, 3, rules=replace(ALONE, consolidate=True))
    hold(yard, a_gang("j1", 2, oracle_s=100), "n0")
    decisions = around(yard, a_gang("j2", 4), a_gang("j3", 3), a_gang("j4", 2))
    assert decisions.reservation is not None
    assert decisions.reservation.slots == (("n0", 4),)
    assert started(decisions) == {"j3": 3}


def test_without_estimates_nobody_is_held_back() -> None:
    """As long as so few jobs have ended that nothing is known of how long they take."""
    yard = a_yard(4)
    hold(yard, a_gang("j1", 3))
    decisions = around(yard, a_gang("j2", 4), a_gang("j3"))
    assert decisions.reservation is not None
    assert math.isinf(decisions.reservation.at)
    assert started(decisions) == {"j3": 1}


def test_max_duration_is_an_estimate_too() -> None:
    yard = a_yard(4)
    hold(yard, a_gang("j1", 3, left_s=100.0))
    decisions = around(yard, a_gang("j2", 4), a_gang("j3", left_s=200.0), a_gang("j4", left_s=99.0, sequence=9))
    assert decisions.reservation is not None
    assert decisions.reservation.at == 100
    assert started(decisions) == {}, "j4 stands in line behind j3"
    yard.leave("j3")
    assert started(decide(yard, 0.0)) == {"j4": 1}


def test_history_is_an_estimate() -> None:
    history = History()
    for _ in range(200):
        history.add(Ran("default", "short", 1, 20.0))
        history.add(Ran("default", "long", 1, 9000.0))
    yard = a_yard(4, history=history)
    long, short = a_gang("j9", name="long"), a_gang("j8", name="short")
    assert ends_by(yard, short, 5.0) < 100 < 6000 < ends_by(yard, long, 5.0) < 14000
    assert ends_by(yard, a_gang("j7", name="long", left_s=50.0), 5.0) == 55
    hold(yard, a_gang("j1", 3, name="long"))
    decisions = around(yard, a_gang("j2", 4, name="short"), long, short)
    assert decisions.reservation is not None
    assert 5000 < decisions.reservation.at < 14000
    assert started(decisions) == {"j8": 1}


def test_one_that_takes_longer_than_expected_holds_the_reservation_up_and_nobody_goes_around() -> None:
    yard = a_yard(4)
    hold(yard, a_gang("j1", 3, oracle_s=100))
    decisions = around(yard, a_gang("j2", 4), a_gang("j3", oracle_s=1), now=150)
    assert decisions.reservation is not None
    assert decisions.reservation.at == 150
    assert started(decisions) == {}


def test_a_gang_that_was_told_to_stop_is_expected_to_be_gone_at_once() -> None:
    yard = a_yard(4)
    hold(yard, a_gang("j1", 3, oracle_s=1e6), stopping=True)
    hold(yard, a_gang("j2", 1, oracle_s=100))
    decisions = around(yard, a_gang("j3", 4, oracle_s=10), now=7)
    assert decisions.reservation is not None
    assert decisions.reservation.at == 100


def test_what_fits_at_no_time_gets_no_reservation() -> None:
    yard = a_yard(4)
    held = hold(yard, a_gang("j1", 4))
    for processes, at in ((4, 100.0), (5, None)):
        shadow = reserve(
            yard.capacity, yard.capacity, [(100.0, 0.0, "j1", held.placement)], a_gang("j2", processes), 9, 0.0
        )
        assert (shadow.reservation.at if shadow is not None else None) == at


def test_those_that_start_at_the_same_time_are_expected_to_end_too() -> None:
    yard = a_yard(4)
    decisions = around(yard, a_gang("j1", 2, oracle_s=10.0), a_gang("j2", 4), a_gang("j3", 2, oracle_s=900.0))
    assert started(decisions) == {"j1": 2}
    assert decisions.reservation is not None
    assert (decisions.reservation.job_id, decisions.reservation.at) == ("j2", 10)


def test_room_that_is_made_for_one_is_not_reserved_for_another() -> None:
    yard = a_yard(4)
    hold(yard, a_gang("j1", 2, oracle_s=1e6), stopping=True)
    hold(yard, a_gang("j2", 2, oracle_s=100))
    decisions = around(yard, a_gang("j3", 2), a_gang("j4", 2), now=7)
    assert [wait.reason.code for wait in decisions.waits] == [ReasonCode.MAKING_ROOM, ReasonCode.INSUFFICIENT_FREE]
    assert decisions.reservation is not None
    assert (decisions.reservation.job_id, decisions.reservation.at) == ("j4", 100)


def test_memory_is_reserved_too() -> None:
    """Slots there are more than enough; of 10 GiB the first needs 8."""
    yard = Yard([a_node(slots=8, memory_gib=10)], rules=ALONE)
    hold(yard, a_gang("j1", oracle_s=100, options=(an_option(1, 4),)))
    head = a_gang("j2", oracle_s=1e4, options=(an_option(1, 8),))
    small, tiny = (an_option(1, 3),), (an_option(1, 2),)
    decisions = around(yard, head, a_gang("j3", oracle_s=1e6, options=small), a_gang("j4", oracle_s=1e6, options=tiny))
    assert decisions.reservation is not None
    assert (decisions.reservation.job_id, decisions.reservation.at) == ("j2", 100)
    assert started(decisions) == {"j4": 1}


def test_a_gang_whose_fewest_ranks_have_no_place_is_reserved_one_for_more() -> None:
    """Alone a rank needs more memory than the open node has."""
    yard = Yard([a_node("a", slots=4, memory_gib=16), a_node("b", memory_gib=64)], rules=ALONE, closed=["b"])
    hold(yard, a_gang("j1", oracle_s=100, options=(an_option(1, 5),)))
    decisions = around(
        yard, a_gang("j2", 1, 4, options=(an_option(4, 4), an_option(1, 20))), a_gang("j3", oracle_s=1e6)
    )
    assert decisions.reservation is not None
    assert (decisions.reservation.job_id, decisions.reservation.slots) == ("j2", (("a", 4),))
    assert started(decisions) == {}


@pytest.mark.parametrize("known", [True, False])
def test_a_large_gang_starts_in_a_stream_of_small_ones(known: bool) -> None:
    """Each time that a small job ends, two come; the large one is not passed over for ever."""
    yard = a_yard(4)
    count, now = 10, 0.0
    keys: dict[str, Any] = {"oracle_s": 50.0} if known else {}
    hold(yard, a_gang("j1", **keys))
    yard.wait(a_gang("j2", 4, queued_at=0.0, **keys))
    for _ in range(60):
        now += 10.0
        for job_id in [one for one, held in yard.running.items() if now - held.since >= 50]:
            held = yard.release(job_id)
            yard.history.add(Ran("default", held.gang.name, held.processes, now - held.since))
        for _ in range(2):
            count += 1
            yard.wait(a_gang(f"j{count}", queued_at=now, **keys))
        for start in decide(yard, now).starts:
            hold(yard, yard.waiting[start.job_id], since=now)
        if "j2" in yard.running:
            return
    raise AssertionError("it starved")


def test_the_queue_decides_who_is_first() -> None:
    yard = a_yard(4, queues=[Queue("b", weight=10)])
    hold(yard, a_gang("j1", 2, queue="a", oracle_s=100))
    decisions = around(yard, a_gang("j2", 4, queue="a"), a_gang("j3", 4, queue="b"))
    assert decisions.reservation is not None
    assert decisions.reservation.job_id == "j3"
    assert [wait.reason.code for wait in decisions.waits] == [ReasonCode.INSUFFICIENT_FREE, ReasonCode.BEHIND_OTHERS]
