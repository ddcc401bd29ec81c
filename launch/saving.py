"""When a training saves, what of its loop goes into a checkpoint, and what is told of it."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from launch.best import Best, BestState
from launch.checkpoint.checkpoints import Checkpoints
from launch.checkpoint.draft import Policy
from launch.checkpoint.interval import MEAN_TIME_BETWEEN_FAILURES_S, interval
from launch.checkpoint.manifest import CheckpointError, Manifest, Unusable
from launch.checkpoint.retention import Retention
from launch.checkpoint.storage import open_storage
from launch.config import TrainSpec
from launch.contract import CheckpointNote, ProgressLine, RunContract
from launch.engine import Engine
from launch.metrics import EarlyStopState, sign_of
from launch.progress import Progress

FIRST_BLOCKED_S, FIRST_SAVE_S = 0.1, 1.0
"""Taken for the cost of a save until one has been measured."""

LAST_MINUTE_S = 20.0
"""For how long a rank that has failed waits for a save to be committed; if a peer died, it notices at once."""


Owed = Literal["evaluation", "end"]
"""The evaluation after this step; or all that follows the last step, whichever that was."""


class LoopState(BaseModel):
    """Where the loop was, beside step and consumed samples."""

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    """Of the training data: another one makes another order, in which the consumed samples mean nothing."""
    losses: tuple[float, ...]
    early_stop: EarlyStopState | None = None
    curve: tuple[ProgressLine, ...]
    skipped: int = 0
    best: BestState | None = None
    """Its weights are among the tensors, as `best/NAME`."""
    owes: Owed | None = None
    """What was broken off by a stop, and is to be done before the next step."""


class Saving:
    """The checkpoints of one training. Called by all ranks alike, but for `is_due_by_time`, `has_failed` and `tell`."""

    def __init__(
        self, contract: RunContract, engine: Engine, tokenizer: PreTrainedTokenizerBase, progress: Progress
    ) -> None:
        spec = contract.spec
        assert spec is not None
        self._spec, self._progress = spec.checkpoint, progress
        self._rank = engine.accelerator.process_index
        self._checkpoints = Checkpoints(
            engine.state(),
            open_storage(contract.checkpoint_dir),
            attempt=contract.attempt or None,
            job=contract.job_id,
            plan=contract.plan,
            rank=self._rank,
            policy=policy_of(spec),
            assets=lambda: files_for_export(engine, tokenizer, spec),
        )
        self._mtbf_s = contract.mtbf_s or MEAN_TIME_BETWEEN_FAILURES_S / len(contract.nodes)
        self._auto = self._spec.every_steps == "auto"
        self._auto_s = interval(FIRST_BLOCKED_S, FIRST_SAVE_S, self._mtbf_s)
        self._last = time.monotonic()
        self._saved_at: int | None = None
        self._saves: dict[int, tuple[dict[str, float], float]] = {}
        """Step → seconds by phase before its save, and for how long the call held training up: until it is known what
        became of it."""

    @property
    def attempt(self) -> int:
        """Known once `resume` was called."""
        assert self._checkpoints.attempt is not None
        return self._checkpoints.attempt

    def resume(self, fingerprint: str, best: Best | None) -> tuple[Manifest, LoopState] | None:
        """Load the newest good checkpoint into engine and `best`, and return where the loop was; None if there is none.

        Raises:
            Unusable: what there is cannot be gone on from: other data, another model, or all of it is damaged.
            CheckpointError: the store does not work, or a higher attempt has begun.
        """

        def accept(manifest: Manifest) -> Mapping[str, torch.Tensor]:
            state = LoopState.model_validate(manifest.loop)
            if state.fingerprint != fingerprint:
                raise Unusable(
                    f"{manifest.id} was saved while training on other data: its place in them means nothing here",
                    code="data-changed",
                    field="data.train",
                    hint="put the data back as they were, or begin a new job",
                )
            return best.room(state.best) if best is not None and state.best is not None else {}

        manifest = self._checkpoints.resume(accept)
        self.tell()
        self._checkpoints.prepare()
        if manifest is None:
            return None
        self._saved_at = manifest.step
        return manifest, LoopState.model_validate(manifest.loop)

    def is_due(self, step: int) -> bool:
        """Whether the job file names this step."""
        return isinstance(self._spec.every_steps, int) and step % self._spec.every_steps == 0

    def is_due_by_time(self) -> bool:
        """Whether it is time to save; rank 0 alone has a clock for it."""
        if self._rank != 0:
            return False
        limits = [self._auto_s] if self._auto else []
        if self._spec.every_minutes is not None:
            limits.append(60 * self._spec.every_minutes)
        return bool(limits) and time.monotonic() - self._last >= min(limits)

    def has_failed(self) -> bool:
        """Whether the last save has failed in a way that ends the training, so far as this rank knows."""
        return self._checkpoints.failed()

    def save(
        self,
        step: int,
        consumed: int,
        state: LoopState,
        metrics: dict[str, float] | None,
        best: Best | None,
        *,
        wait: bool = False,
    ) -> None:
        """Save, unless this step is saved already; with `wait`, return when it is committed or has failed.

        Raises:
            CheckpointError: as Checkpoints.save.
        """
        if wait:
            self.finish()  # all ranks know then whether this very step is saved, or has failed to be
        if self._saved_at != step:
            self._last = time.monotonic()
            self._progress.phase("save", step, samples=consumed)
            spent = self._progress.pulse.spent
            held_up_s = self._checkpoints.save(
                step,
                consumed,
                loop=state.model_dump(mode="json", exclude_none=True),
                metrics=metrics,
                best=best.weights if best is not None else None,
                wait=wait,
            )
            self._saved_at = step
            self._saves[step] = spent, held_up_s
        self.tell()
        if wait:
            self._progress.pulse.enter("done", step)

    def await_copy(self) -> None:
        """Before weights change other than by the optimizer: the last save may still be copying them."""
        self._checkpoints.await_copy()

    def finish(self) -> None:
        """Wait for what is being written. Raises as `save`."""
        try:
            self._checkpoints.finish()
        finally:
            self.tell()

    def conclude(self) -> None:
        """Wait for what is being written, at the end of a training whose model is there: a save that fails is told."""
        with contextlib.suppress(CheckpointError):
            self.finish()

    def let_finish(self) -> None:
        """Give what is being written a little time to be committed, whatever it is that ends this rank."""
        self._checkpoints.let_finish(LAST_MINUTE_S)
        self.tell()

    def tell(self) -> None:
        """Write down what became of checkpoints, and learn what they cost."""
        for note in self._checkpoints.news():
            if note.outcome == "committed" and note.blocked_s is not None and note.save_s is not None:
                self._auto_s = interval(note.blocked_s, note.save_s, self._mtbf_s)
            if note.outcome in ("committed", "failed"):
                spent, held_up_s = self._saves.pop(note.step, (None, 0.0))
                # Where a step had to wait for the copy, that was no training.
                self._progress.pulse.blocked((note.blocked_s or 0.0) - held_up_s)
                note = note.model_copy(update={"spent": spent})
            if note.outcome == "failed" and note.step == self._saved_at:
                self._saved_at = None  # a planned stop at this step tries again
            if self._rank == 0:
                self._progress.checkpoint(note)
                if note.outcome in ("failed", "not-tidied"):
                    print(_words(note), flush=True)


def policy_of(spec: TrainSpec) -> Policy:
    early, checkpoint = spec.train.early_stopping, spec.checkpoint
    metric = early.metric if early is not None else "loss"
    return Policy(
        retention=Retention(
            keep_last=checkpoint.keep_last,
            keep_every=checkpoint.keep_every,
            keep_best=checkpoint.keep_best,
            higher_is_better=sign_of(metric) < 0,
        ),
        metric=metric,
        asynchronous=checkpoint.asynchronous,
        host_memory=None if checkpoint.host_memory_gb is None else int(checkpoint.host_memory_gb * 1e9),
        stop_on_error=checkpoint.on_error == "stop",
    )


def files_for_export(engine: Engine, tokenizer: PreTrainedTokenizerBase, spec: TrainSpec) -> dict[str, bytes]:
    """What an export of a checkpoint needs beside weights: configuration, tokenizer, adapter, job."""
    module = engine.module
    with tempfile.TemporaryDirectory(prefix="tuneyard-") as folder:
        module.config.save_pretrained(folder)
        if getattr(module, "generation_config", None) is not None:
            module.generation_config.save_pretrained(folder)
        for adapter in getattr(module, "peft_config", {}).values():
            adapter.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
    return files | {"job.json": spec.model_dump_json(indent=2).encode()}


def _words(note: CheckpointNote) -> str:
    what = "was not saved" if note.outcome == "failed" else "is saved, but older ones could not be deleted"
    return f"checkpoint {note.id} {what}: [{note.code}] {note.message}"
