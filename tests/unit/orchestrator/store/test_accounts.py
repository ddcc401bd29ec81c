"""What is stored of time, energy and slots, and read again when their time is long past."""

from __future__ import annotations

from launch.contract import CheckpointNote, ProgressLine
from orchestrator.cluster.status import Energy, Slots, Spent
from orchestrator.job.lifecycle import AttemptState, JobState, Reason, ReasonCode
from orchestrator.store.store import Store
from orchestrator.store.transaction import NewAttempt
from tests.builders import a_command_job
from tests.unit.orchestrator.store.test_store import a_start, lease_of

WHY = Reason(code=ReasonCode.STARTING, sentence="because")
SPENT = Spent(began_at=3.0, seconds={"load": 1.25, "step": 0.1}, phase="step", step=7, from_step=2)


def test_where_time_and_energy_went_is_kept_beside_the_attempt(store: Store) -> None:
    store.add_job("a-1", a_command_job(2), 1.0)
    with store.acting(lease_of(store)) as write:
        write.add_attempts([NewAttempt(*a_start())], 2.0)
        write.set_job("a-1", JobState.STARTING, WHY, 2.0)
    assert store.attempts("a-1")[0].spent is None
    with store.acting(lease_of(store)) as write:
        write.set_progress("a-1", 1, None, 0, 4.0, SPENT)
        write.set_progress("a-1", 1, None, 0, 5.0)  # nothing new
    assert store.attempts("a-1")[0].spent == SPENT
    last = SPENT.model_copy(update={"step": 9, "failed_at": 5.5})
    with store.acting(lease_of(store)) as write:
        write.end_attempt("a-1", 1, 6.0, "killed", last, [Energy(gpu_j=2.5), None])
    (row,) = store.attempts_of(["a-1", "nobody"])
    assert (row.state, row.ended_at, row.outcome) == (AttemptState.ENDED, 6.0, "killed")
    assert (row.spent, row.energy) == (last, (Energy(gpu_j=2.5), None))


def test_what_was_known_stays_when_nothing_more_is_told_at_the_end(store: Store) -> None:
    store.add_job("a-1", a_command_job(2), 1.0)
    with store.acting(lease_of(store)) as write:
        write.add_attempts([NewAttempt(*a_start())], 2.0)
        write.set_progress("a-1", 1, None, 0, 4.0, SPENT)
        write.end_attempt("a-1", 1, 6.0, "node-lost", None, None)
    (row,) = store.attempts("a-1")
    assert (row.spent, row.energy) == (SPENT, None)


def test_jobs_of_a_time(store: Store) -> None:
    for number, (submitted, ended) in enumerate([(1.0, 5.0), (2.0, None), (9.0, None)]):
        store.add_job(f"a-{number}", a_command_job(), submitted)
        if ended is not None:
            with store.acting(lease_of(store)) as write:
                write.set_job(f"a-{number}", JobState.CANCELLED, WHY, ended)
    assert [row.id for row in store.jobs_between(4.0, 9.0, 10)] == ["a-0", "a-1"]
    assert [row.id for row in store.jobs_between(5.0, 9.5, 10)] == ["a-1", "a-2"]
    assert [row.id for row in store.jobs_between(0.0, 99.0, 2)] == ["a-1", "a-2"]


def test_events_of_some_kinds(store: Store) -> None:
    store.add_job("a-1", a_command_job(2), 1.0)
    store.add_job("b-1", a_command_job(2), 1.0)
    note = CheckpointNote(id="step-2.attempt-1", step=2, outcome="committed", spent={"step": 1.5})
    with store.acting(lease_of(store)) as write:
        write.add_attempts([NewAttempt(*a_start())], 2.0)
        write.note_checkpoints("a-1", 1, [ProgressLine(time=3.0, phase="save", checkpoint=note)], 10, "/c")
    (event,) = store.events_of(["a-1", "b-1"], ["checkpoint-committed"])
    assert CheckpointNote.model_validate(event.data) == note
    assert [event.job_id for event in store.events_of(["b-1"], ["submitted", "checkpoint-committed"])] == ["b-1"]
    assert store.events_of([], ["submitted"]) == []


def test_slots_are_read_from_what_held_at_a_time(store: Store) -> None:
    assert store.inventories(5.0) == []
    one, two = Slots(name="x", kind="cpu", slots=4), Slots(name="y", kind="H100", slots=8)
    with store.acting(lease_of(store)) as write:
        for at, nodes in ((1.0, {"n0": one}), (2.0, {"n0": one, "n1": two}), (6.0, {})):
            write.add_inventory(nodes, at)
    assert [(row.time, row.nodes) for row in store.inventories(5.0)] == [(2.0, {"n0": one, "n1": two}), (6.0, {})]
    assert [row.time for row in store.inventories(0.5)] == [1.0, 2.0, 6.0]
    assert [row.time for row in store.inventories(99.0)] == [6.0]
