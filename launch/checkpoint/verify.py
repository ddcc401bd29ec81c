"""Whether a checkpoint still is what was committed, to the last byte. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from launch.checkpoint.assets import load_assets
from launch.checkpoint.catalogue import Catalogue
from launch.checkpoint.manifest import BLOCK, CheckpointId, Damaged, Shard, block_range, hash_of
from launch.checkpoint.storage import RangeReader, Storage

READERS = 8
"""Blocks read at once: an object store is slow over each, and fast over many."""


@dataclass(frozen=True)
class Fault:
    """Bytes [start, end) of a file are not those that were committed; of a whole file the range is None."""

    file: str
    what: str
    start: int | None = None
    end: int | None = None

    def __str__(self) -> str:
        place = self.file if self.start is None else f"{self.file}, bytes {self.start} to {self.end}"
        return f"{place}: {self.what}"


@dataclass(frozen=True)
class Finding:
    checkpoint: CheckpointId
    read: int
    """Bytes of its shards that were read."""
    faults: tuple[Fault, ...]


def verify(storage: Storage, found: CheckpointId) -> Finding:
    """Read all of the committed checkpoint `found` and compare it with the hashes in its manifest.

    Raises:
        CheckpointError: the store does not work, or a newer version wrote the checkpoint.
    """
    try:
        manifest = Catalogue(storage).manifest(found)
    except Damaged as problem:
        return Finding(found, 0, (Fault(str(found), problem.message),))
    faults: list[Fault] = []
    if manifest.assets is not None:
        try:
            load_assets(storage, manifest.assets)
        except Damaged as problem:
            faults.append(Fault(f"assets/{manifest.assets}", problem.message))
    read = 0
    for shard in manifest.shards:
        file = f"{found}/{shard.file}"
        try:
            with storage.reader(file) as reader:
                faults += _faults_of(file, shard, reader)
            read += shard.size
        except FileNotFoundError:
            faults.append(Fault(file, "is missing"))
    return Finding(found, read, tuple(faults))


def _faults_of(file: str, shard: Shard, reader: RangeReader) -> Iterator[Fault]:
    def look(index: int) -> Fault | None:
        start, end = block_range(index, shard.size)
        block = memoryview(bytearray(end - start))
        length = reader.read_into(start, block)
        if length < len(block):
            return Fault(file, f"the file ends at byte {start + length}", start, end)
        return None if hash_of(block) == shard.blocks[index] else Fault(file, "the hash differs", start, end)

    assert len(shard.blocks) == -(-shard.size // BLOCK), file
    with ThreadPoolExecutor(READERS) as pool:
        yield from (fault for fault in pool.map(look, range(len(shard.blocks))) if fault is not None)
    if reader.read_into(shard.size, memoryview(bytearray(1))):
        yield Fault(file, f"the file goes on past its {shard.size} bytes")
