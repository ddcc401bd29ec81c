"""Planned stops, which save first and after which the job goes on, and the words for them. Pure."""

from __future__ import annotations

from orchestrator.job.lifecycle import Reason, ReasonCode
from orchestrator.schedule import explain
from orchestrator.schedule.gang import Why
from orchestrator.store.rows import AttemptRow, JobRow

# StopRequest.reason of planned stops, which save first, and after which the job goes on.
PAUSE, PREEMPT, RESIZE, DRAIN = "paused", "preempted", "resized", "drained"
PLANNED = frozenset({PAUSE, PREEMPT, RESIZE, DRAIN})
STOP_OF = {Why.SHRINK: RESIZE, Why.GROW: RESIZE, Why.DRAINED: DRAIN}


def planned(attempt: AttemptRow) -> bool:
    """Whether the stop that the attempt was sent is one after which its job goes on."""
    return attempt.stop is not None and attempt.stop.reason in PLANNED


PAUSING = Reason(code=ReasonCode.PAUSE_REQUESTED, sentence="pausing: its ranks save at their next step, and end")


def stopping(job: JobRow, attempt: AttemptRow) -> Reason:
    """Why a job whose ranks were sent a planned stop is stopping."""
    if job.pause_requested:
        return PAUSING
    assert attempt.stop is not None
    if attempt.stop.reason == PAUSE:
        return Reason(
            code=ReasonCode.RESUMED,
            sentence="resumed while it was being paused: its ranks save and end, then it goes back to the queue",
        )
    return told_to_stop(attempt.stop.reason, attempt.preempted_by, attempt.target)


def told_to_stop(what: str, for_job: str | None, target: int | None) -> Reason:
    """Why the scheduler stops a running job."""
    if what == RESIZE:
        return Reason(
            code=ReasonCode.RESIZED,
            sentence=f"its ranks save and end, to go on with {explain.count(target or 1)}"
            + (f": {for_job} needs room" if for_job is not None else ", since there is room"),
            remedy="goes on at once from the checkpoint; nothing to do",
        )
    if what == DRAIN:
        return Reason(
            code=ReasonCode.NODE_DRAINED,
            sentence="its node is drained: its ranks save and end, then it goes back to the queue",
            remedy="goes on elsewhere from the checkpoint; nothing to do",
        )
    return Reason(
        code=ReasonCode.PREEMPTED,
        sentence=f"makes room for {for_job}: its ranks save and end, then it goes back to the queue",
        remedy=f"goes on from the checkpoint when there is room; `tuneyard why {for_job}` tells why that one is first",
    )


def stopped(attempt: AttemptRow) -> Reason:
    """Why a job is in the queue whose attempt has saved and ended."""
    what = attempt.stop.reason if attempt.stop is not None else None
    if what == RESIZE:
        sentence = f"saved, to go on with {explain.count(attempt.target or 1)}"
        return Reason(code=ReasonCode.RESIZED, sentence=sentence, remedy="goes on at once; nothing to do")
    if what == DRAIN:
        return Reason(code=ReasonCode.NODE_DRAINED, sentence="saved: its node is drained", remedy="goes on elsewhere")
    if what == PREEMPT:
        sentence = f"saved, and made room for {attempt.preempted_by}"
        return Reason(code=ReasonCode.PREEMPTED, sentence=sentence, remedy="goes on when there is room")
    who = "resumed while it was being paused" if what == PAUSE else "its node was asked to stop"
    return Reason(code=ReasonCode.BACKING_OFF, sentence=f"{who}; the job goes back to the queue")


def paused(job: JobRow, error: str | None = None) -> Reason:
    """Why a job is paused; `error` is how its last attempt ended otherwise than by stopping."""
    sentence = "paused by its user"
    if error is not None:
        sentence += f", and ended badly meanwhile: {error}"
    if job.checkpoint is not None:
        sentence += f"; its last checkpoint is of step {job.checkpoint.step}"
    return Reason(code=ReasonCode.PAUSED, sentence=sentence, remedy=f"tuneyard resume {job.id}")
