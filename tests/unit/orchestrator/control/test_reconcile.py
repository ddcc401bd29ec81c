"""One tick at a time, with plain objects."""

from __future__ import annotations

from typing import Any

import pytest

from launch.attempt import ExitCode
from launch.contract import ExecutionPlan, Origin, Pinned, ProgressLine, RankExit, RunContract, StopRequest
from orchestrator.cluster.model import Placement, Snapshot
from orchestrator.cluster.status import AttemptStatus, NodeReport
from orchestrator.control.actions import (
    EndAttempt,
    Explain,
    FinishJob,
    MarkLost,
    MarkRunning,
    NoteProgress,
    SendStop,
    SendStopAgain,
    StartAgain,
    StartAttempt,
)
from orchestrator.control.reconcile import Facts, Policy, State, reconcile
from orchestrator.job.lifecycle import AttemptState, JobState, Reason, ReasonCode, check_attempt_transition
from orchestrator.job.spec import dump_job
from orchestrator.memory.plan import plan
from orchestrator.recover.classify import Outcome
from orchestrator.schedule.place import place
from orchestrator.store.rows import AttemptRow, JobRow
from tests.builders import a_command_job, a_node, an_exit

NODE = a_node("n0", slots=4)
OTHER = a_node("n1", slots=4)
POLICY = Policy(leash=10, leash_margin=2, stop_grace=60)
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
    placement = place(Snapshot(nodes=nodes), processes, "any")
    assert isinstance(placement, Placement)
    contract = RunContract(
        run_id="job-1.1", job_id="job-1", attempt=1, plan=plan(a_command_job(processes), processes, "cpu"),
        nodes=placement.shares, main_port=1, run_dir="/nowhere", output_dir="/nowhere", checkpoint_dir="/nowhere", tracker_dir="/trackers",
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
    return reconcile(state, Facts(nodes=nodes, statuses=statuses), now, POLICY)


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
    assert [type(action) for action in reconcile(state, facts, NOW, POLICY)] == [Explain]


def test_slots_of_an_attempt_that_ends_are_given_away_in_the_same_tick() -> None:
    jobs = [running(), a_row("job-2", sequence=2, job=a_command_job(4))]
    state = State(jobs=jobs, attempts=[an_attempt()])
    ended = a_report(ended=True, exits=(an_exit(0), an_exit(1)))
    facts = Facts(nodes=[NODE], statuses={"job-1.1": AttemptStatus(reports=(ended,))})
    assert [type(action) for action in reconcile(state, facts, NOW, POLICY)] == [EndAttempt, StartAttempt]


def test_a_cancelled_job_that_waits_is_finished_at_once() -> None:
    (finish,) = actions_for(a_row(cancel_requested=True))
    assert isinstance(finish, FinishJob)
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
    heard = actions_for(running(), an_attempt(last_contact=NOW - 1), a_report(progress=line))
    assert heard == [NoteProgress("job-1", 1, line)]


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
    job = running(job=a_command_job(2, max_duration="10s")).model_copy(update={"started_at": NOW - 11})
    (stop,) = actions_for(job, an_attempt(), a_report())
    assert isinstance(stop, SendStop)
    assert stop.reason.code == ReasonCode.MAX_DURATION
    stopping = an_attempt(AttemptState.STOPPING, stop=StopRequest(reason="max-duration", deadline=NOW))
    ended = a_report(ended=True, exits=(an_exit(0, ExitCode.STOPPED), an_exit(1, ExitCode.STOPPED)))
    (end,) = actions_for(job, stopping, ended)
    assert end.job_state == JobState.FAILED
    assert end.error["code"] == "max-duration"


def failed(*exits: RankExit, restarts: int = 3, attempts: int = 1) -> EndAttempt:
    job = running(job=a_command_job(2, retry={"max_restarts": restarts}))
    attempt = an_attempt(number=attempts)
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
    assert failed(crash, restarts=1, attempts=2).job_state == JobState.FAILED
    assert failed(crash, restarts=0).job_state == JobState.FAILED


def test_what_the_user_must_mend_is_never_retried() -> None:
    for code in (ExitCode.USER_ERROR, ExitCode.DATA_ERROR, ExitCode.CONTRACT_MISMATCH, ExitCode.OUT_OF_MEMORY):
        assert failed(an_exit(0, code, 1.0, "no")).job_state == JobState.FAILED


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
    assert actions_for(running(), attempt, silent, nodes=(), now=NOW + 12) == []
    (end,) = actions_for(running(), attempt, silent, nodes=(), now=NOW + 12.1)
    assert end.outcome == Outcome.NODE_LOST
    assert end.job_state == JobState.QUEUED


def test_a_lost_attempt_whose_ranks_all_said_how_they_ended_need_not_be_waited_for() -> None:
    told = a_report(reachable=False, ended=True, exits=tuple(an_exit(r, ExitCode.LEASH_EXPIRED) for r in (0, 1)))
    (end,) = actions_for(running(), an_attempt(AttemptState.LOST, last_contact=NOW - 1), told, nodes=())
    assert end.outcome == Outcome.NODE_LOST


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
    (start,) = reconcile(State([a_row(origin=origin)], []), Facts([NODE]), NOW, POLICY)
    assert isinstance(start, StartAttempt)
    assert start.plan == chosen
    assert [(share.processes, share.threads) for share in start.placement.shares] == [(2, 3)]
