"""Gangs are placed where each rank has the memory that it needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cluster.capacity import Capacity
from orchestrator.cluster.model import Need, Node, Option, Placement
from orchestrator.errors import DoesNotFitError
from orchestrator.job.lifecycle import Reason, ReasonCode
from orchestrator.schedule.decide import decide
from orchestrator.schedule.explain import check_possible
from orchestrator.schedule.gang import Decisions, Gang
from orchestrator.schedule.place import place, room_for
from orchestrator.schedule.yard import Yard
from tests.builders import a_gang, a_node, an_option

GIB = 2**30


def on(*nodes: Node) -> Capacity:
    return Capacity(nodes)


def decided(nodes: tuple[Node, ...] | list[Node], queue: list[Gang]) -> Decisions:
    yard = Yard(nodes)
    for gang in queue:
        yard.wait(gang)
    return decide(yard, 0.0)


def need(host: float = 0, device: float = 0) -> Need:
    return Need(device_bytes=int(device * GIB), host_bytes=int(host * GIB))


def a_wish(job_id: str, *options: Option, misfit: Reason | None = None) -> Gang:
    low, high = min((o.processes for o in options), default=1), max((o.processes for o in options), default=1)
    return a_gang(job_id, low, most=high, options=options, misfit=misfit)


def shares(placement: Placement | None) -> dict[str, int]:
    assert placement is not None
    return {share.node: share.processes for share in placement.shares}


def reason_of(decisions: Decisions, job_id: str) -> Reason:
    (found,) = (wait.reason for wait in decisions.waits if wait.job_id == job_id)
    return found


def test_gpus_that_are_too_small_are_passed_over() -> None:
    capacity = on(
        a_node("small", gpus=2, memory_gib=100, gpu_memory_gib=40),
        a_node("large", gpus=2, memory_gib=100, gpu_memory_gib=80),
    )
    assert shares(place(capacity, 2, "any", need(1, 60))) == {"large": 2}
    assert place(capacity, 3, "any", need(1, 60)) is None
    assert shares(place(capacity, 3, "any", need(1, 40))) == {"large": 2, "small": 1}


def test_ranks_beside_gpus_share_the_host() -> None:
    capacity = on(a_node("a", gpus=4, memory_gib=100, gpu_memory_gib=80), a_node("b", gpus=4))
    assert shares(place(capacity, 4, "any", need(30, 10))) == {"b": 4}, "where memory is unknown it is not counted"
    assert shares(place(capacity, 7, "any", need(30, 10))) == {"a": 3, "b": 4}
    assert place(capacity, 8, "any", need(30, 10)) is None


def test_gangs_on_a_node_share_its_memory() -> None:
    node = a_node(slots=8, memory_gib=10)
    first = place(on(node), 2, "any", need(3))
    assert first is not None
    assert first.host_bytes == 3 * GIB
    then = Capacity.of([node], [first])
    assert then.free(node, "any") == 6, "slots there are"
    assert then.free(node, "any", need(3)) == 1
    assert place(then, 2, "any", need(3)) is None
    assert shares(place(then, 2, "any", need(2))) == {"n0": 2}
    assert shares(place(then, 6, "any")) == {"n0": 6}, "of what nobody knows"
    then.take(first.model_copy(update={"host_bytes": GIB}))
    assert (then.free(node, "any", need(2)), then.free(node, "any", need(3))) == (1, 0), "8 of 10 are held"


def test_an_option_is_for_one_kind_of_device() -> None:
    capacity = on(a_node("cpu", slots=4, memory_gib=100), a_node("gpu", gpus=4, memory_gib=100, gpu_memory_gib=80))
    assert shares(place(capacity, 2, "any", need(1), ("cpu",))) == {"cpu": 2}
    found = room_for(capacity, a_wish("j1", an_option(2, 1), an_option(2, 1, 70)), 2)
    assert found is not None
    assert (capacity.nodes[found[0][0][0]].id, found[1]) == ("cpu", an_option(2, 1)), "the best one, not any GPU"


def test_the_best_option_for_which_there_is_room_is_taken() -> None:
    wide, narrow = an_option(4, 5), an_option(1, 8)
    for memory, taken in ((20, wide), (19, narrow)):
        (start,) = decided([a_node(memory_gib=memory)], [a_wish("j1", wide, narrow)]).starts
        assert start.option == taken
        assert start.placement.host_bytes == taken.need.host_bytes
        assert start.placement.world_size == taken.processes


def test_what_running_jobs_hold_is_waited_for() -> None:
    queue = [a_wish("j1", an_option(1, 6)), a_wish("j2", an_option(2, 3), an_option(1, 5)), a_wish("j3", an_option())]
    decisions = decided([a_node(memory_gib=10)], queue)
    assert [start.job_id for start in decisions.starts] == ["j1", "j3"], "j3 needs nothing that j2 waits for"
    reason = reason_of(decisions, "j2")
    assert reason.code == ReasonCode.INSUFFICIENT_FREE
    assert "needs 3.0 GiB of host memory a process, which running jobs hold" in reason.sentence
    assert reason.remedy


def test_without_slots_it_is_slots_that_are_waited_for() -> None:
    queue = [a_wish("j1", an_option(2, 1)), a_wish("j2", an_option(1, 1))]
    reason = reason_of(decided([a_node(slots=2, memory_gib=10)], queue), "j2")
    assert reason.code == ReasonCode.INSUFFICIENT_FREE
    assert "needs 1 process at once, 0 can start now" in reason.sentence


def test_what_fits_nowhere_blocks_nobody() -> None:
    misfit = Reason(code=ReasonCode.DOES_NOT_FIT, sentence="does not fit: it is large", remedy="make it smaller")
    queue = [a_wish("j1", misfit=misfit), a_wish("j2", an_option(3, 4)), a_wish("j3", an_option())]
    decisions = decided([a_node(memory_gib=10)], queue)
    assert reason_of(decisions, "j1") == misfit
    general = reason_of(decisions, "j2")  # there are options, and not on these nodes
    assert (general.code, "as much memory" in general.sentence) == (ReasonCode.DOES_NOT_FIT, True)
    assert [start.job_id for start in decisions.starts] == ["j3"]


def test_what_fits_nowhere_is_refused() -> None:
    idle = on(a_node(memory_gib=10))
    check_possible(idle, a_wish("j1", an_option(2, 5)))
    with pytest.raises(DoesNotFitError) as told:
        check_possible(idle, a_wish("j1", an_option(2, 6)))
    assert (told.value.code, bool(told.value.hint)) == ("does-not-fit", True)


sizes = st.integers(0, 12)
nodes = st.lists(st.tuples(sizes, st.integers(0, 4), st.none() | st.integers(0, 20)), max_size=5).map(
    lambda rows: tuple(
        a_node(f"n{i}", slots=slots, gpus=gpus, memory_gib=memory, gpu_memory_gib=8 if i % 2 else 16)
        for i, (slots, gpus, memory) in enumerate(rows)
    )
)
options = st.builds(an_option, st.integers(1, 8), st.integers(0, 12), st.sampled_from([0, 6, 12]))
queues = st.lists(st.lists(options, min_size=1, max_size=3) | st.none(), max_size=8).map(
    lambda rows: [a_gang(f"j{i}", 1, most=4) if row is None else a_wish(f"j{i}", *row) for i, row in enumerate(rows)]
)


@given(nodes, queues)
def test_no_memory_is_given_twice(nodes: tuple[Node, ...], queue: list[Gang]) -> None:
    """Of no host, whatever waits; no rank is on a GPU that is too small; and each gang is whole."""
    held: dict[str, int] = dict.fromkeys((node.id for node in nodes), 0)
    by_id = {node.id: node for node in nodes}
    for one in decided(nodes, queue).starts:
        known = one.option.need if one.option is not None else Need()
        assert one.placement.host_bytes == known.host_bytes
        if one.option is not None:
            assert (one.placement.world_size, one.placement.device) == (one.option.processes, one.option.device)
        for share in one.placement.shares:
            held[share.node] += share.processes * known.host_bytes
            for gpu in by_id[share.node].gpus:
                assert gpu.index not in share.gpus or (gpu.memory_bytes or 0) >= known.device_bytes
    for node in nodes:
        assert node.memory_bytes is None or held[node.id] <= node.memory_bytes
