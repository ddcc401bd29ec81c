"""Gangs that keep away from nodes on which they failed."""

from __future__ import annotations

from orchestrator.schedule.decide import decide
from orchestrator.schedule.yard import Yard
from tests.builders import a_gang, a_node, hold


def a_yard() -> Yard:
    return Yard([a_node("n0", slots=2), a_node("n1", slots=2)])


def nodes_of(yard: Yard) -> dict[str, list[str]]:
    return {start.job_id: [share.node for share in start.placement.shares] for start in decide(yard, 0.0).starts}


def test_it_goes_elsewhere_and_others_do_not_care() -> None:
    yard = a_yard()
    yard.wait(a_gang("j1", 2, avoid=("n0",)))
    yard.wait(a_gang("j2", 2))
    assert nodes_of(yard) == {"j1": ["n1"], "j2": ["n0"]}


def test_it_waits_for_elsewhere() -> None:
    yard = a_yard()
    hold(yard, a_gang("j1", 2), "n1")
    yard.wait(a_gang("j2", 2, avoid=("n0",)))
    yard.wait(a_gang("j3", 2))
    assert nodes_of(yard) == {"j3": ["n0"]}, "one that is behind it takes what it does not want"
    reservation = decide(yard, 0.0).reservation
    assert reservation is not None
    assert (reservation.job_id, reservation.slots) == ("j2", (("n1", 2),))


def test_room_is_made_elsewhere() -> None:
    yard = a_yard()
    hold(yard, a_gang("j1", 2), "n0")
    hold(yard, a_gang("j2", 2), "n1")
    yard.wait(a_gang("j3", 2, priority=100, avoid=("n0",)))
    assert [stop.job_id for stop in decide(yard, 1000.0).stops] == ["j2"]


def test_it_grows_onto_the_node_that_it_went_away_from() -> None:
    """An elastic gang starts at once with what is elsewhere, and would stay so small for good."""
    yard = a_yard()
    yard.wait(a_gang("j1", 2, 4, avoid=("n0",)))
    assert nodes_of(yard) == {"j1": ["n1"]}
    yard = a_yard()
    hold(yard, a_gang("j1", 2, 4, avoid=("n0",)), "n1", processes=2)
    assert [(stop.job_id, stop.target) for stop in decide(yard, 1000.0).stops] == [("j1", 4)]


def test_nodes_that_are_gone_are_passed_over() -> None:
    yard = a_yard()
    yard.wait(a_gang("j1", 2, avoid=("n9",)))
    assert nodes_of(yard) == {"j1": ["n0"]}
