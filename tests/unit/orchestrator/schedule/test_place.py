"""Where gangs go: the tightest place that is enough, whole nodes, and the smallest domain of the network."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cluster.capacity import Capacity
from orchestrator.cluster.model import Need, Node, Placement
from orchestrator.schedule.place import largest_gang, place, room_for
from tests.builders import a_gang, a_node, an_option

GIB = 2**30


def on(*nodes: Node) -> Capacity:
    return Capacity(nodes)


def shares(placement: Placement | None) -> dict[str, int]:
    assert placement is not None
    return {share.node: share.processes for share in placement.shares}


def gpu_nodes(racks: str, size: int = 8) -> list[Node]:
    """n0, n1, … each in the rack of its letter."""
    return [a_node(f"n{at}", gpus=size, rack=rack) for at, rack in enumerate(racks)]


def test_best_fit_takes_the_node_with_the_least_room_that_is_enough() -> None:
    capacity = on(a_node("big", slots=8), a_node("small", slots=2), a_node("tiny", slots=1))
    assert shares(place(capacity, 2, "any")) == {"small": 2}
    assert shares(place(capacity, 3, "any")) == {"big": 3}


def test_large_gang_spans_as_few_nodes_as_will_do() -> None:
    capacity = on(a_node("a", slots=2), a_node("b", slots=4), a_node("c", slots=4))
    assert shares(place(capacity, 7, "any")) == {"b": 4, "c": 3}


def test_gpus_are_preferred_and_never_mixed_with_cpus() -> None:
    capacity = on(a_node("cpu", slots=8), a_node("gpu", gpus=2))
    placement = place(capacity, 2, "any")
    assert placement is not None
    assert placement.device == "cuda"
    assert placement.shares[0].gpus == (0, 1)
    assert place(capacity, 9, "any") is None, "8 + 2 would be enough only by mixing"


def test_gpu_type_is_honoured() -> None:
    capacity = on(a_node("a", gpus=4, gpu_type="A100"), a_node("h", gpus=2, gpu_type="H100"))
    assert shares(place(capacity, 2, "h100")) == {"h": 2}
    assert place(capacity, 3, "H100") is None
    assert place(capacity, 1, "cpu") is None


def test_threads_divide_the_cores() -> None:
    placement = place(on(a_node(slots=8, cores=8)), 4, "any")
    assert placement is not None
    assert placement.shares[0].threads == 2


def test_whole_nodes_first_and_the_rest_where_least_is_left() -> None:
    nodes = gpu_nodes("----")
    held = [place(on(node), taken, "any") for node, taken in zip(nodes, (0, 3, 5, 0), strict=True) if taken]
    capacity = Capacity.of(nodes, [one for one in held if one is not None])
    assert shares(place(capacity, 10, "any", consolidate=True)) == {"n0": 8, "n2": 2}
    assert shares(place(capacity, 13, "any", consolidate=True)) == {"n0": 8, "n1": 5}
    assert shares(place(capacity, 14, "any", consolidate=True)) == {"n0": 8, "n3": 6}
    assert place(capacity, 17, "any", consolidate=True) is not None
    assert place(capacity, 22, "any", consolidate=True) is None, "three whole nodes are not free"
    assert shares(place(capacity, 22, "any")) == {"n0": 8, "n3": 8, "n1": 5, "n2": 1}


def test_a_gang_that_a_node_could_hold_waits_for_one_if_it_is_to_be_consolidated() -> None:
    nodes = [a_node("a", gpus=4), a_node("b", gpus=4)]
    half = [place(on(node), 2, "any") for node in nodes]
    capacity = Capacity.of(nodes, [one for one in half if one is not None])
    assert place(capacity, 3, "any", consolidate=True) is None
    assert shares(place(capacity, 3, "any")) == {"a": 2, "b": 1}


def test_whole_nodes_may_be_of_a_smaller_size_where_the_largest_are_too_few() -> None:
    nodes = [a_node("big", gpus=16), *gpu_nodes("----")]
    assert shares(place(on(*nodes), 32, "any", consolidate=True)) == {"n0": 8, "n1": 8, "n2": 8, "n3": 8}
    assert shares(place(on(*nodes), 20, "any", consolidate=True)) == {"big": 16, "n0": 4}


def test_whole_nodes_are_of_those_that_are_large_enough_for_a_rank() -> None:
    nodes = [a_node("old", gpus=8, gpu_memory_gib=16), *(a_node(f"n{at}", gpus=4, gpu_memory_gib=80) for at in (0, 1))]
    need = Need(device_bytes=40 * GIB)
    assert shares(place(on(*nodes), 8, "any", need, consolidate=True)) == {"n0": 4, "n1": 4}


@pytest.mark.parametrize(
    ("racks", "busy", "processes", "where"),
    [
        ("aabb", "", 16, {"n0", "n1"}),
        ("abab", "", 16, {"n0", "n2"}),  # not n0 and n1, which are in two racks
        ("aaabb", "", 16, {"n3", "n4"}),  # the tighter rack
        ("aabb", "0", 16, {"n2", "n3"}),
        ("aabb", "02", 16, {"n1", "n3"}),  # no rack has two
        ("aaabb", "0", 24, {"n1", "n2", "n3"}),  # no rack has three
        ("aabbb", "", 18, {"n2", "n3", "n4"}),  # the rest is in the same rack, too
    ],
)
def test_the_smallest_rack_that_fits(racks: str, busy: str, processes: int, where: set[str]) -> None:
    nodes = gpu_nodes(racks)
    held = [place(on(nodes[int(at)]), 8, "any") for at in busy]
    capacity = Capacity.of(nodes, [one for one in held if one is not None])
    assert set(shares(place(capacity, processes, "any", consolidate=True))) == where


def test_a_spine_where_no_rack_is_large_enough() -> None:
    nodes = [a_node(f"n{at}", gpus=8, rack=f"r{at % 4}", spine=f"s{at % 2}") for at in range(8)]
    spine = {node.id: node.labels["tuneyard.io/spine"] for node in nodes}
    assert {spine[node] for node in shares(place(on(*nodes), 24, "any"))} == {"s0"}
    assert {spine[node] for node in shares(place(on(*nodes), 40, "any"))} == {"s0", "s1"}


def test_scattered_slots_are_of_one_rack_if_it_has_enough() -> None:
    nodes = [a_node(f"n{at}", slots=2 + at % 2, rack="ab"[at // 2]) for at in range(4)]
    assert set(shares(place(on(*nodes), 5, "any"))) == {"n0", "n1"}
    assert len(shares(place(on(*nodes), 7, "any"))) == 3


def test_an_elastic_gang_takes_the_most_for_which_there_is_room() -> None:
    capacity = on(a_node(slots=6))
    for low, high, at_most, taken in ((2, 8, 8, 6), (2, 4, 8, 4), (2, 8, 3, 3), (7, 8, 8, None), (4, 8, 3, None)):
        found = room_for(capacity, a_gang("j1", low, high), at_most)
        assert (None if found is None else sum(ranks for _, ranks in found[0])) == taken


def test_an_elastic_gang_is_consolidated_too() -> None:
    nodes = [a_node("a", slots=4), a_node("b", slots=4), a_node("c", slots=4)]
    half = [place(on(node), 2, "any") for node in nodes[1:]]
    found = room_for(
        Capacity.of(nodes, [one for one in half if one is not None]), a_gang("j1", 2, 9), 9, consolidate=True
    )
    assert found is not None
    assert sum(ranks for _, ranks in found[0]) == 6, "one whole node and the rest on another"


def test_a_target_is_the_most_that_it_takes() -> None:
    capacity = on(a_node(slots=8))
    for target, taken in ((2, 2), (4, 4), (1, 2)):
        found = room_for(capacity, a_gang("j1", 2, 8, target=target), 8)
        assert found is not None
        assert sum(ranks for _, ranks in found[0]) == taken


def test_of_options_the_first_for_which_there_is_room() -> None:
    options = (an_option(4, 5), an_option(2, 6), an_option(1, 8))
    gang = a_gang("j1", 1, 4, options=options)
    for memory, most, taken in ((20, 4, 4), (19, 4, 2), (11, 4, 1), (7, 4, None), (20, 3, 2)):
        found = room_for(on(a_node(slots=8, memory_gib=memory)), gang, most)
        assert (None if found is None or found[1] is None else found[1].processes) == taken


machines = st.lists(
    st.builds(
        a_node, slots=st.integers(1, 6), gpus=st.sampled_from([0, 0, 2, 4, 8]), rack=st.sampled_from([None, "r", "s"])
    ),
    max_size=6,
).map(lambda found: [node.model_copy(update={"id": f"n{at}", "name": f"n{at}"}) for at, node in enumerate(found)])


@given(machines, st.lists(st.integers(1, 8), max_size=6), st.integers(1, 24), st.booleans())
def test_a_place_has_the_room(nodes: list[Node], before: list[int], processes: int, consolidate: bool) -> None:
    """And there is one wherever there are enough slots, unless it is to be consolidated."""
    capacity = on(*nodes)
    for one in before:
        placement = place(capacity, one, "any")
        if placement is not None:
            capacity.take(placement)
    found = place(capacity, processes, "any", consolidate=consolidate)
    room = largest_gang(capacity, "any")
    if found is None:
        assert consolidate or room < processes
        return
    assert found.world_size == processes <= room
    by_id = {node.id: node for node in nodes}
    for share in found.shares:
        assert 0 < share.processes <= capacity.free(by_id[share.node])
    if consolidate and len(found.shares) > 1:
        sizes = {node.id: len(node.gpus) or node.cpu_slots for node in nodes}
        assert sum(share.processes < sizes[share.node] for share in found.shares) <= 1, "whole nodes, but for the rest"
