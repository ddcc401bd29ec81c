"""A job as Kubernetes and its own runs tell of it, put together. Pure."""

from __future__ import annotations

from typing import Any

from orchestrator.job.lifecycle import JobState, Reason, ReasonCode
from orchestrator.outside.k8s.reasons import Seen, told_by
from orchestrator.outside.k8s.record import CANCELLED, Handed
from orchestrator.outside.record import Status, known_as, so_far
from orchestrator.views import JobView


def view_of(handed: Handed, status: Status | None, seen: Seen | None) -> JobView:
    """What was handed over; `status` None where no run has told or the volume is not in sight, `seen` None where the
    API server does not have it (any more)."""
    view = status.job if status is not None else _fresh(handed)
    state, reason = _state(handed, view, status, seen)
    array_id = f"k8s:{handed.namespace}/{handed.array}" if handed.array is not None else None
    update: dict[str, Any] = {"id": handed.id, "array_id": array_id, "submitted_at": handed.submitted_at}
    if not state.final:
        update |= {"finished_at": None}
    elif view.finished_at is None and status is not None and status.events:
        update |= {"finished_at": status.events[-1].time}
    reason = reason.model_copy(
        update={
            "remedy": known_as((reason.remedy or "").replace(" ID ", f" {handed.id} "), handed.name, handed.id) or None
        }
    )
    error = view.error if state == JobState.FAILED or view.state == state else None
    if error is not None:
        error = error | {"hint": known_as(error.get("hint"), handed.name, handed.id)}
    return view.model_copy(update=update | {"state": state, "reason": reason, "error": error})


def _fresh(handed: Handed) -> JobView:
    return JobView(
        id=handed.id,
        name=handed.job_name,
        queue=handed.queue,
        priority=handed.priority,
        state=JobState.QUEUED,
        reason=Reason(code=ReasonCode.SUBMITTED, sentence="handed over to Kubernetes"),
        attempts=0,
        submitted_at=handed.submitted_at,
    )


def _state(handed: Handed, view: JobView, status: Status | None, seen: Seen | None) -> tuple[JobState, Reason]:
    if view.state.final:
        return view.state, view.reason
    if seen is None:
        return _gone(handed, view)
    if CANCELLED in (seen.rayjob["metadata"].get("annotations") or {}):
        state, reason = told_by(seen)
        if state.final:
            return state, reason
        return JobState.STOPPING, Reason(code=ReasonCode.CANCELLED, sentence="cancelled: its pods save and end")
    state, reason = told_by(seen)
    if state == JobState.RUNNING:
        return _running(view, status, reason)
    if view.attempts and state != JobState.SUCCEEDED:
        reason = reason.model_copy(update={"sentence": f"{so_far(view)}; {reason.sentence}"})
    return state, reason


def _running(view: JobView, status: Status | None, reason: Reason) -> tuple[JobState, Reason]:
    """By its run's own word, unless that is of the run before."""
    if status is None:
        return JobState.RUNNING, reason
    if status.told_to_end or view.state == JobState.PAUSED:
        sentence = f"{so_far(view)}; its next run begins" if view.attempts else "its next run begins"
        return JobState.STARTING, Reason(code=ReasonCode.STARTING, sentence=sentence)
    return view.state, view.reason


def _gone(handed: Handed, view: JobView) -> tuple[JobState, Reason]:
    if handed.ended is not None:
        last = JobView.model_validate_json(handed.ended)
        return last.state, last.reason
    if handed.cancelled:
        return JobState.CANCELLED, Reason(code=ReasonCode.CANCELLED, sentence="cancelled by its user")
    again = f"submit it again; {so_far(view)}" if view.attempts else "submit it again"
    if not handed.created:
        sentence = "its submit was cut off before Kubernetes had it"
        return JobState.FAILED, Reason(code=ReasonCode.FAILED, sentence=sentence, remedy="submit it again")
    sentence = "its RayJob was deleted, not by `tuneyard cancel`, and it has left no word of its end"
    return JobState.FAILED, Reason(code=ReasonCode.FAILED, sentence=sentence, remedy=again)
