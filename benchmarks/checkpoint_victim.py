"""`python -m benchmarks.checkpoint_victim`: launch, where one rank kills itself at a named point of a save.

Which rank and where is a Victim, as JSON in the environment variable VICTIM. MISTAKE names a deliberate mistake in how
checkpoints are written or read: a benchmark that does not see those is worth nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENV_VICTIM = "VICTIM"
ENV_MISTAKE = "MISTAKE"

BLOCK = 4096
"""Instead of 4 MiB, so that a shard of a tiny model has some dozens of blocks."""

COPY_S = 0.1
"""As long as some steps."""

OF_EVERY_RANK = ("before-copy", "copied", "shard-begun", "in-shard", "shard-written")
OF_RANK_0 = ("voted", "manifest-written", "committed", "deleting", "tidied")
"""The points of a save, in order: `in-shard` is before a drawn block of this rank's file, `deleting` between the marker
and the rest of an old checkpoint."""


@dataclass(frozen=True)
class Victim:
    """Who is killed, and where."""

    rank: int
    boundary: str
    save: int
    """Which save of the attempt, from 1; if that does not come by the boundary, the next one that does."""
    share: float
    """in-shard: how much of the file is written before."""
    told: str
    """A file that is written just before."""


def install(victim: Victim | None, mistake: str | None) -> None:
    """Change the program of this process."""
    from launch.checkpoint import manifest, shards, snapshot

    for module in (manifest, shards, snapshot):
        put(module, BLOCK=BLOCK)
    if mistake:
        MISTAKES[mistake]()
    if victim is not None and victim.rank == int(os.environ.get("RANK", "0")):
        _watch(victim)


def put(owner: Any, **others: Any) -> None:
    """Other functions or constants in a class or module, of which no checker of types is to know."""
    for name, other in others.items():
        setattr(owner, name, other)


def _watch(victim: Victim) -> None:
    from launch.checkpoint import checkpoints
    from launch.checkpoint.shards import ShardWriter
    from launch.checkpoint.storage import LocalStorage

    saves = 0

    def passing(boundary: str) -> None:
        nonlocal saves
        if boundary == "before-copy":
            saves += 1
        if boundary == victim.boundary and saves >= victim.save:
            Path(victim.told).write_text(boundary)
            os.kill(os.getpid(), signal.SIGKILL)

    write_data, delete_all = ShardWriter.write_data, LocalStorage.delete_all

    def write(writer: ShardWriter, *arguments: Any) -> Any:
        blocks, last = writer._blocks, int(victim.share * -(-writer._layout.size // BLOCK))

        def passed() -> Iterator[memoryview]:
            for index, block in enumerate(blocks()):
                if index == last:
                    passing("in-shard")
                yield block

        writer._blocks = passed
        written = write_data(writer, *arguments)
        passing("shard-written")
        return written

    def delete(storage: LocalStorage, prefix: str) -> None:
        passing("deleting")
        delete_all(storage, prefix)

    put(checkpoints, passing=passing)
    put(ShardWriter, write_data=write)
    put(LocalStorage, delete_all=delete)


def marker_first() -> None:
    """The ranks vote, and the marker is written, when the shards are hashed and not yet written."""
    from launch.checkpoint.checkpoints import Checkpoints
    from launch.checkpoint.shards import ShardWriter
    from launch.checkpoint.storage import LocalStorage

    write_data, whole_save = ShardWriter.write_data, Checkpoints._write
    late: list[Callable[[], None]] = []

    class Later(LocalStorage):
        def write(self, name: str, blocks: Iterable[memoryview]) -> None:
            held = [bytes(block) for block in blocks]
            late.append(lambda: LocalStorage(self.root).write(name, [memoryview(block) for block in held]))

    def write(writer: ShardWriter, *arguments: Any) -> Any:
        assert isinstance(writer._storage, LocalStorage)
        writer._storage = Later(writer._storage.root)
        return write_data(writer, *arguments)

    def save(checkpoints: Checkpoints, *arguments: Any) -> Any:
        note = whole_save(checkpoints, *arguments)
        late.pop()()
        return note

    put(ShardWriter, write_data=write)
    put(Checkpoints, _write=save)


def without_marker() -> None:
    """A directory with a manifest counts."""
    from launch.checkpoint.catalogue import Catalogue, Listing
    from launch.checkpoint.manifest import CheckpointId, Manifest

    listing = Catalogue.listing

    def everything(catalogue: Catalogue) -> Listing:
        found = listing(catalogue)
        more = {one for one in found.unfinished if catalogue.storage.exists(f"{one}/MANIFEST.json")}
        return dataclasses.replace(
            found,
            committed=tuple(sorted({*found.committed, *more}, reverse=True)),
            unfinished=found.unfinished - more,
        )

    def manifest(catalogue: Catalogue, found: CheckpointId) -> Manifest:
        return Manifest.model_validate_json(catalogue.storage.read(f"{found}/MANIFEST.json"))

    put(Catalogue, listing=everything, manifest=manifest)


def without_hashes() -> None:
    """Blocks are taken as they are."""
    from launch.checkpoint import shards
    from launch.checkpoint.manifest import Shard, block_range

    def read(reader: Any, _name: str, shard: Shard, block: int, memory: memoryview) -> memoryview:
        first, last = block_range(block, shard.size)
        found = memory[: last - first]
        reader.read_into(first, found)
        return found

    put(shards, read_block=read)


def slow_copy() -> None:
    """Not a mistake: training has to wait for the copy."""
    from launch.checkpoint.snapshot import HostBuffer

    copy = HostBuffer.copy

    def late(buffer: HostBuffer, *arguments: Any) -> None:
        time.sleep(COPY_S)
        copy(buffer, *arguments)

    put(HostBuffer, copy=late)


def unawaited_copy() -> None:
    """Training does not wait, and changes what is being copied. Nor does a rank that is left save a state that is right
    in place of it."""
    from launch.checkpoint.checkpoints import Checkpoints
    from launch.saving import Saving

    slow_copy()
    put(Checkpoints, await_copy=lambda _checkpoints: None)
    put(Saving, leave=lambda _saving, *_: None)


MISTAKES = {
    "marker-first": marker_first,
    "without-marker": without_marker,
    "without-hashes": without_hashes,
    "slow-copy": slow_copy,
    "unawaited-copy": unawaited_copy,
}


def main() -> None:
    victim = os.environ.get(ENV_VICTIM)
    install(Victim(**json.loads(victim)) if victim else None, os.environ.get(ENV_MISTAKE))
    from launch.__main__ import main

    main()


if __name__ == "__main__":
    main()
