"""Copies that ranks leave: which of them make a whole, and what is put into the store."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from launch.checkpoint import copies
from launch.checkpoint.copies import Held
from launch.checkpoint.manifest import BLOCK, CheckpointId, Fragment, LogicalTensor, Manifest, Shard, hash_of
from launch.checkpoint.storage import LocalStorage
from launch.contract import ExecutionPlan

PLAN = ExecutionPlan(engine="ddp", world_size=2, device="cpu", micro_batch_size=1, gradient_accumulation_steps=1)
SIZE = 10


def a_copy(
    step: int, ranges: Sequence[tuple[int, int]], rank: int = 0, data: bytes = b"", *, loop: bool = True
) -> Held:
    """Rank `rank`'s copy, which holds these ranges of one tensor of SIZE elements."""
    shard = Shard(
        file="copy.safetensors",
        size=len(data),
        blocks=tuple(hash_of(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)),
        fragments=tuple(Fragment(name="weight/w", start=a, length=b - a, offset=0) for a, b in ranges),
    )
    manifest = Manifest(
        id=str(CheckpointId(step, 1)), step=step, attempt=1, parent=None, created=0.0, job="job", plan=PLAN, samples=0,
        scalars={}, loop={"at": step} if loop else {}, shards=(shard,),
        tensors={"weight/w": LogicalTensor(dtype="float32", shape=(SIZE,))},
    )  # fmt: skip
    return Held(f"rank-{rank}.0", manifest)


def told(chosen: list[Held] | None) -> list[tuple[str, list[tuple[int, int]]]] | None:
    if chosen is None:
        return None
    return [
        (one.name, [(part.start, part.start + part.length) for part in one.manifest.shards[0].fragments])
        for one in chosen
    ]


def test_the_newest_step_that_is_whole_is_chosen() -> None:
    of_7 = [a_copy(7, [(0, 6)]), a_copy(7, [(6, 10)], 1, loop=False)]
    of_8 = [a_copy(8, [(0, 6)])]
    assert told(copies.choose([*of_7, *of_8])) == [("rank-0.0", [(0, 6)]), ("rank-1.0", [(6, 10)])]
    whole = [*of_8, a_copy(8, [(6, 10)], 1, loop=False)]
    chosen = copies.choose([*of_7, *whole])
    assert chosen is not None
    assert {one.manifest.step for one in chosen} == {8}


def test_what_two_nodes_have_is_taken_once() -> None:
    """Under DDP each node has all of it, divided among its ranks, here two and three."""
    first = [a_copy(7, [(0, 5)]), a_copy(7, [(5, 10)], 1, loop=False)]
    second = [a_copy(7, [(0, 3)], 2), a_copy(7, [(3, 6)], 3, loop=False), a_copy(7, [(6, 10)], 4, loop=False)]
    assert told(copies.choose([*first, *second])) == [("rank-0.0", [(0, 5)]), ("rank-1.0", [(5, 10)]), ("rank-2.0", [])]
    lost = copies.choose([first[1], *second])
    assert lost is not None
    assert sorted(part for _, parts in told(lost) or [] for part in parts) == [(0, 3), (3, 6), (6, 10)]


@pytest.mark.parametrize(
    "held",
    [
        [],
        [a_copy(7, [(0, 6)])],
        [a_copy(7, [(0, 6)]), a_copy(8, [(6, 10)], 1)],
        [a_copy(7, [(0, 6)], loop=False), a_copy(7, [(6, 10)], 1, loop=False)],
    ],
    ids=["none", "a-part", "of-two-steps", "nobody-knows-where-the-loop-was"],
)
def test_what_is_not_whole_is_of_no_use(held: list[Held]) -> None:
    assert copies.choose(held) is None


@pytest.mark.parametrize("cut", [0, 1, 40, -1])
def test_a_torn_note_is_noticed(cut: int) -> None:
    manifest = a_copy(7, [(0, 10)]).manifest
    data = copies.sealed(manifest)
    assert copies.unsealed(data) == manifest
    assert copies.unsealed(data[:cut]) is None
    assert copies.unsealed(data.replace(b'"step":7', b'"step":8')) is None


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    if not copies.MEMORY.is_dir():
        pytest.skip("there is no shared memory that is a directory")
    yield str(tmp_path / "checkpoints")
    copies.forget(str(tmp_path / "checkpoints"))


def left(url: str, attempt: int, held: Held, data: bytes) -> Path:
    folder = copies.home(url) / f"attempt-{attempt}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{held.name}.safetensors").write_bytes(data)
    (folder / f"{held.name}.json").write_bytes(copies.sealed(held.manifest))
    return folder


def test_what_is_left_is_put_into_the_store_once(url: str) -> None:
    data = os.urandom(BLOCK + 100)
    folder = left(url, 3, a_copy(7, [(0, 10)], data=data), data)
    storage = LocalStorage(Path(url))
    assert copies.upload(url, storage) == 1
    assert not folder.exists()
    assert storage.names(copies.AREA) == [f"copies/attempt-3/step-7.rank-0.{kind}" for kind in ("json", "safetensors")]
    assert storage.read("copies/attempt-3/step-7.rank-0.safetensors") == data
    assert copies.upload(url, storage) == 0


def test_a_flipped_bit_is_noticed(url: str) -> None:
    data = bytearray(os.urandom(BLOCK + 100))
    held = a_copy(7, [(0, 10)], data=bytes(data))
    data[BLOCK + 3] ^= 4
    left(url, 3, held, bytes(data))
    assert copies.upload(url, LocalStorage(Path(url))) == 0
    assert not LocalStorage(Path(url)).exists("copies/attempt-3/step-7.rank-0.json")


def test_copies_of_a_living_rank_are_left_alone(url: str) -> None:
    held = a_copy(7, [(0, 10)])
    folder = left(url, 3, held, b"")
    later = time.time() + copies.KEEP_S + 60
    descriptor = copies.hold(folder)
    try:
        assert copies.upload(url, LocalStorage(Path(url))) == 0
        copies.sweep(later)
        assert folder.exists()
    finally:
        os.close(descriptor)
    copies.sweep(time.time())
    assert folder.exists(), "somebody may still come for it"
    copies.sweep(later)
    assert not folder.exists()
