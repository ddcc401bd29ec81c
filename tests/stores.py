"""Small stores of checkpoints, made by hand: real manifests and markers, shards of bytes that nobody trains on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import s3fs

from launch.checkpoint.assets import store_assets
from launch.checkpoint.catalogue import Catalogue
from launch.checkpoint.manifest import BLOCK, CheckpointId, Fragment, LogicalTensor, Manifest, Shard, hash_of
from launch.checkpoint.storage import RangeReader, Storage, open_storage
from launch.contract import ExecutionPlan
from tests.s3 import an_object_store

CREATED = 1_700_000_000.0
FLOATS = 1000
"""Elements of each tensor of a hand-made checkpoint; the ranks have as many of them each, as far as they go round."""


def shard_bytes(found: CheckpointId, rank: int, size: int) -> bytes:
    """What rank `rank` wrote: other bytes for every checkpoint and rank."""
    line = f"{found} rank {rank} ".encode()
    return (line * (size // len(line) + 1))[:size]


def a_manifest(
    step: int, attempt: int = 1, *, ranks: int = 2, shard_size: int | None = None, **changes: Any
) -> tuple[Manifest, dict[str, bytes]]:
    """A manifest of two float32 tensors, and the bytes of its shards by file."""
    found = CheckpointId(step, attempt)
    share = FLOATS // ranks
    size = shard_size or 8 * share
    files = {f"rank-{rank}.safetensors": shard_bytes(found, rank, size) for rank in range(ranks)}
    shards = tuple(
        Shard(
            file=file,
            size=len(data),
            blocks=tuple(hash_of(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)),
            fragments=tuple(
                Fragment(name=name, start=rank * share, length=share, offset=4 * share * place)
                for place, name in enumerate(("weight/w", "exp_avg/w"))
            ),
        )
        for rank, (file, data) in enumerate(files.items())
    )
    values: dict[str, Any] = {
        "id": str(found),
        "step": step,
        "attempt": attempt,
        "parent": None,
        "created": CREATED + step,
        "job": "job-1",
        "plan": ExecutionPlan(
            engine="ddp" if ranks > 1 else "single", world_size=ranks, device="cpu", micro_batch_size=4,
            gradient_accumulation_steps=1,
        ),
        "samples": 16 * step,
        "scalars": {"step": float(step)},
        "tensors": {name: LogicalTensor(dtype="float32", shape=(FLOATS,)) for name in ("weight/w", "exp_avg/w")},
        "shards": shards,
    }  # fmt: skip
    return Manifest(**(values | changes)), files


def commit(storage: Storage, step: int, attempt: int = 1, **changes: Any) -> CheckpointId:
    """Write a checkpoint as ranks do and commit it. Raises Superseded as Catalogue.commit."""
    manifest, files = a_manifest(step, attempt, **changes)
    for file, data in files.items():
        storage.write(f"{manifest.id}/{file}", [memoryview(data)])
    Catalogue(storage).commit(manifest)
    return CheckpointId(manifest.step, manifest.attempt)


def begin(storage: Storage, attempt: int, starts_from: CheckpointId | None = None) -> None:
    """Begin an attempt and claim what it starts from."""
    catalogue = Catalogue(storage)
    catalogue.begin(attempt)
    catalogue.claim(attempt, starts_from)


def a_store(storage: Storage) -> dict[str, CheckpointId]:
    """A job in its second attempt, with a checkpoint in every state; by what is the matter with each.

    Attempt 1 saved steps 10, 20 and 30; 30 is quarantined, and 40 came after attempt 2 had begun from 20. Attempt 2
    saved 30 and is writing 60; attempt 1 had begun to write 50. 10 is pinned.
    """
    assets = store_assets(storage, {"config.json": b"{}", "tokenizer.json": b"[]"})
    begin(storage, 1)
    made = {"pinned": commit(storage, 10, assets=assets, metrics={"loss": 0.5})}
    made["parent"] = commit(storage, 20, parent=str(made["pinned"]), assets=assets, metrics={"loss": 0.25})
    made["quarantined"] = commit(storage, 30, parent=str(made["parent"]), assets=assets)
    late, files = a_manifest(40, parent=str(made["quarantined"]))
    for number, (file, data) in enumerate(files.items()):
        storage.write(f"{late.id}/{file}", [memoryview(data)])
        if number == 0:
            storage.write(f"step-50.attempt-1/{file}", [memoryview(data)])
    catalogue = Catalogue(storage)
    catalogue.quarantine(made["quarantined"], "rank-0 differs", by_attempt=2)
    catalogue.pin(made["pinned"])
    begin(storage, 2, made["parent"])
    # The marker of a commit that was looked at before attempt 2 began, and lands after.
    _land(storage, late)
    made["superseded"] = CheckpointId(late.step, late.attempt)
    made["newest"] = commit(storage, 30, 2, parent=str(made["parent"]), ranks=4, metrics={"loss": 0.125})
    storage.write("step-60.attempt-2/rank-0.safetensors", [memoryview(b"half")])
    made["left"], made["writing"] = CheckpointId(50, 1), CheckpointId(60, 2)
    return made


def _land(storage: Storage, manifest: Manifest) -> None:
    catalogue = Catalogue(storage)
    catalogue.check_not_superseded = lambda _attempt: None  # type: ignore[method-assign]
    catalogue.commit(manifest)


def damage(path: Path, at: int) -> None:
    """Flip a bit of the byte at `at`."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@contextmanager
def object_store() -> Iterator[str]:
    """The URL of an S3 bucket, for as long as the context lasts; processes that are started meanwhile find it, too."""
    with an_object_store() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # they remember addresses
        yield server.url
        s3fs.S3FileSystem.clear_instance_cache()


def fresh(bucket: str, name: str) -> Storage:
    """An empty store in a bucket, of one test alone."""
    return open_storage(f"{bucket}/{name}-{os.urandom(4).hex()}")


class MemoryStorage:
    """A store whose objects are entries of a dictionary, for simulations. Not for threads."""

    url = "memory"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def create(self, name: str, data: bytes) -> bool:
        return self.objects.setdefault(name, data) == data

    def write(self, name: str, blocks: Iterable[memoryview]) -> None:
        self.objects[name] = b"".join(blocks)

    def read(self, name: str) -> bytes:
        if name not in self.objects:
            raise FileNotFoundError(name)
        return self.objects[name]

    @contextmanager
    def reader(self, name: str) -> Iterator[RangeReader]:
        yield _MemoryRanges(self.read(name))

    def names(self, prefix: str) -> list[str]:
        return sorted(name for name in self.objects if not prefix or name.startswith(f"{prefix}/"))

    def exists(self, name: str) -> bool:
        return name in self.objects

    def delete(self, name: str) -> None:
        self.objects.pop(name, None)

    def delete_all(self, prefix: str) -> None:
        for name in self.names(prefix):
            del self.objects[name]


class _MemoryRanges:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def read_into(self, start: int, target: memoryview) -> int:
        found = self._data[start : start + len(target)]
        target[: len(found)] = found
        return len(found)
