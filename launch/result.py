"""What a rank reports of itself when it ends."""

from __future__ import annotations

from typing import NamedTuple

from launch.config import LossMode
from launch.contract import Allocator, RankResult, TrainSummary
from launch.engine import Engine, peak_bytes


class Found(NamedTuple):
    """What a rank has found of itself that its engine does not know."""

    loss: LossMode
    allocator: Allocator
    baseline_bytes: int


def rank_result(
    engine: Engine, found: Found, summary: TrainSummary, metrics: dict[str, float] | None, output_dir: str | None
) -> RankResult:
    """What is running and what it has used; rank 0 adds what is the same on all ranks."""
    live = engine.describe()
    main = engine.accelerator.process_index == 0
    return RankResult(
        engine=live.engine,
        zero_stage=live.zero_stage,
        world_size=live.world_size,
        micro_batch_size=live.micro_batch_size,
        gradient_accumulation_steps=live.gradient_accumulation_steps,
        precision=live.precision,
        offload=live.offload,
        activation_checkpointing=live.activation_checkpointing,
        loss=found.loss,
        allocator=found.allocator,
        baseline_bytes=found.baseline_bytes,
        peak_bytes=peak_bytes(engine.accelerator.device),
        moment_bytes=engine.moment_bytes(),
        master_bytes=engine.master_bytes(),
        metrics=metrics if main else None,
        train=summary if main else None,
        output_dir=output_dir if main else None,
    )
