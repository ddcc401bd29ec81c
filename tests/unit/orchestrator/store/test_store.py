"""The database, the same tests on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from launch.contract import CheckpointNote, ProgressLine, RunContract, StopRequest
from orchestrator.cluster.capacity import Capacity
from orchestrator.cluster.model import Placement
from orchestrator.errors import (
    ConflictError,
    IllegalTransitionError,
    LeaseLostError,
    NotFoundError,
    StoreError,
)
from orchestrator.job.lifecycle import AttemptState, JobState, Reason, ReasonCode
from orchestrator.job.spec import dump_job
from orchestrator.memory.plan import plan
from orchestrator.schedule.place import place
from orchestrator.store import migrate, schema
from orchestrator.store.rows import Lease
from orchestrator.store.store import Store
from orchestrator.store.transaction import NewAttempt
from tests.builders import a_command_job, a_node

WHY = Reason(code=ReasonCode.STARTING, sentence="because")


def lease_of(store: Store, holder: str = "me", now: float = 0.0) -> Lease:
    lease = store.acquire_lease(holder, now, ttl=10)
    assert lease is not None
    return lease


def a_start(job_id: str = "a-1", number: int = 1) -> tuple[RunContract, Placement]:
    placement = place(Capacity(nodes=(a_node(),)), 2, "any")
    assert placement is not None
    contract = RunContract(
        run_id=f"{job_id}.{number}", job_id=job_id, attempt=number, plan=plan(a_command_job(2), 2, "cpu"),
        nodes=placement.shares, main_port=1, run_dir="/r", output_dir="/o", checkpoint_dir="/c", tracker_dir="/t",
        command=("true",),
    )  # fmt: skip
    return contract, placement


def test_prepare_gives_the_newest_schema_and_can_be_repeated(store: Store) -> None:
    store.prepare()
    with store.engine.connect() as connection:
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == schema.HEAD
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []


def test_migrations_agree_with_the_tables(url: str) -> None:
    store = Store(url)
    migrate.upgrade(store.engine)
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    assert migrate.newest() == schema.HEAD
    store.close()


def test_migrations_lead_back(url: str) -> None:
    store = Store(url)
    migrate.upgrade(store.engine)
    store.add_job("a-1", a_command_job(), 1.0)
    command.downgrade(migrate.config(store.engine), "0004")
    migrate.upgrade(store.engine)
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    assert [row.id for row in store.jobs(live=True)] == ["a-1"]
    store.close()


def test_a_database_of_a_newer_version_is_refused(store: Store, url: str) -> None:
    with store.engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError) as told:
        Store(url).prepare()
    assert "upgrade" in (told.value.hint or "")


def test_a_job_comes_back_as_it_was_submitted(store: Store) -> None:
    job = a_command_job("2..4", queue="research", priority="high", env={"A": "b"})
    row = store.add_job("a-1", job, now=5.0)
    assert row.job == job
    assert (row.state, row.queue, row.priority, row.submitted_at) == (JobState.QUEUED, "research", 100, 5.0)
    assert [event.kind for event in store.events("a-1")] == ["submitted"]
    with pytest.raises(ConflictError):
        store.add_job("a-1", job, now=6.0)


def test_jobs_keep_their_order(store: Store) -> None:
    for index in range(5):
        store.add_job(f"a-{index}", a_command_job(), now=1.0)
    assert [row.id for row in store.jobs()] == [f"a-{index}" for index in range(5)]
    assert [row.id for row in store.jobs(limit=2)] == ["a-3", "a-4"]


def test_what_is_not_there_is_not_found(store: Store) -> None:
    for ask in (store.job, lambda name: store.request_cancel(name, 0.0)):
        with pytest.raises(NotFoundError) as told:
            ask("nope")
        assert told.value.hint


def test_cancel_twice_is_cancel_once(store: Store) -> None:
    store.add_job("a-1", a_command_job(), now=1.0)
    assert store.request_cancel("a-1", 2.0).cancel_requested
    store.request_cancel("a-1", 3.0)
    assert [event.kind for event in store.events("a-1")] == ["submitted", "cancel-requested"]


def test_an_attempts_life(store: Store) -> None:
    store.add_job("a-1", a_command_job(2), now=1.0)
    lease = lease_of(store)
    contract, placement = a_start()
    with store.acting(lease) as write:
        write.add_attempts([NewAttempt(contract, placement)], 2.0)
        write.set_job("a-1", JobState.STARTING, WHY, 2.0)
    (attempt,) = store.live_attempts()
    assert attempt.run == contract
    assert attempt.held == placement
    with store.acting(lease) as write:
        write.set_attempt("a-1", 1, AttemptState.RUNNING, 3.0, started_at=3.0)
        write.set_job("a-1", JobState.RUNNING, WHY, 3.0)
        write.set_progress("a-1", 1, ProgressLine(time=3.5, phase="train", step=7, loss=0.5), 70, 3.5)
    (attempt,) = store.live_attempts()
    assert attempt.progress is not None
    assert (attempt.progress.step, attempt.progress_offset, attempt.last_contact) == (7, 70, 3.5)
    with store.acting(lease) as write:
        write.set_stop("a-1", 1, StopRequest(reason="r", deadline=9.0), 4.0)
    (attempt,) = store.live_attempts()
    assert attempt.stop == StopRequest(reason="r", deadline=9.0)
    with store.acting(lease) as write:
        write.set_attempt("a-1", 1, AttemptState.ENDED, 5.0, outcome="stopped")
        write.count_attempt("a-1", 1, 5.0, processes=2)
        write.set_job("a-1", JobState.CANCELLED, WHY, 5.0, result={"x": 1})
    assert store.live_attempts() == []
    row = store.job("a-1")
    assert (row.state, row.started_at, row.finished_at, row.result) == (JobState.CANCELLED, 2.0, 5.0, {"x": 1})
    assert (row.ran_s, row.served_s, row.failures) == (3.0, 6.0, 0)
    assert store.jobs(live=True) == []


def a_note(step: int, outcome: str = "committed", attempt: int = 1, **fields: Any) -> ProgressLine:
    note = CheckpointNote(id=f"step-{step}.attempt-{attempt}", step=step, outcome=outcome, **fields)  # type: ignore[arg-type]
    return ProgressLine(time=100.0 + step, phase="save", step=step, checkpoint=note)


def test_what_is_told_of_checkpoints_is_stored_once_with_the_newest(store: Store) -> None:
    store.add_job("a-1", a_command_job(2), now=1.0)
    lease = lease_of(store)
    with store.acting(lease) as write:
        write.add_attempts([NewAttempt(*a_start())], 2.0)
    assert store.job("a-1").checkpoint is None
    failed = a_note(3, "failed", code="storage-full", message="the storage is full", hint="free space")

    def note(lines: list[ProgressLine], offset: int) -> None:
        with store.acting(lease) as write:
            write.note_checkpoints("a-1", 1, lines, offset, "s3://bucket/ck/")

    for _ in range(2):  # the second time by a controller that did not know of the first
        note([a_note(2), failed], 100)
    events = [event for event in store.events("a-1") if event.kind.startswith("checkpoint-")]
    assert [(event.kind, event.attempt, event.time) for event in events] == [
        ("checkpoint-committed", 1, 102.0), ("checkpoint-failed", 1, 103.0),
    ]  # fmt: skip
    assert events[1].data["message"] == "the storage is full"
    checkpoint = store.job("a-1").checkpoint
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.time, checkpoint.url) == (2, 102.0, "s3://bucket/ck/step-2.attempt-1")
    note([a_note(2, "quarantined")], 200)
    assert store.job("a-1").checkpoint is None
    assert store.attempts("a-1")[0].progress_offset == 200


def test_failures_and_time_add_up(store: Store) -> None:
    store.add_job("a-1", a_command_job(2), now=1.0)
    lease = lease_of(store)
    for number, (begun, ended) in enumerate([(2.0, 5.0), (10.0, 11.5), (20.0, 20.5)], start=1):
        with store.acting(lease) as write:
            write.add_attempts([NewAttempt(*a_start(number=number))], begun)
            write.set_attempt("a-1", number, AttemptState.ENDED, ended, outcome="crashed")
            write.count_attempt("a-1", number, ended, failed="crashed" if number != 2 else None, processes=number)
    row = store.job("a-1")
    assert (row.failures, row.ran_s, row.served_s) == (2, 5.0, 3.0 * 1 + 1.5 * 2 + 0.5 * 3)
    assert row.started_at == 2.0  # the first start counts
    assert row.failed_by == {"crashed": 2}
    for number, failed, failures in ((4, "hung", 1), (5, None, 0)):  # what has saved something new begins to count anew
        with store.acting(lease) as write:
            write.add_attempts([NewAttempt(*a_start(number=number))], 30.0)
            write.set_attempt("a-1", number, AttemptState.ENDED, 30.0, outcome="crashed")
            write.count_attempt("a-1", number, 30.0, failed=failed, processes=1, progressed=True)
        row = store.job("a-1")
        assert (row.failures, row.failed_by) == (failures, {failed: 1} if failed else None)


def test_what_is_no_number_is_stored_all_the_same(store: Store) -> None:
    store.add_job("a-1", a_command_job(2), now=1.0)
    line = ProgressLine(time=1.0, phase="train", loss=float("nan"), metrics={"a": float("inf"), "b": 1.0})
    with store.acting(lease_of(store)) as write:
        write.add_attempts([NewAttempt(*a_start())], 2.0)
        write.set_progress("a-1", 1, line, 1, 2.0)
    (attempt,) = store.live_attempts()
    assert attempt.progress is not None
    assert math.isnan(attempt.progress.loss or 0.0)
    assert attempt.progress.metrics == {"a": math.inf, "b": 1.0}


def test_pausing_and_resuming_are_wishes(store: Store) -> None:
    store.add_job("a-1", a_command_job(), now=1.0)
    for _ in range(2):
        assert store.request_pause("a-1", 2.0).pause_requested
    row = store.request_resume("a-1", 3.0)
    assert (row.pause_requested, row.state) == (False, JobState.QUEUED)  # the state is the controller's to change
    assert [event.kind for event in store.events("a-1")] == ["submitted", "pause-requested", "resume-requested"]
    lease = lease_of(store)
    with store.acting(lease) as write:
        write.set_job("a-1", JobState.PAUSED, WHY, 4.0)
    store.request_resume("a-1", 5.0)  # granted already, only not carried out
    assert [row.id for row in store.jobs(live=True)] == ["a-1"]


@pytest.mark.parametrize("ask", [Store.request_pause, Store.request_resume])
def test_what_has_ended_is_neither_paused_nor_resumed(store: Store, ask: Callable[..., object]) -> None:
    store.add_job("a-1", a_command_job(), now=1.0)
    store.request_cancel("a-1", 2.0)
    with pytest.raises(ConflictError) as told:
        ask(store, "a-1", 3.0)
    assert told.value.code == "being-cancelled"
    with store.acting(lease_of(store)) as write:
        write.set_job("a-1", JobState.CANCELLED, WHY, 4.0)
    with pytest.raises(ConflictError, match="has ended already: cancelled") as told:
        ask(store, "a-1", 3.0)
    assert told.value.hint


def test_a_job_that_was_never_paused_cannot_be_resumed(store: Store) -> None:
    store.add_job("a-1", a_command_job(), now=1.0)
    with pytest.raises(ConflictError) as told:
        store.request_resume("a-1", 2.0)
    assert told.value.code == "not-paused"


def test_a_database_of_an_earlier_version_is_brought_up(url: str) -> None:
    """With a job whose second attempt runs: the first failed after three seconds."""
    store = Store(url)
    command.upgrade(migrate.config(store.engine), "0002")
    reason = json.dumps({"code": "running", "sentence": "s"})
    contract, placement = a_start()
    with store.engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO jobs (sequence, id, name, queue, priority, spec, state, reason, attempts,"
                " cancel_requested, submitted_at)"
                " VALUES (7, 'a-1', 'job', 'default', 0, :spec, 'running', :reason, 2, :no, 1.0)"
            ),
            {"spec": dump_job(a_command_job(2)), "reason": reason, "no": False},
        )
        for number, state, ended, outcome in ((1, "ended", 5.0, "crashed"), (2, "running", None, None)):
            connection.execute(
                sa.text(
                    "INSERT INTO attempts (job_id, number, state, contract, placement, created_at, ended_at, outcome,"
                    " last_contact) VALUES ('a-1', :number, :state, :contract, :placement, 2.0, :ended, :outcome, 2.0)"
                ),
                {
                    "number": number, "state": state, "contract": contract.model_dump_json(),
                    "placement": placement.model_dump_json(), "ended": ended, "outcome": outcome,
                },
            )  # fmt: skip
    store.prepare()
    row = store.job("a-1")
    assert (row.failures, row.ran_s, row.pause_requested, row.checkpoint) == (1, 3.0, False, None)
    assert (row.relief, row.sizing, store.peaks(["k"]), store.forecasts()) == (None, None, [], [])
    assert (row.served_s, row.preemptions, row.array_id, row.array_at_once, row.version) == (6.0, 0, None, None, 0)
    assert (store.queues(), store.node_marks(), store.history()) == ([], [], [])
    (attempt,) = store.live_attempts()
    assert (attempt.progress_offset, attempt.predicted, attempt.preempted_by) == (0, None, None)
    assert store.request_pause("a-1", 9.0).version == 1
    store.close()


def test_an_attempts_number_is_given_once(store: Store) -> None:
    store.add_job("a-1", a_command_job(2), now=1.0)
    lease = lease_of(store)
    with store.acting(lease) as write:
        write.add_attempts([NewAttempt(*a_start())], 2.0)
    for number in (1, 3):
        with store.acting(lease) as write:
            assert write.add_attempts([NewAttempt(*a_start(number=number))], 2.0) == set()
    assert [attempt.number for attempt in store.attempts("a-1")] == [1]


def test_an_attempt_that_exists_keeps_no_other_from_being_stored(store: Store) -> None:
    for name in ("a-1", "b-1", "c-1"):
        store.add_job(name, a_command_job(2), now=1.0)
    lease = lease_of(store)
    with store.acting(lease) as write:
        write.add_attempts([NewAttempt(*a_start("b-1"))], 2.0)
    with store.acting(lease) as write:
        names = [*store.live_jobs(), "never-submitted"]
        assert write.add_attempts([NewAttempt(*a_start(name)) for name in names], 3.0) == {"a-1", "c-1"}
    assert [(one.job_id, one.number, one.created_at) for one in store.live_attempts()] == [
        ("a-1", 1, 3.0), ("b-1", 1, 2.0), ("c-1", 1, 3.0),
    ]  # fmt: skip
    told = [event.kind for name in ("a-1", "b-1", "c-1") for event in store.events(name)]
    assert told == ["submitted", "attempt-placed"] * 3


def test_jobs_move_together_each_for_its_reason(store: Store) -> None:
    for number, name in enumerate(("a-1", "b-1"), start=1):
        store.add_job(name, a_command_job(2), now=float(number))
    reasons = {name: Reason(code=ReasonCode.STARTING, sentence=f"{name} starts") for name in ("a-1", "b-1")}
    with store.acting(lease_of(store)) as write:
        write.set_jobs({"a-1": WHY}, JobState.STARTING, 4.0)
        write.set_jobs(reasons, JobState.STARTING, 9.0, target=None)
        write.set_jobs({}, JobState.RUNNING, 9.0)
    rows = [store.job(name) for name in reasons]
    assert [(row.state, row.reason, row.waited_s) for row in rows] == [
        (JobState.STARTING, reasons["a-1"], 3.0), (JobState.STARTING, reasons["b-1"], 7.0),
    ]  # fmt: skip
    moves = [(event.time, event.data["reason"]["sentence"]) for row in rows for event in store.events(row.id)[1:]]
    assert moves == [(4.0, "because"), (9.0, "b-1 starts")]


def test_an_illegal_transition_writes_nothing(store: Store) -> None:
    store.add_job("a-1", a_command_job(), now=1.0)
    lease = lease_of(store)

    def succeed_at_once() -> None:
        with store.acting(lease) as write:
            write.event("a-1", None, 2.0, "something", {})
            write.set_job("a-1", JobState.SUCCEEDED, WHY, 2.0)

    with pytest.raises(IllegalTransitionError, match="submitted"):
        succeed_at_once()
    assert store.job("a-1").state == JobState.QUEUED
    assert [event.kind for event in store.events("a-1")] == ["submitted"]


def test_one_holder_at_a_time_and_the_token_grows(store: Store) -> None:
    mine = lease_of(store, "me", now=0)
    assert store.acquire_lease("you", 5, ttl=10) is None
    assert lease_of(store, "me", now=8).token == mine.token
    yours = lease_of(store, "you", now=19)
    assert yours.token > mine.token
    assert store.acquire_lease("me", 20, ttl=10) is None


def test_a_stale_lease_writes_nothing(store: Store) -> None:
    store.add_job("a-1", a_command_job(), now=1.0)
    stale = lease_of(store, "me", now=0)
    fresh = lease_of(store, "you", now=11)
    with pytest.raises(LeaseLostError), store.acting(stale) as write:
        write.set_job("a-1", JobState.STARTING, WHY, 12.0)
    assert store.job("a-1").state == JobState.QUEUED
    with store.acting(fresh) as write:
        write.set_job("a-1", JobState.STARTING, WHY, 12.0)


def test_a_released_lease_is_free_at_once(store: Store) -> None:
    mine = lease_of(store, "me", now=0)
    store.release_lease(mine)
    assert lease_of(store, "you", now=1).token > mine.token


@pytest.mark.usefixtures("store")
def test_of_many_that_ask_at_once_one_gets_the_lease(url: str) -> None:
    stores = [Store(url) for _ in range(6)]
    barrier = threading.Barrier(len(stores))
    got: list[Lease | None] = []

    def ask(index: int) -> None:
        barrier.wait()
        got.append(stores[index].acquire_lease(f"c{index}", 0.0, ttl=10))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(lease is not None for lease in got) == 1
    for one in stores:
        one.close()


def test_an_unreachable_database_is_told_without_its_password() -> None:
    store = Store("postgresql://yard:hunter2@127.0.0.1:9/none")
    with pytest.raises(StoreError) as told:
        store.prepare()
    assert "hunter2" not in str(told.value)
    assert "TUNEYARD_DATABASE_URL" in (told.value.hint or "")


def test_a_shared_file_leaves_nothing_beside_it(tmp_path: Path) -> None:
    """What several hosts open, one after the other, has no log that belongs to one of them."""
    url = f"sqlite:///{tmp_path / 'job.db'}"
    for shared, beside in ((True, {"job.db"}), (False, {"job.db", "job.db-wal", "job.db-shm"})):
        store = Store(url, shared=shared)
        store.prepare()
        store.jobs()
        assert {path.name for path in tmp_path.iterdir()} == beside
        store.close()
