"""What the scheduler is told of a job that waits."""

from __future__ import annotations

from typing import Any

import pytest

from launch.contract import Origin, Pinned
from launch.shape import shape_of_config
from orchestrator.control.wishes import gang_of, gang_of_new, label_of
from orchestrator.job.lifecycle import JobState, Reason, ReasonCode
from orchestrator.job.spec import AnyJob, ArrayElement, TrainingJob, dump_job
from orchestrator.memory.ladder import Relief
from orchestrator.memory.options import kinds_of
from orchestrator.memory.plan import plan
from orchestrator.memory.sizing import sizing_of
from orchestrator.store.rows import JobRow
from tests.builders import a_command_job, a_node, a_training_job

JOB = a_training_job("1..2", train={"max_steps": 1, "global_batch_size": 16})
LARGE, SMALL, UNKNOWN = a_node(memory_gib=50), a_node(memory_gib=1), a_node()


def sizing() -> str:
    """Of a BERT."""
    shape = shape_of_config({"model_type": "bert"}, "sequence-classification")
    assert shape is not None
    assert isinstance(JOB, TrainingJob)
    return sizing_of(JOB, shape).model_dump_json()


def a_row(job: AnyJob = JOB, **changes: Any) -> JobRow:
    values: dict[str, Any] = {
        "sequence": 7, "id": "job-1", "name": "job", "queue": "default", "priority": 0, "spec": dump_job(job),
        "state": JobState.QUEUED, "reason": Reason(code=ReasonCode.SUBMITTED, sentence="s"), "attempts": 0,
        "cancel_requested": False, "not_before": None, "submitted_at": 0.0, "started_at": None, "finished_at": None,
        "error": None, "result": None, "sizing": sizing(),
    }  # fmt: skip
    return JobRow(**(values | changes))


def test_a_job_whose_model_is_known_says_in_which_ways_it_fits() -> None:
    wish = gang_of_new("new", JOB, sizing=sizing(), nodes=[LARGE])
    assert (wish.min_processes, wish.max_processes) == (1, 2)
    assert wish.options is not None
    assert [option.processes for option in wish.options] == [2, 1]
    assert wish.misfit is None
    stored = gang_of(a_row(), kinds_of([LARGE]), ())
    assert (stored.options, stored.sequence) == (wish.options, 7)


def test_a_job_too_large_brings_the_reason() -> None:
    wish = gang_of_new("new", JOB, sizing=sizing(), nodes=[SMALL])
    assert wish.options == ()
    assert wish.misfit is not None
    assert wish.misfit.code == ReasonCode.DOES_NOT_FIT
    assert "and there are" in wish.misfit.sentence
    assert "tuneyard plan" in (wish.misfit.remedy or "")


@pytest.mark.parametrize(
    ("job", "known", "nodes"),
    [(JOB, False, [SMALL]), (JOB, True, [UNKNOWN]), (JOB, True, [SMALL, UNKNOWN]), (JOB, True, []),
     (a_command_job(2), True, [SMALL])],
    ids=["no-sizing", "no-memory", "one-without-memory", "no-nodes", "command"],
)  # fmt: skip
def test_where_nobody_knows_any_slots_will_do(job: AnyJob, known: bool, nodes: Any) -> None:
    wish = gang_of_new("new", job, sizing=sizing() if known else None, nodes=nodes)
    assert (wish.options, wish.misfit) == (None, None)


def test_what_a_job_has_given_up_holds() -> None:
    row = a_row(relief=Relief(max_micro_batch=2))
    wish = gang_of(row, kinds_of([LARGE]), ())
    assert wish.options is not None
    assert {option.plan.micro_batch_size for option in wish.options} == {2}


def test_a_run_that_is_repeated_takes_its_plan_along() -> None:
    pinned = Pinned(plan=plan(JOB, 1, "cpu"), threads=(1,), data={})
    assert gang_of(a_row(origin=Origin(pinned=pinned)), kinds_of([SMALL]), ()).options is None


def test_a_single_process_is_one() -> None:
    job = a_training_job(1, strategy="single")
    assert gang_of_new("new", job).max_processes == 1


def test_what_is_stored_of_a_job_is_told() -> None:
    stored = a_row(
        a_training_job("1..2", max_duration="100s"), queue="q", priority=7, submitted_at=5.0, queued_at=50.0,
        waited_s=9.0, ran_s=30.0, preemptions=2, target=1, array_id="a", array_at_once=3,
    )  # fmt: skip
    gang = gang_of(stored, (), ())
    assert (gang.job_id, gang.sequence, gang.queue, gang.priority, gang.name) == ("job-1", 7, "q", 7, "job")
    assert (gang.queued_at, gang.waited_s, gang.ran_s, gang.left_s) == (50.0, 9.0, 30.0, 70.0)
    assert (gang.evictions, gang.preemptible, gang.target, gang.most) == (2, True, 1, 1)
    assert (gang.group, gang.at_once) == ("a", 3)


def test_of_a_new_job_the_wait_began_when_it_was_submitted() -> None:
    gang = gang_of(a_row(a_command_job(2), submitted_at=5.0, ran_s=9.0), None, ())
    assert (gang.queued_at, gang.left_s, gang.target, gang.group) == (5.0, None, None, None)
    assert not gang.preemptible, "a command need not save when it is told to stop"


def test_time_that_is_used_up_is_not_less_than_none() -> None:
    assert gang_of(a_row(a_command_job(max_duration="10s"), ran_s=30.0), None, ()).left_s == 0.0


def test_elements_of_an_array_are_alike() -> None:
    first, second = (
        a_training_job(name="sweep").model_copy(
            update={"name": f"sweep-{index}", "array_of": ArrayElement(id="sweep-7f", index=index)}
        )
        for index in (1, 11)
    )
    assert label_of(first) == label_of(second) == "sweep"
