"""A look at a directory of checkpoints by the documented format alone: none of the code that reads them is used."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

BLOCK = 4096  # benchmarks.checkpoint_victim's


class Found(NamedTuple):
    """A directory of a store that has a commit marker; ordered by step."""

    step: int
    attempt: int
    faults: tuple[str, ...]
    """What is wrong with it; empty if every byte is what was committed."""

    @property
    def id(self) -> str:
        return f"step-{self.step}.attempt-{self.attempt}"


def committed(store: Path) -> dict[str, Found]:
    """Those that are marked as committed and not set aside, by name, in the order of their steps."""
    found = [
        Found(step, attempt, tuple(faults(folder)))
        for folder, step, attempt in _directories(store)
        if (folder / "COMMITTED").exists() and not (folder / "QUARANTINED.json").exists()
    ]
    return {one.id: one for one in sorted(found)}


def unfinished(store: Path) -> list[str]:
    """Directories without a marker; an empty one is nothing, as it would be in an object store."""
    return [
        folder.name
        for folder, _, _ in _directories(store)
        if not (folder / "COMMITTED").exists() and any(folder.iterdir())
    ]


def faults(folder: Path) -> Iterator[str]:
    """Whatever of a committed checkpoint is not as it was committed."""
    marker, manifest = folder / "COMMITTED", folder / "MANIFEST.json"
    if not manifest.exists():
        yield "there is no manifest"
        return
    if json.loads(marker.read_bytes())["manifest"] != xxhash.xxh3_64_hexdigest(manifest.read_bytes()):
        yield "the manifest is another one"
        return
    found: dict[str, Any] = json.loads(manifest.read_bytes())
    if found["id"] != folder.name:
        yield f"it is {found['id']}"
    held: dict[str, list[tuple[int, int]]] = {name: [] for name in found["tensors"]}
    for shard in found["shards"]:
        if not (folder / shard["file"]).exists():
            yield f"{shard['file']} is missing"
            continue
        data = (folder / shard["file"]).read_bytes()
        blocks = [xxhash.xxh3_64_hexdigest(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]
        if blocks != shard["blocks"]:
            yield f"{shard['file']} is not what was written"
        for fragment in shard["fragments"]:
            held[fragment["name"]].append((fragment["start"], fragment["start"] + fragment["length"]))
    for name, ranges in held.items():
        numel = 1
        for size in found["tensors"][name]["shape"]:
            numel *= size
        edges = [0, *itertools.chain.from_iterable(sorted(ranges)), numel]
        if edges[::2] != edges[1::2]:
            yield f"{name} is not covered once"


def _directories(store: Path) -> Iterator[tuple[Path, int, int]]:
    for folder in store.glob("step-*"):
        named = re.fullmatch(r"step-(\d+)\.attempt-(\d+)", folder.name)
        if named:
            yield folder, int(named[1]), int(named[2])
