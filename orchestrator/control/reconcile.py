"""From what is stored and what is seen of attempts to what should be done. Pure: the clock is an argument."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from launch.attempt import CANCELLED, HUNG
from launch.checkpoint.manifest import CheckpointId
from launch.contract import ExitCode, StopRequest
from orchestrator.cluster.status import AttemptStatus
from orchestrator.control.actions import (
    Action,
    EndAttempt,
    Explain,
    MarkLost,
    MarkRunning,
    Note,
    NoteCheckpoints,
    NoteProgress,
    SendStop,
    SendStopAgain,
    StartAgain,
)
from orchestrator.control.dispatch import over_time
from orchestrator.control.facts import Facts, Policy, State
from orchestrator.control.fitting import after_out_of_memory, device_kind, peak_of
from orchestrator.control.hangs import STACKS_S, cause, hanging, judged, slow_rank
from orchestrator.control.result import job_error, job_result, last_spent, metrics_sentence
from orchestrator.control.stops import PAUSE, PAUSING, paused, planned, stopped, stopping
from orchestrator.job.lifecycle import AttemptState, JobState, Reason, ReasonCode
from orchestrator.recover.classify import Outcome, Treatment, Verdict, back_off, judge, restarts_left, treatment_of
from orchestrator.store.rows import AttemptRow, JobRow

PROGRESS_S = 1.0  # at most one stored sign of life an attempt in so long
START_AGAIN_S = 5.0
START_TIMEOUT_S = 60.0
SILENCE_S = 3.0  # a node that has not answered for so long is lost
UNTOLD_S = SILENCE_S / 2  # so old is the stored sign of life of one that answers, at most
LEAVING_S = 2.0  # a rank that nobody sees has said how it ended before its process is gone
ECHO_S = 5.0  # time the other nodes have to end once one has failed


def reconcile(state: State, facts: Facts, now: float, policy: Policy) -> list[Action]:
    """What living attempts need, so that the stored state and the world come together: in the order to carry it out,
    which is that of submission. What starts next is decided when this is stored: see dispatch."""
    jobs = {job.id: job for job in state.jobs}
    actions: list[Action] = []
    for attempt in sorted(state.attempts, key=lambda attempt: jobs[attempt.job_id].sequence):
        status = facts.statuses.get(attempt.run.run_id)
        if status:
            actions += _attempt(jobs[attempt.job_id], attempt, status, facts, now, policy)
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
    patient = attempt.stop is None or planned(attempt)  # nothing is on its way that would end it soon
    if patient and job.cancel_requested:
        reason = Reason(code=ReasonCode.CANCEL_REQUESTED, sentence="cancelling: ranks end at their next step boundary")
        yield SendStop(*key, StopRequest(reason=CANCELLED, deadline=now + policy.stop_grace), reason)
    elif patient and _has_failed_in_part(status):
        # Agents end their own node's ranks; the other nodes' ranks only hang in a collective until they are told.
        reason = Reason(code=ReasonCode.FAILED, sentence="a rank failed; the rest of the gang is being ended")
        yield SendStop(*key, StopRequest(reason="a rank failed", deadline=now + ECHO_S), reason)
    elif patient and (stall := cause(status.stalls)) is not None:
        request, reason = StopRequest(reason=HUNG, deadline=now + STACKS_S), hanging(stall, attempt.run)
        note = Note("hung", {"rank": stall.rank, "sentence": reason.sentence})
        yield SendStop(*key, request, reason, notes=(note,))
    elif attempt.stop is not None:
        yield SendStopAgain(*key, attempt.stop)
        if planned(attempt) and attempt.state == AttemptState.STOPPING and job.reason != stopping(job, attempt):
            yield Explain(job.id, stopping(job, attempt))
    elif job.pause_requested:
        yield SendStop(*key, StopRequest(reason=PAUSE, deadline=now + policy.pause_grace), PAUSING)
    elif over_time(job, attempt, now):
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
    if (changed and now - attempt.last_contact >= PROGRESS_S) or now - attempt.last_contact >= UNTOLD_S:
        spent = status.spent if status.spent != attempt.spent else None
        notes = slow_rank(attempt, progress)
        yield NoteProgress(*key, progress if changed else None, status.offset, spent, notes)


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
        # Its agent may have been heard since the last contact that is stored.
        if silence > UNTOLD_S + attempt.run.leash_s + policy.leash_margin and not status.news:
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
    spent = last_spent(verdict, status, attempt.spent)
    energy = status.energy if status is not None else None
    end = _goes_on(job, attempt, verdict, status, now)
    goes_on = progressed(job, attempt) and not end.job_state.final  # of one that is over, all failures are told
    return replace(end, peak=peak, spent=spent, energy=energy, progressed=goes_on)


def _goes_on(
    job: JobRow, attempt: AttemptRow, verdict: Verdict, status: AttemptStatus | None, now: float
) -> EndAttempt:
    """How the job goes on after an attempt of which nothing lives."""
    exits = status.exits if status else []
    verdict = judged(attempt, verdict, status)
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
            return EndAttempt(*key, outcome, JobState.PAUSED, paused(job))
        target = attempt.target if planned(attempt) else None
        return EndAttempt(*key, outcome, JobState.QUEUED, stopped(attempt), not_before=now, target=target)
    error = job_error(verdict, attempt.run)
    if outcome == Outcome.OUT_OF_MEMORY and verdict.first is not None:
        end = after_out_of_memory(job, attempt, verdict.first, error, status, now)
        if end.job_state == JobState.QUEUED and job.pause_requested:
            return replace(end, job_state=JobState.PAUSED, reason=paused(job, end.reason.sentence))
        return end
    treatment, retry = treatment_of(verdict, job.job.retry.rules), job.job.retry
    if job.pause_requested and treatment.again:
        # Nobody asked for another start, so none is used up, and it is not too late for one.
        return EndAttempt(*key, outcome, JobState.PAUSED, paused(job, error["message"]), error=error)
    counts = not planned(attempt)
    failed_by = Counter({} if progressed(job, attempt) else job.failed_by or {})
    failed_by[outcome] += counts
    left = restarts_left(outcome, failed_by, retry.max_restarts, retry.restarts)
    if treatment.again and left >= 0:
        wait, avoid = back_off(failed_by.total(), treatment), failed_on(attempt, verdict, treatment)
        if status is None or not status.seen:
            wait = max(wait, LEAVING_S)
        when = f"in {wait:.0f} s" if wait else "at once"
        where = ", on other nodes if they will do" if avoid else ""
        reason = Reason(
            code=ReasonCode.BACKING_OFF,
            sentence=f"attempt {attempt.number} ended: {error['message']}; the next starts {when}{where}",
            remedy=f"restarts left: {left + counts}",
        )
        suspects = avoid if treatment.suspect else ()
        end = EndAttempt(*key, outcome, JobState.QUEUED, reason, failed=counts, not_before=now + wait, error=error)
        return replace(end, avoid=avoid, suspects=suspects)
    reason = Reason(code=ReasonCode.FAILED, sentence=error["message"], remedy=error.get("hint"))
    return EndAttempt(*key, outcome, JobState.FAILED, reason, failed=counts, error=error)


def progressed(job: JobRow, attempt: AttemptRow) -> bool:
    """Whether the job's newest checkpoint is of this attempt: a job that gets on may fail as often as it likes."""
    saved = CheckpointId.parse(job.checkpoint.id) if job.checkpoint is not None else None
    return saved is not None and saved.attempt == attempt.number


def failed_on(attempt: AttemptRow, verdict: Verdict, treatment: Treatment) -> tuple[str, ...]:
    """The node that the next attempt is to keep away from, if the cause may lie in it, or it is lost."""
    if verdict.first is None or not treatment.elsewhere or planned(attempt):
        return ()
    nodes = attempt.run.nodes
    return tuple(nodes[index].node for index in range(len(nodes)) if verdict.first.rank in attempt.run.ranks_of(index))
