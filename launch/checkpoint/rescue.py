"""From copies that ranks have left to a checkpoint: the next attempt's own first one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence

from launch.checkpoint import copies
from launch.checkpoint.blocks import read_block
from launch.checkpoint.catalogue import Catalogue
from launch.checkpoint.copies import Held
from launch.checkpoint.manifest import BLOCK, CheckpointError, CheckpointId, Shard
from launch.checkpoint.ranks import Ranks
from launch.checkpoint.storage import RangeReader, Storage


def gather(ranks: Ranks, catalogue: Catalogue, url: str, attempt: int, newest: CheckpointId | None) -> list[Held]:
    """The copies of a whole state that is newer than the checkpoint `newest`; none if there is no such thing. All ranks
    call it, and what lies in the memory of their nodes is in the store afterwards."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and copies.home(url).exists():
        try:
            copies.upload(url, catalogue.storage)
        except CheckpointError as problem:
            print(f"copies in memory could not be stored: {problem.message}", flush=True)
    ranks.everyones(0)  # all nodes have
    return ranks.by_main(lambda: _newest(catalogue, attempt, newest))


def commit(
    ranks: Ranks,
    catalogue: Catalogue,
    attempt: int,
    chosen: Sequence[Held],
    parent: CheckpointId | None,
    assets: Callable[[], str | None],
) -> CheckpointId | None:
    """Make a checkpoint of `attempt` of the copies that `gather` found; None if they turn out to be damaged. All ranks
    call it: each takes its share of the files.

    Raises:
        Superseded: a higher attempt has begun.
    """
    tensors, loop = copies.joined(chosen)
    key = CheckpointId(loop.step, attempt)
    shards = [one.manifest.shards[0].model_copy(update={"file": _file(one)}) for one in chosen]
    failed = ""
    for one, shard in list(zip(chosen, shards, strict=True))[ranks.rank :: ranks.world_size]:
        try:
            with catalogue.storage.reader(f"{one.name}.safetensors") as reader:
                catalogue.storage.write(f"{key}/{shard.file}", _checked(reader, one.name, shard))
        except (CheckpointError, OSError) as problem:
            failed = str(problem)
    if any(ranks.everyones(bool(failed))):
        if failed:
            print(f"copies of step {key.step} are of no use: {failed}", flush=True)
        ranks.by_main(lambda: _clear(catalogue.storage, str(key)))
        return None
    manifest = loop.model_copy(
        update={
            "id": str(key), "attempt": attempt, "parent": None if parent is None else str(parent),
            "created": time.time(), "assets": None, "tensors": tensors, "shards": tuple(shards),
        }
    )  # fmt: skip
    ranks.by_main(lambda: catalogue.commit(manifest.model_copy(update={"assets": assets()})))
    return key


def discard(storage: Storage) -> None:
    """Delete all copies, when an attempt goes on from what it has chosen: they were used, or nobody will."""
    if storage.names(copies.AREA):
        _clear(storage, copies.AREA)


def _newest(catalogue: Catalogue, attempt: int, newest: CheckpointId | None) -> list[Held]:
    """On one rank: what the store has of the last attempt that left copies, if none has saved since."""
    storage = catalogue.storage
    names = [name for name in storage.names(copies.AREA) if name.endswith(".json")]
    of = max((of for name in names if (of := copies.attempt_of(name)) is not None and of < attempt), default=None)
    if of is None or (newest is not None and newest.attempt > of):
        return []
    held = []
    for name in names:
        if copies.attempt_of(name) == of:
            manifest = copies.unsealed(storage.read(name))
            if manifest is not None and (newest is None or manifest.step > newest.step):
                held.append(Held(name.removesuffix(".json"), manifest))
    return copies.choose(held) or []


def _checked(reader: RangeReader, name: str, shard: Shard) -> Iterator[memoryview]:
    memory = memoryview(bytearray(min(BLOCK, shard.size)))
    for block in range(len(shard.blocks)):
        yield read_block(reader, name, shard, block, memory)


def _file(one: Held) -> str:
    return f"{one.name.rpartition('.')[2]}.safetensors"


def _clear(storage: Storage, folder: str) -> None:
    with contextlib.suppress(CheckpointError):  # what stays is in nobody's way: it is no checkpoint
        storage.delete_all(folder)
