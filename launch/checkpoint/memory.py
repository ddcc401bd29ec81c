"""Copies of this rank's state in the node's shared memory, made while it trains: see copies.py.

There are two, which take turns, so that one is whole whenever the rank is killed.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from launch.attempt import write_atomically
from launch.checkpoint import copies, random_state
from launch.checkpoint.manifest import CheckpointError, CheckpointId, LogicalTensor, Manifest, Shard, hash_of
from launch.checkpoint.snapshot import HostBuffer, Layout, streamed_blocks
from launch.checkpoint.state import BEST, Part, TrainingState, logical
from launch.checkpoint.storage import Storage
from launch.contract import ExecutionPlan

SHARE = 0.01
"""Of its time that a training spends on copies, where it may choose how many it makes."""


class Source:
    """What a rank's copies are made of. Where all ranks hold the same, those of a node divide it, so that a node has
    all of it; `whole`, this rank alone has all of it, and nothing of that where its state is sharded."""

    def __init__(
        self, state: TrainingState, *, job: str, plan: ExecutionPlan, attempt: int, rank: int, whole: bool = False
    ) -> None:
        local = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._state = state.among(*((0, 1) if whole else local))
        self._job, self._plan, self._attempt, self._rank = job, plan, attempt, rank

    def parts(self, random: Mapping[str, torch.Tensor] | None, best: Mapping[str, torch.Tensor] | None) -> list[Part]:
        """`random` are the rank's random numbers as random_state.capture gave them; None for those of now."""
        drawn = random_state.parts_of(self._rank, dict(random) if random is not None else random_state.capture())
        return self._state.parts() + drawn + (self._state.divide(BEST, best) if best else [])

    def manifest(
        self,
        step: int,
        samples: int,
        loop: dict[str, Any],
        parts: list[Part],
        best: Mapping[str, torch.Tensor] | None,
        shard: Shard,
    ) -> Manifest:
        tensors = {part.name: logical(part.tensor) for part in parts if part.name.startswith("rng-")}
        tensors |= self._state.tensors()
        for name, tensor in (best or {}).items():
            shape = tensors[f"weight/{name}"].shape
            tensors[f"{BEST}/{name}"] = LogicalTensor(dtype=logical(tensor).dtype, shape=shape)
        return Manifest(
            id=str(CheckpointId(step, self._attempt)), step=step, attempt=self._attempt, parent=None,
            created=time.time(), job=self._job, plan=self._plan, samples=samples, scalars=self._state.scalars(),
            loop=loop, tensors=tensors, shards=(shard,),
        )  # fmt: skip


class MemoryCopies:
    """This rank's copies. Ranks that copy do so at the same steps; one that cannot makes those of the others useless,
    and nothing else."""

    def __init__(self, source: Source, url: str, attempt: int, rank: int, *, cuda: bool) -> None:
        self._source, self._cuda, self._rank = source, cuda, rank
        self._folder = copies.home(url) / f"attempt-{attempt}"
        self._url = url
        self._held: int | None = None
        self._slots: list[Slot | None] = [None, None]
        self._turn = 0
        self.failed: str | None = None
        """Why there are none any more."""
        self.copy_s = 0.0
        """What the last one took."""
        self.copied_at = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time for the next one, by what they cost."""
        return self.failed is None and time.monotonic() - self.copied_at >= self.copy_s / SHARE

    def copy(self, step: int, samples: int, loop: dict[str, Any], best: Mapping[str, torch.Tensor] | None) -> None:
        """Copy the state as of `step`. It never raises: `failed` tells."""
        if self.failed is not None:
            return
        begun = time.monotonic()
        try:
            self._copy(step, samples, loop, best)
        except (OSError, CheckpointError) as problem:
            self.failed = f"there are no copies in memory: {problem}"
            self._let_go()
        self.copied_at = time.monotonic()
        self.copy_s = self.copied_at - begun

    def _copy(self, step: int, samples: int, loop: dict[str, Any], best: Mapping[str, torch.Tensor] | None) -> None:
        if self._held is None:
            if not copies.MEMORY.is_dir():
                raise OSError(f"this system has no {copies.MEMORY}")
            self._held = copies.hold(self._folder)
        parts = self._source.parts(None, best)
        layout = Layout(parts)
        slot = self._slots[self._turn]
        if slot is None or slot.buffer.layout != layout:
            self._slots[self._turn] = slot = None
            self._slots[self._turn] = slot = Slot(self._folder / f"rank-{self._rank}.{self._turn}", layout)
        slot.note.unlink(missing_ok=True)
        slot.buffer.copy(parts, torch.cuda.current_stream().record_event() if self._cuda else None)
        shard = shard_of(slot.buffer.blocks(), layout)
        manifest = self._source.manifest(step, samples, loop if self._tells else {}, parts, best, shard)
        write_atomically(slot.note, copies.sealed(manifest).decode())
        self._turn = 1 - self._turn

    @property
    def _tells(self) -> bool:
        """Where the loop was is told once a node."""
        return os.environ.get("LOCAL_RANK", "0") == "0"

    def invalidate(self) -> None:
        """What was copied is not to be gone on from."""
        for slot in self._slots:
            if slot is not None:
                slot.note.unlink(missing_ok=True)

    def forget(self) -> None:
        """Free the memory: what they are for is in a checkpoint, or the training is done. After all ranks have said so,
        since a node's ranks share the folder."""
        self._let_go()
        copies.forget(self._url)

    def _let_go(self) -> None:
        self._slots = [None, None]
        for path in self._folder.glob(f"rank-{self._rank}.*"):
            path.unlink(missing_ok=True)
        if self._held is not None:
            os.close(self._held)
            self._held = None


class Slot:
    """One copy's memory, mapped, all of it taken at once: a page that is missing later would end the process."""

    def __init__(self, name: Path, layout: Layout) -> None:
        """Raises OSError: there is not enough of it."""
        self.note = name.with_name(f"{name.name}.json")
        self.note.unlink(missing_ok=True)
        descriptor = os.open(f"{name}.safetensors", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, layout.size)
            self.buffer = HostBuffer(layout, pinned=False, mapped=mmap.mmap(descriptor, layout.size))
        except OSError:
            Path(f"{name}.safetensors").unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)


def shard_of(blocks: Iterator[memoryview], layout: Layout) -> Shard:
    hashes = tuple(hash_of(block) for block in blocks)
    return Shard(file="copy.safetensors", size=layout.size, blocks=hashes, fragments=layout.fragments)


def leave_in_store(
    storage: Storage,
    source: Source,
    where: str,
    step: int,
    samples: int,
    loop: dict[str, Any],
    random: Mapping[str, torch.Tensor],
    best: Mapping[str, torch.Tensor] | None,
) -> None:
    """Write all of the state straight into the store, for a rank that is about to end. Raises CheckpointError."""
    parts = source.parts(random, best)
    layout = Layout(parts)
    hashes: list[str] = []

    def hashed() -> Iterator[memoryview]:
        for block in streamed_blocks(layout, parts):
            hashes.append(hash_of(block))
            yield block

    storage.write(f"{where}.safetensors", hashed())
    shard = Shard(file="copy.safetensors", size=layout.size, blocks=tuple(hashes), fragments=layout.fragments)
    storage.create(f"{where}.json", copies.sealed(source.manifest(step, samples, loop, parts, best, shard)))
