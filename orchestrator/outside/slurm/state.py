"""A job as Slurm and its own runs tell of it, put together. Pure."""

from __future__ import annotations

from typing import Any

from orchestrator.job.lifecycle import JobState, Reason, ReasonCode
from orchestrator.outside.record import Status, known_as, so_far
from orchestrator.outside.slurm.commands import Queued
from orchestrator.outside.slurm.reasons import how_ended, why_waiting
from orchestrator.outside.slurm.record import PREFIX, Handed
from orchestrator.views import JobView

WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
LIVE = frozenset({"RUNNING", "CONFIGURING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING", "STOPPED", "SUSPENDED"})


def id_of(handed: Handed, index: int) -> str:
    """How the job is known here."""
    return f"{PREFIX}{handed.id}_{index}" if handed.is_array else f"{PREFIX}{handed.id}"


def view_of(
    handed: Handed, index: int, status: Status | None, row: Queued | None, cancelled: bool, now: float
) -> JobView:
    """Element `index` of what was handed over (0 is the job itself); `row` None where Slurm has forgotten it, and
    `cancelled` whether somebody asked for its end here."""
    job_id = id_of(handed, index)
    view = _told(handed, index, status)
    state, reason = _state(view, status, row, cancelled, now)
    view = view.model_copy(update={"state": state, "reason": reason})
    array_id = f"{PREFIX}{handed.id}" if handed.is_array else None
    update: dict[str, Any] = {"id": job_id, "array_id": array_id, "submitted_at": handed.submitted_at}
    if not state.final:
        update |= {"finished_at": None}
    elif view.finished_at is None and status is not None and status.events:
        update |= {"finished_at": status.events[-1].time}
    own = handed.job_ids[index]
    reason = reason.model_copy(update={"remedy": known_as(reason.remedy, own, job_id)})
    error = view.error if state == JobState.FAILED or view.state == state else None
    if error is not None:
        error = error | {"hint": known_as(error.get("hint"), own, job_id)}
    return view.model_copy(update=update | {"reason": reason, "error": error})


def _told(handed: Handed, index: int, status: Status | None) -> JobView:
    """The job as its last run told of it, or as it was handed over."""
    if status is not None:
        return status.job
    return JobView(
        id=handed.job_ids[index],
        name=handed.names[index],
        queue=handed.queue,
        priority=handed.priority,
        state=JobState.QUEUED,
        reason=Reason(code=ReasonCode.SUBMITTED, sentence="handed over to Slurm"),
        attempts=0,
        submitted_at=handed.submitted_at,
    )


def _state(
    view: JobView, status: Status | None, row: Queued | None, cancelled: bool, now: float
) -> tuple[JobState, Reason]:
    if view.state.final:
        return view.state, view.reason
    if row is not None and row.state in WAITING:
        reason = why_waiting(row, now)
        if view.attempts:
            reason = reason.model_copy(update={"sentence": f"{so_far(view)}; {reason.sentence}"})
        return JobState.QUEUED, reason
    if row is not None and row.state in LIVE:
        return _live(view, status, row)
    if cancelled:
        return JobState.CANCELLED, Reason(code=ReasonCode.CANCELLED, sentence="cancelled by its user")
    if row is not None:
        return _ended(view, row)
    if status is not None and status.told_to_end:
        sentence = "Slurm ended it before it was done, and does not know it any more: it was cancelled"
        return JobState.CANCELLED, Reason(code=ReasonCode.CANCELLED, sentence=sentence)
    return JobState.FAILED, Reason(
        code=ReasonCode.FAILED,
        sentence="Slurm does not know it any more, and it has left no word of its end",
        remedy="submit it again" if status is None else f"submit it again; {so_far(view)}",
    )


def _live(view: JobView, status: Status | None, row: Queued) -> tuple[JobState, Reason]:
    if row.state == "SUSPENDED":
        told = "suspended by Slurm: its processes are stopped where they are"
        return JobState.PAUSED, Reason(code=ReasonCode.PAUSED, sentence=told, remedy="goes on when Slurm lets it")
    if row.state == "COMPLETING":
        told = "its processes are being ended"
        return JobState.STOPPING, Reason(code=ReasonCode.OLD_ATTEMPT_ENDING, sentence=told)
    if status is None or view.state in (JobState.QUEUED, JobState.PAUSED):
        resting = status is not None and view.state == JobState.QUEUED and view.attempts > 0
        told = view.reason.sentence if resting else f"its run begins on {row.where}"
        return JobState.STARTING, Reason(code=ReasonCode.STARTING, sentence=told)
    return view.state, view.reason


def _ended(view: JobView, row: Queued) -> tuple[JobState, Reason]:
    """By what Slurm says, since its runs have not told of an end."""
    state, reason = how_ended(row)
    if state == JobState.FAILED and view.state == JobState.PAUSED and row.state in ("FAILED", "COMPLETED"):
        return state, view.reason  # its run has said why it does not go on
    if view.attempts:
        reason = reason.model_copy(update={"sentence": f"{reason.sentence}; {so_far(view)}"})
    return state, reason
