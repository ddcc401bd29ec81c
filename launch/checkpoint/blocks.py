"""The one way in which bytes of a checkpoint are read to be used. Torch-free."""

from __future__ import annotations

from launch.checkpoint.manifest import Damaged, Shard, block_range, hash_of
from launch.checkpoint.storage import RangeReader


def read_block(reader: RangeReader, name: str, shard: Shard, block: int, memory: memoryview) -> memoryview:
    """Block `block` of the file `name`, which `reader` reads, in the beginning of `memory`, once its hash is right.

    Raises:
        Damaged: it is cut, or differs from what was written.
        CheckpointError: the store does not work.
    """
    first, last = block_range(block, shard.size)
    found = memory[: last - first]
    if reader.read_into(first, found) != last - first:
        raise Damaged(f"{name} ends before byte {last}: it was written in part, or cut")
    if hash_of(found) != shard.blocks[block]:
        raise Damaged(f"{name} differs from what was written between bytes {first} and {last}")
    return found
