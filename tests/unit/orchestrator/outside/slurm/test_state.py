"""A job of Slurm's in a yard's words."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.job.checkpoint import LastCheckpoint
from orchestrator.job.lifecycle import JobState, Reason, ReasonCode
from orchestrator.outside.record import Status
from orchestrator.outside.slurm.commands import Queued
from orchestrator.outside.slurm.reasons import WAITS, how_ended, why_waiting
from orchestrator.outside.slurm.record import Handed
from orchestrator.outside.slurm.state import view_of
from orchestrator.views import EventView, JobView

NOW = 1000.0
HANDED = Handed(
    id="12", root="/r", job_ids=("sms-x1",), names=("sms",), queue="lab", priority=0, is_array=False, submitted_at=900.0
)
ARRAY = HANDED.model_copy(update={"job_ids": ("s-x-0", "s-x-1"), "names": ("s-0", "s-1"), "is_array": True})


def a_row(state: str = "PENDING", reason: str = "Priority", start: float | None = None, job: str = "12") -> Queued:
    return Queued(job, job, state, start, 900.0, 2, "main", "n[1-2]", reason)


def a_status(state: JobState, attempts: int = 1, told_to_end: bool = False, **fields: Any) -> Status:
    values: dict[str, Any] = {
        "id": "sms-x1", "name": "sms", "queue": "lab", "priority": 0, "state": state,
        "reason": Reason(code=ReasonCode.RUNNING, sentence="as told"), "attempts": attempts, "submitted_at": 901.0,
    }  # fmt: skip
    event = EventView(id=1, attempt=None, time=950.0, kind="submitted", data={})
    return Status(job=JobView(**(values | fields)), events=(event,), told_to_end=told_to_end)


def seen(status: Status | None, row: Queued | None, cancelled: bool = False) -> JobView:
    return view_of(HANDED, 0, status, row, cancelled, NOW)


@pytest.mark.parametrize("reason", [*WAITS, "QOSMaxJobsPerUserLimit", "AssocGrpGRES", "ReqNodeNotAvail, Reserved", "X"])
def test_whatever_waits_has_a_sentence_and_a_way_out(reason: str) -> None:
    told = why_waiting(a_row(reason=reason), NOW)
    assert told.sentence
    assert told.remedy
    assert "{" not in told.sentence + told.remedy


def test_words_for_waiting() -> None:
    assert why_waiting(a_row(reason="Resources"), NOW).sentence == (
        "first in the partition main; 2 nodes as it asks for are not free at once"
    )
    assert why_waiting(a_row(reason="QOSMaxCpuPerUserLimit"), NOW).code == ReasonCode.OVER_QUOTA
    assert "(QOSMaxCpuPerUserLimit)" in why_waiting(a_row(reason="QOSMaxCpuPerUserLimit"), NOW).sentence
    assert why_waiting(a_row(reason="Mystery"), NOW).code == ReasonCode.NOT_TOLD
    assert "expected to start at" in why_waiting(a_row(start=NOW + 60), NOW).sentence
    assert "expected" not in why_waiting(a_row(start=NOW - 60), NOW).sentence


def test_before_its_first_run() -> None:
    view = seen(None, a_row())
    assert (view.id, view.name, view.state, view.attempts) == ("slurm:12", "sms", JobState.QUEUED, 0)
    assert view.reason.code == ReasonCode.BEHIND_OTHERS
    begins = seen(None, a_row("RUNNING"))
    assert (begins.state, begins.reason.sentence) == (JobState.STARTING, "its run begins on n[1-2]")


def test_while_it_runs_it_tells_itself() -> None:
    view = seen(a_status(JobState.RUNNING), a_row("RUNNING"))
    assert (view.state, view.reason.sentence) == (JobState.RUNNING, "as told")
    assert seen(a_status(JobState.RUNNING), a_row("COMPLETING")).state == JobState.STOPPING
    assert seen(a_status(JobState.RUNNING), a_row("SUSPENDED")).state == JobState.PAUSED
    waits = seen(a_status(JobState.QUEUED), a_row("RUNNING"))  # for its next attempt
    assert (waits.state, waits.reason.sentence) == (JobState.STARTING, "as told")


def test_between_two_runs_it_is_queued() -> None:
    saved = LastCheckpoint(id="step-7.attempt-1", step=7, time=940.0, url="/r/c")
    view = seen(a_status(JobState.PAUSED, checkpoint=saved), a_row(reason="BeginTime"))
    assert (view.state, view.reason.code) == (JobState.QUEUED, ReasonCode.BACKING_OFF)
    assert view.reason.sentence.startswith("1 attempt so far, saved at step 7; ")


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED])
def test_what_its_run_told_of_its_end_counts(state: JobState) -> None:
    for row in (None, a_row("COMPLETED"), a_row("FAILED"), a_row("COMPLETING"), a_row("CANCELLED")):
        assert seen(a_status(state), row).state == state


@pytest.mark.parametrize(
    ("row", "cancelled", "status", "state"),
    [
        (a_row("CANCELLED"), False, None, JobState.CANCELLED),
        (a_row("CANCELLED"), False, a_status(JobState.PAUSED), JobState.CANCELLED),
        (None, True, None, JobState.CANCELLED),
        (None, True, a_status(JobState.PAUSED), JobState.CANCELLED),
        (None, False, a_status(JobState.PAUSED, told_to_end=True), JobState.CANCELLED),
        (None, False, a_status(JobState.RUNNING), JobState.FAILED),
        (None, False, None, JobState.FAILED),
        (a_row("TIMEOUT"), False, a_status(JobState.RUNNING), JobState.FAILED),
        (a_row("NODE_FAIL"), False, a_status(JobState.RUNNING), JobState.FAILED),
        (a_row("FAILED"), False, None, JobState.FAILED),
        (a_row("COMPLETED"), False, a_status(JobState.RUNNING), JobState.FAILED),
    ],
)
def test_an_end_of_which_its_runs_have_not_told(
    row: Queued | None, cancelled: bool, status: Status | None, state: JobState
) -> None:
    view = seen(status, row, cancelled)
    assert view.state == state
    assert view.reason.sentence
    assert view.reason.remedy or state == JobState.CANCELLED


def test_a_run_that_could_not_be_requeued_says_why() -> None:
    why = Reason(code=ReasonCode.HELD, sentence="could not be requeued", remedy="`scontrol requeue 12` lets it go on")
    view = seen(a_status(JobState.PAUSED, reason=why), a_row("FAILED"))
    assert (view.state, view.reason) == (JobState.FAILED, why)


def test_every_end_of_slurms_is_explained() -> None:
    for state in ("TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "FAILED", "REVOKED"):
        assert how_ended(a_row(state))[0] == JobState.FAILED


def test_commands_name_it_as_it_is_known_here() -> None:
    error = {"code": "x", "message": "m", "hint": "the whole log: tuneyard logs sms-x1 --rank 0 (/r/jobs/sms-x1/log)"}
    view = seen(a_status(JobState.FAILED, error=error), None)
    assert view.error is not None
    assert view.error["hint"] == "the whole log: tuneyard logs slurm:12 --rank 0 (/r/jobs/sms-x1/log)"


def test_elements_of_an_array() -> None:
    views = [view_of(ARRAY, index, None, a_row(job=f"12_{index}"), False, NOW) for index in range(2)]
    assert [(view.id, view.name, view.array_id) for view in views] == [
        ("slurm:12_0", "s-0", "slurm:12"), ("slurm:12_1", "s-1", "slurm:12"),
    ]  # fmt: skip
