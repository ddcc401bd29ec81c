"""What is stored of jobs' memory: what they need, what was predicted of attempts, and what those took."""

from __future__ import annotations

from typing import Any

from launch.contract import RunContract, dumps
from orchestrator.cluster.capacity import Capacity
from orchestrator.cluster.model import Placement
from orchestrator.job.lifecycle import JobState, Reason, ReasonCode
from orchestrator.memory.alike import Peak
from orchestrator.memory.ladder import Relief, Rung, Taken
from orchestrator.memory.plan import plan
from orchestrator.schedule.place import place
from orchestrator.store.rows import Lease
from orchestrator.store.store import Store
from orchestrator.store.transaction import NewAttempt
from tests.builders import a_node, a_training_job

WHY = Reason(code=ReasonCode.STARTING, sentence="because")
FORECAST = {"family": "bert", "peak_bytes": 6 << 40, "margin_bytes": 1}


def lease_of(store: Store) -> Lease:
    lease = store.acquire_lease("me", 0.0, ttl=10)
    assert lease is not None
    return lease


def a_peak(job_id: str, key: str, time: float, predicted: dict[str, Any] | None = None) -> Peak:
    return Peak(
        key=key, device_kind="cpu", world_size=2, plan=plan(a_training_job(2), 2, "cpu"), measured_bytes=6 << 40,
        limit_bytes=None, ran_out=False, job_id=job_id, attempt=1, time=time, predicted=predicted,
    )  # fmt: skip


def test_what_attempts_needed_is_found_by_its_key(store: Store) -> None:
    store.add_job("a-1", a_training_job(2), now=1.0)
    with store.acting(lease_of(store)) as write:
        for number, key in enumerate(["k", "other", "k"]):
            write.add_peak(a_peak("a-1", key, float(number)))
    assert store.peaks(["k", "unknown"]) == [a_peak("a-1", "k", 2.0), a_peak("a-1", "k", 0.0)]
    assert store.peaks(["k", "other"], limit=1) == [a_peak("a-1", "k", 2.0)]
    assert store.peaks([]) == []


def test_what_was_predicted_is_found_whatever_the_job(store: Store) -> None:
    """Newest first, and only where something was predicted: a row without it must not use up the limit."""
    for name in ("a-1", "b-1"):
        store.add_job(name, a_training_job(2), now=1.0)
    rows = [
        a_peak("a-1", "k", 1.0, FORECAST),
        a_peak("b-1", "l", 2.0, FORECAST),
        a_peak("a-1", "k", 3.0),
        a_peak("a-1", "k", 4.0),
    ]
    with store.acting(lease_of(store)) as write:
        for row in rows:
            write.add_peak(row)
    assert store.forecasts() == [rows[1], rows[0]]
    assert store.forecasts(limit=1) == [rows[1]]


def test_what_a_job_has_given_up_is_kept(store: Store) -> None:
    store.add_job("a-1", a_training_job(2), now=1.0)
    assert store.job("a-1").relief is None
    relief = Relief(max_micro_batch=4, taken=(Taken(rung=Rung.MICRO_BATCH, sentence="micro-batch 8 → 4"),))
    with store.acting(lease_of(store)) as write:
        write.set_job("a-1", JobState.QUEUED, WHY, 2.0, relief=dumps(relief))
    assert store.job("a-1").relief == relief


def test_what_a_job_needs_is_stored_with_it_and_replaced_by_what_is_better(store: Store) -> None:
    long = "x" * (1 << 18)
    assert store.add_job("a-1", a_training_job(2), now=1.0, sizing=long).sizing == long
    assert store.add_job("b-1", a_training_job(2), now=1.0).sizing is None
    with store.acting(lease_of(store)) as write:
        write.set_sizing("a-1", "better")
    assert [row.sizing for row in store.jobs(live=True)] == ["better", None]


def a_start(job_id: str) -> tuple[RunContract, Placement]:
    placement = place(Capacity(nodes=(a_node(),)), 2, "any")
    assert placement is not None
    contract = RunContract(
        run_id=f"{job_id}.1", job_id=job_id, attempt=1, plan=plan(a_training_job(2), 2, "cpu"),
        nodes=placement.shares, main_port=1, run_dir="/r", output_dir="/o", checkpoint_dir="/c", tracker_dir="/t",
        command=("true",),
    )  # fmt: skip
    return contract, placement.model_copy(update={"host_bytes": 5 << 40})


def test_what_was_predicted_of_an_attempt_and_what_it_holds_comes_back(store: Store) -> None:
    for name, predicted in (("a-1", FORECAST), ("b-1", None)):
        store.add_job(name, a_training_job(2), now=1.0)
        with store.acting(lease_of(store)) as write:
            write.add_attempts([NewAttempt(*a_start(name), predicted)], 2.0)
        (attempt,) = store.attempts(name)
        assert attempt.predicted == predicted
        assert attempt.held.host_bytes == 5 << 40
