"""Which gangs start, where, and why the others wait."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cluster.model import Placement, Snapshot
from orchestrator.job.lifecycle import ReasonCode
from orchestrator.schedule.decide import Start, Wait, decide
from orchestrator.schedule.place import largest_gang, place
from tests.builders import a_node, a_waiting


def on(*nodes: object) -> Snapshot:
    return Snapshot(nodes=nodes)  # type: ignore[arg-type]


def outcome(decisions: list[Start | Wait]) -> dict[str, str]:
    return {one.job_id: "starts" if isinstance(one, Start) else one.reason.code.value for one in decisions}


def test_starts_in_order_of_submission_until_one_does_not_fit() -> None:
    queue = [a_waiting("j3", 1), a_waiting("j1", 2), a_waiting("j2", 3)]
    assert outcome(decide(on(a_node(slots=4)), queue)) == {
        "j1": "starts",
        "j2": "insufficient-free",
        "j3": "behind-others",  # it would fit, but the head would starve
    }


def test_higher_priority_goes_first() -> None:
    queue = [a_waiting("j1", 4), a_waiting("j2", 4, priority=100)]
    assert outcome(decide(on(a_node(slots=4)), queue)) == {"j2": "starts", "j1": "insufficient-free"}


def test_a_gang_no_idle_cluster_holds_blocks_nobody() -> None:
    queue = [a_waiting("j1", 64), a_waiting("j2", 1)]
    decisions = decide(on(a_node(slots=4)), queue)
    assert outcome(decisions) == {"j1": "gang-too-large", "j2": "starts"}
    reason = next(one.reason for one in decisions if isinstance(one, Wait))
    assert "64" in reason.sentence
    assert "4" in reason.sentence
    assert reason.remedy


def test_no_nodes_is_said() -> None:
    assert outcome(decide(on(), [a_waiting("j1")])) == {"j1": "no-nodes"}


def test_elastic_gang_takes_what_is_there_within_its_bounds() -> None:
    (start,) = decide(on(a_node(slots=6)), [a_waiting("j1", 2, most=8)])
    assert isinstance(start, Start)
    assert start.placement.world_size == 6


def test_best_fit_takes_the_node_with_the_least_room_that_is_enough() -> None:
    placement = place(on(a_node("big", slots=8), a_node("small", slots=2)), 2, "any")
    assert placement is not None
    assert [share.node for share in placement.shares] == ["small"]


def test_large_gang_spans_as_few_nodes_as_will_do() -> None:
    placement = place(on(a_node("a", slots=2), a_node("b", slots=4), a_node("c", slots=4)), 7, "any")
    assert placement is not None
    assert [(share.node, share.processes) for share in placement.shares] == [("b", 4), ("c", 3)]


def test_gpus_are_preferred_and_never_mixed_with_cpus() -> None:
    snapshot = on(a_node("cpu", slots=8), a_node("gpu", gpus=2))
    placement = place(snapshot, 2, "any")
    assert placement is not None
    assert placement.device == "cuda"
    assert placement.shares[0].gpus == (0, 1)
    assert place(snapshot, 9, "any") is None  # 8 + 2 would be enough only by mixing


def test_gpu_type_is_honoured() -> None:
    snapshot = on(a_node("a", gpus=4, gpu_type="A100"), a_node("h", gpus=2, gpu_type="H100"))
    placement = place(snapshot, 2, "h100")
    assert placement is not None
    assert placement.shares[0].node == "h"
    assert place(snapshot, 3, "H100") is None
    assert place(snapshot, 1, "cpu") is None


def test_threads_divide_the_cores() -> None:
    placement = place(on(a_node(slots=8, cores=8)), 4, "any")
    assert placement is not None
    assert placement.shares[0].threads == 2


nodes = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)).map(lambda pair: pair), min_size=0, max_size=6).map(
    lambda pairs: tuple(a_node(f"n{i}", slots=slots, gpus=gpus) for i, (slots, gpus) in enumerate(pairs))
)
queues = st.lists(
    st.tuples(st.integers(1, 12), st.integers(0, 6), st.integers(-2, 2), st.sampled_from(["any", "cpu", "gpu"])),
    max_size=12,
).map(
    lambda rows: [
        a_waiting(f"j{i}", low, most=low + extra, priority=priority, accelerator=accelerator)
        for i, (low, extra, priority, accelerator) in enumerate(rows)
    ]
)


@given(nodes, queues)
def test_no_slot_is_given_twice_and_no_gang_is_partial(nodes, queue) -> None:  # type: ignore[no-untyped-def]
    snapshot = Snapshot(nodes=nodes)
    decisions = decide(snapshot, queue)
    assert sorted(one.job_id for one in decisions) == sorted(job.job_id for job in queue)
    asked = {job.job_id: job for job in queue}
    slots: dict[str, int] = {}
    gpus: set[tuple[str, int]] = set()
    for one in decisions:
        if not isinstance(one, Start):
            assert one.reason.sentence
            continue
        placement: Placement = one.placement
        job = asked[one.job_id]
        assert job.min_processes <= placement.world_size <= job.max_processes
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
def test_the_head_waits_only_when_it_does_not_fit(nodes, queue) -> None:  # type: ignore[no-untyped-def]
    snapshot = Snapshot(nodes=nodes)
    asked = {job.job_id: job for job in queue}
    for one in decide(snapshot, queue):
        if isinstance(one, Start):
            snapshot = snapshot.with_placement(one.placement)
        elif one.reason.code == ReasonCode.INSUFFICIENT_FREE:
            job = asked[one.job_id]
            assert largest_gang(snapshot, job.accelerator) < job.min_processes
