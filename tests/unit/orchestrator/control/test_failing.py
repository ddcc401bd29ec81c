"""One tick at a time: ranks that fail, and those that run out of memory."""

from __future__ import annotations

from launch.attempt import ExitCode
from launch.contract import ExecutionPlan, Origin, Pinned, ProgressLine, RankExit, RankResult
from orchestrator.control.actions import EndAttempt, StartAttempt
from orchestrator.control.facts import Facts, State
from orchestrator.job.lifecycle import JobState, ReasonCode
from orchestrator.memory.alike import key_of
from orchestrator.memory.ladder import Relief, Rung, Taken
from orchestrator.memory.plan import plan
from orchestrator.recover.classify import Outcome
from orchestrator.store.rows import AttemptRow, JobRow
from tests.builders import a_command_job, a_training_job, an_exit, looked
from tests.ticks import NODE, NOW, POLICY, a_report, a_row, actions_for, an_attempt, running


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
