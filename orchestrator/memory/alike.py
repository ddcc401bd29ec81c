"""What earlier jobs tell of a new one: which jobs are alike, and on which rung a job should start. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.contract import ExecutionPlan, Record
from orchestrator.job.spec import AnyJob, TrainingJob
from orchestrator.memory.ladder import Relief, climb, demands_no_more, eased, limits_of, steps


class Peak(Record):
    """What an attempt needed of memory, or that it did not fit."""

    key: str
    """Of jobs that are alike in all that decides how much a plan takes."""
    device_kind: str
    """cpu, or the type of the GPUs."""
    world_size: int
    plan: ExecutionPlan
    predicted: dict[str, Any] | None = None
    measured_bytes: int | None = None
    """Of the rank that held the most."""
    limit_bytes: int | None = None
    """How much there was, where that is known."""
    ran_out: bool
    job_id: str
    attempt: int
    time: float


@dataclass(frozen=True)
class Remembered:
    """On which rung to start, and why."""

    relief: Relief
    sentence: str


def key_of(job: AnyJob) -> str | None:
    """The same for jobs that take the same memory under the same plan; None for a command: nothing is known of it."""
    if not isinstance(job, TrainingJob):
        return None
    shape = {"type", "r", "use_dora", "target_modules", "modules_to_save"}
    adapter = job.adapter.model_dump(mode="json", include=shape) if job.adapter is not None else None
    parts: dict[str, object] = {
        "model": job.model.model_dump(mode="json", include={"name_or_path", "revision", "task", "attn_implementation"}),
        "adapter": adapter,
        "data": job.data.model_dump(mode="json", include={"max_length", "packing"}),
        "train": job.train.model_dump(mode="json", include={"optimizer", "precision", "freeze"}),
    }
    if job.model.vocabulary != "whole":  # keys of other jobs stay what they were
        parts["vocabulary"] = job.model.vocabulary
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def remembered(rows: Sequence[Peak], job: AnyJob, plan: ExecutionPlan, device_kind: str) -> Remembered | None:
    """Where to start a job that would start with `plan`, by the attempts of like jobs; None: with that plan.

    The newest attempt that says something of `plan` decides. One that ran with no less is a good sign. One that ran out
    with no more is a bad one: then the job starts as the newest like job ran that fitted on a lower rung, or on the
    rung after the plan that ran out.
    """
    here = [
        row
        for row in rows
        if (row.device_kind, row.world_size, row.plan.precision) == (device_kind, plan.world_size, plan.precision)
    ]
    newest_first = sorted(here, key=lambda row: row.time, reverse=True)
    for row in newest_first:
        if not row.ran_out and demands_no_more(plan, row.plan):
            return None
        if row.ran_out and demands_no_more(row.plan, plan):
            return _after(row, newest_first, job, plan)
    return None


def _after(ran_out: Peak, newest_first: Sequence[Peak], job: AnyJob, plan: ExecutionPlan) -> Remembered | None:
    lower = [row for row in newest_first if not row.ran_out and demands_no_more(row.plan, ran_out.plan)]
    fitted = next((row for row in lower if row.plan != ran_out.plan or row.time > ran_out.time), None)
    limits = limits_of(fitted.plan) if fitted is not None else climb(job, ran_out.plan, limits_of(ran_out.plan))
    if limits is None:
        return None
    taken = steps(plan, eased(job, plan, limits))
    if not taken:
        return None
    because = f"because job {ran_out.job_id} ran out of memory"
    if fitted is not None:
        because += f" and job {fitted.job_id} then fitted" if fitted.job_id != ran_out.job_id else " and then fitted so"
    told = "; ".join(one.sentence for one in taken)
    return Remembered(
        limits.model_copy(update={"taken": taken}), f"starts on rung {taken[-1].rung} ({told}), {because}"
    )
