"""Whoever waits is told why, and what would change it."""

from __future__ import annotations

import pytest

from orchestrator.errors import DoesNotFitError, ImpossibleGangError
from orchestrator.job.lifecycle import Reason, ReasonCode
from orchestrator.schedule import explain
from orchestrator.schedule.decide import decide
from orchestrator.schedule.gang import Gang, Queue, Rules, Stop, Why
from orchestrator.schedule.yard import Yard
from tests.builders import a_gang, a_node, an_option, hold

NOW = 5000.0


def told(yard: Yard, *gangs: Gang) -> dict[str, Reason]:
    for gang in gangs:
        yard.wait(gang)
    return {wait.job_id: wait.reason for wait in decide(yard, NOW).waits}


def busy(*, preemptible: bool = False) -> Yard:
    yard = Yard([a_node(slots=4, memory_gib=8)], queues=[Queue("q", ceiling=1)])
    hold(yard, a_gang("j1", 3, preemptible=preemptible, options=(an_option(3, 2),)))
    return yard


CASES = {
    ReasonCode.NO_NODES: (Yard(), a_gang("j9")),
    ReasonCode.GANG_TOO_LARGE: (busy(), a_gang("j9", 5)),
    ReasonCode.DOES_NOT_FIT: (busy(), a_gang("j9", options=(an_option(1, 9),))),
    ReasonCode.INSUFFICIENT_FREE: (busy(), a_gang("j9", 2)),
    ReasonCode.MAKING_ROOM: (busy(preemptible=True), a_gang("j9", 2, priority=1)),
    ReasonCode.OVER_QUOTA: (busy(), a_gang("j9", 2, queue="q")),
    ReasonCode.ARRAY_FULL: (busy(), a_gang("j9", group="a", at_once=0)),
}


@pytest.mark.parametrize("code", CASES)
def test_each_reason_has_a_sentence_and_a_remedy(code: ReasonCode) -> None:
    yard, gang = CASES[code]
    reason = told(yard, gang)["j9"]
    assert reason.code == code
    assert len(reason.sentence) > 20
    assert reason.remedy
    assert not reason.sentence.endswith("."), "it is put into other sentences"


def test_who_is_behind_is_told_so() -> None:
    reasons = told(busy(), a_gang("j8", 2), a_gang("j9", 2, accelerator="cpu"))
    assert reasons["j9"].code == ReasonCode.BEHIND_OTHERS
    assert "tuneyard why" in (reasons["j9"].remedy or "")


def test_numbers_are_those_of_the_gang_and_the_yard() -> None:
    assert "needs 5 processes; the whole yard holds 4" in told(busy(), a_gang("j9", 5))["j9"].sentence
    assert told(busy(), a_gang("j9", 5))["j9"].remedy == "ask for at most 4 processes"
    assert "needs 2 processes at once, 1 can start now" in told(busy(), a_gang("j9", 2))["j9"].sentence
    on_gpus = told(busy(), a_gang("j9", accelerator="H100"))["j9"]
    assert "needs 1 process on H100; the whole yard holds 0" in on_gpus.sentence
    assert on_gpus.remedy == "ask for another accelerator, or add such a node"


def test_memory_that_others_hold_is_said() -> None:
    reason = told(busy(), a_gang("j9", options=(an_option(1, 3),)))["j9"]
    assert "needs 3.0 GiB of host memory a process, which running jobs hold" in reason.sentence


def test_gpus_that_others_hold_are_no_lack_of_host_memory() -> None:
    small, large = a_node("s", gpus=2, gpu_memory_gib=16), a_node("l", gpus=1, gpu_memory_gib=80)
    yard = Yard([small, large])
    hold(yard, a_gang("j1", preemptible=False), "l")
    reason = told(yard, a_gang("j9", options=(an_option(1, 1, 40),)))["j9"]
    assert reason.code == ReasonCode.INSUFFICIENT_FREE
    assert "40.0 GiB" in reason.sentence
    assert "host memory" not in reason.sentence


def test_whole_nodes_that_others_hold_are_said() -> None:
    yard = Yard([a_node("a"), a_node("b")], rules=Rules(consolidate=True))
    for node in "ab":
        hold(yard, a_gang(f"j{node}", preemptible=False), node)
    assert "on nodes of its own" in told(yard, a_gang("j9", 4))["j9"].sentence


def test_who_makes_room_is_named() -> None:
    one = explain.makes_room([Stop("j1", Why.SHRINK, "j9", 2)])
    assert one.sentence == "j1 goes on with fewer processes to make room for it"
    two = explain.makes_room([Stop("j1", Why.QUOTA, "j9"), Stop("j2", Why.QUOTA, "j9")])
    assert two.sentence == "2 jobs save and go back to the queue to make room for it"


def test_what_is_never_possible_whole_nodes_among_it_is_said() -> None:
    """Consolidated, three ranks go to one node, and none has three."""
    nodes = [a_node("a", slots=2), a_node("b", slots=2)]
    assert told(Yard(nodes), a_gang("j9", 3)) == {}
    mixed = Yard(
        [a_node("a", slots=4, memory_gib=8), a_node("b", slots=4, memory_gib=8)], rules=Rules(consolidate=True)
    )
    reason = told(mixed, a_gang("j9", 4, options=(an_option(4, 3),)))["j9"]
    assert reason.code == ReasonCode.DOES_NOT_FIT
    assert told(Yard(mixed.capacity.nodes), a_gang("j9", 4, options=(an_option(4, 3),))) == {}


def test_what_is_possible_is_not_refused() -> None:
    idle = Yard([a_node(slots=4, memory_gib=8)]).idle
    explain.check_possible(idle, a_gang("j9", 4))
    for gang, error, field in (
        (a_gang("j9", 5), ImpossibleGangError, "resources.num_processes"),
        (a_gang("j9", 1, accelerator="gpu"), ImpossibleGangError, "resources.accelerator"),
        (a_gang("j9", options=(an_option(1, 9),)), DoesNotFitError, None),
    ):
        with pytest.raises(error) as refused:
            explain.check_possible(idle, gang)
        assert refused.value.hint
        assert field is None or refused.value.field == field


def test_durations_are_read_easily() -> None:
    told = [explain.duration(seconds) for seconds in (4.2, 89, 90, 5000, 5400, 1e5, 2e5)]
    assert told == ["4 s", "89 s", "2 min", "83 min", "1.5 h", "27.8 h", "2.3 days"]
    assert (explain.count(1), explain.count(2)) == ("1 process", "2 processes")
