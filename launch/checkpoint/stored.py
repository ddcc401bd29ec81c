"""Whole tensors out of a checkpoint, one at a time, every block checked; on any machine, without the training."""

from __future__ import annotations

from collections import OrderedDict

import torch

from launch.checkpoint.blocks import read_block
from launch.checkpoint.manifest import BLOCK, Damaged, Fragment, Manifest, block_range
from launch.checkpoint.snapshot import bytes_of, dtype_of
from launch.checkpoint.storage import Storage

CACHED_BLOCKS = 2
"""Small tensors lie together: the block of the last one mostly holds the next."""


class StoredTensors:
    """The logical tensors of `manifest`."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self._storage, self.manifest = storage, manifest
        self._fragments: dict[str, list[tuple[int, Fragment]]] = {}
        for index, shard in enumerate(manifest.shards):
            for fragment in shard.fragments:
                self._fragments.setdefault(fragment.name, []).append((index, fragment))
        self._blocks: OrderedDict[tuple[int, int], torch.Tensor] = OrderedDict()

    def __contains__(self, name: str) -> bool:
        return name in self.manifest.tensors

    def names(self, prefix: str) -> list[str]:
        """What there is of `prefix/`, without it."""
        return [name.removeprefix(f"{prefix}/") for name in self.manifest.tensors if name.startswith(f"{prefix}/")]

    def read(self, name: str) -> torch.Tensor:
        """The tensor, whole, on the CPU.

        Raises:
            KeyError: there is none of that name.
            Damaged: its bytes are not those that were written.
        """
        known = self.manifest.tensors[name]
        dtype = dtype_of(known.dtype)
        found = torch.empty(known.numel, dtype=dtype)
        for shard, fragment in self._fragments.get(name, []):
            into = found[fragment.start : fragment.start + fragment.length].view(torch.uint8)
            at, end = fragment.offset, fragment.offset + fragment.length * dtype.itemsize
            while at < end:
                block, within = divmod(at, BLOCK)
                size = min(end - at, BLOCK - within)
                into[at - fragment.offset : at - fragment.offset + size] = self._block(shard, block)[
                    within : within + size
                ]
                at += size
        return found.view(known.shape)

    def _block(self, index: int, block: int) -> torch.Tensor:
        cached = self._blocks.get((index, block))
        if cached is not None:
            return cached
        while len(self._blocks) >= CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        shard = self.manifest.shards[index]
        first, last = block_range(block, shard.size)
        found = torch.empty(last - first, dtype=torch.uint8)
        name = f"{self.manifest.id}/{shard.file}"
        try:
            with self._storage.reader(name) as reader:
                read_block(reader, name, shard, block, bytes_of(found))
        except FileNotFoundError as problem:
            raise Damaged(f"{name} is missing") from problem
        self._blocks[index, block] = found
        return found
