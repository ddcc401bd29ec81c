"""Checkpoints for a training script of one's own, with what `accelerator.prepare` returned."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from launch.attempt import ENV_CHECKPOINT_DIR, ENV_PROGRESS_FILE, ENV_RUN_ID
from launch.checkpoint.checkpoints import Checkpoints
from launch.checkpoint.draft import Policy
from launch.checkpoint.manifest import Manifest
from launch.checkpoint.state import ZeroState, state_of
from launch.checkpoint.storage import open_storage
from launch.contract import ExecutionPlan, ProgressLine


class ScriptCheckpoints(Checkpoints):
    """Checkpoints whose place in the data is a number of steps. What becomes of them is told in the job's progress."""

    def save(self, step: int, samples: int = 0, **options: Any) -> float:
        blocked = super().save(step, samples, **options)
        self._tell()
        return blocked

    def finish(self) -> None:
        try:
            super().finish()
        finally:
            self._tell()

    def resume_step(self) -> int:
        """Load the newest good checkpoint, if there is one, and return its step; 0 without one. Raises as `resume`."""
        return self.resume_loop()[0]

    def resume_loop(self) -> tuple[int, dict[str, Any]]:
        """The same, with what was saved as `loop`."""
        manifest: Manifest | None = self.resume()
        self._tell()
        return (0, {}) if manifest is None else (manifest.step, dict(manifest.loop))

    def _tell(self) -> None:
        notes = self.told()
        if self._ranks.main and ENV_PROGRESS_FILE in os.environ:
            with Path(os.environ[ENV_PROGRESS_FILE]).open("a", encoding="utf-8") as out:
                for note in notes:
                    line = ProgressLine(time=time.time(), phase="save", step=note.step, checkpoint=note)
                    out.write(line.model_dump_json(exclude_none=True) + "\n")


def checkpoints_of(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    directory: str | Path | None = None,
    *,
    policy: Policy | None = None,
    assets: Mapping[str, bytes] | None = None,
) -> ScriptCheckpoints:
    """The checkpoints of a script that trains `model` with `optimizer`, both as `accelerator.prepare` returned them.

    `directory` is a path or URL, by default the one that Tuneyard gives the job, else `checkpoints`. `assets` are files
    that an export needs beside the weights. All ranks call everything alike; call `finish()` before the script ends.
    """
    state = state_of(accelerator, model, optimizer)
    where = str(directory or os.environ.get(ENV_CHECKPOINT_DIR) or "checkpoints")
    job, _, attempt = os.environ.get(ENV_RUN_ID, "script").rpartition(".")
    sharded = isinstance(state, ZeroState)
    world_size = accelerator.num_processes
    precision = accelerator.mixed_precision
    plan = ExecutionPlan(
        engine=f"zero{model.zero_optimization_stage()}" if sharded else "ddp" if world_size > 1 else "single",
        world_size=world_size,
        device=accelerator.device.type,
        micro_batch_size=1,  # the script's own affair
        gradient_accumulation_steps=accelerator.gradient_accumulation_steps,
        precision=precision if precision in ("bf16", "fp16") else "fp32",
    )
    return ScriptCheckpoints(
        state,
        open_storage(where),
        attempt=int(attempt) if job and attempt.isdigit() else None,
        job=job or "script",
        plan=plan,
        rank=accelerator.process_index,
        policy=policy or Policy(),
        assets=lambda: assets or {},
    )
