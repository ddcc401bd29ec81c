"""Jobs that come after others, arrays, priorities, and live jobs that are read again only where they have changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from launch.contract import CheckpointNote, Origin, ProgressLine, StopRequest
from orchestrator.cluster.status import Spent
from orchestrator.errors import ConflictError, NotFoundError
from orchestrator.job.lifecycle import AttemptState, JobState, Reason, ReasonCode
from orchestrator.job.spec import AnyJob, ArrayElement
from orchestrator.memory.alike import Peak
from orchestrator.memory.plan import plan
from orchestrator.store.jobs import Jobs, NewJob
from orchestrator.store.rows import HistoryRow, JobRow, NodeFault
from orchestrator.store.store import Store
from orchestrator.store.transaction import NewAttempt, Transaction
from tests.builders import a_command_job, a_training_job
from tests.unit.orchestrator.store.test_store import a_start, lease_of

WHY = Reason(code=ReasonCode.STARTING, sentence="because")


def end(store: Store, job_id: str, state: JobState) -> None:
    with store.acting(lease_of(store)) as write:
        if state == JobState.SUCCEEDED:
            write.set_job(job_id, JobState.STARTING, WHY, 2.0)
        write.set_job(job_id, state, WHY, 2.0)


def an_element(index: int, **keys: Any) -> AnyJob:
    job = a_command_job(name=f"job-{index}", **keys)
    return job.model_copy(update={"array_of": ArrayElement(id="job-x", index=index, at_once=2)})


# Jobs that come after others.


def test_a_job_may_come_after_live_ones_and_ones_that_succeeded(store: Store) -> None:
    for name in ("a-1", "b-1"):
        store.add_job(name, a_command_job(), 1.0)
    end(store, "a-1", JobState.SUCCEEDED)
    assert store.add_job("c-1", a_command_job(after=["a-1", "b-1"]), 3.0).job.after == ("a-1", "b-1")
    assert store.check_after(["a-1", "b-1"]) == ["b-1"]
    assert store.states_of(["b-1", "a-1", "nope"]) == {"a-1": JobState.SUCCEEDED, "b-1": JobState.QUEUED}
    assert store.states_of([]) == {}


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED])
def test_nothing_comes_after_what_has_ended_otherwise(store: Store, state: JobState) -> None:
    for name in ("a-1", "b-1"):
        store.add_job(name, a_command_job(), 1.0)
    end(store, "b-1", state)
    with pytest.raises(ConflictError) as told:
        store.add_job("c-1", a_command_job(after=["a-1", "b-1"]), 3.0)
    assert (told.value.code, told.value.field) == ("dependency-ended", "after")
    assert "b-1" in told.value.message
    assert told.value.hint
    assert [row.id for row in store.jobs()] == ["a-1", "b-1"]


def test_nothing_comes_after_what_there_is_not(store: Store) -> None:
    store.add_job("a-1", a_command_job(), 1.0)
    for after in (["nope"], ["a-1", "nope"]):
        with pytest.raises(NotFoundError) as told:
            store.add_job("c-1", a_command_job(after=after), 3.0)
        assert (told.value.field, "nope" in told.value.message, bool(told.value.hint)) == ("after", True, True)
    assert [row.id for row in store.jobs()] == ["a-1"]


def test_more_jobs_than_fit_a_query_may_come_before(store: Store) -> None:
    ids = [f"a-{index}" for index in range(501)]
    store.add_jobs([NewJob(job_id, a_command_job()) for job_id in ids], 1.0)
    store.add_job("b-1", a_command_job(after=ids), 2.0)
    assert set(store.states_of(ids)) == set(ids)


# Arrays.


def test_an_array_is_stored_whole_and_found_again(store: Store) -> None:
    store.add_job("other-1", a_command_job(), 1.0)
    origin = Origin()
    rows = store.add_jobs([NewJob(f"job-{i}-a", an_element(i), origin, f"sizing {i}") for i in (2, 0, 1)], 2.0)
    assert [row.id for row in rows] == ["job-2-a", "job-0-a", "job-1-a"]
    assert [(row.array_id, row.array_at_once, row.sizing) for row in rows] == [
        ("job-x", 2, f"sizing {i}") for i in (2, 0, 1)
    ]
    assert rows[0].job == an_element(2)
    assert rows[0].origin == origin
    assert store.jobs(array="job-x") == rows
    assert store.jobs(array="other") == []
    assert (store.job("other-1").array_id, store.job("other-1").array_at_once) == (None, None)
    assert [event.kind for event in store.events("job-1-a")] == ["submitted"]


@pytest.mark.parametrize("after", [[], ["nope"]])
def test_of_an_array_that_cannot_be_nothing_is_stored(store: Store, after: list[str]) -> None:
    store.add_job("job-2-a", a_command_job(), 1.0)
    jobs = [NewJob(f"job-{index}-a", an_element(index, after=after)) for index in range(3)]
    with pytest.raises(NotFoundError if after else ConflictError) as told:
        store.add_jobs(jobs, 2.0)
    assert told.value.field == ("after" if after else "id")
    assert [row.id for row in store.jobs()] == ["job-2-a"]


# Priorities.


def test_a_priority_is_changed_once_and_told(store: Store) -> None:
    store.add_job("a-1", a_command_job(priority="low"), 1.0)
    assert store.set_priority("a-1", 70, 2.0).priority == 70
    assert store.set_priority("a-1", 70, 3.0).priority == 70
    events = [event for event in store.events("a-1") if event.kind == "priority-changed"]
    assert [(event.time, event.data) for event in events] == [(2.0, {"from": -100, "to": 70})]
    assert store.job("a-1").job.priority == -100  # as it was submitted


def test_what_has_ended_has_no_priority_any_more(store: Store) -> None:
    store.add_job("a-1", a_command_job(), 1.0)
    end(store, "a-1", JobState.FAILED)
    with pytest.raises(ConflictError) as told:
        store.set_priority("a-1", 1, 3.0)
    assert (told.value.code, bool(told.value.hint)) == ("already-ended", True)
    with pytest.raises(NotFoundError):
        store.set_priority("nope", 1, 3.0)
    assert store.job("a-1").priority == 0


# What live jobs are read of.

READS = {"job", "jobs", "live_jobs", "states_of", "check_after"}
WISHES: dict[str, Callable[[Store], object]] = {
    "add_job": lambda store: store.add_job("b-1", a_command_job(), 1.0),
    "add_jobs": lambda store: store.add_jobs([NewJob("b-1", a_command_job()), NewJob("c-1", a_command_job())], 1.0),
    "set_priority": lambda store: store.set_priority("a-1", 7, 1.0),
    "request_cancel": lambda store: store.request_cancel("a-1", 1.0),
    "request_pause": lambda store: store.request_pause("a-1", 1.0),
    "request_resume": lambda store: (store.request_pause("a-1", 1.0), store.request_resume("a-1", 2.0)),
}
PEAK = Peak(
    key="k", device_kind="cpu", world_size=2, plan=plan(a_training_job(2), 2, "cpu"), measured_bytes=1,
    limit_bytes=None, ran_out=False, job_id="a-1", attempt=1, time=1.0,
)  # fmt: skip
SAVED = ProgressLine(
    time=1.0, phase="save", step=2, checkpoint=CheckpointNote(id="step-2.attempt-1", step=2, outcome="committed")
)
# In an order that a life may have.
WRITES: dict[str, Callable[[Transaction], object]] = {
    "explain": lambda write: write.explain("a-1", WHY),
    "set_sizing": lambda write: write.set_sizing("a-1", "better"),
    "add_attempts": lambda write: write.add_attempts([NewAttempt(*a_start())], 2.0),
    "set_jobs": lambda write: write.set_jobs({"a-1": WHY}, JobState.STARTING, 2.0),
    "set_job": lambda write: write.set_job("a-1", JobState.STARTING, WHY, 2.0, target=None),
    "set_relief": lambda write: write.set_relief("a-1", {"min_stage": 1}),
    "set_attempt": lambda write: write.set_attempt("a-1", 1, AttemptState.RUNNING, 3.0),
    "set_progress": lambda write: write.set_progress("a-1", 1, SAVED, 10, 3.0),
    "note_checkpoints": lambda write: write.note_checkpoints("a-1", 1, [SAVED], 20, "/c"),
    "set_stop": lambda write: write.set_stop("a-1", 1, StopRequest(reason="r", deadline=9.0), 4.0, preempted_by="b-1"),
    "add_node_fault": lambda write: write.add_node_fault(
        NodeFault(node="n1", job_id="a-1", attempt=1, outcome="hung", time=4.0)
    ),
    "count_preemption": lambda write: write.count_preemption("a-1"),
    "count_attempt": lambda write: write.count_attempt("a-1", 1, 5.0, processes=2),
    "end_attempt": lambda write: write.end_attempt("a-1", 1, 5.0, "crashed", Spent(began_at=3.0, phase="step")),
    "add_inventory": lambda write: write.add_inventory({}, 5.0),
    "add_peak": lambda write: write.add_peak(PEAK),
    "add_history": lambda write: write.add_history(
        HistoryRow(queue="q", name="job", processes=2, ran_s=1.0, succeeded=True, time=1.0)
    ),
    "event": lambda write: write.event("a-1", 1, 5.0, "k", {}),
}


def public(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_") and inspect.isfunction(getattr(kind, name))}


def check(store: Store, known: dict[str, JobRow]) -> dict[str, JobRow]:
    """What is read again of `known` is what a whole read finds; the jobs are parsed once."""
    now = store.live_jobs(known)
    assert list(now.values()) == store.jobs(live=True)
    assert list(now) == [row.id for row in now.values()]
    for job_id, row in now.items():
        assert row.job is known[job_id].job if job_id in known else row.job
    return now


def test_every_way_to_write_is_among_these() -> None:
    assert public(Jobs) == READS | set(WISHES)
    assert public(Transaction) == set(WRITES)


@pytest.mark.parametrize("wish", WISHES)
def test_what_users_ask_for_is_seen_in_what_is_known(store: Store, wish: str) -> None:
    store.add_job("a-1", a_command_job(2), 1.0, Origin())
    known = check(store, {})
    WISHES[wish](store)
    assert check(store, known) != known


def test_what_the_controller_writes_is_seen_in_what_is_known(store: Store) -> None:
    for name in ("a-1", "b-1"):
        store.add_job(name, a_training_job(2), 1.0, Origin(), "sizing")
    known = check(store, {})
    for write in WRITES.values():
        with store.acting(lease_of(store)) as transaction:
            write(transaction)
        known = check(store, known)
    row = known["a-1"]
    assert (row.served_s, row.ran_s, row.preemptions) == (6.0, 3.0, 1)
    assert (row.sizing, row.origin, row.started_at, row.state) == ("better", Origin(), 2.0, JobState.STARTING)
    (attempt,) = store.attempts("a-1")
    assert attempt.preempted_by == "b-1"


def test_jobs_come_and_go_in_what_is_known(store: Store) -> None:
    for name in ("a-1", "b-1", "c-1"):
        store.add_job(name, a_command_job(), 1.0)
    known = check(store, {})
    end(store, "b-1", JobState.FAILED)
    store.add_job("d-1", a_command_job(), 1.0)
    known = check(store, known)
    assert list(known) == ["a-1", "c-1", "d-1"]
    end(store, "c-1", JobState.FAILED)  # as many as before, with versions that add up to the same
    store.add_job("c-2", a_command_job(), 1.0)
    known = check(store, known)
    assert list(known) == ["a-1", "d-1", "c-2"]
    end(store, "a-1", JobState.SUCCEEDED)
    store.request_cancel("d-1", 2.0)
    known = check(store, known)
    assert list(known) == ["d-1", "c-2"]
    for name in known:
        end(store, name, JobState.FAILED)
    assert check(store, known) == check(store, {}) == {}


def test_of_jobs_that_have_not_changed_no_row_is_read(store: Store) -> None:
    store.add_jobs([NewJob(f"a-{index}", a_command_job()) for index in range(20)], 1.0)
    known = store.live_jobs()
    asked: list[str] = []
    sa.event.listen(store.engine, "before_cursor_execute", lambda *about: asked.append(about[2]))
    again = store.live_jobs(known)
    assert all(again[job_id] is row for job_id, row in known.items())
    (query,) = [text for text in asked if text.startswith("SELECT")]
    assert query.startswith("SELECT count(*)")
    store.set_priority("a-7", 1, 2.0)
    asked.clear()
    changed = {job_id for job_id, row in store.live_jobs(known).items() if row is not known[job_id]}
    assert changed == {"a-7"}
    assert not any("jobs.spec" in text or "jobs.origin" in text for text in asked)
