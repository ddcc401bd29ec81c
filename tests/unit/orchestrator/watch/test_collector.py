"""A scrape over a real database: numbers of what is there, and none from a controller that does not act."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from launch.contract import NodeShare
from orchestrator.cluster.model import Gpu, Node
from orchestrator.job.lifecycle import JobState, Reason, ReasonCode
from orchestrator.store.rows import Mark
from orchestrator.store.store import Store
from orchestrator.watch.collector import Collector, Known, slots
from orchestrator.watch.families import FAMILIES
from tests.builders import a_command_job, a_node

NOW = 1000.0
WHY = Reason(code=ReasonCode.CANCELLED, sentence="because")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path / 'yard.db'}")
    store.prepare()
    yield store
    store.close()


def scrape(store: Store, known: Known, spent: Mapping[str, float] | None = None) -> dict[tuple[str, str], float]:
    """(sample, its labels' values) → value."""
    collector = Collector(store, lambda: known, lambda: spent, lambda: NOW)
    return {
        (sample.name, "/".join(sample.labels.values())): sample.value
        for metric in collector.registry().collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


def test_jobs_are_counted_by_queue_and_state(store: Store) -> None:
    store.add_job("a-1", a_command_job(queue="night"), 100.0)
    store.add_job("a-2", a_command_job(queue="night"), 400.0)
    store.add_job("b-1", a_command_job(), 900.0)
    store.add_job("c-1", a_command_job(), 1.0)
    lease = store.acquire_lease("me", NOW, ttl=10)
    assert lease is not None
    with store.acting(lease) as write:
        write.set_job("c-1", JobState.CANCELLED, WHY, 2.0)
    found = scrape(store, Known("1", acting=True))
    assert found["tuneyard_jobs", "night/queued"] == 2
    assert found["tuneyard_jobs", "default/queued"] == 1
    assert found["tuneyard_queue_oldest_wait_seconds", "night"] == 900
    assert found["tuneyard_queue_oldest_wait_seconds", "default"] == 100
    assert [found["tuneyard_jobs_ended_total", state] for state in ("cancelled", "failed", "succeeded")] == [1, 0, 0]


def test_who_does_not_act_tells_of_itself_alone(store: Store) -> None:
    store.add_job("a-1", a_command_job(), 100.0)
    found = scrape(store, Known("1.2", nodes=[a_node("n")]), {"training": 1.0})
    assert {name for name, _ in found} == {
        "tuneyard_build_info", "tuneyard_controller_acting", "tuneyard_controller_tick_seconds_sum",
        "tuneyard_controller_tick_seconds_count",
    }  # fmt: skip
    assert found["tuneyard_controller_acting", ""] == 0
    assert found["tuneyard_build_info", "1.2"] == 1


def test_a_controller_tells_what_it_did(store: Store) -> None:
    ends = {("crashed", "backing-off"): 2, ("succeeded", "done"): 1}
    found = scrape(store, Known("1", True, ticks=4, tick_s=0.5, last_tick_at=990.0, ends=ends), {"training": 7.0})
    assert found["tuneyard_controller_last_tick_timestamp_seconds", ""] == 990
    assert found["tuneyard_controller_tick_seconds_count", ""] == 4
    assert found["tuneyard_controller_tick_seconds_sum", ""] == 0.5
    assert found["tuneyard_attempts_ended_total", "crashed/backing-off"] == 2
    assert found["tuneyard_slot_seconds", "training"] == 7
    assert found["tuneyard_store_up", ""] == 1


def test_a_database_that_is_away_is_told_and_the_rest_as_well() -> None:
    store = Store("postgresql://yard@127.0.0.1:9/none")
    found = scrape(store, Known("1", acting=True, ticks=1, last_tick_at=5.0))
    assert found["tuneyard_store_up", ""] == 0
    assert found["tuneyard_controller_acting", ""] == 1
    assert not any(name == "tuneyard_jobs" for name, _ in found)


def test_no_sample_but_those_of_the_table(store: Store) -> None:
    store.add_job("a-1", a_command_job(), 100.0)
    store.mark_node("n", Mark.CORDONED, None, 1.0)
    known = Known("1", True, 1, 1.0, 1.0, {("hung", "hung"): 1}, [a_gpu_node("g", 8), a_node("n")])
    names = {name for name, _ in scrape(store, known, {"training": 1.0})}
    assert names == {sample for family in FAMILIES for sample in family.samples}
    assert all(family.name.endswith("_total") is (family.kind == "counter") for family in FAMILIES)


def a_gpu_node(name: str, gpus: int) -> Node:
    some = tuple(Gpu(index=index, type="H100") for index in range(gpus))
    return Node(id=name, name=name, address="10.0.0.1", cores=64, cpu_slots=0, gpus=some)


def test_slots_are_free_used_or_closed() -> None:
    nodes = [a_gpu_node("a", 8), a_gpu_node("b", 8), a_gpu_node("c", 8), a_node("d", slots=4), a_gpu_node("head", 0)]
    shares = [
        NodeShare(node="a", address="10.0.0.1", processes=3),
        NodeShare(node="c", address="10.0.0.1", processes=1),
    ]
    busy = {share.node: share.processes for share in shares}
    found = {
        (metric.name, *sample.labels.values()): sample.value
        for metric in slots(nodes, busy, ["c"])
        for sample in metric.samples
    }
    assert found["tuneyard_nodes", "used"] == 1
    assert found["tuneyard_nodes", "free"] == 2
    assert found["tuneyard_nodes", "closed"] == 1
    assert [found["tuneyard_gpus", "H100", state] for state in ("used", "free", "closed")] == [4, 13, 7]
    assert [found["tuneyard_cpu_slots", state] for state in ("used", "free", "closed")] == [0, 4, 0]
