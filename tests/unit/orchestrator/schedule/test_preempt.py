"""Who makes room: elastic gangs that shrink first; then the lowest class, the longest ahead, the least lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.cluster.model import Gpu
from orchestrator.job.lifecycle import ReasonCode
from orchestrator.schedule.decide import decide
from orchestrator.schedule.gang import Decisions, Gang, Queue, Rules, Why
from orchestrator.schedule.preempt import may_stop, sizes
from orchestrator.schedule.yard import Yard
from tests.builders import a_gang, a_node, an_option, hold

OLD = -1e6
"""Everybody who runs since then is protected no more, and in the worst level."""
NOW = 5000.0


def a_yard(*slots: int, **keys: Any) -> Yard:
    return Yard([a_node(f"n{at}", slots=count) for at, count in enumerate(slots)], **keys)


def asked(yard: Yard, *gangs: Gang, now: float = NOW) -> Decisions:
    for gang in gangs:
        yard.wait(gang)
    return decide(yard, now)


def stopped(decisions: Decisions) -> dict[str, Why]:
    return {stop.job_id: stop.why for stop in decisions.stops}


def high(job_id: str, processes: int = 1, **changes: Any) -> Gang:
    return a_gang(job_id, processes, **({"priority": 100} | changes))


def test_the_lowest_class_goes_first() -> None:
    yard = a_yard(3)
    for at, priority in enumerate((1, 0, 2)):
        hold(yard, a_gang(f"j{at}", priority=priority), since=OLD)
    decisions = asked(yard, high("j9"))
    assert stopped(decisions) == {"j1": Why.HIGHER_CLASS}
    (stop,) = decisions.stops
    assert (stop.for_job, stop.target) == ("j9", None)
    (wait,) = decisions.waits
    assert wait.reason.code == ReasonCode.MAKING_ROOM
    assert "j1" in wait.reason.sentence


def test_of_one_class_who_has_the_most_ahead_goes_first() -> None:
    yard = a_yard(3)
    for at, since in enumerate((NOW - 100, NOW - 1e5, NOW - 2000)):
        hold(yard, a_gang(f"j{at}"), since=since, saved_at=NOW if at != 1 else None)
    assert stopped(asked(yard, high("j9"))) == {"j1": Why.HIGHER_CLASS}, "though it has saved nothing"


def test_of_one_level_who_loses_least_goes_first() -> None:
    yard = a_yard(7, rules=Rules(levels=1))
    for at, (processes, saved) in enumerate(((2, 50), (1, 90), (1, 200), (3, 40))):
        hold(yard, a_gang(f"j{at}", processes), since=OLD, saved_at=NOW - saved)
    assert stopped(asked(yard, high("j9"))) == {"j1": Why.HIGHER_CLASS}, "90 rank-seconds; j0 loses 100"


def test_who_never_saved_loses_all_since_its_start() -> None:
    yard = a_yard(2)
    hold(yard, a_gang("j1"), since=NOW - 3e5)
    hold(yard, a_gang("j2"), since=NOW - 4e5, saved_at=NOW - 1e5)
    assert yard.running["j1"].lost_s(NOW) == 3e5
    assert stopped(asked(yard, high("j9"))) == {"j2": Why.HIGHER_CLASS}


def test_one_less_where_one_less_will_do() -> None:
    """j1 would be the cheapest, but j2 alone is enough, and without it j1 is not."""
    yard = a_yard(4)
    hold(yard, a_gang("j1", 1), since=OLD, saved_at=NOW)
    hold(yard, a_gang("j2", 3), since=OLD, saved_at=NOW - 500)
    assert stopped(asked(yard, high("j9", 3))) == {"j2": Why.HIGHER_CLASS}


def test_nobody_stops_where_it_would_not_help() -> None:
    yard = a_yard(4, rules=Rules(consolidate=True))
    hold(yard, a_gang("j1", 2), since=OLD)
    hold(yard, a_gang("j2", 2, priority=101), since=OLD)
    assert stopped(asked(yard, high("j9", 3))) == {}
    assert stopped(asked(yard, high("j8", 2))) == {"j1": Why.HIGHER_CLASS}


def test_only_who_is_in_the_way_stops() -> None:
    yard = a_yard(2, 2, 4, rules=Rules(consolidate=True))
    for at, node in enumerate(("n0", "n1", "n2", "n2")):
        hold(yard, a_gang(f"j{at}", 2), node, since=OLD, saved_at=NOW - 10 * at)
    assert stopped(asked(yard, high("j9", 4))) == {"j2": Why.HIGHER_CLASS, "j3": Why.HIGHER_CLASS}


@pytest.mark.parametrize(("ran", "stops"), [(59.0, False), (60.0, True)])
def test_who_has_just_started_is_protected(ran: float, stops: bool) -> None:
    yard = a_yard(1)
    hold(yard, a_gang("j1"), since=NOW - ran)
    assert bool(stopped(asked(yard, high("j9")))) == stops


@pytest.mark.parametrize("state", [{"preemptible": False}, {"stopping": True}, {"evictions": 20}])
def test_who_cannot_save_or_is_stopping_is_not_told(state: dict[str, Any]) -> None:
    yard = a_yard(1)
    gang = a_gang("j1", **{key: value for key, value in state.items() if key != "stopping"})
    hold(yard, gang, since=OLD, stopping=state.get("stopping", False))
    told = stopped(asked(yard, high("j9")))
    assert told == ({"j1": Why.HIGHER_CLASS} if "evictions" in state else {}), "a higher class may, however often"


def may(gang: Gang, now: float = NOW, rules: Rules | None = None, since: float = OLD, **victim: Any) -> Why | None:
    """Whether a gang of one rank may be stopped for another."""
    yard = a_yard(1, rules=rules)
    held = hold(yard, a_gang("j1", **victim), since=since)
    yard.wait(gang)
    decide(yard, now)
    return may_stop(yard, gang, yard.level(gang.job_id), held, Counter(yard.held), now)


def test_a_shorter_one_is_stopped_for_only_once_all_is_fair() -> None:
    short = a_gang("j9")
    assert may(short) == Why.SHORTER
    assert may(a_gang("j9", priority=-1)) is None
    assert may(a_gang("j9", ran_s=1e7)) is None, "it is no shorter"
    assert may(short, since=NOW - 899) is None, "it has just started"
    assert may(a_gang("j9", queued_at=NOW - 59)) is None, "it has not waited for long"
    assert may(a_gang("j9", queued_at=NOW - 60)) == Why.SHORTER
    assert may(short, evictions=19) == Why.SHORTER
    assert may(short, evictions=20) is None
    assert may(a_gang("j9", priority=1), evictions=20) == Why.HIGHER_CLASS


def test_who_waited_for_days_is_hard_to_stop() -> None:
    assert may(a_gang("j9", ran_s=300.0), waited_s=0.0) == Why.SHORTER
    assert may(a_gang("j9", ran_s=300.0), waited_s=1e6) is None


def test_no_pre_emption_where_the_rules_say_so() -> None:
    yard = a_yard(1, rules=Rules(preempt=False))
    hold(yard, a_gang("j1"), since=OLD)
    assert stopped(asked(yard, high("j9"))) == {}


def test_of_two_queues_who_holds_more_does_not_take_from_who_holds_less() -> None:
    yard = a_yard(3)
    hold(yard, a_gang("j1", 2, queue="a", preemptible=False), since=OLD)
    hold(yard, a_gang("j2", 1, queue="b"), since=OLD)
    assert stopped(asked(yard, a_gang("j9", queue="a"))) == {}
    assert stopped(asked(yard, a_gang("j8", queue="c"))) == {"j2": Why.SHORTER}


def test_room_is_made_once() -> None:
    """Who comes next does not get it, nor more of it made in vain."""
    yard = a_yard(4)
    for at in range(4):
        hold(yard, a_gang(f"j{at}"), since=OLD)
    decisions = asked(yard, high("j8", 2), high("j9", 1))
    assert len(stopped(decisions)) == 3
    for stop in decisions.stops:
        yard.stopping(stop.job_id)
    decisions = asked(yard, a_gang("j7"))
    assert not decisions.stops or stopped(decisions).keys() == {"j3"}
    codes = {wait.job_id: wait.reason.code for wait in decisions.waits}
    assert codes["j8"] == codes["j9"] == ReasonCode.MAKING_ROOM
    for job_id in [one for one, held in yard.running.items() if held.stopping]:
        yard.wait(yard.release(job_id).gang)
    assert {start.job_id for start in decide(yard, NOW + 10).starts} >= {"j8", "j9"}


def test_nobody_stops_for_slots_that_are_reserved() -> None:
    """j1 is in the way of j8 for 100 s more, in which j9 does not end: what stopped for it would stand idle."""
    for length, stops in ((1e4, {}), (50.0, {"j2": Why.HIGHER_CLASS})):
        yard = a_yard(2)
        hold(yard, a_gang("j1", priority=1, preemptible=False, oracle_s=100.0), since=NOW)
        hold(yard, a_gang("j2", oracle_s=NOW + 90), since=0.0)
        first, second = (
            a_gang("j8", 2, priority=1, ran_s=10.0, oracle_s=20.0),
            a_gang("j9", priority=1, oracle_s=length),
        )
        decisions = asked(yard, first, second)
        assert decisions.reservation is not None
        assert (decisions.reservation.job_id, decisions.reservation.at) == ("j8", NOW + 100)
        assert stopped(decisions) == stops
        if not stops:
            assert decisions.waits[1].reason.code == ReasonCode.BEHIND_OTHERS


def test_elsewhere_they_stop_for_who_is_behind_a_reservation() -> None:
    yard = Yard([a_node("g", gpus=2), a_node("c", slots=2)])
    hold(yard, a_gang("j1", 2, accelerator="gpu", preemptible=False, oracle_s=1e7), since=0.0)
    hold(yard, a_gang("j2", 2, accelerator="cpu"), since=0.0)
    first, second = a_gang("j8", 2, priority=5, accelerator="gpu"), a_gang("j9", 2, priority=1, accelerator="cpu")
    decisions = asked(yard, first, second)
    assert decisions.reservation is not None
    assert decisions.reservation.job_id == "j8"
    assert stopped(decisions) == {"j2": Why.HIGHER_CLASS}


def test_memory_is_room_too() -> None:
    """There are slots; it is memory that somebody has to give back."""
    yard = Yard([a_node(slots=8, memory_gib=10)])
    hold(yard, a_gang("j1", options=(an_option(1, 2),)), since=OLD, saved_at=NOW)
    hold(yard, a_gang("j2", options=(an_option(1, 6),)), since=OLD, saved_at=NOW - 10)
    decisions = asked(yard, high("j9", options=(an_option(1, 7),)))
    assert stopped(decisions) == {"j2": Why.HIGHER_CLASS}
    yard.release("j2")
    assert [start.job_id for start in decide(yard, NOW).starts] == ["j9"]


def test_gpus_that_differ_are_room_for_some_only() -> None:
    node = a_node("m").model_copy(update={"gpus": tuple(Gpu(index=at, type="AH"[at // 2]) for at in range(4))})
    yard = Yard([node])
    hold(yard, a_gang("j1", 2, accelerator="h"), since=OLD)
    decisions = asked(yard, high("j9", 2, accelerator="h"), a_gang("j8", 2, accelerator="a"))
    assert stopped(decisions) == {"j1": Why.HIGHER_CLASS}
    assert [(start.job_id, start.placement.shares[0].gpus) for start in decisions.starts] == [("j8", (0, 1))]


# Shrinking.


def test_an_elastic_gang_shrinks_before_any_stops() -> None:
    yard = a_yard(6)
    hold(yard, a_gang("j1", 1, 4), since=OLD)
    hold(yard, a_gang("j2", 2), since=OLD, saved_at=NOW)
    decisions = asked(yard, high("j9", 2))
    (stop,) = decisions.stops
    assert (stop.job_id, stop.why, stop.target, stop.for_job) == ("j1", Why.SHRINK, 2, "j9")
    assert "fewer processes" in decisions.waits[0].reason.sentence


def test_it_shrinks_by_as_little_as_will_do() -> None:
    for wanted, target in ((1, 4), (4, 4), (5, 2), (6, 2), (7, 1)):
        yard = a_yard(8)
        hold(yard, a_gang("j1", 1, 8), since=OLD)
        (stop,) = asked(yard, high("j9", wanted)).stops
        assert (stop.why, stop.target) == (Why.SHRINK, target)


def test_what_goes_on_has_room() -> None:
    """Of 4 slots the new gang takes 4: it cannot shrink to nothing, so it stops."""
    yard = a_yard(4)
    hold(yard, a_gang("j1", 1, 4), since=OLD)
    assert stopped(asked(yard, high("j9", 4))) == {"j1": Why.HIGHER_CLASS}


def test_one_of_equal_class_shrinks_and_of_a_higher_does_not() -> None:
    for priority, told in ((0, {}), (1, {"j1": Why.SHRINK}), (2, {"j1": Why.SHRINK})):
        yard = a_yard(4)
        hold(yard, a_gang("j1", 1, 4, priority=1), since=NOW - 60)
        assert stopped(asked(yard, a_gang("j9", priority=priority, ran_s=1e7))) == told
    yard = a_yard(4)
    hold(yard, a_gang("j1", 1, 4, priority=1), since=NOW - 59)
    assert stopped(asked(yard, a_gang("j9", priority=2))) == {}, "it has just started"


def test_several_shrink_where_one_is_not_enough() -> None:
    yard = a_yard(8)
    for at in (1, 2):
        hold(yard, a_gang(f"j{at}", 2, 4), since=OLD)
    decisions = asked(yard, high("j9", 4))
    assert {(stop.job_id, stop.why, stop.target) for stop in decisions.stops} == {
        ("j1", Why.SHRINK, 2), ("j2", Why.SHRINK, 2)
    }  # fmt: skip


def test_nobody_shrinks_in_vain() -> None:
    """j1 is cheaper to shrink, and is where it does not help."""
    yard = Yard([a_node("g", gpus=4), a_node("c", slots=4)])
    hold(yard, a_gang("j1", 1, 4, accelerator="gpu"), since=OLD, saved_at=NOW)
    hold(yard, a_gang("j2", 1, 4, accelerator="cpu"), since=OLD)
    assert stopped(asked(yard, high("j9", 2, accelerator="cpu"))) == {"j2": Why.SHRINK}


def test_what_is_left_to_a_shrunk_gang_is_not_for_others() -> None:
    yard = a_yard(4, queues=[Queue("b", weight=9)])
    hold(yard, a_gang("j1", 1, 4, queue="a"), since=OLD)
    decisions = asked(yard, high("j9", 2, queue="c"), a_gang("j8", 2, queue="b"))
    (stop,) = decisions.stops
    assert (stop.job_id, stop.target) == ("j1", 2)
    gang = yard.release("j1").gang
    yard.wait(a_gang("j1", 1, 4, queue=gang.queue, target=2))
    assert {start.job_id: start.placement.world_size for start in decide(yard, NOW + 5).starts} == {"j9": 2, "j1": 2}


@pytest.mark.parametrize("told", [False, True])
def test_nor_is_it_promised_to_others(told: bool) -> None:
    """Half of what j1 holds is for j8; for j9 somebody else has to stop."""
    yard = a_yard(6)
    hold(yard, a_gang("j1", 1, 4), since=OLD)
    hold(yard, a_gang("j2", 2), since=OLD)
    yard.wait(high("j8", 2))
    if told:
        (stop,) = decide(yard, NOW).stops
        yard.stopping(stop.job_id, stop.target)
    decisions = asked(yard, high("j9", 2))
    assert stopped(decisions) == {"j2": Why.HIGHER_CLASS} | ({} if told else {"j1": Why.SHRINK})


def test_it_shrinks_to_sizes_for_which_it_has_memory() -> None:
    """With two ranks, each needs more than there is beside the new gang."""
    yard = Yard([a_node(slots=8, memory_gib=20)])
    hold(yard, a_gang("j1", 1, 4, options=(an_option(4, 4), an_option(2, 9), an_option(1, 12))), since=OLD)
    (stop,) = asked(yard, high("j9", 1, options=(an_option(1, 6),))).stops
    assert (stop.why, stop.target) == (Why.SHRINK, 1)


def test_a_gang_that_would_not_fit_anywhere_any_more_does_not_shrink() -> None:
    """Since it started, its margins turned out to be too small."""
    yard = Yard([a_node(slots=4, memory_gib=20)])
    hold(yard, a_gang("j1", 1, 4), since=OLD)
    yard.hold(replace(yard.running["j1"], gang=replace(yard.running["j1"].gang, options=())))
    assert stopped(asked(yard, high("j9", 2))) == {"j1": Why.HIGHER_CLASS}


def test_no_shrinking_where_the_rules_say_so() -> None:
    yard = a_yard(4, rules=Rules(resize=False))
    hold(yard, a_gang("j1", 1, 4), since=OLD)
    assert stopped(asked(yard, high("j9", 2))) == {"j1": Why.HIGHER_CLASS}


def test_sizes() -> None:
    assert sizes(a_gang("j1", 1, 8)) == (8, 4, 2, 1)
    assert sizes(a_gang("j1", 3, 8)) == (8, 4, 3)
    assert sizes(a_gang("j1", 4)) == (4,)
    assert sizes(a_gang("j1", 1, 6, options=(an_option(6), an_option(2), an_option(3), an_option(2, 9)))) == (6, 3, 2)
