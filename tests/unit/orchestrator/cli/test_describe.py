"""What `tuneyard describe` says of events, of checkpoints above all."""

from __future__ import annotations

import time
from typing import Any

import pytest

from launch.contract import ExecutionPlan
from orchestrator.cli import describe
from orchestrator.job.checkpoint import LastCheckpoint
from orchestrator.job.lifecycle import AttemptState, JobState, Reason, ReasonCode
from orchestrator.views import AttemptView, EventView, JobView


def an_event(kind: str, attempt: int | None = 1, **data: Any) -> EventView:
    return EventView(id=1, attempt=attempt, time=0.0, kind=kind, data=data)


def a_commit(step: int, **data: Any) -> EventView:
    return an_event("checkpoint-committed", id=f"step-{step}.attempt-1", step=step, outcome="committed", **data)


FAILED = an_event(
    "checkpoint-failed", id="step-3.attempt-1", step=3, outcome="failed", bytes=0, code="storage-full",
    message="the storage of the checkpoints is full", hint="free space",
)  # fmt: skip


def told(*events: EventView) -> list[str]:
    return [line.partition(" ")[2] for line in describe.lines(events)]


def test_commits_in_a_row_are_one_line() -> None:
    commits = [a_commit(step) for step in (1, 2)] + [a_commit(3, bytes=2048, save_s=1.25, blocked_s=0.5)]
    assert told(an_event("submitted", None, queue="default"), *commits, an_event("attempt-ended"), a_commit(4)) == [
        "submitted queue: default",
        "attempt 1 checkpoint-committed step-3.attempt-1, 2.0 KiB in 1.2 s, training waited 0.50 s, and 2 before",
        "attempt 1 attempt-ended ",
        "attempt 1 checkpoint-committed step-4.attempt-1",
    ]


def test_what_failed_is_told_each_time_and_whole() -> None:
    line = "attempt 1 checkpoint-failed step-3.attempt-1: [storage-full] the storage of the checkpoints is full"
    assert told(FAILED, FAILED) == [line, line]


def a_view(checkpoint: LastCheckpoint | None) -> JobView:
    return JobView(
        id="job-1", name="job", queue="default", priority=0, state=JobState.RUNNING, attempts=1, submitted_at=0.0,
        reason=Reason(code=ReasonCode.RUNNING, sentence="attempt 1 runs"), checkpoint=checkpoint,
    )  # fmt: skip


def test_the_newest_checkpoint_and_a_save_that_failed_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    last = LastCheckpoint(id="step-2.attempt-1", step=2, time=time.time() - 40.5, url="s3://b/step-2.attempt-1")
    describe._checkpoints(a_view(last), [a_commit(2), FAILED])
    out = capsys.readouterr().out
    assert "last checkpoint: step 2, 40s ago, s3://b/step-2.attempt-1" in out
    assert "the last save failed: step-3.attempt-1: [storage-full]" in out
    assert "free space" in out
    describe._checkpoints(a_view(None), [FAILED, a_commit(4)])
    assert capsys.readouterr().out == ""


def an_attempt(number: int, **plan: Any) -> AttemptView:
    values = {
        "engine": "ddp",
        "world_size": 2,
        "device": "cpu",
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
    }
    return AttemptView(
        number=number, state=AttemptState.ENDED, plan=ExecutionPlan.model_validate(values | plan), nodes=(),
        run_dir="/r", created_at=0.0,
    )  # fmt: skip


def test_an_attempt_says_what_is_other_than_before_and_why() -> None:
    first, second = an_attempt(1), an_attempt(2, micro_batch_size=4, gradient_accumulation_steps=2)
    events = [
        an_event("remembered", 1, sentence="starts on rung allocator, because job x ran out of memory"),
        an_event("out-of-memory", 1, message="ran out of memory on rank 1 (its cgroup allows 1.0 GiB)", rank=1),
        an_event("next-rung", 1, rung="micro-batch", sentence="micro-batch 8 → 4, accumulation 1 → 2"),
    ]
    assert describe.story(None, first, events) == [events[0].data["sentence"], events[1].data["message"]]
    assert describe.story(first, second, events) == [
        "other than before: micro-batch 8 → 4, accumulation 1 → 2, the rung micro-batch, because attempt 1 ran out of"
        " memory"
    ]
    assert describe.story(second, an_attempt(3, world_size=4), events) == [
        "other than before: ranks 2 → 4, micro-batch 4 → 8, accumulation 2 → 1"
    ]
    assert told(events[1]) == ["attempt 1 out-of-memory ran out of memory on rank 1 (its cgroup allows 1.0 GiB)"]
