"""What a rank tells of its training: when it ends, and in a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from launch.config import LossMode
from launch.contract import Allocator, RankResult, TrainSummary
from launch.engine import Engine, peak_bytes
from launch.saving import LoopState

if TYPE_CHECKING:
    from launch.train import Loop


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


def summary_of(loop: Loop) -> TrainSummary:
    return TrainSummary(
        steps=loop.step,
        samples=loop.consumed,
        samples_per_s=loop.progress.samples_per_s(loop.consumed),
        losses=tuple(loop.losses),
        first_step_at=loop.first_step_at,
        stopped_early=loop.stopped_early,
        skipped_steps=loop.skipped,
        rollbacks=loop.guard.rollbacks,
        best_step=loop.best.state.step if loop.best is not None and loop.best.state is not None else None,
        dropped_rows=loop.corpus.dropped,
    )


def state_of(loop: Loop) -> LoopState:
    """Where the loop is, or was when the step began that has not ended."""
    place = loop.place
    return LoopState(
        fingerprint=loop.fingerprint,
        losses=tuple(loop.losses[: place.losses] if place is not None else loop.losses),
        early_stop=loop.early_stop.state if loop.early_stop is not None else None,
        curve=tuple(loop.progress.curve),
        skipped=place.skipped if place is not None else loop.skipped,
        best=loop.best.state if loop.best is not None else None,
        owes=loop.owes,
        left_out=tuple(loop.guard.left_out),
        rollbacks=loop.guard.rollbacks,
    )
