"""Who starts, who is stopped to make room, and why the others wait: decisions as actions. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from launch.contract import Device, StopRequest
from orchestrator.control.actions import Action, Explain, MoveJob, Note, SendStop, StartAttempt
from orchestrator.control.board import Board
from orchestrator.control.facts import Facts, Policy, State
from orchestrator.control.fitting import device_kind
from orchestrator.control.stops import PREEMPT, STOP_OF, paused, told_to_stop
from orchestrator.job.lifecycle import JobState, Reason, ReasonCode
from orchestrator.memory.alike import key_of, remembered
from orchestrator.memory.ladder import eased
from orchestrator.memory.plan import plan
from orchestrator.schedule import explain
from orchestrator.schedule.decide import decide
from orchestrator.schedule.gang import Start, Stop
from orchestrator.schedule.yard import Yard
from orchestrator.store.rows import AttemptRow, JobRow

MAX_EXPLAIN = 500
"""Reasons that are written in one tick: a queue of thousands is explained over some of them."""
_TRACING = Reason(
    code=ReasonCode.TRACING,
    sentence="its memory is being traced, since it needs most of what there is",
    remedy="starts when that is done, in a minute at most; nothing to do",
)


def dispatch(
    state: State,
    facts: Facts,
    now: float,
    policy: Policy,
    board: Board,
) -> Iterator[Action]:
    """Start what fits, stop what is to make room, and say of all else why it waits.

    `state` has what was done about attempts in this very tick: those that have ended are not in it.
    """
    jobs = {job.id: job for job in state.jobs}
    busy = {attempt.job_id: attempt for attempt in state.attempts}
    waiting: list[JobRow] = []
    for job in state.jobs:
        if job.id in busy or job.state not in (JobState.QUEUED, JobState.PAUSED):
            continue
        action = _unfit_to_wait(job, jobs, state, facts, now)
        if action is not None:
            yield action
        elif not _held_up(job, jobs, facts, now):
            waiting.append(job)
    decisions = decide(_yard(state, facts, waiting, board, now), now)
    for stop in decisions.stops:
        yield _stop(busy[stop.job_id], stop, now, policy)
    starting = {start.job_id for start in decisions.starts}
    for start in decisions.starts:
        yield _start(jobs[start.job_id], start, state, facts)
    reasons = {wait.job_id: wait.reason for wait in decisions.waits}
    left = MAX_EXPLAIN
    for job in waiting:
        if job.id not in starting and left:
            reason = facts.coming.get(job.id) or reasons.get(job.id, explain.behind())
            if reason != job.reason:
                left -= 1
                yield Explain(job.id, reason)


def yard_of(state: State, facts: Facts, now: float, board: Board) -> Yard:
    """The scheduler's picture, for who wants to know what it would do."""
    jobs = {job.id: job for job in state.jobs}
    busy = {attempt.job_id for attempt in state.attempts}
    waiting = [
        job
        for job in state.jobs
        if job.id not in busy
        and job.state == JobState.QUEUED
        and _unfit_to_wait(job, jobs, state, facts, now) is None
        and _held_up(job, jobs, facts, now) is None
    ]
    return _yard(state, facts, waiting, board, now)


def _yard(state: State, facts: Facts, waiting: Sequence[JobRow], board: Board, now: float) -> Yard:
    jobs = {job.id: job for job in state.jobs}
    return board.sync(
        waiting,
        [(jobs[attempt.job_id], attempt) for attempt in state.attempts],
        facts.nodes,
        marks=state.marks,
        queues=state.queues,
        factors=state.factors,
        now=now,
    )


def _unfit_to_wait(job: JobRow, jobs: Mapping[str, JobRow], state: State, facts: Facts, now: float) -> Action | None:
    """What happens to a job without an attempt that does not wait for one; None if it does, or is held up."""
    if job.cancel_requested:
        when = "before it started" if job.attempts == 0 else f"while it was {job.state}"
        return MoveJob(job.id, JobState.CANCELLED, Reason(code=ReasonCode.CANCELLED, sentence=f"cancelled {when}"))
    if job.state == JobState.PAUSED:
        if job.pause_requested:
            return None
        return MoveJob(job.id, JobState.QUEUED, Reason(code=ReasonCode.RESUMED, sentence="resumed by its user"))
    if job.pause_requested:
        return MoveJob(job.id, JobState.PAUSED, paused(job))
    if over_time(job, None, now):
        sentence = f"max_duration ({job.job.max_duration:.0f} s) passed before it could be started again"
        return MoveJob(job.id, JobState.FAILED, Reason(code=ReasonCode.MAX_DURATION, sentence=sentence))
    for other in job.job.after:
        if state.ended.get(other) in (JobState.FAILED, JobState.CANCELLED):
            reason = Reason(
                code=ReasonCode.AFTER,
                sentence=f"{other}, which it comes after, has {state.ended[other]}",
                remedy=f"submit {other} again, then this job with `after` naming the new one",
            )
            return MoveJob(job.id, JobState.FAILED, reason)
    held_up = _held_up(job, jobs, facts, now)
    return Explain(job.id, held_up) if held_up is not None and held_up != job.reason else None


def _held_up(job: JobRow, jobs: Mapping[str, JobRow], facts: Facts, now: float) -> Reason | None:
    """Why a job does not stand in the queue; None if it does."""
    if job.state == JobState.PAUSED:
        return job.reason
    if (pending := next((other for other in job.job.after if other in jobs), None)) is not None:
        return Reason(
            code=ReasonCode.AFTER,
            sentence=f"comes after {pending}, which is {jobs[pending].state}",
            remedy=f"starts once {pending} has succeeded",
        )
    if job.id in facts.tracing:
        return _TRACING
    return job.reason if job.not_before is not None and now < job.not_before else None


def _stop(attempt: AttemptRow, stop: Stop, now: float, policy: Policy) -> SendStop:
    what = STOP_OF.get(stop.why, PREEMPT)
    request = StopRequest(reason=what, deadline=now + policy.pause_grace)
    reason = told_to_stop(what, stop.for_job, stop.target)
    note = Note("told-to-stop", {"why": stop.why, "for": stop.for_job, "target": stop.target})
    return SendStop(attempt.job_id, attempt.number, request, reason, stop.for_job, stop.target, (note,))


def _start(job: JobRow, start: Start, state: State, facts: Facts) -> StartAttempt:
    """The next attempt, planned for its placement, or as it is pinned to be."""
    number, placement = job.attempts + 1, start.placement
    pinned = job.origin.pinned if job.origin is not None else None
    if pinned is not None:
        # A rank whose number is another one sets it itself.
        shares = tuple(share.model_copy(update={"threads": pinned.threads[0]}) for share in placement.shares)
        return StartAttempt(job.id, number, placement.model_copy(update={"shares": shares}), pinned.plan)
    device = cast(Device, placement.device)
    option = start.option
    if option is not None:
        chosen = option.plan
    else:
        bf16 = placement.multiplies_bf16(facts.nodes)
        chosen = plan(job.job, placement.world_size, device, job.relief, bf16=bf16)
    predicted = option.predicted if option is not None else None
    if number == 1:
        key = key_of(job.job) if state.peaks else None
        alike = [row for row in state.peaks if row.key == key]
        found = remembered(alike, job.job, chosen, device_kind(facts.nodes, placement)) if alike else None
        if found is not None:
            chosen = eased(job.job, chosen, found.relief)
            note = Note("remembered", {"sentence": found.sentence})
            return StartAttempt(job.id, number, placement, chosen, found.relief, (note,))
    return StartAttempt(job.id, number, placement, chosen, predicted=predicted if job.relief is None else None)


def over_time(job: JobRow, attempt: AttemptRow | None, now: float) -> bool:
    """Whether a job's attempts, with the one that lives, took longer than it may."""
    limit = job.job.max_duration
    return limit is not None and job.ran_s + (now - attempt.created_at if attempt is not None else 0.0) > limit
