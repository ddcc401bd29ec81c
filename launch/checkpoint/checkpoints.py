"""Saving and resuming, as a training loop sees it: the life of a checkpoint from the copy to the commit.

A save leaves everything to a thread: it copies this rank's parts into host memory, writes them, votes, commits and
tidies up. Training goes on at once, and waits for the copy before the optimizer's next step, which would change what is
copied. The thread has a process group of its own, so that its collectives never meet the training's.
"""

from __future__ import annotations

import functools
import os
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psutil
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from launch.checkpoint import random_state
from launch.checkpoint.assets import store_assets
from launch.checkpoint.beginning import Beginning, clear
from launch.checkpoint.catalogue import Catalogue
from launch.checkpoint.draft import Draft, Policy
from launch.checkpoint.loading import first_failure
from launch.checkpoint.manifest import (
    CheckpointError,
    CheckpointId,
    LogicalTensor,
    Manifest,
    Superseded,
)
from launch.checkpoint.plans import PartsSavePlanner
from launch.checkpoint.ranks import Ranks
from launch.checkpoint.shards import Pace, ShardWriter, Written
from launch.checkpoint.snapshot import HostBuffer, Layout, streamed_blocks
from launch.checkpoint.state import BEST, BUFFER, Part, TrainingState, logical
from launch.checkpoint.storage import Storage
from launch.checkpoint.tidy import Tidier
from launch.contract import CheckpointNote, ExecutionPlan

# One process has no group, and DCP says so at every save.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


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
        url: str | None = None,
    ) -> None:
        """`attempt` None is the one after the highest that has begun; `assets` gives files that an export needs. With
        `url`, the storage's as the job says it, copies that ranks have left are gone on from, too."""
        self.attempt = attempt
        self._state, self._catalogue, self._storage = state, Catalogue(storage), storage
        self._job, self._plan, self._policy, self._assets = job, plan, policy, assets
        self._ranks = Ranks(rank, plan.world_size)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[CheckpointNote] | None = None
        self._draft: Draft | None = None
        self._pace = Pace()
        this = weakref.ref(self)  # the optimizer lives longer
        state.before_step(lambda: found.await_copy() if (found := this()) is not None else None)
        self._notes: list[CheckpointNote] = []
        self._buffer: HostBuffer | None = None
        self._preparing: Future[HostBuffer] | None = None
        self._budget: int | None = None
        self._fitting: dict[bool, bool] = {}
        self._parent: CheckpointId | None = None
        self._tidier = Tidier(self._catalogue, policy.retention, policy.metric)
        self._assets_id: str | None = None
        self._url = url
        self._beginning: Beginning | None = None
        self.read_bytes = 0
        """Bytes that this rank read to resume."""
        self.random_restored = False
        """Whether this rank goes on with the random numbers that it had."""

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
        beginning = Beginning(self._state, self._catalogue, self._ranks, self.attempt, self._stored_assets, self._url)
        self._beginning = beginning
        try:
            return self._goes_on(beginning.run(accept))
        finally:
            self.attempt = beginning.known_attempt

    def go_back(
        self, before: int, accept: Callable[[Manifest], Mapping[str, torch.Tensor]] = lambda _manifest: {}
    ) -> Manifest | None:
        """Load the newest good checkpoint of less than `before` steps, as `resume`; None if there is none. Those of
        more steps are deleted. When nothing is being written."""
        assert self._beginning is not None, "resume() begins the attempt"
        self.finish()
        return self._goes_on(self._beginning.go_back(before, accept))

    def _goes_on(self, manifest: Manifest | None) -> Manifest | None:
        assert self._beginning is not None
        if manifest is not None:
            assert self._beginning.loaded is not None
            self._parent = CheckpointId.parse(manifest.id)
            self.read_bytes, self.random_restored = self._beginning.loaded
        return manifest

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
        """Save the state as of `step`; returns for how many seconds training was held up so far.

        A save that is still being written is waited for: there is one buffer. What becomes of this one, and for how
        long training has waited in all, `news` tells; with `wait` it is known when this returns.

        Raises:
            Superseded: an earlier save found a higher attempt.
            CheckpointError: an earlier save failed (with `wait`, this one), and the policy is to stop.
        """
        begun = time.perf_counter()
        self.finish()
        self._pace.hurry.clear()
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
            # A forward pass changes buffers; they are small.
            kept = [p._replace(tensor=p.tensor.clone()) if p.name.startswith(f"{BUFFER}/") else p for p in parts]
            after = torch.cuda.current_stream().record_event() if self._plan.device == "cuda" else None
            self._pending = self._thread.submit(
                self._write, draft, layout, buffer.blocks, functools.partial(buffer.copy, kept, after)
            )
            self._draft = draft
        else:
            # In the thread, too: it has the process group.
            self._pending = self._thread.submit(
                self._write, draft, layout, lambda: streamed_blocks(layout, parts), None
            )
            wait = True
        draft.blocked_s = time.perf_counter() - begun
        if wait:
            self.finish()
            draft.blocked_s = time.perf_counter() - begun
        return draft.blocked_s

    def await_copy(self) -> None:
        """Wait until what the last save is of has been copied. Before weights change, other than by the optimizer."""
        if self._draft is not None:
            begun = time.perf_counter()
            self._draft.copied.wait()
            self._draft.blocked_s += time.perf_counter() - begun
            self._draft = None

    def finish(self) -> None:
        """Wait until the last save is committed or has failed. Raises as `save` does."""
        if self._pending is None:
            return
        self._pace.hurry.set()
        note = self._pending.result()
        self._pending = None
        self._notes.append(note)
        if self._is_fatal(note):
            kind = Superseded if note.code == Superseded.code else CheckpointError
            raise kind(note.message or "", code=note.code, field="checkpoint.directory", hint=note.hint)

    def let_finish(self, seconds: float) -> bool:
        """Wait for the last save, but no longer, and without a word if it fails: something else has gone wrong.
        Returns whether it has come to an end of its own: not if a peer is gone without which it cannot."""
        if self._pending is None:
            return True
        self._pace.hurry.set()
        futures.wait([self._pending], timeout=seconds)
        if self._pending.done() and self._pending.exception() is None:
            return True
        self._pending = None
        return False

    def failed(self) -> bool:
        """Whether the last save has ended in a way that ends the training; the ranks must agree on it to call
        `finish`."""
        if self._pending is None or not self._pending.done() or self._pending.exception() is not None:
            return False  # an exception: a peer has died, or a bug; `finish` raises it
        return self._is_fatal(self._pending.result())

    def _is_fatal(self, note: CheckpointNote) -> bool:
        return note.outcome == "failed" and (self._policy.stop_on_error or note.code == Superseded.code)

    def news(self) -> list[CheckpointNote]:
        """What has become of checkpoints since this was last asked."""
        if self._pending is not None and self._pending.done() and not self.failed():
            self.finish()
        return self.told()

    def told(self) -> list[CheckpointNote]:
        """The same, without a look at what is being written."""
        told, self._notes = self._notes, []
        if self._beginning is not None:
            told = [*self._beginning.notes, *told]
            self._beginning.notes.clear()
        return told

    def _all_parts(self, best: Mapping[str, torch.Tensor] | None) -> list[Part]:
        parts = self._state.parts() + random_state.parts_of(self._ranks.rank, random_state.capture())
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
            self._budget = min(self._ranks.everyones(mine))
        fits = max(self._ranks.everyones(layout.size)) <= self._budget
        self._fitting[with_best] = fits
        return fits

    def _take_buffer(self, layout: Layout) -> HostBuffer:
        self._buffer = None  # the old one first: there is room for one
        self._buffer = HostBuffer(layout, pinned=self._plan.device == "cuda")
        return self._buffer

    def _write(
        self, draft: Draft, layout: Layout, blocks: Callable[[], Any], copy: Callable[[], None] | None
    ) -> CheckpointNote:
        """In the thread: copy, shards, vote, commit, retention. What goes wrong is in the note, on all ranks."""
        assert self.attempt is not None, "resume() begins the attempt"
        key = CheckpointId(draft.step, self.attempt)
        file = f"{key}/rank-{self._ranks.rank}.safetensors"
        if copy is not None:
            try:
                copy()
            finally:
                draft.copied.set()
        passing("copied")
        begun = time.perf_counter()
        told: dict[str, float] = {}

        def finish(written: list[Written]) -> None:
            passing("voted")
            told["bytes"] = sum(one.shard.size for one in written)
            told["write_s"] = max(one.write_s for one in written)
            told["hash_s"] = max(one.hash_s for one in written)
            self._commit(draft, [one.shard for one in written])

        pace = self._pace if self._plan.device == "cpu" else None
        try:
            passing("shard-begun")
            save(
                {},
                storage_writer=ShardWriter(self._storage, file, layout, blocks, finish, pace),
                planner=PartsSavePlanner(draft.parts, draft.tensors),
                process_group=self._ranks.group,
            )
        except RuntimeError as problem:
            # A peer has died. Another one may wait here for this rank's word while this rank's training waits for that
            # one: it notices when the group is gone, and that is with the last reference to it.
            traceback.clear_frames(problem.__traceback__)
            self._ranks.part()
            raise
        except CheckpointException as problem:
            cause = first_failure(problem)
            if not isinstance(cause, CheckpointError):
                raise
            if self._ranks.main and not isinstance(cause, Superseded):
                clear(self._catalogue, key)
            return CheckpointNote(
                id=str(key), step=draft.step, outcome="failed",
                code=cause.code, message=cause.message, hint=cause.hint, blocked_s=draft.blocked_s,
            )  # fmt: skip
        self._parent = key
        took = time.perf_counter() - begun
        if self._ranks.main:
            self._tidy(key, draft.metrics)
        return CheckpointNote(
            id=str(key), step=draft.step, outcome="committed", bytes=int(told.get("bytes", 0)),
            blocked_s=took if copy is None else draft.blocked_s, save_s=took,
            write_s=told.get("write_s"), hash_s=told.get("hash_s"),
        )  # fmt: skip

    def _commit(self, draft: Draft, shards: Sequence[Any]) -> None:
        """On the coordinator, once every rank's file is durable."""
        assert self.attempt is not None
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
            assets=self._stored_assets(),
            # The ranks' random numbers, too: each rank knows its own alone.
            tensors=draft.tensors | _foreign(draft, self._plan.world_size),
            shards=tuple(shards),
        )
        self._catalogue.commit(manifest, passing)

    def _tidy(self, newest: CheckpointId, metrics: dict[str, float] | None) -> None:
        passing("committed")
        try:
            self._tidier.after(newest, metrics)
        except CheckpointError as problem:
            told = {"code": problem.code, "message": problem.message}
            self._notes.append(CheckpointNote(id=str(newest), step=newest.step, outcome="not-tidied", **told))
        passing("tidied")

    def _stored_assets(self) -> str | None:
        if self._assets_id is None:
            self._assets_id = store_assets(self._storage, self._assets())
        return self._assets_id


def passing(boundary: str) -> None:
    """A named point of a save. Does nothing; the crash benchmark ends a rank here."""


def _foreign(draft: Draft, world_size: int) -> dict[str, LogicalTensor]:
    """The random states of the other ranks, which look like this one's."""
    own = {name: tensor for name, tensor in draft.tensors.items() if name.startswith("rng-")}
    return {
        f"rng-{rank}/{name.partition('/')[2]}": tensor for rank in range(world_size) for name, tensor in own.items()
    }
