"""Who comes first: classes, then shares of queues, then levels, then submission."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.schedule.decide import decide
from orchestrator.schedule.gang import Gang, Queue, Rules
from orchestrator.schedule.history import History
from orchestrator.schedule.order import AT_ONCE, Levels, Lines, lifts, next_fall_s, next_lift_s, share_of
from orchestrator.schedule.yard import Yard
from tests.builders import a_gang, a_node, hold

RULES = Rules()
LEVELS = Levels(History(), RULES)


def started(yard: Yard, *gangs: Gang, now: float = 0.0) -> list[str]:
    """Job ids, in the order in which they get slots."""
    for gang in gangs:
        yard.wait(gang)
    return [start.job_id for start in decide(yard, now).starts]


def test_classes_come_first_whatever_else() -> None:
    yard = Yard([a_node(slots=4)], queues=[Queue("b", weight=9, guaranteed=4)])
    order = started(
        yard, a_gang("j1", queue="b"), a_gang("j2", priority=1), a_gang("j3", priority=2, ran_s=1e6), a_gang("j4")
    )
    assert order == ["j3", "j2", "j1", "j4"]


def test_the_queue_that_holds_least_for_its_weight_is_next() -> None:
    yard = Yard([a_node(slots=6)], queues=[Queue("a", weight=2), Queue("b")])
    gangs = [a_gang(f"j{at}", queue=queue) for at, queue in enumerate("aaaabbbb")]
    assert started(yard, *gangs) == ["j0", "j4", "j1", "j2", "j5", "j3"]


def test_what_a_queue_holds_counts() -> None:
    yard = Yard([a_node(slots=6)])
    hold(yard, a_gang("j9", 3, queue="a"))
    gangs = [a_gang(f"j{at}", queue=queue) for at, queue in enumerate("aabbb")]
    assert started(yard, *gangs) == ["j2", "j3", "j4"]


def test_what_is_guaranteed_goes_before_what_is_borrowed() -> None:
    queues = [Queue("a", weight=100), Queue("b", guaranteed=2)]
    yard = Yard([a_node(slots=4)], queues=queues)
    gangs = [a_gang(f"j{at}", queue=queue) for at, queue in enumerate("aaabbb")]
    assert started(yard, *gangs) == ["j3", "j4", "j0", "j1"]


def test_a_gang_that_borrows_a_part_comes_after_those_that_borrow_nothing() -> None:
    yard = Yard([a_node(slots=4)], queues=[Queue("a", guaranteed=4), Queue("b", guaranteed=1)])
    hold(yard, a_gang("j9", queue="a"))
    assert started(yard, a_gang("j1", 2, queue="b"), a_gang("j2", 3, queue="a")) == ["j2"]


def test_shares() -> None:
    assert share_of(Queue("q", weight=2), 6) == (True, 3.0)
    queue = Queue("q", guaranteed=6)
    shares = [share_of(queue, 4, 2), share_of(queue, 6), share_of(Queue("r"), 1), share_of(queue, 4, 3)]
    assert shares == sorted(shares)
    assert [borrowed for borrowed, _ in shares] == [False, False, True, True]


def test_of_one_queue_the_level_and_then_the_order_of_submission() -> None:
    yard = Yard([a_node(slots=19)])
    order = started(yard, a_gang("j3"), a_gang("j1", ran_s=9e4), a_gang("j4"), a_gang("j2", 16))
    assert order == ["j3", "j4", "j2", "j1"], "j2 is larger, and j1 has run for a day"
    assert [gang.job_id for gang in yard.in_order()] == order


def test_levels_sink_with_what_was_run_and_with_ranks() -> None:
    levels = [LEVELS.at(a_gang("j1"), ran, 0) for ran in (0, 1e3, 1e4, 1e5, 1e6, 1e7)]
    assert levels == sorted(levels)
    assert levels[0] < levels[-1] == RULES.levels - 1
    by_ranks = [LEVELS.at(a_gang("j1", ranks), 1e3, 0) for ranks in (1, 8, 64, 512)]
    assert by_ranks == sorted(by_ranks)
    assert by_ranks[0] < by_ranks[-1]


def test_levels_rise_with_waiting_ever_sooner() -> None:
    gang = a_gang("j1", 64, ran_s=1e6)
    day = RULES.starving_s
    levels = [LEVELS.at(gang, gang.ran_s, lifts(days * day, RULES)) for days in (0, 0.99, 1, 1.58, 1.59, 2.0, 2.33, 9)]
    assert levels == [5, 5, 4, 4, 3, 2, 1, 0]


@given(st.floats(0, 1e9), st.floats(1, 1e6))
def test_the_next_lift_is_the_next(waited: float, starving: float) -> None:
    rules = Rules(starving_s=starving)
    have, at = lifts(waited, rules), next_lift_s(lifts(waited, rules), rules)
    if have < 1 << 20:
        assert at > waited * (1 - 1e-9)
        assert lifts(at * (1 + 1e-9), rules) == have + 1
        assert lifts(at * (1 - 1e-9), rules) == have


@given(st.integers(1, 512), st.floats(1, 1e7), st.floats(0, 1), st.floats(0, 3e5))
def test_where_the_end_is_known_the_next_fall_is_the_next(ranks: int, whole: float, part: float, waited: float) -> None:
    gang, ran = a_gang("j1", ranks, oracle_s=whole), whole * part

    def level(ran_s: float) -> int:
        return LEVELS.at(gang, ran_s, lifts(waited, RULES))

    at = next_fall_s(gang, ran, lifts(waited, RULES), RULES)
    if math.isfinite(at):
        assert ran <= at * (1 + 1e-9)
        assert level(at + 1e-3) < level(ran) or at >= whole - 1
        assert level(max(ran, at - 1e-3)) == level(ran)
    else:
        assert level(whole) == level(ran)


def test_who_goes_on_at_once_is_first_of_its_class() -> None:
    yard = Yard([a_node(slots=4)], queues=[Queue("b", weight=9)])
    hold(yard, a_gang("j9", 1, queue="a"))
    order = started(
        yard, a_gang("j1", 2, queue="b"), a_gang("j2", 1, 4, queue="a", ran_s=1e6, target=2),
        a_gang("j3", 1, priority=1),
    )  # fmt: skip
    assert order == ["j3", "j2"]
    assert yard.level("j2") == AT_ONCE


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("ab"), st.integers(1, 2), st.integers(-1, 3)), max_size=9))
def test_lines_are_the_same_one_by_one_and_at_once(rows: list[tuple[int, str, int, int]]) -> None:
    gangs = [
        (a_gang(f"j{at}", ranks, priority=priority, queue=queue), level)
        for at, (priority, queue, ranks, level) in enumerate(rows)
    ]
    at_once, one_by_one = Lines(), Lines()
    at_once.fill(gangs)
    for gang, level in reversed(gangs):
        one_by_one.add(gang, level)
    assert one_by_one.classes == at_once.classes
    assert list(at_once) == sorted({gang.priority for gang, _ in gangs}, reverse=True)
    for gang, level in gangs:
        one_by_one.remove(gang, level)
    assert one_by_one.classes == {}


@pytest.mark.parametrize("starving", [1.0, 60.0])
def test_a_wait_of_years_is_no_trouble(starving: float) -> None:
    yard = Yard([a_node(slots=1)], rules=Rules(starving_s=starving))
    hold(yard, a_gang("j2", preemptible=False))
    yard.wait(a_gang("j1"))
    decide(yard, 1e9)
    assert yard.level("j1") == 0
