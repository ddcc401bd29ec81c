"""One tick at a time, with plain objects."""

from __future__ import annotations

import pytest

from launch.attempt import ExitCode
from launch.contract import CheckpointNote, ExecutionPlan, Origin, Pinned, ProgressLine, StopRequest
from orchestrator.cluster.status import AttemptStatus
from orchestrator.control.actions import (
    EndAttempt,
    Explain,
    MarkLost,
    MarkRunning,
    MoveJob,
    NoteCheckpoints,
    NoteProgress,
    SendStop,
    SendStopAgain,
    StartAgain,
    StartAttempt,
)
from orchestrator.control.facts import Facts, State
from orchestrator.control.reconcile import LEAVING_S, UNTOLD_S
from orchestrator.job.lifecycle import AttemptState, JobState, ReasonCode, check_attempt_transition
from orchestrator.recover.classify import Outcome
from tests.builders import a_command_job, an_exit, looked
from tests.ticks import NODE, NOW, OTHER, POLICY, a_report, a_row, actions_for, an_attempt, running


def test_a_queued_job_that_fits_starts_with_the_next_number() -> None:
    (start,) = actions_for(a_row(attempts=2))
    assert isinstance(start, StartAttempt)
    assert start.number == 3
    assert start.plan.world_size == start.placement.world_size == 2


def test_a_queued_job_that_does_not_fit_is_told_why_once() -> None:
    (explain,) = actions_for(a_row(job=a_command_job(9)))
    assert isinstance(explain, Explain)
    assert explain.reason.code == ReasonCode.GANG_TOO_LARGE
    assert actions_for(a_row(job=a_command_job(9), reason=explain.reason)) == []


def test_slots_of_a_live_attempt_are_not_given_away() -> None:
    jobs = [running(), a_row("job-2", sequence=2, job=a_command_job(3))]
    attempt = an_attempt()
    state = State(jobs=jobs, attempts=[attempt])
    facts = Facts(nodes=[NODE], statuses={"job-1.1": AttemptStatus(reports=(a_report(),))})
    assert [type(action) for action in looked(state, facts, NOW, POLICY)] == [Explain]


def test_a_cancelled_job_that_waits_is_finished_at_once() -> None:
    (finish,) = actions_for(a_row(cancel_requested=True))
    assert isinstance(finish, MoveJob)
    assert finish.state == JobState.CANCELLED


def test_backing_off_waits_for_its_time() -> None:
    assert actions_for(a_row(not_before=NOW + 1)) == []
    assert isinstance(actions_for(a_row(not_before=NOW))[0], StartAttempt)


def test_first_sign_of_life_marks_the_attempt_running() -> None:
    job = a_row(state=JobState.STARTING, attempts=1)
    assert actions_for(job, an_attempt(AttemptState.STARTING), a_report())[0] == MarkRunning("job-1", 1)
    assert actions_for(job, an_attempt(AttemptState.STARTING), a_report(begun=False)) == []


def test_an_attempt_that_no_agent_took_is_started_again_then_given_up() -> None:
    job = a_row(state=JobState.STARTING, attempts=1)
    unclaimed = a_report(claimed=False, begun=False)
    assert actions_for(job, an_attempt(AttemptState.STARTING), unclaimed) == []
    late = an_attempt(AttemptState.STARTING, created_at=NOW - 6)
    assert actions_for(job, late, unclaimed)[0] == StartAgain("job-1", 1)
    too_late = an_attempt(AttemptState.STARTING, created_at=NOW - 61)
    assert isinstance(actions_for(job, too_late, unclaimed)[0], EndAttempt)


def test_progress_is_stored_at_most_once_a_second() -> None:
    line = ProgressLine(time=NOW, phase="train", step=3)
    assert actions_for(running(), an_attempt(last_contact=NOW - 0.5), a_report(progress=line)) == []
    heard = actions_for(running(), an_attempt(last_contact=NOW - 1), a_report(progress=line, offset=70))
    assert heard == [NoteProgress("job-1", 1, line, 70)]


def test_cancel_sends_a_stop_and_repeats_it_until_the_end() -> None:
    (stop,) = actions_for(running(cancel_requested=True), an_attempt(), a_report())
    assert isinstance(stop, SendStop)
    assert stop.request.deadline == NOW + POLICY.stop_grace
    stopping = an_attempt(AttemptState.STOPPING, stop=stop.request)
    job = running(cancel_requested=True)
    assert actions_for(job, stopping, a_report()) == [SendStopAgain("job-1", 1, stop.request)]
    ended = a_report(ended=True, exits=(an_exit(0, ExitCode.STOPPED), an_exit(1, ExitCode.STOPPED)))
    (end,) = actions_for(job, stopping, ended)
    assert end.job_state == JobState.CANCELLED


def test_cancel_that_comes_too_late_leaves_a_success() -> None:
    ended = a_report(ended=True, exits=(an_exit(0), an_exit(1)))
    (end,) = actions_for(running(cancel_requested=True), an_attempt(), ended)
    assert end.job_state == JobState.SUCCEEDED


def test_max_duration_stops_and_then_fails_the_job() -> None:
    job = running(job=a_command_job(2, max_duration="10s"), ran_s=9.5)
    assert actions_for(job, an_attempt(created_at=NOW - 0.4), a_report()) == []
    (stop,) = actions_for(job, an_attempt(created_at=NOW - 1), a_report())
    assert isinstance(stop, SendStop)
    assert stop.reason.code == ReasonCode.MAX_DURATION
    stopping = an_attempt(AttemptState.STOPPING, stop=StopRequest(reason="max-duration", deadline=NOW))
    ended = a_report(ended=True, exits=(an_exit(0, ExitCode.STOPPED), an_exit(1, ExitCode.STOPPED)))
    (end,) = actions_for(job, stopping, ended)
    assert end.job_state == JobState.FAILED
    assert end.error["code"] == "max-duration"


# News of checkpoints.

SAVED = ProgressLine(
    time=NOW, phase="save", step=4, checkpoint=CheckpointNote(id="step-4.attempt-1", step=4, outcome="committed")
)


def test_news_of_checkpoints_is_noted_at_once() -> None:
    attempt = an_attempt(last_contact=NOW - 0.1)
    told = actions_for(running(), attempt, a_report(progress=SAVED, news=(SAVED,), offset=300))
    assert told == [NoteCheckpoints("job-1", 1, (SAVED,), 300)]


def test_an_attempt_ends_when_nothing_is_left_to_be_noted() -> None:
    ended = a_report(ended=True, exits=(an_exit(0), an_exit(1)), news=(SAVED,), offset=300)
    assert actions_for(running(), an_attempt(), ended) == [NoteCheckpoints("job-1", 1, (SAVED,), 300)]
    (end,) = actions_for(running(), an_attempt(progress_offset=300), ended.model_copy(update={"news": ()}))
    assert isinstance(end, EndAttempt)


def test_a_lost_attempt_ends_when_nothing_is_left_to_be_noted() -> None:
    silent = a_report(reachable=False, news=(SAVED,), offset=300)
    attempt = an_attempt(AttemptState.LOST, last_contact=NOW)
    (note,) = actions_for(running(), attempt, silent, nodes=(), now=NOW + 20)
    assert isinstance(note, NoteCheckpoints)
    (end,) = actions_for(running(), attempt, silent.model_copy(update={"news": ()}), nodes=(), now=NOW + 20)
    assert isinstance(end, EndAttempt)


def test_a_job_that_never_stops_telling_can_still_be_cancelled() -> None:
    chatty = a_report(news=(SAVED,), offset=300)
    kinds = [type(action) for action in actions_for(running(cancel_requested=True), an_attempt(), chatty)]
    assert kinds == [NoteCheckpoints, SendStop]


def test_one_node_failing_ends_the_others() -> None:
    attempt = an_attempt(processes=6, nodes=(NODE, OTHER))
    bad = a_report(0, exits=(an_exit(0, ExitCode.CRASH, 1.0, "boom"),), ended=True)
    (stop,) = actions_for(running(), attempt, bad, a_report(1), nodes=(NODE, OTHER))
    assert isinstance(stop, SendStop)
    assert stop.reason.code == ReasonCode.FAILED


def test_a_node_that_is_gone_loses_the_attempt_until_the_leash_has_surely_ended_it() -> None:
    silent = a_report(reachable=False, begun=True)
    (lost,) = actions_for(running(), an_attempt(last_contact=NOW - 0.3), silent, nodes=())
    assert isinstance(lost, MarkLost)
    assert lost.reason.code == ReasonCode.OLD_ATTEMPT_ENDING
    attempt = an_attempt(AttemptState.LOST, last_contact=NOW)
    assert actions_for(running(), attempt, silent, nodes=(), now=NOW + 12 + UNTOLD_S) == []
    (end,) = actions_for(running(), attempt, silent, nodes=(), now=NOW + 12.1 + UNTOLD_S)
    assert end.not_before == NOW + 12.1 + UNTOLD_S + LEAVING_S
    assert end.outcome == Outcome.NODE_LOST
    assert end.job_state == JobState.QUEUED


def test_a_lost_attempt_whose_ranks_all_said_how_they_ended_need_not_be_waited_for() -> None:
    told = a_report(reachable=False, ended=True, exits=tuple(an_exit(r, ExitCode.LEASH_EXPIRED) for r in (0, 1)))
    (end,) = actions_for(running(), an_attempt(AttemptState.LOST, last_contact=NOW - 1), told, nodes=())
    assert (end.outcome, end.not_before) == (Outcome.NODE_LOST, NOW + LEAVING_S), "a word is there before the end"
    (end,) = actions_for(running(), an_attempt(), told.model_copy(update={"reachable": True}))
    assert end.not_before == NOW, "its agent has seen them gone"


def test_no_new_attempt_while_an_old_one_may_live() -> None:
    silent = a_report(reachable=False)
    job = a_row(state=JobState.QUEUED, attempts=1)  # cannot happen by the loop; guarded all the same
    actions = actions_for(job, an_attempt(AttemptState.LOST, last_contact=NOW), silent, nodes=(NODE,))
    assert not any(isinstance(action, StartAttempt) for action in actions)


def test_a_node_that_answers_again_is_found() -> None:
    assert actions_for(running(), an_attempt(AttemptState.LOST), a_report())[0] == MarkRunning("job-1", 1)


def test_same_input_same_actions() -> None:
    first = actions_for(a_row())
    assert first == actions_for(a_row())


@pytest.mark.parametrize("why", ["cancelled", "too long", "a rank failed"])
@pytest.mark.parametrize("state", [AttemptState.STARTING, AttemptState.LOST])
def test_an_attempt_that_is_due_to_run_and_to_stop_in_one_tick_does_both_in_a_legal_order(
    state: AttemptState, why: str
) -> None:
    limited = a_command_job(2, max_duration=0.5)
    job = running(job=limited if why == "too long" else None, cancel_requested=why == "cancelled")
    exits = (an_exit(1, ExitCode.CRASH),) if why == "a rank failed" else ()
    actions = actions_for(job, an_attempt(state), a_report(0, exits=exits), a_report(1))
    kinds = [type(action) for action in actions if isinstance(action, MarkRunning | SendStop)]
    assert kinds == [MarkRunning, SendStop]
    for new in (AttemptState.RUNNING, AttemptState.STOPPING):
        check_attempt_transition("job-1", 1, state, new)
        state = new


def test_a_pinned_job_is_not_planned_anew() -> None:
    """Another micro-batch and number of threads than the planner would choose, and an accumulation to match."""
    chosen = ExecutionPlan(
        engine="zero2", world_size=2, device="cpu", micro_batch_size=3, gradient_accumulation_steps=3
    )
    origin = Origin(pinned=Pinned(plan=chosen, threads=(3, 2), data={"train": "f"}))
    (start,) = looked(State([a_row(origin=origin)], []), Facts([NODE]), NOW, POLICY)
    assert isinstance(start, StartAttempt)
    assert start.plan == chosen
    assert [(share.processes, share.threads) for share in start.placement.shares] == [(2, 3)]
