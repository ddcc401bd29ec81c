"""Saving and resuming training on the same topology: equal engine and equal world size.

Not imported by the package itself, whose manifest the orchestrator reads without torch.

A checkpoint is the directory `step-N`, written as `step-N.tmp` by all ranks and complete once it holds COMMITTED.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from launch.best import Best, BestState
from launch.contract import EngineName, ExecutionPlan, ProgressLine
from launch.engine import Engine
from launch.metrics import EarlyStopState

COMMITTED = "COMMITTED"
STATE = "loop.json"


class LoopState(BaseModel):
    """Where the loop was. The data position is `consumed`: the sampler is a pure function of it."""

    model_config = ConfigDict(frozen=True)

    engine: EngineName
    world_size: int
    fingerprint: str
    """Of the training data: another one makes another order, in which `consumed` means nothing."""
    step: int
    consumed: int
    losses: tuple[float, ...]
    early_stop: EarlyStopState | None
    curve: tuple[ProgressLine, ...]
    skipped: int = 0
    best: BestState | None = None


def save(engine: Engine, state: LoopState, best: Best | None, directory: Path, keep_last: int) -> None:
    """Write weights, optimizer, random state, `state` and the best weights as `directory/step-N`; all ranks call it.

    The commit is a marker that rank 0 writes after every rank's files are on disk. Then older ones are deleted.

    Raises:
        OSError: the directory cannot be written.
    """
    unfinished = directory / f"step-{state.step}.tmp"
    main = engine.accelerator.is_main_process
    if main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    barrier()
    engine.accelerator.save_state(str(unfinished))
    if best is not None:
        best.save(unfinished)
    barrier()
    if not main:
        barrier()
        return
    (unfinished / STATE).write_text(state.model_dump_json())
    for path in unfinished.rglob("*"):
        if path.is_file():
            _sync(path)
    final = directory / f"step-{state.step}"
    shutil.rmtree(final, ignore_errors=True)
    unfinished.rename(final)
    (final / COMMITTED).touch()
    _sync(final / COMMITTED)
    _sync(final)
    _sync(directory)
    for old in committed(directory)[keep_last:]:
        (old / COMMITTED).unlink()  # first, so that a half-deleted one is never taken for whole
        shutil.rmtree(old)
    barrier()


def resume(
    engine: Engine, plan: ExecutionPlan, fingerprint: str, best: Best | None, directory: Path
) -> LoopState | None:
    """Load the newest committed checkpoint that fits, and return where the loop was; None where there is none.

    One of another engine, world size or data is passed over, and the log says so. All ranks call it; rank 0 decides.
    """
    chosen: list[str | None] = [None]
    if engine.accelerator.is_main_process:
        for path in committed(directory):
            state = LoopState.model_validate_json((path / STATE).read_bytes())
            if (state.engine, state.world_size, state.fingerprint) == (plan.engine, plan.world_size, fingerprint):
                chosen = [str(path)]
                break
            print(f"{path} is of {state.engine} on {state.world_size} processes, or of other data: not resumed from")
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(chosen, src=0)
    if chosen[0] is None:
        return None
    engine.accelerator.load_state(chosen[0])
    state = LoopState.model_validate_json((Path(chosen[0]) / STATE).read_bytes())
    if best is not None:
        best.load(Path(chosen[0]), state.best)
    return state


def committed(directory: Path) -> list[Path]:
    """Complete checkpoints, the newest first."""
    found = [path.parent for path in directory.glob(f"step-*/{COMMITTED}")]
    return sorted((path for path in found if path.suffix != ".tmp"), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
