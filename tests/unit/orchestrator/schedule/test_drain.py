"""Nodes that are cordoned get nothing new; from drained ones gangs go elsewhere."""

from __future__ import annotations

from orchestrator.job.lifecycle import ReasonCode
from orchestrator.schedule.decide import decide
from orchestrator.schedule.gang import Stop, Why
from orchestrator.schedule.yard import Yard
from tests.builders import a_gang, a_node, hold

NODES = [a_node("a"), a_node("b")]
NOW = 10.0


def test_gangs_of_a_drained_node_are_told_to_stop_however_short_they_ran() -> None:
    yard = Yard(NODES)
    hold(yard, a_gang("j1"), "b", since=NOW)
    hold(yard, a_gang("j2"), "a", since=NOW)
    hold(yard, a_gang("j3", 5), "a", "b", since=NOW)
    yard.set_nodes(NODES, drained=["b"])
    assert decide(yard, NOW).stops == (Stop("j1", Why.DRAINED), Stop("j3", Why.DRAINED))


def test_who_cannot_save_stays_and_who_is_stopping_is_not_told_again() -> None:
    yard = Yard(NODES)
    hold(yard, a_gang("j1", preemptible=False), "b")
    hold(yard, a_gang("j2"), "b", stopping=True)
    yard.set_nodes(NODES, drained=["b"])
    assert decide(yard, NOW).stops == ()


def test_from_a_cordoned_node_nobody_goes() -> None:
    yard = Yard(NODES)
    hold(yard, a_gang("j1"), "b")
    yard.set_nodes(NODES, closed=["b"])
    assert decide(yard, NOW).stops == ()


def test_nothing_starts_on_either() -> None:
    for marks in ({"closed": ["b"]}, {"drained": ["b"]}):
        yard = Yard(NODES, **marks)
        for at in range(1, 4):
            yard.wait(a_gang(f"j{at}", 2))
        yard.wait(a_gang("j5", 5))
        decisions = decide(yard, NOW)
        assert {share.node for start in decisions.starts for share in start.placement.shares} == {"a"}
        assert len(decisions.starts) == 2
        codes = {wait.job_id: wait.reason.code for wait in decisions.waits}
        assert codes["j5"] == ReasonCode.GANG_TOO_LARGE
        yard.set_nodes(NODES)
        assert len(decide(yard, NOW).starts) == 3


def test_nobody_stops_for_slots_of_a_closed_node() -> None:
    for marks in ({"closed": ["b"]}, {"drained": ["b"]}):
        yard = Yard(NODES)
        hold(yard, a_gang("j1", 4), "b", since=-1e6, saved_at=NOW)
        hold(yard, a_gang("j2", 4), "a", since=-1e6)
        yard.set_nodes(NODES, **marks)
        yard.wait(a_gang("j9", 4, priority=1))
        stops = {stop.job_id: stop.why for stop in decide(yard, NOW).stops}
        assert stops.pop("j1", Why.DRAINED) == Why.DRAINED
        assert stops == {"j2": Why.HIGHER_CLASS}


def test_other_slots_of_a_gang_that_leaves_are_room() -> None:
    """Nobody else stops: j1 leaves both nodes."""
    yard = Yard(NODES)
    hold(yard, a_gang("j1", 6), "a", "b", since=-1e6)
    hold(yard, a_gang("j2", 1), since=-1e6)
    yard.set_nodes(NODES, drained=["b" if yard.capacity.free_at[0] else "a"])
    yard.wait(a_gang("j9", 2, priority=1))
    decisions = decide(yard, NOW)
    assert [stop.job_id for stop in decisions.stops] == ["j1"]
    assert [wait.reason.code for wait in decisions.waits] == [ReasonCode.MAKING_ROOM]
