"""From what is stored and what is seen to what should be done. Pure: the clock is an argument."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from launch.contract import Device, ExitCode, StopRequest
from orchestrator.cluster.model import Node, Snapshot
from orchestrator.cluster.status import AttemptStatus
from orchestrator.control.actions import (
    Action,
    EndAttempt,
    Explain,
    MarkLost,
    MarkRunning,
    MoveJob,
    Note,
    NoteCheckpoints,
    NoteProgress,
    SendStop,
    SendStopAgain,
    StartAgain,
    StartAttempt,
)
from orchestrator.control.fitting import after_out_of_memory, device_kind, peak_of
from orchestrator.control.result import job_error, job_result, metrics_sentence
from orchestrator.control.wishes import waiting_row
from orchestrator.job.lifecycle import AttemptState, JobState, Reason, ReasonCode
from orchestrator.memory.alike import Peak, key_of, remembered
from orchestrator.memory.ladder import eased
from orchestrator.memory.options import Factors, kinds_of
from orchestrator.memory.plan import plan
from orchestrator.recover.classify import RETRIED, Outcome, Verdict, back_off, judge, may_retry
from orchestrator.schedule.decide import Start, Waiting, decide
from orchestrator.store.rows import AttemptRow, JobRow

PROGRESS_S = 1.0  # at most one stored sign of life an attempt in so long
START_AGAIN_S = 5.0
START_TIMEOUT_S = 60.0
SILENCE_S = 3.0  # a node that has not answered for so long is lost
ECHO_S = 5.0  # time the other nodes have to end once one has failed
_TRACING = Reason(
    code=ReasonCode.TRACING,
    sentence="its memory is being traced, since it needs most of what there is",
    remedy="starts when that is done, in a minute at most; nothing to do",
)
PAUSE = "paused"  # StopRequest.reason of a planned stop, which saves first


@dataclass(frozen=True)
class Policy:
    """How patient to be, in seconds."""

    leash: float = 30.0
    leash_margin: float = 5.0
    stop_grace: float = 60.0
    pause_grace: float = 600.0


@dataclass(frozen=True)
class State:
    """What the database holds of the living."""

    jobs: Sequence[JobRow]
    attempts: Sequence[AttemptRow]
    peaks: Sequence[Peak] = ()
    """Of jobs like those that have not started yet."""
    factors: Factors = ()
    """What attempts have taught of memory: by what to multiply margins."""


@dataclass(frozen=True)
class Facts:
    """What was seen."""

    nodes: Sequence[Node]
    statuses: Mapping[str, AttemptStatus] = field(default_factory=dict)
    """By run id."""
    tracing: frozenset[str] = frozenset()
    """Jobs whose memory is being traced, which they wait for."""


def reconcile(state: State, facts: Facts, now: float, policy: Policy) -> list[Action]:
    """The actions that bring the stored state and the world together, in the order to carry them out."""
    jobs = {job.id: job for job in state.jobs}
    actions: list[Action] = []
    holding = []
    for attempt in state.attempts:
        status = facts.statuses.get(attempt.run.run_id)
        decided = list(_attempt(jobs[attempt.job_id], attempt, status, facts, now, policy)) if status else []
        actions += decided
        if not any(isinstance(action, EndAttempt) for action in decided):
            holding.append(attempt)
    actions += _queue(state, facts, holding, now)
    return actions


def _attempt(
    job: JobRow, attempt: AttemptRow, status: AttemptStatus, facts: Facts, now: float, policy: Policy
) -> Iterator[Action]:
    """What one living attempt needs."""
    key = (attempt.job_id, attempt.number)
    if status.news:
        yield NoteCheckpoints(*key, status.news, status.offset)
    if status.ended:
        if not status.news:  # else there may be more of it; nothing is missed by ending at the next look
            yield _end(job, attempt, judge(status.exits, attempt.plan.world_size), status, facts, now)
        return
    # Before any stop: a stopping attempt cannot become a running one, and both may be due in one tick.
    found = attempt.state == AttemptState.LOST and attempt.stop is None
    if status.reachable and status.begun and (found or attempt.state == AttemptState.STARTING):
        yield MarkRunning(*key)
    patient = attempt.stop is None or _pauses(attempt)  # nothing is on its way that would end it soon
    if patient and job.cancel_requested:
        reason = Reason(code=ReasonCode.CANCEL_REQUESTED, sentence="cancelling: ranks end at their next step boundary")
        yield SendStop(*key, StopRequest(reason="cancelled", deadline=now + policy.stop_grace), reason)
    elif patient and _has_failed_in_part(status):
        # Agents end their own node's ranks; the other nodes' ranks only hang in a collective until they are told.
        reason = Reason(code=ReasonCode.FAILED, sentence="a rank failed; the rest of the gang is being ended")
        yield SendStop(*key, StopRequest(reason="a rank failed", deadline=now + ECHO_S), reason)
    elif attempt.stop is not None:
        yield SendStopAgain(*key, attempt.stop)
        if _pauses(attempt) and attempt.state == AttemptState.STOPPING and job.reason != _pausing(job):
            yield Explain(job.id, _pausing(job))
    elif job.pause_requested:
        yield SendStop(*key, StopRequest(reason=PAUSE, deadline=now + policy.pause_grace), _pausing(job))
    elif _over_time(job, attempt, now):
        sentence = f"has run for longer than max_duration ({job.job.max_duration:.0f} s)"
        reason = Reason(code=ReasonCode.MAX_DURATION, sentence=sentence, remedy="raise max_duration, or do fewer steps")
        yield SendStop(*key, StopRequest(reason="max-duration", deadline=now + policy.stop_grace), reason)

    if not status.reachable:
        yield from _silent(job, attempt, status, facts, now, policy)
        return
    age = now - attempt.created_at
    if not status.claimed and age > START_TIMEOUT_S:
        # Whatever state it is in: nothing was ever started, and nothing is left to wait for.
        yield _end(job, attempt, Verdict(Outcome.NODE_LOST, None), status, facts, now)
        return
    if not status.claimed_everywhere and attempt.stop is None and age > START_AGAIN_S:
        yield StartAgain(*key)
    progress = status.progress
    changed = progress is not None and progress != attempt.progress
    if (changed and now - attempt.last_contact >= PROGRESS_S) or now - attempt.last_contact >= SILENCE_S / 2:
        yield NoteProgress(*key, progress if changed else None, status.offset)


def _has_failed_in_part(status: AttemptStatus) -> bool:
    failed = any(end.code not in (ExitCode.DONE, ExitCode.STOPPED) for end in status.exits)
    return failed and len(status.reports) > 1


def _silent(
    job: JobRow, attempt: AttemptRow, status: AttemptStatus, facts: Facts, now: float, policy: Policy
) -> Iterator[Action]:
    """A node of the attempt does not answer: its ranks may live on, until their leash has surely ended them."""
    silence = now - attempt.last_contact
    alive = {node.id for node in facts.nodes}
    gone = [share.node for share in attempt.run.nodes if share.node not in alive]
    if attempt.state == AttemptState.LOST:
        if silence > attempt.run.leash_s + policy.leash_margin and not status.news:
            yield _end(job, attempt, Verdict(Outcome.NODE_LOST, None), None, facts, now)
    elif gone or silence > SILENCE_S:
        wait = attempt.run.leash_s + policy.leash_margin
        who = f"node {gone[0]} is gone" if gone else "a node does not answer"
        reason = Reason(
            code=ReasonCode.OLD_ATTEMPT_ENDING,
            sentence=f"{who}; attempt {attempt.number}'s ranks end themselves within {wait:.0f} s of silence",
            remedy="a new attempt starts when they have surely ended; nothing to do",
        )
        yield MarkLost(attempt.job_id, attempt.number, reason)


def _end(
    job: JobRow, attempt: AttemptRow, verdict: Verdict, status: AttemptStatus | None, facts: Facts, now: float
) -> EndAttempt:
    """The end of an attempt of which nothing lives, and what is remembered of it."""
    exits = status.exits if status else []
    peak = peak_of(job, attempt, verdict, exits, device_kind(facts.nodes, attempt.held), now)
    return replace(_goes_on(job, attempt, verdict, status, now), peak=peak)


def _goes_on(
    job: JobRow, attempt: AttemptRow, verdict: Verdict, status: AttemptStatus | None, now: float
) -> EndAttempt:
    """How the job goes on after an attempt of which nothing lives."""
    exits = status.exits if status else []
    outcome = verdict.outcome
    key = (attempt.job_id, attempt.number)
    if outcome == Outcome.SUCCEEDED:
        reason = Reason(code=ReasonCode.DONE, sentence=metrics_sentence(exits))
        return EndAttempt(*key, outcome, JobState.SUCCEEDED, reason, result=job_result(attempt.run, exits))
    if job.cancel_requested:
        return EndAttempt(
            *key, outcome, JobState.CANCELLED, Reason(code=ReasonCode.CANCELLED, sentence="cancelled by its user")
        )
    if attempt.stop is not None and attempt.stop.reason == "max-duration":
        error = {"code": "max-duration", "message": job.reason.sentence, "hint": job.reason.remedy}
        return EndAttempt(*key, outcome, JobState.FAILED, job.reason, error=error)
    if outcome == Outcome.STOPPED:
        if job.pause_requested:
            return EndAttempt(*key, outcome, JobState.PAUSED, _paused(job))
        who = "resumed while it was being paused" if _pauses(attempt) else "its node was asked to stop"
        reason = Reason(code=ReasonCode.BACKING_OFF, sentence=f"{who}; the job goes back to the queue")
        return EndAttempt(*key, outcome, JobState.QUEUED, reason, not_before=now)
    error = job_error(verdict, attempt.run)
    if outcome == Outcome.OUT_OF_MEMORY and verdict.first is not None:
        end = after_out_of_memory(job, attempt, verdict.first, error, status, now)
        if end.job_state == JobState.QUEUED and job.pause_requested:
            return replace(end, job_state=JobState.PAUSED, reason=_paused(job, end.reason.sentence))
        return end
    if job.pause_requested and RETRIED[outcome]:
        # Nobody asked for another start, so none is used up, and it is not too late for one.
        return EndAttempt(*key, outcome, JobState.PAUSED, _paused(job, error["message"]), error=error)
    counts = not _pauses(attempt)
    failures = job.failures + counts
    if may_retry(outcome, failures, job.job.retry.max_restarts):
        wait = back_off(failures)
        reason = Reason(
            code=ReasonCode.BACKING_OFF,
            sentence=f"attempt {attempt.number} ended: {error['message']}; the next starts in {wait:.0f} s",
            remedy=f"restarts left: {job.job.retry.max_restarts - failures + 1}",
        )
        return EndAttempt(*key, outcome, JobState.QUEUED, reason, failed=counts, not_before=now + wait, error=error)
    reason = Reason(code=ReasonCode.FAILED, sentence=error["message"], remedy=error.get("hint"))
    return EndAttempt(*key, outcome, JobState.FAILED, reason, failed=counts, error=error)


def _pauses(attempt: AttemptRow) -> bool:
    """Whether the stop that the attempt was sent is a planned one."""
    return attempt.stop is not None and attempt.stop.reason == PAUSE


def _pausing(job: JobRow) -> Reason:
    """Why a job whose ranks were sent a planned stop is stopping."""
    if job.pause_requested:
        return Reason(code=ReasonCode.PAUSE_REQUESTED, sentence="pausing: its ranks save at their next step, and end")
    return Reason(
        code=ReasonCode.RESUMED,
        sentence="resumed while it was being paused: its ranks save and end, then it goes back to the queue",
    )


def _paused(job: JobRow, error: str | None = None) -> Reason:
    """Why a job is paused; `error` is how its last attempt ended otherwise than by stopping."""
    sentence = "paused by its user"
    if error is not None:
        sentence += f", and ended badly meanwhile: {error}"
    if job.checkpoint is not None:
        sentence += f"; its last checkpoint is of step {job.checkpoint.step}"
    return Reason(code=ReasonCode.PAUSED, sentence=sentence, remedy=f"tuneyard resume {job.id}")


def _queue(state: State, facts: Facts, holding: Sequence[AttemptRow], now: float) -> Iterator[Action]:
    """Start what fits, and say of all else why it waits."""
    waiting: list[Waiting] = []
    queued = {job.id: job for job in state.jobs if job.state == JobState.QUEUED}
    busy = {attempt.job_id for attempt in holding}
    kinds = kinds_of(facts.nodes)
    for job in state.jobs:
        if job.id in busy or job.state not in (JobState.QUEUED, JobState.PAUSED):
            continue
        if job.cancel_requested:
            when = "before it started" if job.attempts == 0 else f"while it was {job.state}"
            reason = Reason(code=ReasonCode.CANCELLED, sentence=f"cancelled {when}")
            yield MoveJob(job.id, JobState.CANCELLED, reason)
        elif job.state == JobState.PAUSED:
            if not job.pause_requested:
                yield MoveJob(job.id, JobState.QUEUED, Reason(code=ReasonCode.RESUMED, sentence="resumed by its user"))
        elif job.pause_requested:
            yield MoveJob(job.id, JobState.PAUSED, _paused(job))
        elif _over_time(job, None, now):
            sentence = f"max_duration ({job.job.max_duration:.0f} s) passed before it could be started again"
            yield MoveJob(job.id, JobState.FAILED, Reason(code=ReasonCode.MAX_DURATION, sentence=sentence))
        elif job.id in facts.tracing:
            if job.reason.code != ReasonCode.TRACING:
                yield Explain(job.id, _TRACING)
        elif job.not_before is None or now >= job.not_before:
            waiting.append(waiting_row(job, kinds, state.factors))
    snapshot = Snapshot.of(facts.nodes, (attempt.held for attempt in holding))
    for decision in decide(snapshot, waiting):
        job = queued[decision.job_id]
        if isinstance(decision, Start):
            yield _start(job, decision, state, facts)
        elif decision.reason != job.reason:
            yield Explain(job.id, decision.reason)


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
    chosen = option.plan if option is not None else plan(job.job, placement.world_size, device, job.relief)
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


def _over_time(job: JobRow, attempt: AttemptRow | None, now: float) -> bool:
    """Whether a job's attempts, with the one that lives, took longer than it may."""
    limit = job.job.max_duration
    return limit is not None and job.ran_s + (now - attempt.created_at if attempt is not None else 0.0) > limit
