"""Which gangs start, where, and why the others wait."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cluster.capacity import Capacity
from orchestrator.cluster.model import Node
from orchestrator.job.lifecycle import ReasonCode
from orchestrator.schedule.decide import decide
from orchestrator.schedule.gang import Decisions, Gang
from orchestrator.schedule.place import largest_gang
from orchestrator.schedule.yard import Yard
from tests.builders import a_gang, a_node, hold


def decided(nodes: list[Node], queue: list[Gang]) -> Decisions:
    yard = Yard(nodes)
    for gang in queue:
        yard.wait(gang)
    return decide(yard, 0.0)


def outcome(decisions: Decisions) -> dict[str, str]:
    starts = {start.job_id: "starts" for start in decisions.starts}
    return starts | {wait.job_id: wait.reason.code.value for wait in decisions.waits}


def test_starts_in_order_of_submission() -> None:
    queue = [a_gang("j3", 1), a_gang("j1", 1), a_gang("j2", 1)]
    decisions = decided([a_node(slots=2)], queue)
    assert [start.job_id for start in decisions.starts] == ["j1", "j2"]
    assert outcome(decisions)["j3"] == "insufficient-free"


def test_the_first_that_does_not_fit_is_explained_and_others_go_around_it() -> None:
    queue = [a_gang("j1", 2, left_s=9.0), a_gang("j2", 3), a_gang("j3", 1, left_s=9.0), a_gang("j4", 4)]
    decisions = decided([a_node(slots=4)], queue)
    assert outcome(decisions) == {
        "j1": "starts", "j2": "insufficient-free", "j3": "starts", "j4": "behind-others",
    }  # fmt: skip
    assert decisions.reservation is not None
    assert decisions.reservation.job_id == "j2"


def test_who_is_behind_in_its_line_is_not_even_named() -> None:
    decisions = decided([a_node(slots=1)], [a_gang(f"j{at}") for at in range(1, 5)])
    assert outcome(decisions) == {"j1": "starts", "j2": "insufficient-free"}


def test_higher_priority_goes_first() -> None:
    queue = [a_gang("j1", 4), a_gang("j2", 4, priority=100)]
    assert outcome(decided([a_node(slots=4)], queue)) == {"j2": "starts", "j1": "insufficient-free"}


def test_a_gang_no_idle_cluster_holds_blocks_nobody() -> None:
    decisions = decided([a_node(slots=4)], [a_gang("j1", 64), a_gang("j2", 1)])
    assert outcome(decisions) == {"j1": "gang-too-large", "j2": "starts"}
    (wait,) = decisions.waits
    assert "64" in wait.reason.sentence
    assert "4" in wait.reason.sentence
    assert wait.reason.remedy


def test_what_was_impossible_is_possible_once_there_are_nodes() -> None:
    yard = Yard([a_node("a", slots=4)])
    yard.wait(a_gang("j1", 8))
    assert outcome(decide(yard, 0.0)) == {"j1": "gang-too-large"}
    yard.set_nodes([a_node("a", slots=4), a_node("b", slots=4)])
    assert outcome(decide(yard, 0.0)) == {"j1": "starts"}
    yard.set_nodes([])
    assert outcome(decide(yard, 0.0)) == {"j1": "no-nodes"}


def test_elastic_gang_takes_what_is_there_within_its_bounds() -> None:
    (start,) = decided([a_node(slots=6)], [a_gang("j1", 2, most=8)]).starts
    assert start.placement.world_size == 6


def test_what_runs_holds_its_slots() -> None:
    yard = Yard([a_node(slots=4)])
    hold(yard, a_gang("j1", 3))
    yard.wait(a_gang("j2", 1, 4))
    (start,) = decide(yard, 0.0).starts
    assert start.placement.world_size == 1
    yard.hold(hold(Yard([a_node(slots=4)]), a_gang("j1", 2)))  # it holds others now
    (start,) = decide(yard, 0.0).starts
    assert start.placement.world_size == 2
    yard.release("j1")
    (start,) = decide(yard, 0.0).starts
    assert start.placement.world_size == 4


def test_a_gang_that_waits_anew_is_another_one() -> None:
    yard = Yard([a_node(slots=4)])
    yard.wait(a_gang("j1", 5))
    assert decide(yard, 0.0).starts == ()
    yard.wait(a_gang("j1", 4, priority=3))
    assert [start.placement.world_size for start in decide(yard, 0.0).starts] == [4]
    yard.leave("j1")
    assert decide(yard, 0.0) == Decisions()


nodes = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=6).map(
    lambda pairs: [a_node(f"n{i}", slots=slots, gpus=gpus) for i, (slots, gpus) in enumerate(pairs)]
)
queues = st.lists(
    st.tuples(st.integers(1, 12), st.integers(0, 6), st.integers(-2, 2), st.sampled_from(["any", "cpu", "gpu"])),
    max_size=12,
).map(
    lambda rows: [
        a_gang(f"j{i}", low, most=low + extra, priority=priority, accelerator=accelerator)
        for i, (low, extra, priority, accelerator) in enumerate(rows)
    ]
)


@given(nodes, queues)
def test_no_slot_is_given_twice_and_no_gang_is_partial(nodes: list[Node], queue: list[Gang]) -> None:
    decisions = decided(nodes, queue)
    named = [one.job_id for one in (*decisions.starts, *decisions.waits)]
    assert len(named) == len(set(named))
    assert set(named) <= {gang.job_id for gang in queue}
    assert all(wait.reason.sentence for wait in decisions.waits)
    asked = {gang.job_id: gang for gang in queue}
    slots: dict[str, int] = {}
    gpus: set[tuple[str, int]] = set()
    for start in decisions.starts:
        placement, gang = start.placement, asked[start.job_id]
        assert gang.min_processes <= placement.world_size <= gang.max_processes
        for share in placement.shares:
            node = next(node for node in nodes if node.id == share.node)
            if placement.device == "cuda":
                assert len(share.gpus) == share.processes
                for index in share.gpus:
                    assert (share.node, index) not in gpus
                    gpus.add((share.node, index))
            else:
                assert not node.gpus
                slots[share.node] = slots.get(share.node, 0) + share.processes
                assert slots[share.node] <= node.cpu_slots


@given(nodes, queues)
def test_whoever_waits_for_room_does_not_fit(nodes: list[Node], queue: list[Gang]) -> None:
    """Nobody knows how long any of them takes, so that nobody is held back for the first."""
    decisions = decided(nodes, queue)
    capacity = Capacity.of(nodes, (start.placement for start in decisions.starts))
    asked = {gang.job_id: gang for gang in queue}
    for wait in decisions.waits:
        if wait.reason.code in (ReasonCode.INSUFFICIENT_FREE, ReasonCode.BEHIND_OTHERS):
            gang = asked[wait.job_id]
            assert largest_gang(capacity, gang.accelerator) < gang.min_processes
