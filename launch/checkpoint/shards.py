"""Writing and reading the ranks' files: torch.distributed.checkpoint's storage, on ours.

Every block is hashed as it is written and checked as it is read, before a byte of it reaches the training.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from launch.checkpoint.blocks import read_block
from launch.checkpoint.manifest import BLOCK, Damaged, Fragment, Manifest, Shard, hash_of
from launch.checkpoint.plans import metadata_of
from launch.checkpoint.snapshot import Layout, bytes_of, dtype_of
from launch.checkpoint.storage import Storage

READERS = 4
"""Threads of a rank that read: an object store answers many requests as fast as one."""


class Pace:
    """Leaves most of a core to the training that the thread writes beside: on a CPU they share it.

    A thread that has computed for some time rests SHARE_LEFT times as long, until somebody waits for it.
    """

    SHARE_LEFT = 9.0

    def __init__(self) -> None:
        self.hurry = threading.Event()
        """Set while somebody waits."""
        self._before = 0.0

    def begin(self) -> None:
        self._before = time.thread_time()

    def rest(self) -> None:
        now = time.thread_time()
        self.hurry.wait(self.SHARE_LEFT * (now - self._before))
        self._before = time.thread_time()


class Written(NamedTuple):
    """What became of one rank's file."""

    shard: Shard
    write_s: float
    hash_s: float


class ShardWriter(StorageWriter):
    """Writes this rank's blocks as one file; the coordinator is given what all ranks wrote."""

    def __init__(
        self,
        storage: Storage,
        file: str,
        layout: Layout,
        blocks: Callable[[], Iterator[memoryview]],
        finish: Callable[[list[Written]], None],
        pace: Pace | None = None,
    ) -> None:
        self._storage, self._file, self._layout = storage, file, layout
        self._blocks, self._finish, self._pace = blocks, finish, pace

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        hashes: list[str] = []
        hash_s = 0.0

        def hashed() -> Iterator[memoryview]:
            nonlocal hash_s
            if self._pace is not None:
                self._pace.begin()
            for block in self._blocks():
                before = time.perf_counter()
                hashes.append(hash_of(block))
                hash_s += time.perf_counter() - before
                yield block
                if self._pace is not None:
                    self._pace.rest()

        begun = time.perf_counter()
        self._storage.write(self._file, hashed())
        written = Written(
            Shard(
                file=self._file.rpartition("/")[2],
                size=self._layout.size,
                blocks=tuple(hashes),
                fragments=self._layout.fragments,
            ),
            time.perf_counter() - begun,
            hash_s,
        )
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(MetadataIndex(self._file), self._layout.size, written)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._finish([result.storage_data for rank in results for result in rank])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        return True


class _Copy(NamedTuple):
    """Elements that lie within one block, and where they go."""

    offset: int
    """Bytes from the block's beginning."""
    dtype: torch.dtype
    target: torch.Tensor


class ShardReader(StorageReader):
    """Reads the blocks that hold what the planner asks for; the ranks divide the others among them, to be checked."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self._storage, self._manifest = storage, manifest
        self._metadata = metadata_of(manifest)
        self._fragments: dict[str, list[tuple[int, Fragment]]] = {}  # by name; the n-th chunk is the n-th here
        for index, shard in enumerate(manifest.shards):
            for fragment in shard.fragments:
                self._fragments.setdefault(fragment.name, []).append((index, fragment))
        self.read_bytes = 0
        """What this rank has read."""

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        needed = {
            (shard, block)
            for item in plan.items
            for shard, first, last, _ in [self._bytes_of(item)]
            for block in range(first // BLOCK, -(-last // BLOCK))
        }
        return LoadPlan(plan.items, storage_data=needed)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        needed = set().union(*(plan.storage_data for plan in plans))
        everything = [(i, block) for i, shard in enumerate(self._manifest.shards) for block in range(len(shard.blocks))]
        left = [place for place in everything if place not in needed]
        return [
            LoadPlan(plan.items, storage_data=plan.storage_data | set(left[rank :: len(plans)]))
            for rank, plan in enumerate(plans)
        ]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        copies: dict[tuple[int, int], list[_Copy]] = {place: [] for place in plan.storage_data}
        for item in plan.items:
            self._cut(item, planner.resolve_tensor(item), copies)
        # One thread holds one block: a rank's memory does not depend on the checkpoint's size.
        places = sorted(copies)
        cuts = [places[i::READERS] for i in range(READERS)]
        with ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint") as pool:
            self.read_bytes = sum(pool.map(lambda some: self._read(some, copies), cuts))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _bytes_of(self, item: ReadItem) -> tuple[int, int, int, torch.dtype]:
        """Of what `item` reads: the shard, the first byte in its file, the byte after the last, the type."""
        assert item.storage_index.index is not None
        shard, fragment = self._fragments[item.storage_index.fqn][item.storage_index.index]
        dtype = dtype_of(self._manifest.tensors[fragment.name].dtype)
        first = fragment.offset + item.storage_offsets[0] * dtype.itemsize
        return shard, first, first + item.lengths[0] * dtype.itemsize, dtype

    def _cut(self, item: ReadItem, target: torch.Tensor, copies: dict[tuple[int, int], list[_Copy]]) -> None:
        shard, first, last, dtype = self._bytes_of(item)
        at = first
        while at < last:
            block = at // BLOCK
            end = min(last, (block + 1) * BLOCK)
            elements = slice((at - first) // dtype.itemsize, (end - first) // dtype.itemsize)
            copies[shard, block].append(_Copy(at - block * BLOCK, dtype, target[elements]))
            at = end

    def _read(self, places: list[tuple[int, int]], copies: dict[tuple[int, int], list[_Copy]]) -> int:
        staging = torch.empty(BLOCK, dtype=torch.uint8)
        total = 0
        for index in sorted({shard for shard, _ in places}):
            shard = self._manifest.shards[index]
            name = f"{self._manifest.id}/{shard.file}"
            try:
                with self._storage.reader(name) as reader:
                    for block in (block for of, block in places if of == index):
                        total += len(read_block(reader, name, shard, block, bytes_of(staging)))
                        for offset, dtype, target in copies[index, block]:
                            found = staging[offset : offset + len(target) * dtype.itemsize].view(dtype)
                            target.copy_(found)
            except FileNotFoundError as problem:
                raise Damaged(f"{name} is missing") from problem
        return total

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        return True
