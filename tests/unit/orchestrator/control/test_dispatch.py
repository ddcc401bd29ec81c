"""Who is stopped to make room, and what becomes of them; dependencies, drained nodes, rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.attempt import ExitCode
from launch.contract import StopRequest
from orchestrator.cluster.capacity import Capacity
from orchestrator.cluster.status import AttemptStatus, NodeReport
from orchestrator.control.actions import EndAttempt, Explain, MoveJob, SendStop, StartAttempt
from orchestrator.control.facts import Facts, Policy, State
from orchestrator.control.rules import rules_of
from orchestrator.errors import SettingsError
from orchestrator.job.lifecycle import JobState, Reason, ReasonCode
from orchestrator.job.spec import dump_job
from orchestrator.memory.plan import plan
from orchestrator.schedule.gang import Rules
from orchestrator.schedule.place import place
from orchestrator.settings import Settings
from orchestrator.store.rows import AttemptRow, JobRow, Mark
from tests.builders import a_command_job, a_node, a_training_job, an_exit, looked
from tests.worlds import a_contract

NOW = 10_000.0
NODES = (a_node("n0", slots=2), a_node("n1", slots=2))
POLICY = Policy(pause_grace=600, rules=Rules(min_run_for_class_s=0, grow_after_s=0))


def a_job(job_id: str, number: int = 1, state: JobState = JobState.QUEUED, **changes: Any) -> JobRow:
    job = changes.pop("job", None) or a_training_job(2)
    values: dict[str, Any] = {
        "sequence": number, "id": job_id, "name": "job", "queue": "default", "priority": job.priority,
        "spec": dump_job(job), "state": state, "reason": Reason(code=ReasonCode.SUBMITTED, sentence="s"),
        "attempts": 0, "cancel_requested": False, "not_before": None, "submitted_at": NOW - 500, "started_at": None,
        "finished_at": None, "error": None, "result": None, "queued_at": NOW - 500,
    }  # fmt: skip
    return JobRow(**(values | changes))


def runs(job: JobRow, processes: int = 2, nodes: tuple[Any, ...] = NODES, **changes: Any) -> AttemptRow:
    placement = place(Capacity(nodes), processes, "any")
    assert placement is not None
    contract = a_contract(
        Path("/nowhere"), plan(job.job, processes, "cpu"), run_id=f"{job.id}.1", job_id=job.id, nodes=placement.shares
    )
    values: dict[str, Any] = {
        "job_id": job.id, "number": 1, "state": "running", "contract": contract.model_dump_json(),
        "placement": placement.model_dump_json(), "created_at": NOW - 100, "started_at": NOW - 90, "ended_at": None,
        "last_contact": NOW, "stop": None, "outcome": None, "progress": None,
    }  # fmt: skip
    return AttemptRow(**(values | changes))


def report(ended: bool = False, code: ExitCode = ExitCode.STOPPED) -> NodeReport:
    exits = tuple(an_exit(rank, code) for rank in range(2)) if ended else ()
    return NodeReport(node_index=0, reachable=True, claimed=True, begun=True, ended=ended, exits=exits)


def actions(state: State, *, ended: tuple[str, ...] = (), nodes: tuple[Any, ...] = NODES) -> list[Any]:
    statuses = {
        attempt.run.run_id: AttemptStatus(reports=(report(attempt.job_id in ended),)) for attempt in state.attempts
    }
    return looked(state, Facts(nodes=nodes, statuses=statuses), NOW, POLICY)


def running(job_id: str, **changes: Any) -> JobRow:
    return a_job(job_id, state=JobState.RUNNING, attempts=1, **changes)


def test_the_lower_class_saves_and_makes_room() -> None:
    low, high = running("low"), a_job("high", 2, job=a_training_job(4, priority="high"))
    state = State(jobs=[low, high], attempts=[runs(low)])
    stop, explain = actions(state)
    assert isinstance(stop, SendStop)
    assert (stop.job_id, stop.request.reason, stop.preempted_by, stop.target) == ("low", "preempted", "high", None)
    assert stop.request.deadline == NOW + 600
    assert (stop.reason.code, "high" in stop.reason.sentence) == (ReasonCode.PREEMPTED, True)
    assert isinstance(explain, Explain)
    assert (explain.job_id, explain.reason.code) == ("high", ReasonCode.MAKING_ROOM)


def test_who_was_pre_empted_goes_back_to_the_queue() -> None:
    low = running("low").model_copy(update={"state": JobState.STOPPING})
    high = a_job("high", 2, job=a_training_job(4, priority="high"))
    stop = StopRequest(reason="preempted", deadline=NOW + 1)
    state = State(jobs=[low, high], attempts=[runs(low, state="stopping", stop=stop, preempted_by="high")])
    end, _ = actions(state, ended=("low",))
    assert isinstance(end, EndAttempt)
    assert (end.job_state, end.reason.code, end.failed) == (JobState.QUEUED, ReasonCode.PREEMPTED, False)


def test_a_crash_while_it_makes_room_uses_up_no_restart() -> None:
    low = running("low").model_copy(update={"state": JobState.STOPPING})
    stop = StopRequest(reason="preempted", deadline=NOW + 1)
    state = State(jobs=[low], attempts=[runs(low, state="stopping", stop=stop, preempted_by="high")])
    crashed = {"low.1": AttemptStatus(reports=(report(ended=True, code=ExitCode.CRASH),))}
    (end,) = looked(state, Facts(nodes=NODES, statuses=crashed), NOW, POLICY)
    assert isinstance(end, EndAttempt)
    assert (end.job_state, end.failed) == (JobState.QUEUED, False)


def test_a_command_is_never_pre_empted() -> None:
    low, high = running("low", job=a_command_job(2)), a_job("high", 2, job=a_training_job(4, priority="high"))
    (explain,) = actions(State(jobs=[low, high], attempts=[runs(low)]))
    assert explain.reason.code == ReasonCode.INSUFFICIENT_FREE


def test_an_elastic_job_shrinks_and_goes_on_with_less() -> None:
    elastic = running("elastic", job=a_training_job("2..4"))
    high = a_job("high", 2, job=a_training_job(2, priority="high"))
    stop, _ = actions(State(jobs=[elastic, high], attempts=[runs(elastic, 4)]))
    assert (stop.request.reason, stop.target, stop.preempted_by) == ("resized", 2, "high")
    request = StopRequest(reason="resized", deadline=NOW + 1)
    stopping = elastic.model_copy(update={"state": JobState.STOPPING})
    attempt = runs(elastic, 4, state="stopping", stop=request, preempted_by="high", target=2)
    ended = AttemptStatus(reports=tuple(report(ended=True).model_copy(update={"node_index": at}) for at in range(2)))
    exits = tuple(an_exit(rank, ExitCode.STOPPED) for rank in range(4))
    ended = AttemptStatus(
        reports=(
            ended.reports[0].model_copy(update={"exits": exits[:2]}),
            ended.reports[1].model_copy(update={"exits": exits[2:]}),
        )
    )
    state = State(jobs=[stopping, high], attempts=[attempt])
    end, *_ = looked(state, Facts(nodes=NODES, statuses={"elastic.1": ended}), NOW, POLICY)
    assert (end.job_state, end.target, end.reason.code) == (JobState.QUEUED, 2, ReasonCode.RESIZED)
    again = a_job("elastic", job=a_training_job("2..4"), target=2, attempts=1)
    started = [one for one in actions(State(jobs=[again, high])) if isinstance(one, StartAttempt)]
    assert {start.job_id: start.placement.world_size for start in started} == {"elastic": 2, "high": 2}


def test_an_elastic_job_grows_when_nobody_waits() -> None:
    elastic = running("elastic", job=a_training_job("2..4"))
    (stop,) = actions(State(jobs=[elastic], attempts=[runs(elastic, 2)]))
    assert (stop.request.reason, stop.target, stop.preempted_by) == ("resized", 4, None)


def test_a_drained_node_is_emptied() -> None:
    job = running("job")
    attempt = runs(job)
    (stop,) = actions(State(jobs=[job], attempts=[attempt], marks={"n0": Mark.DRAINED}))
    assert (stop.request.reason, stop.reason.code) == ("drained", ReasonCode.NODE_DRAINED)
    waits = a_job("job", attempts=1)
    (start,) = actions(State(jobs=[waits], marks={"n0": Mark.DRAINED}))
    assert [share.node for share in start.placement.shares] == ["n1"]


def test_a_user_who_cancels_a_job_that_makes_room_is_heard() -> None:
    low = running("low", cancel_requested=True).model_copy(update={"state": JobState.STOPPING})
    stop = StopRequest(reason="preempted", deadline=NOW + 1)
    state = State(jobs=[low], attempts=[runs(low, state="stopping", stop=stop, preempted_by="high")])
    (sent,) = actions(state)
    assert (sent.request.reason, sent.reason.code) == ("cancelled", ReasonCode.CANCEL_REQUESTED)


@pytest.mark.parametrize(("there", "taken"), [((True, True), "bf16"), ((True, False), "fp32")])
def test_a_job_of_which_nothing_is_known_computes_in_what_its_nodes_multiply(
    there: tuple[bool, bool], taken: str
) -> None:
    nodes = tuple(a_node(f"n{at}", slots=1, bf16=bf16) for at, bf16 in enumerate(there))
    other = a_node("elsewhere", slots=1, gpus=1, gpu_type="V100")
    job = a_job("a", job=a_training_job(2, train={"max_steps": 1, "precision": "auto"}))
    (start,) = [one for one in actions(State(jobs=[job]), nodes=(*nodes, other)) if isinstance(one, StartAttempt)]
    assert start.plan.precision == taken


def test_a_job_starts_after_those_before_it() -> None:
    before, after = running("before"), a_job("after", 2, job=a_command_job(1, after=["before"]))
    (explain,) = actions(State(jobs=[before, after], attempts=[runs(before)]))
    assert (explain.reason.code, "before" in explain.reason.sentence) == (ReasonCode.AFTER, True)
    (start,) = actions(State(jobs=[after], ended={"before": JobState.SUCCEEDED}))
    assert isinstance(start, StartAttempt)
    (move,) = actions(State(jobs=[after], ended={"before": JobState.FAILED}))
    assert isinstance(move, MoveJob)
    assert (move.state, move.reason.code, bool(move.reason.remedy)) == (JobState.FAILED, ReasonCode.AFTER, True)


@pytest.mark.parametrize(
    ("rules", "hint"),
    [({"min_run": 1.0}, "min_run_s"), ({"preempt": 3.0}, "true"), ({"min_run_s": -1.0}, "0 or above")],
)
def test_rules_that_there_are_not_are_refused(rules: dict[str, bool | float], hint: str) -> None:
    with pytest.raises(SettingsError) as refused:
        rules_of(Settings(rules=rules))
    assert hint in (refused.value.hint or "")


def test_rules_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEYARD_RULES", '{"levels": 3, "preempt": false}')
    assert rules_of(Settings()) == Rules(levels=3, preempt=False)
