"""How a job fits: from what was asked and where it was placed to an ExecutionPlan. Pure."""

from __future__ import annotations

from typing import cast

from launch.config import Offload
from launch.contract import Device, EngineName, ExecutionPlan
from orchestrator.job.spec import AnyJob, CommandJob
from orchestrator.memory.ladder import NOTHING, Relief, eased

MAX_MICRO_BATCH = 32


def plan(
    job: AnyJob, world_size: int, device: Device, relief: Relief | None = None, *, bf16: bool = False
) -> ExecutionPlan:
    """The plan of `job` on `world_size` ranks of `device`, each of which multiplies `bf16` or not, within the limits of
    `relief`."""
    return eased(job, _first_choice(job, world_size, device, bf16), relief or NOTHING)


def _first_choice(job: AnyJob, world_size: int, device: Device, bf16: bool) -> ExecutionPlan:
    """`auto` is DDP, or a single process where there is one."""
    engine = _engine(job.strategy, world_size)
    if isinstance(job, CommandJob):
        return ExecutionPlan(
            engine=engine, world_size=world_size, device=device, micro_batch_size=1, gradient_accumulation_steps=1
        )
    rows = -(-job.train.global_batch_size // world_size)
    micro = min(job.train.micro_batch_size or MAX_MICRO_BATCH, rows)
    offload: Offload = (job.offload or "none") if engine.startswith("zero") else "none"
    return ExecutionPlan(
        engine=engine,
        world_size=world_size,
        device=device,
        micro_batch_size=micro,
        gradient_accumulation_steps=-(-rows // micro),
        precision=job.train.precision_on(bf16=bf16),
        offload=offload,
        offload_path=job.offload_path if offload != "none" else None,
        activation_checkpointing=bool(job.train.activation_checkpointing),
        loss=job.train.loss_mode or "chunked",
    )


def _engine(strategy: str, world_size: int) -> EngineName:
    if strategy == "auto":
        return "single" if world_size == 1 else "ddp"
    if strategy == "ddp" and world_size == 1:
        return "single"
    return cast(EngineName, strategy)
