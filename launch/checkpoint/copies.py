"""Copies of ranks' state that outlive the ranks: in a node's shared memory, and from there in the store. Torch-free.

    /dev/shm/tuneyard-UID/STORE/attempt-A/rank-R.S.safetensors   what rank R had at a step; S is 0 or 1, in turn
    /dev/shm/tuneyard-UID/STORE/attempt-A/rank-R.S.json          its manifest: removed first, and written last
    copies/attempt-A/step-N.rank-R.{safetensors,json}            the same in the store, once the ranks are gone

They are no checkpoints: nobody has seen whether they make a whole. The next attempt looks at all of one step, and makes
a checkpoint of its own of them (rescue.py).
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from launch.checkpoint.manifest import (
    BLOCK,
    CheckpointError,
    Damaged,
    Fragment,
    LogicalTensor,
    Manifest,
    Shard,
    hash_of,
)
from launch.checkpoint.storage import Storage, open_storage

AREA = "copies"
MEMORY = Path("/dev/shm")
KEEP_S = 900.0
"""For how long copies stay in memory that no attempt has come for."""
SWEEP_S = 60.0
"""How often a node looks for such."""

_FOLDER = re.compile(r"attempt-(\d+)")


class Held(NamedTuple):
    """One rank's copy: where its bytes are, without the suffix, and what it says of itself."""

    name: str
    manifest: Manifest


def home(url: str) -> Path:
    """Where a node's memory has the copies of the job whose checkpoints lie at `url`."""
    return MEMORY / f"tuneyard-{os.getuid()}" / hash_of(url.encode())


def sealed(manifest: Manifest) -> bytes:
    """What is written of it: whoever reads it knows whether it is whole."""
    text = manifest.model_dump_json().encode()
    return hash_of(text).encode() + b"\n" + text


def unsealed(data: bytes) -> Manifest | None:
    """The manifest in what `sealed` gave; None if it is torn or another."""
    told, _, text = data.partition(b"\n")
    if hash_of(text).encode() != told:
        return None
    try:
        return Manifest.model_validate_json(text)
    except ValidationError:
        return None


def in_memory(folder: Path) -> list[Held]:
    """The copies in an attempt's folder that are whole, so far as their manifests tell."""
    found = []
    for path in sorted(folder.glob("rank-*.json")):
        with suppress(OSError):
            manifest = unsealed(path.read_bytes())
            if manifest is not None and path.with_suffix(".safetensors").exists():
                found.append(Held(str(path.with_suffix("")), manifest))
    return found


def choose(held: Sequence[Held]) -> list[Held] | None:
    """Copies of one step, the newest there is, that together are the whole state; None if no step has that.

    What several have is taken of one: of the others' shards fewer fragments are told of then.
    """
    for step in sorted({one.manifest.step for one in held}, reverse=True):
        of_step = [one for one in held if one.manifest.step == step]
        for order in (of_step, of_step[::-1]):
            chosen = _without_repetition(order)
            if _is_whole(chosen):
                return chosen
    return None


def joined(chosen: Sequence[Held]) -> tuple[dict[str, LogicalTensor], Manifest]:
    """All tensors of what `choose` chose, and one that knows where the loop was."""
    tensors: dict[str, LogicalTensor] = {}
    for one in chosen:
        tensors |= one.manifest.tensors
    return tensors, next(one.manifest for one in chosen if one.manifest.loop)


def blocks_of(descriptor: int, shard: Shard) -> Iterator[memoryview]:
    """The bytes of a copy, each block once its hash is right. Raises Damaged."""
    for index, expected in enumerate(shard.blocks):
        first = index * BLOCK
        data = os.pread(descriptor, min(BLOCK, shard.size - first), first)
        if hash_of(data) != expected:
            raise Damaged(f"a copy in memory differs from what was copied, at byte {first}")
        yield memoryview(data)


def upload(url: str, storage: Storage) -> int:
    """Put what ranks that are gone have left in this node's memory into the store, and free the memory; returns how
    many copies there were. Folders of ranks that live are left alone.

    Raises:
        CheckpointError: the store fails; what was not stored stays in memory.
    """
    count = 0
    for folder in sorted(home(url).glob("attempt-*")):
        with _alone_in(folder) as alone:
            if not alone:
                continue
            held = in_memory(folder)
            for one in choose(held) or held:
                where = f"{AREA}/{folder.name}/step-{one.manifest.step}.rank-{_rank_of(one.name)}"
                (shard,) = one.manifest.shards
                descriptor = os.open(f"{one.name}.safetensors", os.O_RDONLY)
                try:
                    storage.write(f"{where}.safetensors", blocks_of(descriptor, shard))
                except Damaged as problem:
                    print(f"{one.name}: {problem.message}", file=sys.stderr)
                    continue
                finally:
                    os.close(descriptor)
                storage.create(f"{where}.json", sealed(one.manifest))
                count += 1
            shutil.rmtree(folder, ignore_errors=True)
    return count


def forget(url: str) -> None:
    """Free the memory of a job's copies."""
    shutil.rmtree(home(url), ignore_errors=True)


def sweep(now: float) -> None:
    """Free the memory of copies whose ranks are gone and that nobody has come for in KEEP_S."""
    for folder in MEMORY.glob(f"tuneyard-{os.getuid()}/*/attempt-*"):
        with suppress(OSError), _alone_in(folder) as alone:
            if alone and now - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) > KEEP_S:
                shutil.rmtree(folder, ignore_errors=True)
                folder.parent.rmdir()


def hold(folder: Path) -> int:
    """Make the folder of a living rank's copies; it is the rank's until the descriptor that is returned is closed."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


@contextmanager
def _alone_in(folder: Path) -> Iterator[bool]:
    """Whether no living rank holds the folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        alone = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)


def attempt_of(name: str) -> int | None:
    """The attempt in `copies/attempt-A/...`; None if the name is another."""
    match = _FOLDER.fullmatch(name.split("/")[1]) if name.startswith(f"{AREA}/") else None
    return int(match[1]) if match else None


def _rank_of(name: str) -> str:
    return Path(name).name.removeprefix("rank-").partition(".")[0]


def _without_repetition(held: Sequence[Held]) -> list[Held]:
    covered: dict[str, list[tuple[int, int]]] = {}
    chosen = []
    for name, manifest in held:
        (shard,) = manifest.shards
        fragments = []
        for fragment in shard.fragments:
            begin, end = fragment.start, fragment.start + fragment.length
            there = covered.setdefault(fragment.name, [])
            if all(end <= low or begin >= high for low, high in there):
                there.append((begin, end))
                fragments.append(fragment)
        if fragments or manifest.loop:
            kept = shard.model_copy(update={"fragments": tuple(fragments)})
            chosen.append(Held(name, manifest.model_copy(update={"shards": (kept,)})))
    return chosen


def _is_whole(chosen: Sequence[Held]) -> bool:
    if not any(one.manifest.loop for one in chosen):
        return False
    tensors, _ = joined(chosen)
    held: dict[str, int] = {}
    fragments: list[Fragment] = [part for one in chosen for part in one.manifest.shards[0].fragments]
    for fragment in fragments:
        held[fragment.name] = held.get(fragment.name, 0) + fragment.length
    return all(held.get(name) == tensor.numel for name, tensor in tensors.items())


def main() -> None:
    """`python -m launch.checkpoint.copies URL`: upload what is left on this node, by its agent."""
    begun = time.monotonic()
    (url,) = sys.argv[1:]
    try:
        count = upload(url, open_storage(url))
    except (CheckpointError, OSError) as problem:
        sys.exit(f"copies in memory could not be stored: {problem}")
    print(f"{count} copies were stored in {time.monotonic() - begun:.2f} s")


if __name__ == "__main__":
    main()
