"""The contract of a job file that is run without an orchestrator, from what `accelerate launch` set up."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from launch.config import TrainSpec, load_train_spec
from launch.contract import ALONE, Device, ExecutionPlan, NodeShare, Origin, RunContract, checkpoints_of_job
from launch.document import read_document
from launch.errors import SpecError
from launch.git import git_state
from launch.sampler import micro_steps

DEFAULT_MICRO_BATCH = 8  # rows; without a planner nobody knows what fits


def contract_alone(config: Path, overrides: Sequence[str], output: Path | None, world_size: int) -> RunContract:
    """Every rank builds the same contract, for `world_size` processes that are already running.

    The run's directory is `runs/<name>` beside the job file, the model directory inside it. Every start is an attempt
    of its own, and goes on from the checkpoints of those before: its number is found when it begins.

    Raises:
        SpecError: a fault in the job file, a strategy that does not fit the number of processes, or a precision that
            each host would choose for itself.
    """
    spec = load_train_spec(read_document(config, overrides))
    if spec.strategy == "single" and world_size != 1:
        raise SpecError(
            f"strategy: single is one process, and the launcher started {world_size}",
            code="wrong-number-of-processes",
            field="strategy",
            file=config,
            hint="pass --num_processes 1, or take strategy ddp, zero1, zero2 or zero3",
        )
    run_dir = config.resolve().parent / "runs" / spec.name
    model_dir = output.resolve() if output else Path(spec.output_dir) if spec.output_dir else run_dir / "model"
    if spec.train.precision == "auto" and world_size > int(os.environ.get("LOCAL_WORLD_SIZE", world_size)):
        raise SpecError(
            "train.precision: auto, and processes on several hosts, which may differ",
            code="precision-undecided",
            field="train.precision",
            file=config,
            hint="say bf16 or fp32; or let a yard plan the job",
        )
    share = NodeShare(node=socket.gethostname(), address="127.0.0.1", processes=world_size)
    return RunContract(
        run_id=f"{spec.name}.{ALONE}",
        job_id=spec.name,
        attempt=ALONE,
        plan=plan_alone(spec, world_size, device_here()),
        nodes=(share,),
        main_port=int(os.environ.get("MASTER_PORT", "0")),
        run_dir=str(run_dir),
        output_dir=str(model_dir),
        checkpoint_dir=checkpoints_of_job(spec.checkpoint.directory, spec.name, run_dir),
        tracker_dir=str(run_dir / "trackers"),
        spec=spec,
        origin=Origin(git=git_state(config)),
    )


def plan_alone(spec: TrainSpec, world_size: int, device: Device) -> ExecutionPlan:
    """The plan that the job file itself spells out."""
    from launch.precision import has_bf16

    assert spec.strategy != "auto"
    rows = -(-spec.train.global_batch_size // world_size)
    micro_batch = min(spec.train.micro_batch_size or DEFAULT_MICRO_BATCH, rows)
    return ExecutionPlan(
        engine=spec.strategy,
        world_size=world_size,
        device=device,
        micro_batch_size=micro_batch,
        gradient_accumulation_steps=micro_steps(spec.train.global_batch_size, world_size, micro_batch),
        precision=spec.train.precision_on(bf16=has_bf16(device)),
        offload=spec.offload or "none",
        offload_path=spec.offload_path if spec.offload else None,
        activation_checkpointing=bool(spec.train.activation_checkpointing),
        loss=spec.train.loss_mode or "chunked",
    )


def device_here() -> Device:
    """cuda if there is one and nobody said otherwise."""
    said_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or os.environ.get("DS_ACCELERATOR") == "cpu"
    if said_cpu:
        return "cpu"
    import torch.cuda

    return "cuda" if torch.cuda.is_available() else "cpu"
