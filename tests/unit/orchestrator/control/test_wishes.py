"""What the scheduler is told of a job that waits."""

from __future__ import annotations

from typing import Any

import pytest

from launch.contract import Origin, Pinned
from launch.shape import shape_of_config
from orchestrator.control.wishes import waiting, waiting_row
from orchestrator.job.lifecycle import JobState, Reason, ReasonCode
from orchestrator.job.spec import AnyJob, TrainingJob, dump_job
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
    wish = waiting("new", 0, JOB, sizing=sizing(), nodes=[LARGE])
    assert (wish.min_processes, wish.max_processes) == (1, 2)
    assert wish.options is not None
    assert [option.processes for option in wish.options] == [2, 1]
    assert wish.misfit is None
    stored = waiting_row(a_row(), kinds_of([LARGE]), ())
    assert (stored.options, stored.sequence) == (wish.options, 7)


def test_a_job_too_large_brings_the_reason() -> None:
    wish = waiting("new", 0, JOB, sizing=sizing(), nodes=[SMALL])
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
    wish = waiting("new", 0, job, sizing=sizing() if known else None, nodes=nodes)
    assert (wish.options, wish.misfit) == (None, None)


def test_what_a_job_has_given_up_holds() -> None:
    row = a_row(relief=Relief(max_micro_batch=2))
    wish = waiting_row(row, kinds_of([LARGE]), ())
    assert wish.options is not None
    assert {option.plan.micro_batch_size for option in wish.options} == {2}


def test_a_run_that_is_repeated_takes_its_plan_along() -> None:
    pinned = Pinned(plan=plan(JOB, 1, "cpu"), threads=(1,), data={})
    assert waiting_row(a_row(origin=Origin(pinned=pinned)), kinds_of([SMALL]), ()).options is None


def test_a_single_process_is_one() -> None:
    job = a_training_job(1, strategy="single")
    assert waiting("new", 0, job).max_processes == 1
