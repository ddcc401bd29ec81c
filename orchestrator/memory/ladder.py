"""What to change in a plan that has run out of memory: one rung at a time, the cheapest first. Pure.

    allocator → smaller micro-batch → chunked loss → activation checkpointing → higher ZeRO stage
    → offload the optimizer → offload all → it does not fit

None of it changes what is trained: the global batch stays, and so does its order. A Relief is what has been given up so
far; it says so in limits, not as a plan, so that it holds on another number of ranks, too.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from launch.config import WHOLE_WEIGHTS, LossMode, Offload
from launch.contract import Allocator, EngineName, ExecutionPlan, Record
from orchestrator.job.spec import AnyJob, TrainingJob


class Rung(enum.StrEnum):
    ALLOCATOR = "allocator"
    MICRO_BATCH = "micro-batch"
    CHUNKED_LOSS = "chunked-loss"
    CHECKPOINTING = "activation-checkpointing"
    STAGE = "zero-stage"
    OFFLOAD_OPTIMIZER = "offload-optimizer"
    OFFLOAD_ALL = "offload-all"


OF_PASSES = frozenset({Rung.MICRO_BATCH, Rung.CHUNKED_LOSS, Rung.CHECKPOINTING})
"""They make forward and backward passes smaller: no help before there are any."""
OF_HOST = frozenset({Rung.STAGE})
"""What a GPU's host needs less for. Offload takes more of it."""

FIELDS = {
    Rung.ALLOCATOR: ("allocator",),
    Rung.MICRO_BATCH: ("micro_batch_size", "gradient_accumulation_steps"),
    Rung.CHUNKED_LOSS: ("loss",),
    Rung.CHECKPOINTING: ("activation_checkpointing",),
    Rung.STAGE: ("engine",),
    Rung.OFFLOAD_ALL: ("offload", "offload_path"),
}
"""What of a plan each rung changes."""

OFFLOADS: tuple[Offload, ...] = ("none", "optimizer", "all")


class Taken(Record):
    """A rung that was taken."""

    rung: Rung
    sentence: str
    """What it changed: `micro-batch 8 → 4, accumulation 1 → 2`."""


class Relief(Record):
    """Rungs taken so far, and the limits that they set to plans; null sets none."""

    taken: tuple[Taken, ...] = ()
    allocator: Allocator | None = None
    max_micro_batch: int | None = None
    loss: LossMode | None = None
    activation_checkpointing: bool | None = None
    min_stage: int = 0
    offload: Offload = "none"


NOTHING = Relief()


@dataclass(frozen=True)
class Trouble:
    """Circumstances of an out-of-memory that decide what could help."""

    loading: bool = False
    """There was no forward pass yet."""
    host: bool = False
    """It was the memory of the host, not of the device."""


def eased(job: AnyJob, plan: ExecutionPlan, relief: Relief) -> ExecutionPlan:
    """`plan` within the limits of `relief`, as far as the job and its device allow.

    Strategy and micro-batch are speed and memory alone, so a job file that names them says where to begin. What it says
    of checkpointing, loss mode and offload is kept. ZeRO is no help to a single process, except that offload needs it;
    on a CPU there is nowhere to offload to; some optimizers cannot run on ZeRO.
    """
    if not isinstance(job, TrainingJob):
        return plan
    changes: dict[str, Any] = {}
    if relief.allocator is not None:
        changes["allocator"] = relief.allocator
    micro = min(plan.micro_batch_size, relief.max_micro_batch or plan.micro_batch_size)
    if micro < plan.micro_batch_size:
        rows = -(-job.train.global_batch_size // plan.world_size)
        changes |= {"micro_batch_size": micro, "gradient_accumulation_steps": -(-rows // micro)}
    if relief.loss is not None and job.train.loss_mode is None and job.model.task == "causal-lm":
        changes["loss"] = relief.loss
    if relief.activation_checkpointing and job.train.activation_checkpointing is None:
        changes["activation_checkpointing"] = True
    if job.train.optimizer not in WHOLE_WEIGHTS:
        offload = relief.offload if plan.device == "cuda" and job.offload is None else "none"
        offload = max(plan.offload, offload, key=OFFLOADS.index)
        stage = max(plan.zero_stage, relief.min_stage if plan.world_size > 1 else 0)
        if offload != plan.offload:
            stage = max(stage, 3 if offload == "all" or job.offload_path else 2)
        if stage > 0:
            path = job.offload_path if offload != "none" else None
            changes |= {"engine": cast(EngineName, f"zero{stage}"), "offload": offload, "offload_path": path}
    return plan.model_copy(update=changes)


def climb(job: AnyJob, ran: ExecutionPlan, relief: Relief, trouble: Trouble = Trouble()) -> Relief | None:
    """`relief` and the next rung, after `ran` has run out of memory; None if no rung is left that could help."""
    for rung, more in _rungs(ran, relief):
        if (trouble.loading and rung in OF_PASSES) or (trouble.host and ran.device == "cuda" and rung not in OF_HOST):
            continue
        after = eased(job, ran, more)
        if after != ran:
            return more.model_copy(update={"taken": (*more.taken, Taken(rung=rung, sentence=difference(ran, after)))})
    return None


def _rungs(ran: ExecutionPlan, relief: Relief) -> Iterator[tuple[Rung, Relief]]:
    def more(**limits: Any) -> Relief:
        return relief.model_copy(update=limits)

    yield Rung.ALLOCATOR, more(allocator="tight")
    yield Rung.MICRO_BATCH, more(max_micro_batch=max(1, ran.micro_batch_size // 2))
    yield Rung.CHUNKED_LOSS, more(loss="chunked")
    yield Rung.CHECKPOINTING, more(activation_checkpointing=True)
    yield Rung.STAGE, more(min_stage=min(3, ran.zero_stage + 1))
    yield Rung.OFFLOAD_OPTIMIZER, more(offload=max(relief.offload, "optimizer", key=OFFLOADS.index))
    yield Rung.OFFLOAD_ALL, more(offload="all")


def limits_of(plan: ExecutionPlan) -> Relief:
    """The relief under which other plans demand no more than `plan`."""
    return Relief(
        allocator=plan.allocator,
        max_micro_batch=plan.micro_batch_size,
        loss=plan.loss,
        activation_checkpointing=plan.activation_checkpointing,
        min_stage=plan.zero_stage,
        offload=plan.offload,
    )


def steps(before: ExecutionPlan, after: ExecutionPlan) -> tuple[Taken, ...]:
    """The rungs that lead from one plan to the other, in their order."""
    found, at = [], before
    for rung, fields in FIELDS.items():
        then = at.model_copy(update={field: getattr(after, field) for field in fields})
        if then != at:
            found.append(Taken(rung=rung, sentence=difference(at, then)))
        at = then
    return tuple(found)


def demands_no_more(plan: ExecutionPlan, than: ExecutionPlan) -> bool:
    """Whether `plan` takes at most the memory that `than` takes, with regard to every rung."""
    return (
        plan.micro_batch_size <= than.micro_batch_size
        and plan.zero_stage >= than.zero_stage
        and plan.activation_checkpointing >= than.activation_checkpointing
        and OFFLOADS.index(plan.offload) >= OFFLOADS.index(than.offload)
        and (plan.loss == than.loss or plan.loss == "chunked")
        and (plan.allocator == than.allocator or plan.allocator == "tight")
    )


NAMES = {
    "engine": "engine",
    "world_size": "ranks",
    "allocator": "allocator",
    "micro_batch_size": "micro-batch",
    "gradient_accumulation_steps": "accumulation",
    "loss": "loss",
    "activation_checkpointing": "activation checkpointing",
    "offload": "offload",
    "precision": "precision",
}


def difference(before: ExecutionPlan, after: ExecutionPlan) -> str:
    """What `after` has otherwise: `micro-batch 8 → 4, accumulation 1 → 2`; empty if nothing."""
    told = {True: "on", False: "off"}
    changes = [(name, getattr(before, field), getattr(after, field)) for field, name in NAMES.items()]
    return ", ".join(
        f"{name} {told[old] if isinstance(old, bool) else old} → {told[new] if isinstance(new, bool) else new}"
        for name, old, new in changes
        if old != new
    )


def would_help(job: AnyJob, ran: ExecutionPlan) -> str:
    """What a user could change where no rung is left, in one line."""
    if not isinstance(job, TrainingJob):
        return "the yard cannot change what a command needs: give it less to do, or a node with more memory"
    kept = []
    if job.train.activation_checkpointing is False:
        kept.append("train.activation_checkpointing: false")
    if job.train.loss_mode == "whole" and job.model.task == "causal-lm":
        kept.append("train.loss_mode: whole")
    if job.offload is not None and job.offload != "all" and ran.device == "cuda":
        kept.append(f"offload: {job.offload}")
    ways = [f"remove `{one}`, which is kept because the job file says it" for one in kept]
    if job.train.optimizer in WHOLE_WEIGHTS:
        ways.append("another optimizer, which ZeRO can shard")
    else:
        ways.append("more processes (resources.num_processes), over which ZeRO-3 shards the state")
    if job.train.optimizer == "adamw":
        ways.append("train.optimizer: lion, which remembers half as much")
    if ran.precision == "fp32":
        ways.append("train.precision: bf16")
    if job.adapter is None:
        ways.append("an adapter (adapter: {type: lora})")
    ways.append(f"a smaller data.max_length than {job.data.max_length}")
    if job.train.eval_batch_size is not None:
        ways.append("a smaller train.eval_batch_size")
    ways.append("a smaller model, or nodes with more memory")
    return "what would help: " + "; ".join(ways)
