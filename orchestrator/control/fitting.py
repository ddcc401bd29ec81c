"""What an attempt tells of memory, and how a job goes on that has run out of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.contract import ExecutionPlan, RankExit
from orchestrator.cluster.model import Node, Placement
from orchestrator.cluster.status import AttemptStatus
from orchestrator.control.actions import EndAttempt, Note
from orchestrator.job.lifecycle import JobState, Reason, ReasonCode
from orchestrator.job.spec import AnyJob, TrainingJob
from orchestrator.memory.alike import Peak, key_of
from orchestrator.memory.ladder import NOTHING, Relief, Trouble, climb, would_help
from orchestrator.recover.classify import Outcome, Verdict
from orchestrator.store.rows import AttemptRow, JobRow

BEFORE_PASSES = frozenset({"start", "load", "export"})  # phases without a forward pass
ON_HOST = frozenset({"host-out-of-memory", "cgroup-killed", "kernel-killed"})


def after_out_of_memory(
    job: JobRow, attempt: AttemptRow, end: RankExit, error: dict[str, Any], status: AttemptStatus | None, now: float
) -> EndAttempt:
    """The next rung, or the explanation that there is none. A repeated run and a command stay what they are.

    No restart is used up, since the ladder is finite; `error` is what is told of the attempt, a job's error.
    """
    last = status.progress if status is not None else None
    phase = last.phase if last is not None else None
    story = Note("out-of-memory", told_of(end) | {"phase": phase, "step": last.step if last is not None else None})
    pinned = job.origin is not None and job.origin.pinned is not None
    key = (attempt.job_id, attempt.number, Outcome.OUT_OF_MEMORY)
    if pinned or not isinstance(job.job, TrainingJob):
        hint = "it repeats another run, so its plan is not changed" if pinned else would_help(job.job, attempt.plan)
        error = error | {"hint": hint}
        reason = Reason(code=ReasonCode.FAILED, sentence=error["message"], remedy=hint)
        return EndAttempt(*key, JobState.FAILED, reason, failed=True, error=error, notes=(story,))
    trouble = Trouble(loading=phase in BEFORE_PASSES, host=end.error is not None and end.error.code in ON_HOST)
    before = job.relief or NOTHING
    relief = climb(job.job, attempt.plan, before, trouble)
    if relief is None:
        error = error | does_not_fit(job.job, attempt.plan, before, end)
        reason = Reason(code=ReasonCode.FAILED, sentence=error["message"], remedy=error["hint"])
        return EndAttempt(*key, JobState.FAILED, reason, failed=True, error=error, notes=(story,))
    rung = relief.taken[-1]
    reason = Reason(
        code=ReasonCode.NEXT_RUNG,
        sentence=f"{ran_out(end)}; next: {rung.sentence}",
        remedy="nothing to do: it goes on from its last checkpoint with the same global batch",
    )
    climbed = Note("next-rung", {"rung": rung.rung.value, "sentence": rung.sentence})
    return EndAttempt(*key, JobState.QUEUED, reason, not_before=now, error=error, relief=relief, notes=(story, climbed))


def does_not_fit(job: AnyJob, ran: ExecutionPlan, relief: Relief, end: RankExit) -> dict[str, Any]:
    """Why no rung is left: what was tried, and what would help."""
    tried = "; ".join(taken.sentence for taken in relief.taken)
    tried = f"tried before: {tried}" if tried else "nothing else could be tried"
    return {
        "code": "does-not-fit",
        "message": f"{ran_out(end)}, with {described(ran)}, which takes the least that the yard knows of; {tried}",
        "hint": would_help(job, ran),
    }


def ran_out(end: RankExit) -> str:
    """`ran out of memory on rank 1 (the kernel killed it: its cgroup allows 1.0 GiB)`."""
    lines = (end.error.message if end.error is not None else "").splitlines()
    why = lines[0] if lines else "out of memory"
    return f"ran out of memory on rank {end.rank} ({why if len(why) <= 200 else why[:197] + '...'})"


def described(plan: ExecutionPlan) -> str:
    checkpointing = ", activation checkpointing" if plan.activation_checkpointing else ""
    offload = f", offload {plan.offload}" if plan.offload != "none" else ""
    rows = f"micro-batch {plan.micro_batch_size}"
    return f"{plan.engine} on {plan.world_size} × {plan.device}, {rows}{checkpointing}{offload}"


def told_of(end: RankExit) -> dict[str, Any]:
    """The cause as an event holds it."""
    error = end.error
    return {
        "rank": end.rank,
        "cause": error.code if error is not None else None,
        "message": ran_out(end),
        "limit_bytes": error.limit_bytes if error is not None else None,
        "used_bytes": error.used_bytes if error is not None else None,
    }


def peak_of(
    job: JobRow, attempt: AttemptRow, verdict: Verdict, exits: Sequence[RankExit], device: str, now: float
) -> Peak | None:
    """What to remember of an attempt that trained: what its ranks measured, or that it ran out."""
    key = key_of(job.job)
    ran_out = verdict.outcome == Outcome.OUT_OF_MEMORY
    measured = [end.result.peak_bytes for end in exits if end.result is not None]
    if key is None or not (measured or ran_out):
        return None
    error = verdict.first.error if verdict.first is not None else None
    used = error.used_bytes if error is not None else None
    return Peak(
        key=key,
        device_kind=device,
        world_size=attempt.plan.world_size,
        plan=attempt.plan,
        predicted=attempt.predicted,
        measured_bytes=used if ran_out else max(measured),
        limit_bytes=error.limit_bytes if error is not None else None,
        ran_out=ran_out,
        job_id=job.id,
        attempt=attempt.number,
        time=now,
    )


def device_kind(nodes: Sequence[Node], placement: Placement) -> str:
    """`cpu`, or the type of the GPUs that a placement holds."""
    if placement.device != "cuda":
        return "cpu"
    held = {(share.node, index) for share in placement.shares for index in share.gpus}
    types = {gpu.type for node in nodes for gpu in node.gpus if (node.id, gpu.index) in held}
    return min(types) if types else "cuda"
