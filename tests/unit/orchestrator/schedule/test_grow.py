"""Elastic gangs take what nobody waits for."""

from __future__ import annotations

from typing import Any

from orchestrator.job.lifecycle import Reason, ReasonCode
from orchestrator.schedule.decide import decide
from orchestrator.schedule.gang import Queue, Rules, Stop, Why
from orchestrator.schedule.yard import Yard
from tests.builders import a_gang, a_node, an_option, hold

NOW = 600.0


def a_yard(slots: int = 8, **keys: Any) -> Yard:
    return Yard([a_node(slots=slots)], **keys)


def grown(yard: Yard, now: float = NOW) -> dict[str, int | None]:
    decisions = decide(yard, now)
    assert all(stop.why == Why.GROW and stop.for_job is None for stop in decisions.stops)
    return {stop.job_id: stop.target for stop in decisions.stops}


def test_it_grows_to_the_largest_size_for_which_there_is_room() -> None:
    for others, target in ((0, 8), (1, 4), (4, 4), (5, None)):
        yard = a_yard()
        hold(yard, a_gang("j1", 1, 8), processes=2)
        if others:
            hold(yard, a_gang("j2", others))
        assert grown(yard) == ({} if target is None else {"j1": target})


def test_it_goes_on_at_once_with_so_many() -> None:
    yard = a_yard()
    hold(yard, a_gang("j1", 1, 8, queue="q"), processes=2)
    (stop,) = decide(yard, NOW).stops
    yard.stopping("j1")
    assert decide(yard, NOW + 1).stops == ()
    yard.release("j1")
    yard.wait(a_gang("j1", 1, 8, queue="q", target=stop.target, queued_at=NOW + 5))
    (start,) = decide(yard, NOW + 5).starts
    assert start.placement.world_size == stop.target == 8


def test_what_it_would_grow_by_is_still_for_who_comes_meanwhile() -> None:
    yard = a_yard()
    hold(yard, a_gang("j1", 1, 8), processes=2)
    yard.stopping("j1", decide(yard, NOW).stops[0].target)
    yard.wait(a_gang("j2", 3, 8))
    (start,) = decide(yard, NOW + 1).starts
    assert start.placement.world_size == 6, "all but the two that j1 goes on with"


def test_only_once_it_has_run_for_a_while() -> None:
    yard = a_yard()
    hold(yard, a_gang("j1", 1, 8), processes=2, since=1.0)
    decisions = decide(yard, NOW)
    assert (decisions.stops, decisions.next_at) == ((), 601.0)
    assert grown(yard, 601.0) == {"j1": 8}


def test_not_while_anybody_waits_for_room() -> None:
    yard = a_yard(rules=Rules(preempt=False))
    hold(yard, a_gang("j1", 1, 8), processes=2, since=NOW - 601)
    yard.wait(a_gang("j2", 7, priority=-1, queued_at=NOW))
    assert grown(yard) == {}
    yard.leave("j2")
    assert grown(yard) == {"j1": 8}


def test_who_waits_for_something_else_is_not_in_the_way() -> None:
    misfit = Reason(code=ReasonCode.DOES_NOT_FIT, sentence="it is too large")
    for other in (
        a_gang("j2", 9),
        a_gang("j2", options=(), misfit=misfit),
        a_gang("j2", queue="full"),
        a_gang("j2", group="a", at_once=0),
    ):
        yard = a_yard(queues=[Queue("full", ceiling=0)])
        hold(yard, a_gang("j1", 1, 8), processes=2, since=1.0)
        yard.wait(other)
        assert decide(yard, NOW).next_at == 601.0
        assert grown(yard, 601.0) == {"j1": 8}


def test_one_at_a_time_the_highest_class_and_the_smallest_first() -> None:
    yard = a_yard(16)
    hold(yard, a_gang("j1", 1, 8), processes=2)
    hold(yard, a_gang("j2", 1, 8), processes=1)
    hold(yard, a_gang("j3", 1, 8, priority=1), processes=4)
    assert grown(yard) == {"j3": 8}
    yard.release("j3")
    assert grown(yard) == {"j2": 8}


def test_within_what_its_queue_may_hold() -> None:
    yard = a_yard(queues=[Queue("q", ceiling=5), Queue("own", guaranteed=2, lendable=False)])
    hold(yard, a_gang("j1", 1, 8, queue="q"), processes=2)
    assert grown(yard) == {"j1": 4}
    yard = a_yard(queues=[Queue("own", guaranteed=5, lendable=False)])
    hold(yard, a_gang("j1", 1, 8, queue="q"), processes=2)
    assert grown(yard) == {}


def test_to_sizes_of_its_options_for_which_there_is_memory() -> None:
    yard = Yard([a_node(slots=8, memory_gib=20)])
    hold(yard, a_gang("j2", options=(an_option(1, 4),)))
    hold(yard, a_gang("j1", 1, 6, options=(an_option(6, 3), an_option(4, 4), an_option(2, 5))), processes=2)
    assert grown(yard) == {"j1": 4}, "six would need 18 of the 16 GiB that are free"


def test_who_cannot_save_does_not_grow() -> None:
    yard = a_yard()
    hold(yard, a_gang("j1", 1, 8, preemptible=False), processes=2)
    assert grown(yard) == {}


def test_no_growing_where_the_rules_say_so() -> None:
    yard = a_yard(rules=Rules(resize=False))
    hold(yard, a_gang("j1", 1, 8), processes=2)
    assert decide(yard, NOW).stops == ()
    assert decide(yard, NOW).next_at is None


def test_what_starts_now_comes_first() -> None:
    yard = a_yard()
    hold(yard, a_gang("j1", 1, 8), processes=2)
    yard.wait(a_gang("j2", 3))
    decisions = decide(yard, NOW)
    assert [start.job_id for start in decisions.starts] == ["j2"]
    assert decisions.stops == (Stop("j1", Why.GROW, None, 4),)
