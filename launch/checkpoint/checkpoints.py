"""Saving and resuming, as a training loop sees it: the life of a checkpoint from the copy to the commit.

A save copies this rank's parts into host memory; a thread writes them, votes, commits and tidies up. The thread has a
process group of its own, so that its collectives never meet the training's.
"""

from __future__ import annotations

import functools
import os
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from launch.checkpoint import random_state
from launch.checkpoint.assets import store_assets
from launch.checkpoint.catalogue import Catalogue
from launch.checkpoint.manifest import (
    CheckpointError,
    CheckpointId,
    Damaged,
    LogicalTensor,
    Manifest,
    Superseded,
    Unusable,
)
from launch.checkpoint.plans import PartsLoadPlanner, PartsSavePlanner
from launch.checkpoint.retention import Retention, superfluous
from launch.checkpoint.shards import ShardReader, ShardWriter, Written
from launch.checkpoint.snapshot import HostBuffer, Layout, streamed_blocks
from launch.checkpoint.state import Part, TrainingState, logical
from launch.checkpoint.storage import Storage
from launch.contract import CheckpointNote, ExecutionPlan

BEST = "best"
_PATIENCE = timedelta(hours=12)
"""How long ranks wait for the slowest one's storage; a rank that dies is noticed at once."""

# One process has no group, and DCP says so at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

T = TypeVar("T")


@dataclass(frozen=True)
class Policy:
    """How to save, beside when."""

    retention: Retention = field(default_factory=Retention)
    metric: str | None = None
    """Which of a checkpoint's metrics retention.keep_best looks at."""
    asynchronous: bool = True
    host_memory: int | None = None
    """Bytes of a rank's copy; more is written straight from the live tensors while training waits. None: half of what
    is free on the host, by rank."""
    stop_on_error: bool = False
    """Whether a save that fails ends the training, or training goes on with the checkpoints that there are."""


@dataclass
class Draft:
    """What is to become a manifest."""

    step: int
    samples: int
    loop: dict[str, Any]
    metrics: dict[str, float] | None
    scalars: dict[str, float]
    tensors: dict[str, LogicalTensor]
    parts: list[Part] = field(repr=False)


class Checkpoints:
    """The checkpoints of one attempt. Every method is called by all ranks alike, but for `news`, `failed`."""

    def __init__(
        self,
        state: TrainingState,
        storage: Storage,
        *,
        attempt: int | None,
        job: str,
        plan: ExecutionPlan,
        rank: int,
        policy: Policy = Policy(),
        assets: Callable[[], Mapping[str, bytes]] = dict,
    ) -> None:
        """`attempt` None is the one after the highest that has begun; `assets` gives files that an export needs."""
        self.attempt = attempt
        self._state, self._catalogue, self._storage = state, Catalogue(storage), storage
        self._job, self._plan, self._rank, self._policy, self._assets = job, plan, rank, policy, assets
        self._group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE) if plan.world_size > 1 else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[CheckpointNote] | None = None
        self._notes: list[CheckpointNote] = []
        self._buffer: HostBuffer | None = None
        self._preparing: Future[HostBuffer] | None = None
        self._budget: int | None = None
        self._fitting: dict[bool, bool] = {}
        self._parent: CheckpointId | None = None
        self._values: dict[CheckpointId, float] = {}
        self._assets_id: str | None = None
        self.read_bytes = 0
        """Bytes that this rank read to resume."""

    def resume(
        self, accept: Callable[[Manifest], Mapping[str, torch.Tensor]] = lambda _manifest: {}
    ) -> Manifest | None:
        """Begin this attempt, and load the newest good checkpoint of the lineage into the live state; None if the job
        has none yet. `accept` is shown the manifest before anything is loaded: it may refuse it by raising, and
        returns the weights to fill with those that were saved as `best`.

        Raises:
            Superseded: a higher attempt has begun.
            Unusable: every checkpoint is damaged, or the newest good one does not fit this training.
            CheckpointError: the store fails.
        """
        self.attempt, lineage = self._by_main(self._begin)
        for found in lineage:
            loaded = self._load(found, accept)
            if loaded is not None:
                self._by_main(functools.partial(self._claim, found))
                self._parent = found
                self._notes.append(
                    CheckpointNote(id=loaded.id, step=loaded.step, outcome="resumed", bytes=self.read_bytes)
                )
                return loaded
        if lineage:
            raise Unusable(
                f"each of the {len(lineage)} checkpoints of this job is damaged, the newest {lineage[0]}",
                code="no-good-checkpoint",
                hint=f"`tuneyard checkpoint verify {self._storage.url}` says how; to start from scratch, use a new job",
            )
        self._by_main(lambda: self._claim(None))
        return None

    def prepare(self) -> None:
        """Take the host buffer now, in the thread, instead of at the first save."""
        if self._policy.asynchronous and self._pending is None:
            layout = Layout(self._all_parts(None))
            if self._fits(layout, with_best=False):
                self._preparing = self._thread.submit(self._take_buffer, layout)

    def save(
        self,
        step: int,
        samples: int = 0,
        *,
        loop: dict[str, Any] | None = None,
        metrics: dict[str, float] | None = None,
        best: Mapping[str, torch.Tensor] | None = None,
        wait: bool = False,
    ) -> float:
        """Save the state as of `step`; returns for how many seconds training was held up.

        A save that is still being written is waited for: there is one buffer. What becomes of this one `news` tells;
        with `wait` it is known when this returns.

        Raises:
            Superseded: an earlier save found a higher attempt.
            CheckpointError: an earlier save failed (with `wait`, this one), and the policy is to stop.
        """
        self.finish()
        begun = time.perf_counter()
        if self._preparing is not None:
            self._preparing.result()
            self._preparing = None
        passing("before-copy")
        parts = self._all_parts(best)
        tensors = {part.name: logical(part.tensor) for part in parts if part.name.startswith("rng-")}
        tensors |= self._state.tensors()
        if best:
            tensors |= {f"{BEST}/{name}": self._best_logical(name, tensor) for name, tensor in best.items()}
        draft = Draft(step, samples, loop or {}, metrics, self._state.scalars(), tensors, parts)
        layout = Layout(parts)
        if self._policy.asynchronous and self._fits(layout, with_best=bool(best)):
            buffer = self._buffer if self._buffer and self._buffer.layout == layout else self._take_buffer(layout)
            buffer.copy(parts)
            passing("copied")
            blocked = time.perf_counter() - begun
            self._pending = self._thread.submit(self._write, draft, layout, buffer.blocks, blocked)
        else:
            # In the thread, too: it is its process group.
            self._pending = self._thread.submit(
                self._write, draft, layout, lambda: streamed_blocks(layout, parts), None
            )
            wait = True
        if wait:
            self.finish()
            blocked = time.perf_counter() - begun
        return blocked

    def finish(self) -> None:
        """Wait until the last save is committed or has failed. Raises as `save` does."""
        if self._pending is None:
            return
        note = self._pending.result()
        self._pending = None
        self._notes.append(note)
        if note.outcome == "failed" and (self._policy.stop_on_error or note.code == Superseded.code):
            kind = Superseded if note.code == Superseded.code else CheckpointError
            raise kind(note.message or "", code=note.code, field="checkpoint.directory", hint=note.hint)

    def let_finish(self, seconds: float) -> None:
        """Wait for the last save, but no longer, and without a word if it fails: something else has gone wrong."""
        if self._pending is not None:
            futures.wait([self._pending], timeout=seconds)

    def failed(self) -> bool:
        """Whether the last save has ended in a way that ends the training; the ranks must agree on it to call
        `finish`."""
        if self._pending is None or not self._pending.done():
            return False
        if self._pending.exception() is not None:  # a peer has died, or a bug: `finish` raises it
            return False
        note = self._pending.result()
        return note.outcome == "failed" and (self._policy.stop_on_error or note.code == Superseded.code)

    def news(self) -> list[CheckpointNote]:
        """What has become of checkpoints since this was last asked."""
        if self._pending is not None and self._pending.done() and not self.failed():
            self.finish()
        return self.told()

    def told(self) -> list[CheckpointNote]:
        """The same, without a look at what is being written."""
        told, self._notes = self._notes, []
        return told

    def _all_parts(self, best: Mapping[str, torch.Tensor] | None) -> list[Part]:
        parts = self._state.parts() + random_state.parts_of(self._rank, random_state.capture())
        return parts + (self._state.divide(BEST, best) if best else [])

    def _best_logical(self, name: str, tensor: torch.Tensor) -> LogicalTensor:
        """A whole best weight has the weight's shape, also where this rank holds a part of it."""
        weight = self._state.tensors()[f"weight/{name}"]
        return LogicalTensor(dtype=logical(tensor).dtype, shape=weight.shape)

    def _fits(self, layout: Layout, *, with_best: bool) -> bool:
        """Whether the copies of all ranks fit into their budgets: one that does not makes all of them wait.

        The ranks agree once, and once more when there are best weights: nothing else changes a layout.
        """
        if with_best in self._fitting:
            return self._fitting[with_best]
        if self._budget is None:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            mine = self._policy.host_memory or psutil.virtual_memory().available // 2 // local
            self._budget = min(self._everyones(mine))
        fits = max(self._everyones(layout.size)) <= self._budget
        self._fitting[with_best] = fits
        return fits

    def _take_buffer(self, layout: Layout) -> HostBuffer:
        self._buffer = None  # the old one first: there is room for one
        self._buffer = HostBuffer(layout, pinned=self._plan.device == "cuda")
        return self._buffer

    def _write(self, draft: Draft, layout: Layout, blocks: Callable[[], Any], blocked: float | None) -> CheckpointNote:
        """In the thread: shards, vote, commit, retention. What goes wrong is in the note, the same on all ranks."""
        assert self.attempt is not None, "resume() begins the attempt"
        key = CheckpointId(draft.step, self.attempt)
        file = f"{key}/rank-{self._rank}.safetensors"
        begun = time.perf_counter()
        told: dict[str, float] = {}

        def finish(written: list[Written]) -> None:
            passing("voted")
            told["bytes"] = sum(one.shard.size for one in written)
            told["write_s"] = max(one.write_s for one in written)
            told["hash_s"] = max(one.hash_s for one in written)
            self._commit(draft, [one.shard for one in written])

        try:
            passing("shard-begun")
            save(
                {},
                storage_writer=ShardWriter(self._storage, file, layout, blocks, finish),
                planner=PartsSavePlanner(draft.parts, draft.tensors),
                process_group=self._group,
            )
        except RuntimeError as problem:
            # A peer has died. Another one may wait here for this rank's word while this rank's training waits for that
            # one: it notices when the group is gone, and that is with the last reference to it.
            if self._group is not None:
                traceback.clear_frames(problem.__traceback__)
                torch.distributed.destroy_process_group(self._group)
                self._group = None
            raise
        except CheckpointException as problem:
            cause = _first_failure(problem)
            if not isinstance(cause, CheckpointError):
                raise
            if self._rank == 0 and not isinstance(cause, Superseded):
                self._storage.delete_all(str(key))
            return CheckpointNote(
                id=str(key), step=draft.step, outcome="failed",
                code=cause.code, message=cause.message, hint=cause.hint, blocked_s=blocked,
            )  # fmt: skip
        self._parent = key
        took = time.perf_counter() - begun
        if self._rank == 0:
            self._tidy(key, draft.metrics)
        return CheckpointNote(
            id=str(key), step=draft.step, outcome="committed", bytes=int(told.get("bytes", 0)),
            blocked_s=took if blocked is None else blocked, save_s=took,
            write_s=told.get("write_s"), hash_s=told.get("hash_s"),
        )  # fmt: skip

    def _commit(self, draft: Draft, shards: Sequence[Any]) -> None:
        """On the coordinator, once every rank's file is durable."""
        assert self.attempt is not None
        if self._assets_id is None:
            self._assets_id = store_assets(self._storage, self._assets())
        manifest = Manifest(
            id=str(CheckpointId(draft.step, self.attempt)),
            step=draft.step,
            attempt=self.attempt,
            parent=None if self._parent is None else str(self._parent),
            created=time.time(),
            job=self._job,
            plan=self._plan,
            samples=draft.samples,
            scalars=draft.scalars,
            metrics=draft.metrics,
            loop=draft.loop,
            assets=self._assets_id,
            # The ranks' random numbers, too: each rank knows its own alone.
            tensors=draft.tensors | _foreign(draft, self._plan.world_size),
            shards=tuple(shards),
        )
        self._catalogue.commit(manifest, passing)

    def _tidy(self, newest: CheckpointId, metrics: dict[str, float] | None) -> None:
        """Delete what the retention leaves over, unless a higher attempt has begun: it may have chosen any of them."""
        passing("committed")
        metric = self._policy.metric
        if metric and metrics and metric in metrics:
            self._values[newest] = metrics[metric]
        try:
            listing = self._catalogue.listing()
            lineage = [found for found in listing.lineage() if found <= newest]
            if self._policy.retention.keep_best and metric:
                self._learn_values(lineage, metric)
            # Looked at after the commit: see catalogue.py.
            if listing.begun > newest.attempt:
                return
            for old in superfluous(lineage, self._policy.retention, listing.pinned, self._values):
                self._catalogue.delete(old)
        except CheckpointError as problem:
            self._notes.append(
                CheckpointNote(
                    id=str(newest), step=newest.step, outcome="not-tidied", code=problem.code, message=problem.message
                )
            )
        passing("tidied")

    def _learn_values(self, lineage: Sequence[CheckpointId], metric: str) -> None:
        for found in lineage:
            if found not in self._values:
                metrics = self._catalogue.manifest(found).metrics or {}
                self._values[found] = metrics.get(metric, float("nan"))
        self._values = {found: value for found, value in self._values.items() if value == value}

    def _begin(self) -> tuple[int, list[CheckpointId]]:
        attempt = self._catalogue.listing().begun + 1 if self.attempt is None else self.attempt
        self._catalogue.begin(attempt)
        return attempt, list(self._catalogue.listing().lineage())

    def _claim(self, starts_from: CheckpointId | None) -> None:
        assert self.attempt is not None
        self._catalogue.claim(self.attempt, starts_from)
        for left in self._catalogue.listing().unfinished:
            if left.attempt < self.attempt:  # nobody will finish it: a commit of it would not count
                self._storage.delete_all(str(left))

    def _load(self, found: CheckpointId, accept: Callable[[Manifest], Mapping[str, torch.Tensor]]) -> Manifest | None:
        """Load `found` on all ranks; None if it is damaged, which is then noted for good."""
        try:
            manifest = self._by_main(lambda: self._catalogue.manifest(found))
            best = accept(manifest)
            parts = self._state.parts() + (self._state.divide(BEST, best) if best else [])
            check_fits(manifest, self._state.tensors())
            random = self._random_parts(manifest)
            reader = ShardReader(self._storage, manifest)
            load(
                {},
                storage_reader=reader,
                planner=PartsLoadPlanner(parts + random_state.parts_of(self._rank, random)),
                process_group=self._group,
            )
        except (Damaged, CheckpointException) as problem:
            cause = _first_failure(problem) if isinstance(problem, CheckpointException) else problem
            if not isinstance(cause, Damaged):
                raise cause from problem
            self._by_main(functools.partial(self._set_aside, found, cause.message))
            return None
        self._state.loaded()
        if best:
            self._state.share(best)
        self._state.set_scalars(manifest.scalars)
        if random:
            random_state.restore(random)
        self.read_bytes = reader.read_bytes
        return manifest

    def _random_parts(self, manifest: Manifest) -> dict[str, torch.Tensor]:
        """Room for this rank's random state; empty if another number of ranks saved: theirs mean nothing here."""
        room = random_state.capture()
        saved = all(f"rng-{self._rank}/{name}" in manifest.tensors for name in room)
        return room if saved and manifest.plan.world_size == self._plan.world_size else {}

    def _set_aside(self, found: CheckpointId, reason: str) -> None:
        assert self.attempt is not None
        self._catalogue.quarantine(found, reason, self.attempt)
        print(f"checkpoint {found} is set aside: {reason}", flush=True)
        self._notes.append(
            CheckpointNote(id=str(found), step=found.step, outcome="quarantined", code=Damaged.code, message=reason)
        )

    def _by_main(self, act: Callable[[], T]) -> T:
        """What `act` returns or raises on rank 0, on every rank."""
        answer: list[Any] = [None, None]
        if self._rank == 0:
            try:
                answer[0] = act()
            except CheckpointError as problem:
                answer[1] = problem
        if self._group is not None:
            torch.distributed.broadcast_object_list(answer, src=0, group=self._group)
        if answer[1] is not None:
            raise answer[1]
        found: T = answer[0]
        return found

    def _everyones(self, value: int) -> list[int]:
        values = [value] * self._plan.world_size
        if self._group is not None:
            torch.distributed.all_gather_object(values, value, group=self._group)
        return values


def check_fits(manifest: Manifest, tensors: Mapping[str, LogicalTensor]) -> None:
    """Raises Unusable if `manifest` is not of the training that has `tensors`."""
    for name, tensor in tensors.items():
        saved = manifest.tensors.get(name)
        if saved is None:
            raise Unusable(
                f"{manifest.id} has no {name}",
                code="checkpoint-differs",
                hint="were the model, the adapter or the optimizer changed? then begin a new job",
            )
        if saved.shape != tensor.shape:
            raise Unusable(
                f"{name} has the shape {list(saved.shape)} in {manifest.id}, and {list(tensor.shape)} here",
                code="checkpoint-differs",
                hint="were the model, the adapter or the labels changed? then begin a new job",
            )


def passing(boundary: str) -> None:
    """A named point of a save. Does nothing; the crash benchmark ends a rank here."""


def _foreign(draft: Draft, world_size: int) -> dict[str, LogicalTensor]:
    """The random states of the other ranks, which look like this one's."""
    own = {name: tensor for name, tensor in draft.tensors.items() if name.startswith("rng-")}
    return {
        f"rng-{rank}/{name.partition('/')[2]}": tensor for rank in range(world_size) for name, tensor in own.items()
    }


def _first_failure(problem: CheckpointException) -> BaseException:
    """What happened on the lowest rank that failed."""
    failures = problem.failures
    cause: BaseException = failures[min(failures)][0]
    return cause
