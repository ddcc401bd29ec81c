"""Of an array so many run at once as it says."""

from __future__ import annotations

from typing import Any

from orchestrator.job.lifecycle import ReasonCode
from orchestrator.schedule.decide import decide
from orchestrator.schedule.gang import Gang
from orchestrator.schedule.yard import Yard
from tests.builders import a_gang, a_node, hold

NOW = 5000.0


def one_of(job_id: str, processes: int = 1, **changes: Any) -> Gang:
    return a_gang(job_id, processes, **({"group": "a", "at_once": 2} | changes))


def a_yard(slots: int, *waiting: Gang) -> Yard:
    yard = Yard([a_node(slots=slots)])
    for gang in waiting:
        yard.wait(gang)
    return yard


def test_so_many_at_once_and_the_others_in_order() -> None:
    yard = a_yard(8, *(one_of(f"j{at}") for at in range(4)), a_gang("j9"))
    decisions = decide(yard, NOW)
    assert [start.job_id for start in decisions.starts] == ["j0", "j1", "j9"]
    assert {wait.job_id: wait.reason.code for wait in decisions.waits} == {
        "j2": ReasonCode.ARRAY_FULL, "j3": ReasonCode.ARRAY_FULL
    }  # fmt: skip
    assert "2 of its array run" in decisions.waits[0].reason.sentence


def test_those_that_run_count_until_they_have_ended() -> None:
    yard = a_yard(8, one_of("j2"), one_of("j3"))
    hold(yard, one_of("j0"))
    hold(yard, one_of("j1"), stopping=True)
    assert decide(yard, NOW).starts == ()
    yard.release("j1")
    assert [start.job_id for start in decide(yard, NOW).starts] == ["j2"]


def test_arrays_are_told_apart_and_some_have_no_limit() -> None:
    yard = a_yard(
        8,
        *(one_of(f"j{at}", at_once=1) for at in (1, 2)),
        *(one_of(f"j{at}", group="b", at_once=None) for at in (3, 4)),
    )
    assert [start.job_id for start in decide(yard, NOW).starts] == ["j1", "j3", "j4"]


def test_room_is_made_for_so_many_only() -> None:
    yard = a_yard(4, *(one_of(f"j{at}", priority=1, at_once=1) for at in (1, 2, 3)))
    for at in (5, 6, 7, 8):
        hold(yard, a_gang(f"j{at}"))
    decisions = decide(yard, NOW)
    assert len(decisions.stops) == 1
    assert [wait.reason.code for wait in decisions.waits] == [
        ReasonCode.MAKING_ROOM, ReasonCode.ARRAY_FULL, ReasonCode.ARRAY_FULL
    ]  # fmt: skip
