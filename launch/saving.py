"""When a training saves, what of its loop goes into a checkpoint, and what is told of it."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from launch.best import Best, BestState
from launch.checkpoint import random_state
from launch.checkpoint.beginning import Accept
from launch.checkpoint.checkpoints import Checkpoints
from launch.checkpoint.copies import AREA
from launch.checkpoint.draft import Policy
from launch.checkpoint.interval import MEAN_TIME_BETWEEN_FAILURES_S, interval
from launch.checkpoint.manifest import CheckpointError, Manifest, Unusable
from launch.checkpoint.memory import MemoryCopies, Source, leave_in_store
from launch.checkpoint.retention import Retention
from launch.checkpoint.state import buffers
from launch.checkpoint.storage import open_storage
from launch.config import TrainSpec
from launch.contract import CheckpointNote, ProgressLine, RunContract
from launch.engine import Engine
from launch.errors import TuneyardError
from launch.guard import Explosion
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
    left_out: tuple[tuple[int, int], ...] = ()
    """Steps, from and to, that are not trained, since the loss exploded at them."""
    rollbacks: int = 0
    owes: Owed | None = None
    """What was broken off by a stop, and is to be done before the next step."""


class Place(NamedTuple):
    """Where a loop was between two steps, and this rank's random numbers then."""

    step: int
    consumed: int
    losses: int
    """How many."""
    skipped: int
    random: random_state.Moment


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
            url=contract.checkpoint_dir,
        )
        self._engine, self._contract = engine, contract
        self._copies: MemoryCopies | None = None  # once the attempt has a number
        self._copied_at: int | None = None
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

        manifest = self._checkpoints.resume(self._accepting(fingerprint, best))
        self.tell()
        self._checkpoints.prepare()
        if self._spec.memory_every_steps is not None:
            cuda = self._contract.plan.device == "cuda"
            url = self._contract.checkpoint_dir
            self._copies = MemoryCopies(self._source(), url, self.attempt, self._rank, cuda=cuda)
        if manifest is None:
            return None
        self._saved_at = manifest.step
        return manifest, LoopState.model_validate(manifest.loop)

    def roll_back(
        self, why: Explosion, consumed: tuple[int, int], fingerprint: str, best: Best | None
    ) -> tuple[Manifest, LoopState] | None:
        """Load the newest good checkpoint from before the explosion, delete what this attempt has saved since, and tell
        of it; None if there is none. `consumed` are the samples that are left out: consumed before, and after.

        Raises:
            CheckpointError: the store fails, or a higher attempt has begun.
        """
        with contextlib.suppress(CheckpointError):
            self.finish()
        if self._copies is not None:
            self._copies.invalidate()
        manifest = self._checkpoints.go_back(why.first, self._accepting(fingerprint, best))
        if manifest is None:
            return None
        self._saved_at = manifest.step
        self._saves.clear()
        if self._rank == 0:
            message = f"{why}; steps {why.first} to {why.last} are left out: samples {consumed[0]} to {consumed[1]}"
            note = {"outcome": "rolled-back", "code": "loss-exploded", "message": message}
            self._progress.checkpoint(CheckpointNote(id=manifest.id, step=manifest.step, **note))
        return manifest, LoopState.model_validate(manifest.loop)

    def _accepting(self, fingerprint: str, best: Best | None) -> Accept:
        """What looks at a manifest before it is loaded, and makes room for the best weights."""

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

        return accept

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

    def copies_at(self, step: int) -> bool:
        """Whether the job file names this step for copies in memory."""
        every = self._spec.memory_every_steps
        return isinstance(every, int) and step % every == 0

    def copies_by_time(self) -> bool:
        """Whether it is time for copies in memory; rank 0 alone has a clock for it."""
        auto = self._rank == 0 and self._spec.memory_every_steps == "auto"
        return auto and self._copies is not None and self._copies.is_due()

    def copy(self, step: int, consumed: int, state: LoopState, best: Best | None) -> None:
        """Copy this rank's state into the node's memory."""
        if self._copies is None:
            return
        silent = self._copies.failed is None
        loop = state.model_dump(mode="json", exclude_none=True)
        self._copies.copy(step, consumed, loop, best.weights if best is not None else None)
        if self._copies.failed is None:
            self._copied_at = step
        elif silent:
            print(self._copies.failed, flush=True)

    def leave(self, problem: Exception, place: Place, state: LoopState, best: Best | None) -> None:
        """For a rank that is about to end by `problem`: if it has all of the state, write that into the store, unless
        it is there, or another rank does so. The next attempt goes on from it (checkpoint/copies.py)."""
        if self._contract.plan.zero_stage > 0 or buffers(self._engine.module) or isinstance(problem, TuneyardError):
            return  # it has a part; or what a forward pass changes is that of the step that failed; or it would again
        if place.step in (0, self._copied_at) or (place.step == self._saved_at and not self._checkpoints.failed()):
            return
        self._progress.pulse.enter("save", place.step)  # the agent gives more time to a rank that saves
        storage = open_storage(self._contract.checkpoint_dir)
        where = f"{AREA}/attempt-{self.attempt}/step-{place.step}.rank-{self._rank}"
        loop = state.model_dump(mode="json", exclude_none=True)
        weights = best.weights if best is not None else None
        random = random_state.capture(place.random)

        def write() -> None:
            with contextlib.suppress(CheckpointError):
                taken = f"{AREA}/attempt-{self.attempt}/step-{place.step}.taken"
                if storage.create(taken, str(self._rank).encode()):
                    leave_in_store(
                        storage, self._source(whole=True), where, place.step, place.consumed, loop, random, weights
                    )

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(LAST_MINUTE_S)

    def forget_copies(self) -> None:
        """Free the memory of copies, once all ranks need them no more."""
        if self._copies is not None:
            self._copies.forget()

    def _source(self, *, whole: bool = False) -> Source:
        return Source(
            self._engine.state(),
            job=self._contract.job_id,
            plan=self._contract.plan,
            attempt=self.attempt,
            rank=self._rank,
            whole=whole,
        )

    @property
    def random_restored(self) -> bool:
        """After `resume`: whether this rank goes on with the random numbers that it had."""
        return self._checkpoints.random_restored

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

    def saved(self, step: int) -> bool:
        """Whether the state of `step` is saved, as far as is known: certain after a `save` that has waited."""
        return self._saved_at == step

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
        if not self._checkpoints.let_finish(LAST_MINUTE_S):
            self._saved_at = None
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
