"""One tick at a time, with plain objects."""

from __future__ import annotations

from typing import Any

import pytest

from launch.attempt import ExitCode
from launch.contract import (
    CheckpointNote,
    ExecutionPlan,
    Origin,
    Pinned,
    ProgressLine,
    RankExit,
    RankResult,
    RunContract,
    StopRequest,
)
from orchestrator.cluster.capacity import Capacity
from orchestrator.cluster.model import Placement
from orchestrator.cluster.status import AttemptStatus, NodeReport
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
from orchestrator.control.facts import Facts, Policy, State
from orchestrator.control.reconcile import LEAVING_S, UNTOLD_S
from orchestrator.job.checkpoint import LastCheckpoint
from orchestrator.job.lifecycle import (
    AttemptState,
    JobState,
    Reason,
    ReasonCode,
    check_attempt_transition,
    check_job_transition,
)
from orchestrator.job.spec import dump_job
from orchestrator.memory.alike import key_of
from orchestrator.memory.ladder import Relief, Rung, Taken
from orchestrator.memory.plan import plan
from orchestrator.recover.classify import Outcome
from orchestrator.schedule.place import place
from orchestrator.store.rows import AttemptRow, JobRow
from tests.builders import a_command_job, a_node, a_training_job, an_exit, looked

NODE = a_node("n0", slots=4)
OTHER = a_node("n1", slots=4)
POLICY = Policy(leash=10, leash_margin=2, stop_grace=60, pause_grace=600)
NOW = 1000.0


def a_row(job_id: str = "job-1", state: JobState = JobState.QUEUED, **changes: Any) -> JobRow:
    job = changes.pop("job", None) or a_command_job(2)
    values: dict[str, Any] = {
        "sequence": 1, "id": job_id, "name": "job", "queue": "default", "priority": 0, "spec": dump_job(job),
        "state": state, "reason": Reason(code=ReasonCode.SUBMITTED, sentence="s"), "attempts": 0,
        "cancel_requested": False, "not_before": None, "submitted_at": 0.0, "started_at": None, "finished_at": None,
        "error": None, "result": None,
    }  # fmt: skip
    return JobRow(**(values | changes))


def an_attempt(
    state: AttemptState = AttemptState.RUNNING, processes: int = 2, nodes: tuple = (NODE,), **changes: Any
) -> AttemptRow:
    placement = place(Capacity(nodes=nodes), processes, "any")
    assert isinstance(placement, Placement)
    contract = RunContract(
        run_id="job-1.1", job_id="job-1", attempt=1, plan=plan(a_command_job(processes), processes, "cpu"),
        nodes=placement.shares, main_port=1, run_dir="/nowhere", output_dir="/nowhere", checkpoint_dir="/nowhere",
        tracker_dir="/nowhere",
        command=("true",), leash_s=10,
    )  # fmt: skip
    values: dict[str, Any] = {
        "job_id": "job-1", "number": 1, "state": state, "contract": contract.model_dump_json(),
        "placement": placement.model_dump_json(), "created_at": NOW - 1, "started_at": None, "ended_at": None,
        "last_contact": NOW, "stop": None, "outcome": None, "progress": None,
    }  # fmt: skip
    return AttemptRow(**(values | changes))


def a_report(index: int = 0, **changes: Any) -> NodeReport:
    return NodeReport(**({"node_index": index, "reachable": True, "claimed": True, "begun": True} | changes))


def actions_for(
    job: JobRow, attempt: AttemptRow | None = None, *reports: NodeReport, nodes: tuple = (NODE,), now: float = NOW
) -> list[Any]:
    statuses = {attempt.run.run_id: AttemptStatus(reports=reports)} if attempt else {}
    state = State(jobs=[job], attempts=[attempt] if attempt else [])
    return looked(state, Facts(nodes=nodes, statuses=statuses), now, POLICY)


def running(**changes: Any) -> JobRow:
    return a_row(state=JobState.RUNNING, attempts=1, started_at=NOW - 1, **changes)


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


# Pausing.

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


# Failing.


def failed(*exits: RankExit, restarts: int = 3, failures: int = 0) -> EndAttempt:
    job = running(job=a_command_job(2, retry={"max_restarts": restarts}))
    job = job.model_copy(update={"failures": failures, "failed_by": {"crashed": failures}})
    attempt = an_attempt()
    (end,) = actions_for(job, attempt, a_report(ended=True, exits=exits))
    assert isinstance(end, EndAttempt)
    return end


def test_the_first_failing_rank_is_the_cause() -> None:
    end = failed(an_exit(0, ExitCode.CRASH, 2.0, "connection lost"), an_exit(1, ExitCode.CRASH, 1.0, "boom"))
    assert end.error is not None
    assert end.error["message"] == "boom"
    assert end.error["rank"] == 1
    assert end.job_state == JobState.QUEUED
    assert end.not_before is not None
    assert end.not_before > NOW


def test_a_crash_is_retried_until_the_budget_is_spent() -> None:
    crash = an_exit(0, ExitCode.CRASH, 1.0, "boom")
    assert failed(crash, restarts=1).job_state == JobState.QUEUED
    assert failed(crash, restarts=1).failed
    assert failed(crash, restarts=1, failures=1).job_state == JobState.FAILED
    assert failed(crash, restarts=0).job_state == JobState.FAILED


def test_what_the_user_must_mend_is_never_retried() -> None:
    # A command's memory is its own affair.
    for code in (ExitCode.USER_ERROR, ExitCode.DATA_ERROR, ExitCode.CONTRACT_MISMATCH, ExitCode.OUT_OF_MEMORY):
        assert failed(an_exit(0, code, 1.0, "no")).job_state == JobState.FAILED


# Out of memory.

TRAINS = a_training_job(2, train={"max_steps": 1, "global_batch_size": 16}, retry={"max_restarts": 0})
RAN_OUT = an_exit(
    1, ExitCode.OUT_OF_MEMORY, 2.0, "the kernel killed it: its cgroup allows 1.0 GiB", cause="cgroup-killed",
    limit_bytes=1 << 30,
)  # fmt: skip
ECHO = an_exit(0, ExitCode.CRASH, 1.0, "Connection closed by peer", echo=True)


def a_training(chosen: ExecutionPlan | None = None) -> AttemptRow:
    """An attempt of TRAINS."""
    run = an_attempt().run.model_copy(update={"plan": chosen or plan(TRAINS, 2, "cpu"), "command": None})
    return an_attempt(contract=run.model_dump_json())


def end_of_training(job: JobRow, phase: str = "train", chosen: ExecutionPlan | None = None) -> EndAttempt:
    line = ProgressLine(time=NOW, phase=phase, step=7)
    (end,) = actions_for(job, a_training(chosen), a_report(ended=True, exits=(ECHO, RAN_OUT), progress=line))
    assert isinstance(end, EndAttempt)
    return end


def test_out_of_memory_is_a_change_of_plan_and_no_failure() -> None:
    end = end_of_training(running(job=TRAINS))
    assert (end.outcome, end.job_state, end.failed) == (Outcome.OUT_OF_MEMORY, JobState.QUEUED, False)
    assert end.not_before == NOW
    assert end.reason.code == ReasonCode.NEXT_RUNG
    assert end.reason.sentence == (
        "ran out of memory on rank 1 (the kernel killed it: its cgroup allows 1.0 GiB); next: allocator fast → tight"
    )
    assert end.relief == Relief(
        allocator="tight", taken=(Taken(rung=Rung.ALLOCATOR, sentence="allocator fast → tight"),)
    )
    assert [note.kind for note in end.notes] == ["out-of-memory", "next-rung"]
    assert end.notes[0].data["cause"] == "cgroup-killed"
    assert (end.notes[0].data["phase"], end.notes[0].data["step"]) == ("train", 7)
    assert end.peak is not None
    assert (end.peak.ran_out, end.peak.limit_bytes, end.peak.device_kind) == (True, 1 << 30, "cpu")
    # The next attempt is planned within it.
    (start,) = actions_for(a_row(job=TRAINS, attempts=1, relief=end.relief))
    assert isinstance(start, StartAttempt)
    assert start.plan == a_training().plan.model_copy(update={"allocator": "tight"})


def test_while_loading_a_smaller_batch_is_no_help() -> None:
    tight = plan(TRAINS, 2, "cpu", Relief(allocator="tight"))
    job = running(job=TRAINS, relief=Relief(allocator="tight"))
    for phase, rung in (("load", Rung.STAGE), ("ready", Rung.MICRO_BATCH)):
        relief = end_of_training(job, phase, tight).relief
        assert relief is not None
        assert relief.taken[-1].rung == rung


def test_where_no_rung_is_left_it_does_not_fit() -> None:
    relief = Relief(allocator="tight", max_micro_batch=1, activation_checkpointing=True, min_stage=3)
    end = end_of_training(running(job=TRAINS, relief=relief), chosen=plan(TRAINS, 2, "cpu", relief))
    assert (end.job_state, end.relief) == (JobState.FAILED, None)
    assert end.error is not None
    assert (end.error["code"], end.error["rank"]) == ("does-not-fit", 1)
    assert "zero3 on 2 × cpu, micro-batch 1, activation checkpointing" in end.error["message"]
    assert "a smaller data.max_length" in end.error["hint"]


def test_a_repeated_run_keeps_its_plan_and_fails() -> None:
    origin = Origin(pinned=Pinned(plan=plan(TRAINS, 2, "cpu"), threads=(1, 1), data={"train": "f"}))
    end = end_of_training(running(job=TRAINS, origin=origin))
    assert (end.job_state, end.relief) == (JobState.FAILED, None)
    assert end.error is not None
    assert end.error["code"] == "cgroup-killed"
    assert "repeats another run" in end.error["hint"]


def test_a_pausing_job_that_runs_out_pauses_on_the_next_rung() -> None:
    end = end_of_training(running(job=TRAINS, pause_requested=True))
    assert (end.job_state, end.reason.code) == (JobState.PAUSED, ReasonCode.PAUSED)
    assert end.relief is not None
    assert "ran out of memory on rank 1" in end.reason.sentence


def test_a_like_job_starts_on_the_rung_that_it_needs() -> None:
    peak = end_of_training(running(job=TRAINS)).peak
    assert peak is not None
    state = State([a_row(job=TRAINS)], [], peaks=[peak])
    (start,) = looked(state, Facts([NODE]), NOW, POLICY)
    assert isinstance(start, StartAttempt)
    assert start.plan.allocator == "tight"
    assert start.relief is not None
    assert start.notes[0].data["sentence"].endswith("because job job-1 ran out of memory")
    (again,) = looked(State([a_row(job=TRAINS, attempts=1)], [], peaks=[peak]), Facts([NODE]), NOW, POLICY)
    assert isinstance(again, StartAttempt)
    assert again.relief is None, "it has its own story by then"


def test_what_a_training_measured_is_remembered() -> None:
    results = [
        RankResult(
            engine="ddp", zero_stage=0, world_size=2, micro_batch_size=8, gradient_accumulation_steps=1,
            precision="fp32", offload="none", activation_checkpointing=False, peak_bytes=peak, moment_bytes=0,
            master_bytes=0,
        )
        for peak in (5, 9)
    ]  # fmt: skip
    exits = tuple(an_exit(rank).model_copy(update={"result": one}) for rank, one in enumerate(results))
    (end,) = actions_for(running(job=TRAINS), a_training(), a_report(ended=True, exits=exits))
    assert end.peak is not None
    assert (end.peak.measured_bytes, end.peak.ran_out, end.peak.key) == (9, False, key_of(TRAINS))


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
