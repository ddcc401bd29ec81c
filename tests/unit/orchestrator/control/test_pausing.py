"""One tick at a time: jobs that are paused and resumed."""

from __future__ import annotations

import pytest

from launch.attempt import ExitCode
from launch.contract import RankExit, StopRequest
from orchestrator.control.actions import EndAttempt, Explain, MoveJob, SendStop, SendStopAgain, StartAttempt
from orchestrator.control.facts import Facts, State
from orchestrator.job.checkpoint import LastCheckpoint
from orchestrator.job.lifecycle import AttemptState, JobState, Reason, ReasonCode, check_job_transition
from orchestrator.recover.classify import Outcome
from orchestrator.store.rows import JobRow
from tests.builders import a_command_job, an_exit, looked
from tests.ticks import NODE, NOW, OTHER, POLICY, a_report, a_row, actions_for, an_attempt, running

STOPPED = (an_exit(0, ExitCode.STOPPED), an_exit(1, ExitCode.STOPPED))
KILLED = (an_exit(0, ExitCode.KILLED, message="killed by SIGKILL"), an_exit(1, ExitCode.STOPPED))
PAUSING = StopRequest(reason="paused", deadline=NOW + 600)


def end_of(job: JobRow, exits: tuple[RankExit, ...], stop: StopRequest | None = PAUSING) -> EndAttempt:
    attempt = an_attempt(AttemptState.STOPPING if stop else AttemptState.RUNNING, stop=stop)
    (end,) = actions_for(job, attempt, a_report(ended=True, exits=exits))
    assert isinstance(end, EndAttempt)
    check_job_transition("job-1", job.state, end.job_state)
    return end


def test_a_queued_job_is_parked_at_once_and_stays() -> None:
    (park,) = actions_for(a_row(pause_requested=True))
    assert isinstance(park, MoveJob)
    assert (park.state, park.reason.code) == (JobState.PAUSED, ReasonCode.PAUSED)
    assert park.reason.remedy == "tuneyard resume job-1"
    assert actions_for(a_row(state=JobState.PAUSED, pause_requested=True, reason=park.reason)) == []


def test_a_job_that_backs_off_is_parked_too() -> None:
    (park,) = actions_for(a_row(pause_requested=True, attempts=1, not_before=NOW + 100))
    assert isinstance(park, MoveJob)


def test_a_parked_job_does_not_hold_up_the_queue() -> None:
    jobs = [a_row(state=JobState.PAUSED, pause_requested=True), a_row("job-2", sequence=2)]
    (start,) = looked(State(jobs, []), Facts([NODE]), NOW, POLICY)
    assert isinstance(start, StartAttempt)
    assert start.job_id == "job-2"


def test_pausing_sends_a_stop_with_a_long_grace_and_repeats_it() -> None:
    job = running(pause_requested=True)
    (stop,) = actions_for(job, an_attempt(), a_report())
    assert isinstance(stop, SendStop)
    assert stop.request == PAUSING
    assert stop.reason.code == ReasonCode.PAUSE_REQUESTED
    stopping = an_attempt(AttemptState.STOPPING, stop=stop.request)
    pausing = job.model_copy(update={"state": JobState.STOPPING, "reason": stop.reason})
    assert actions_for(pausing, stopping, a_report()) == [SendStopAgain("job-1", 1, stop.request)]


def test_a_job_that_stopped_as_it_was_asked_is_paused() -> None:
    last = LastCheckpoint(id="step-40.attempt-1", step=40, time=NOW, url="/nowhere/step-40.attempt-1")
    end = end_of(running(pause_requested=True, checkpoint=last), STOPPED)
    assert (end.job_state, end.failed, end.error) == (JobState.PAUSED, False, None)
    assert end.reason.sentence == "paused by its user; its last checkpoint is of step 40"
    assert end.reason.remedy == "tuneyard resume job-1"


def test_a_job_that_succeeds_meanwhile_has_succeeded() -> None:
    assert end_of(running(pause_requested=True), (an_exit(0), an_exit(1))).job_state == JobState.SUCCEEDED


@pytest.mark.parametrize("stop", [PAUSING, None], ids=["asked", "not yet asked"])
def test_a_crash_while_pausing_loses_neither_job_nor_restart(stop: StopRequest | None) -> None:
    spent = a_command_job(2, retry={"max_restarts": 0})
    end = end_of(running(pause_requested=True, job=spent), KILLED, stop)
    assert (end.job_state, end.failed) == (JobState.PAUSED, False)
    assert end.error is not None
    assert "killed by SIGKILL" in end.reason.sentence


def test_what_its_user_must_mend_fails_a_pausing_job() -> None:
    assert end_of(running(pause_requested=True), (an_exit(0, ExitCode.DATA_ERROR, 1.0, "no"),)).job_state == (
        JobState.FAILED
    )


def test_a_node_lost_while_pausing_leaves_it_paused() -> None:
    attempt = an_attempt(AttemptState.LOST, last_contact=NOW, stop=PAUSING)
    job = running(pause_requested=True).model_copy(update={"state": JobState.STOPPING})
    gone = a_report(reachable=False)
    end = actions_for(job, attempt, gone, nodes=(), now=NOW + 20)[-1]
    assert (end.outcome, end.job_state) == (Outcome.NODE_LOST, JobState.PAUSED)


def test_a_resumed_job_goes_back_to_the_queue_and_starts() -> None:
    (back,) = actions_for(a_row(state=JobState.PAUSED, attempts=1))
    assert back == MoveJob("job-1", JobState.QUEUED, back.reason)
    assert back.reason.code == ReasonCode.RESUMED
    (start,) = actions_for(a_row(attempts=1, reason=back.reason))
    assert isinstance(start, StartAttempt)
    assert start.number == 2


def test_a_job_resumed_while_it_pauses_stops_and_goes_on() -> None:
    told = Reason(code=ReasonCode.PAUSE_REQUESTED, sentence="pausing")
    job = running(reason=told).model_copy(update={"state": JobState.STOPPING})
    stopping = an_attempt(AttemptState.STOPPING, stop=PAUSING)
    again, explain = actions_for(job, stopping, a_report())
    assert again == SendStopAgain("job-1", 1, PAUSING)
    assert isinstance(explain, Explain)
    assert explain.reason.code == ReasonCode.RESUMED
    assert actions_for(job.model_copy(update={"reason": explain.reason}), stopping, a_report()) == [again]
    assert (end_of(job, STOPPED).job_state, end_of(job, STOPPED).failed) == (JobState.QUEUED, False)
    late = end_of(job, KILLED)  # it was too slow for the grace
    assert (late.job_state, late.failed) == (JobState.QUEUED, False)


def test_a_rank_that_crashes_while_its_gang_pauses_ends_the_others_soon() -> None:
    job = running(pause_requested=True).model_copy(update={"state": JobState.STOPPING})
    attempt = an_attempt(AttemptState.STOPPING, processes=6, nodes=(NODE, OTHER), stop=PAUSING)
    bad = a_report(0, exits=(an_exit(0, ExitCode.CRASH, 1.0, "boom"),))
    (stop,) = actions_for(job, attempt, bad, a_report(1), nodes=(NODE, OTHER))
    assert isinstance(stop, SendStop)
    assert stop.request.deadline < NOW + 10
    attempt = attempt.model_copy(update={"stop": stop.request})
    assert actions_for(job, attempt, bad, a_report(1), nodes=(NODE, OTHER)) == [SendStopAgain("job-1", 1, stop.request)]
    gone = [a_report(0, ended=True, exits=tuple(an_exit(rank, ExitCode.KILLED) for rank in range(4)))]
    gone.append(a_report(1, ended=True, exits=(an_exit(4, ExitCode.KILLED), an_exit(5, ExitCode.KILLED))))
    (end,) = actions_for(job, attempt, *gone, nodes=(NODE, OTHER))
    assert end.job_state == JobState.PAUSED


def test_a_job_that_gets_on_may_fail_as_often_as_it_likes() -> None:
    job = running(failures=3, failed_by={"killed": 3}, job=a_command_job(2, retry={"max_restarts": 3}))
    assert end_of(job, KILLED, None).job_state == JobState.FAILED
    saved = LastCheckpoint(id="step-40.attempt-1", step=40, time=NOW, url="/c")
    again = end_of(job.model_copy(update={"checkpoint": saved}), KILLED, None)
    assert (again.job_state, again.failed, again.progressed) == (JobState.QUEUED, True, True)
    assert again.not_before == NOW, "at once: it was killed"
    assert again.reason.remedy == "restarts left: 3"
    older = saved.model_copy(update={"id": "step-40.attempt-7"})
    assert end_of(job.model_copy(update={"checkpoint": older}), KILLED, None).job_state == JobState.FAILED


def test_after_a_kill_the_next_attempt_goes_elsewhere() -> None:
    attempt = an_attempt(processes=6, nodes=(NODE, OTHER))
    first, second = (share.node for share in attempt.run.nodes)
    told = {rank: an_exit(rank, ExitCode.KILLED, 2.0, "its peer is gone", echo=True) for rank in range(6)}
    told[5] = an_exit(5, ExitCode.KILLED, 3.0, "killed by SIGKILL")
    reports = [
        a_report(index, ended=True, exits=tuple(told[rank] for rank in attempt.run.ranks_of(index))) for index in (0, 1)
    ]
    (end,) = actions_for(running(job=a_command_job(6)), attempt, *reports, nodes=(NODE, OTHER))
    assert isinstance(end, EndAttempt)
    assert end.avoid == (second,)
    assert (end.suspects, first in end.avoid) == ((second,), False)
    assert end.reason.sentence.endswith("on other nodes if they will do")
    # A mistake in the user's own program goes with it, and who was too slow for a planned stop has done nothing.
    assert end_of(running(), (an_exit(0, ExitCode.CRASH, message="boom"), an_exit(1, ExitCode.CRASH)), None).avoid == ()
    assert end_of(running(), KILLED).avoid == ()


def test_after_a_node_is_lost_the_next_attempt_goes_elsewhere_even_if_it_still_seems_to_be_there() -> None:
    attempt = an_attempt()
    gone = (an_exit(0, ExitCode.LEASH_EXPIRED, 2.0), an_exit(1, ExitCode.KILLED, 3.0))
    end = end_of(running(), gone, None)
    assert (end.outcome, end.avoid) == (Outcome.NODE_LOST, (attempt.run.nodes[0].node,))
    assert end.suspects == (), "jobs on it have not failed by its fault as long as it was there"


def test_cancelling_a_pausing_job_shortens_its_grace() -> None:
    job = running(pause_requested=True, cancel_requested=True).model_copy(update={"state": JobState.STOPPING})
    (stop,) = actions_for(job, an_attempt(AttemptState.STOPPING, stop=PAUSING), a_report())
    assert isinstance(stop, SendStop)
    assert stop.request == StopRequest(reason="cancelled", deadline=NOW + POLICY.stop_grace)
    check_job_transition("job-1", JobState.STOPPING, end_of(job, STOPPED, stop.request).job_state)
    assert end_of(job, STOPPED, stop.request).job_state == JobState.CANCELLED


def test_a_paused_job_that_is_cancelled_ends() -> None:
    (finish,) = actions_for(a_row(state=JobState.PAUSED, pause_requested=True, cancel_requested=True, attempts=1))
    assert isinstance(finish, MoveJob)
    assert (finish.state, finish.reason.sentence) == (JobState.CANCELLED, "cancelled while it was paused")


def test_time_spent_paused_does_not_count_against_max_duration() -> None:
    job = a_row(job=a_command_job(2, max_duration="10s"), attempts=1, started_at=0.0, ran_s=9.0)
    assert isinstance(actions_for(job)[0], StartAttempt)
    (over,) = actions_for(job.model_copy(update={"ran_s": 10.5}))
    assert isinstance(over, MoveJob)
    assert over.reason.code == ReasonCode.MAX_DURATION
