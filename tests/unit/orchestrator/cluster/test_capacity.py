"""What of the nodes is free: bit masks tell the same as counting does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from launch.contract import NodeShare
from orchestrator.cluster.capacity import Capacity, Ground, bits
from orchestrator.cluster.model import UNKNOWN_NEED, Gpu, Need, Node, Placement
from orchestrator.schedule.place import largest_gang, place
from tests.builders import a_node

GIB = 2**30


def a_mixed_node(name: str, *gpus: tuple[str, int | None]) -> Node:
    """Types of its GPUs, each with its GiB."""
    found = tuple(
        Gpu(index=index, type=kind, memory_bytes=None if gib is None else gib * GIB)
        for index, (kind, gib) in enumerate(gpus)
    )
    return a_node(name).model_copy(update={"gpus": found})


def on(node: Node, *gpus: int, processes: int = 0, host: int = 0) -> Placement:
    share = NodeShare(node=node.id, address=node.address, processes=processes or len(gpus), gpus=gpus, threads=1)
    return Placement(device="cuda" if gpus else "cpu", shares=(share,), host_bytes=host * GIB)


def look(capacity: Capacity) -> list[object]:
    """All that a capacity says."""
    needs = (UNKNOWN_NEED, Need(device_bytes=30 * GIB), Need(host_bytes=2 * GIB))
    return [
        capacity.with_free,
        capacity.free_at,
        [capacity.free(node, kind, need) for node in capacity.nodes for kind in ("any", "A100") for need in needs],
        [largest_gang(capacity, kind) for kind in ("any", "cpu", "gpu", "A100", "H100")],
    ]


nodes = st.lists(
    st.one_of(
        st.builds(a_node, slots=st.integers(0, 5), memory_gib=st.none() | st.integers(0, 20)),
        st.builds(a_node, gpus=st.integers(1, 4), gpu_type=st.sampled_from(["A100", "H100"])),
        st.lists(st.tuples(st.sampled_from(["A100", "H100"]), st.sampled_from([None, 20, 40])), min_size=1, max_size=4)
        .map(lambda gpus: a_mixed_node("mixed", *gpus)),
    ),
    max_size=6,
).map(
    lambda found: [node.model_copy(update={"id": f"n{at}", "name": f"n{at}"}) for at, node in enumerate(found)]
)  # fmt: skip
needs = st.builds(Need, st.sampled_from([0, 30 * GIB]), st.sampled_from([0, 3 * GIB]))
asked = st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["any", "cpu", "gpu", "A100"]), needs), max_size=6)


def naive(node: Node, placements: list[Placement], accelerator: str, need: Need) -> int:
    """Free slots of a node, counted one by one."""
    shares = [(one, share) for one in placements for share in one.shares if share.node == node.id]
    if node.gpus:
        held = {index for _, share in shares for index in share.gpus}
        suited = [
            gpu
            for gpu in node.gpus
            if gpu.index not in held
            and (accelerator in ("any", "gpu") or gpu.type == accelerator)
            and (gpu.memory_bytes is None or gpu.memory_bytes >= need.device_bytes)
        ]
        free = len(suited)
    else:
        free = node.cpu_slots - sum(share.processes for _, share in shares)
    if node.memory_bytes is not None and need.host_bytes:
        left = node.memory_bytes - sum(one.host_bytes * share.processes for one, share in shares)
        free = min(free, max(0, left // need.host_bytes))
    return free if node.takes(accelerator) else 0


@given(nodes, asked, needs)
def test_masks_agree_with_counting(nodes: list[Node], asked: list[tuple[int, str, Need]], need: Need) -> None:
    capacity, placed = Capacity(nodes), []
    for processes, accelerator, wanted in asked:
        placement = place(capacity, processes, accelerator, wanted)
        if placement is not None:
            capacity.take(placement)
            placed.append(placement)
    for node in nodes:
        for accelerator in ("any", "cpu", "gpu", "A100"):
            assert capacity.free(node, accelerator, need) == naive(node, placed, accelerator, need)
    frees = {node.id: naive(node, placed, "any", UNKNOWN_NEED) for node in nodes}
    for free, mask in enumerate(capacity.with_free):
        assert {capacity.nodes[at].id for at in bits(mask)} == {name for name, count in frees.items() if count == free}
    everywhere = (1 << len(nodes)) - 1
    assert capacity.total(everywhere) == sum(frees.values())
    for accelerator in ("any", "cpu", "gpu", "A100"):
        by_device = {
            on_gpus: sum(naive(node, placed, accelerator, UNKNOWN_NEED) for node in nodes if bool(node.gpus) == on_gpus)
            for on_gpus in (True, False)
        }
        assert largest_gang(capacity, accelerator) == max(by_device.values())


@given(nodes, asked)
def test_give_undoes_take(nodes: list[Node], asked: list[tuple[int, str, Need]]) -> None:
    capacity = Capacity(nodes)
    before, placed = [look(capacity)], []
    for processes, accelerator, need in asked:
        placement = place(capacity, processes, accelerator, need)
        if placement is not None:
            capacity.take(placement)
            placed.append(placement)
            before.append(look(capacity))
    assert look(Capacity.of(nodes, reversed(placed))) == look(capacity)
    for placement in reversed(placed):
        assert look(capacity) == before.pop()
        capacity.give(placement)
    assert look(capacity) == before.pop() == look(Capacity(nodes))


def test_a_copy_is_another() -> None:
    node = a_node(gpus=2, memory_gib=10)
    capacity = Capacity([node])
    copy = capacity.copy()
    copy.take(on(node, 0, host=4))
    assert (capacity.free(node), copy.free(node)) == (2, 1)
    assert (capacity.free(node, need=Need(host_bytes=5 * GIB)), copy.free(node, need=Need(host_bytes=5 * GIB))) == (
        2,
        1,
    )


def test_gpus_of_one_node_that_differ_are_counted_one_by_one() -> None:
    node = a_mixed_node("m", ("A100", 40), ("H100", 80), ("A100", 40), ("H100", 80))
    capacity = Capacity([node])
    large = Need(device_bytes=60 * GIB)
    assert [capacity.free(node, kind) for kind in ("any", "gpu", "A100", "h100", "cpu")] == [4, 4, 2, 2, 0]
    assert (capacity.free(node, "any", large), capacity.free(node, "A100", large)) == (2, 0)
    placement = place(capacity, 2, "any", large)
    assert placement is not None
    assert placement.shares[0].gpus == (1, 3)
    capacity.take(placement)
    assert [capacity.free(node, kind) for kind in ("any", "A100", "H100")] == [2, 2, 0]
    assert place(capacity, 1, "H100") is None
    assert place(capacity, 2, "A100") is not None


def test_gpus_have_names_of_their_own() -> None:
    """Indices are those of the machine, which need not begin at 0."""
    node = a_node("n0").model_copy(update={"gpus": (Gpu(index=5), Gpu(index=2))})
    capacity = Capacity([node])
    capacity.take(on(node, 2))
    found = place(capacity, 1, "any")
    assert found is not None
    assert found.shares[0].gpus == (5,)


def test_a_closed_node_gets_nothing_and_still_gives_back() -> None:
    open_, closed = a_node("a"), a_node("b")
    held = on(closed, processes=3)
    capacity = Capacity.of([open_, closed], [held], closed=["b"])
    assert largest_gang(capacity, "any") == 4
    assert place(capacity, 5, "any") is None
    assert capacity.free(closed) == 1, "cordoned or not"
    capacity.give(held)
    assert capacity.free(closed) == 4
    assert largest_gang(capacity, "any") == largest_gang(capacity.idle(), "any") == 4


def test_what_is_held_on_nodes_that_are_gone_is_passed_over() -> None:
    here, gone = a_node("a"), a_node("b")
    capacity = Capacity.of([here], [on(gone, processes=2)])
    assert capacity.free(here) == 4
    capacity.give(on(gone, processes=2))
    assert capacity.free(here) == 4


def test_a_node_that_is_smaller_than_it_was_is_free_only_when_all_have_left() -> None:
    two, one = on(a_node(), processes=2), on(a_node(), processes=2)
    node = a_node(slots=2)
    capacity = Capacity.of([node], [one, two])
    assert capacity.free(node) == 0
    capacity.give(one)
    assert capacity.free(node) == 0, "the other one holds both"
    capacity.give(two)
    assert capacity.free(node) == 2


def test_racks_lie_in_spines_and_the_smallest_domains_come_first() -> None:
    ground = Ground(
        [a_node(f"n{at}", rack=f"r{at // 2 % 2}", spine=f"s{at // 4}") for at in range(8)] + [a_node("elsewhere")]
    )
    racks, spines, everything = ground.domains
    names = [sorted(ground.nodes[at].id for at in bits(mask)) for mask in (*racks, *spines)]
    assert names == [
        ["n0", "n1"], ["n2", "n3"], ["n4", "n5"], ["n6", "n7"],  # r0 of s0 is not r0 of s1
        ["n0", "n1", "n2", "n3"], ["n4", "n5", "n6", "n7"],
    ]  # fmt: skip
    assert [mask.bit_count() for mask in everything] == [9]
    assert Ground([a_node("a"), a_node("b")]).domains == ((3,),)


def test_bits() -> None:
    assert list(bits(0)) == []
    assert list(bits(0b1011)) == [0, 1, 3]
