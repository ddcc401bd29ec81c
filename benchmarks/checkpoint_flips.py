"""What bad storage does to checkpoints: one fault at a time in a store of good ones. See benchmarks.checkpoint_crash.

The store has two attempts. The first saved steps 2, 4 and 6; the second went on from step 4, since step 6 of the first
was committed too late, and saved steps 6 and 8. A fault is one flipped bit, a file that is cut or missing, or files or
directories in each other's place. benchmarks.checkpoint_resident resumes from what is left of it.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.checkpoint_victim import ENV_MISTAKE
from launch.contract import ExecutionPlan
from tests.worlds import a_contract, start

ENV_CASES = "CASES"

THIRD, LATE, SECOND, NEWEST = "step-4.attempt-1", "step-6.attempt-1", "step-6.attempt-2", "step-8.attempt-2"
"""In the order of their age; LATE counts for nothing."""
MANIFEST, MARKER, CLAIM = "MANIFEST.json", "COMMITTED", "claims/attempt-2.json"
SHARDS = ("rank-0.safetensors", "rank-1.safetensors")

PLAN = ExecutionPlan(
    engine="zero2", world_size=2, device="cpu", micro_batch_size=1, gradient_accumulation_steps=1, precision="fp32"
)


@dataclass(frozen=True)
class Fault:
    """What was done, and what must come of it."""

    kind: str
    named: tuple[str, ...]
    """Of these files, in their directories, the reason must name one."""
    loads: str = SECOND
    """The checkpoint that must be loaded, whole."""
    set_aside: tuple[str, ...] = (NEWEST,)
    may_refuse: bool = False
    """Whether a typed error is as good."""


@dataclass
class FlipFigures:
    """What came of the faults. From `undetected` to `not_kept`, all should be 0."""

    flips: int = 0
    """Faults of all kinds."""
    detected: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    """Typed errors, where what counts could not be known any more."""
    undetected: int = 0
    """What was damaged was loaded."""
    wrong_fallback: int = 0
    """Something else was loaded than the right one whole, or nothing, or the attempt failed."""
    not_named: int = 0
    """Not set aside by a note that names the file."""
    not_kept: int = 0
    """The damaged files are gone."""
    case_ms: float = 0.0
    wrong: list[str] = field(default_factory=list)


def flip(
    folder: Path,
    flips: int,
    seed: int,
    *,
    mistake: str | None = None,
    kinds: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda _line: None,
) -> FlipFigures:
    """Do `flips` faults, of all kinds or of some, to be found by two ranks under ZeRO-2 that stay up.

    `mistake` is one of benchmarks.checkpoint_victim.
    """
    contract = a_contract(folder / "resident", PLAN, run_id="resident.1")
    cases = {"flips": flips, "seed": seed, "folder": str(folder), "kinds": kinds or list(KINDS)}
    environment = {ENV_CASES: json.dumps(cases), ENV_MISTAKE: mistake or ""}
    launched = start(contract, environment, module="benchmarks.checkpoint_resident")
    while launched.launchers[0].poll() is None:
        time.sleep(1)
        progress = launched.files.progress(0)
        say(f"{len(progress.read_text().splitlines()) if progress.exists() else 0:5} faults")
    launched.wait()
    found = folder / "figures.json"
    assert found.exists(), launched.logs()
    figures = FlipFigures(**json.loads(found.read_text()))
    for wrong in figures.wrong:
        say(f"WRONG {wrong}")
    return figures


def damage(draw: random.Random, store: Path, kinds: Sequence[str]) -> Fault:
    """Do one fault to the newest checkpoint, or to what says that it counts."""
    kind = draw.choices(kinds, weights=[KINDS[kind][0] for kind in kinds])[0]
    return KINDS[kind][1](draw, store, kind)


def _flip_shard(draw: random.Random, store: Path, kind: str) -> Fault:
    name = draw.choice(SHARDS)
    path = store / NEWEST / name
    first, last = draw.choice(_regions(path, kind.removeprefix("flip-")))
    flip_bit(path, draw, first, last)
    return Fault(kind, (f"{NEWEST}/{name}",))


def _flip_file(draw: random.Random, store: Path, kind: str) -> Fault:
    name = {"flip-manifest": MANIFEST, "flip-marker": MARKER}[kind]
    flip_bit(store / NEWEST / name, draw)
    return Fault(kind, (f"{NEWEST}/{name}",))


def _cut(draw: random.Random, store: Path, kind: str) -> Fault:
    name = {"cut-shard": draw.choice(SHARDS), "cut-manifest": MANIFEST, "cut-marker": MARKER}[kind]
    path = store / NEWEST / name
    with path.open("r+b") as file:
        file.truncate(draw.choice((0, draw.randrange(path.stat().st_size))))
    return Fault(kind, (f"{NEWEST}/{name}",))


def _missing(draw: random.Random, store: Path, kind: str) -> Fault:
    name = {"missing-shard": draw.choice(SHARDS), "missing-manifest": MANIFEST}[kind]
    (store / NEWEST / name).unlink()
    return Fault(kind, (f"{NEWEST}/{name}",))


def _uncommitted(_draw: random.Random, store: Path, kind: str) -> Fault:
    """Without its marker it never was one."""
    (store / NEWEST / MARKER).unlink()
    return Fault(kind, (), set_aside=())


def _swapped_shards(_draw: random.Random, store: Path, kind: str) -> Fault:
    swap(*(store / NEWEST / name for name in SHARDS))
    return Fault(kind, tuple(f"{NEWEST}/{name}" for name in SHARDS))


def _older_shard(draw: random.Random, store: Path, kind: str) -> Fault:
    name = draw.choice(SHARDS)
    shutil.copyfile(store / SECOND / name, store / NEWEST / name)
    return Fault(kind, (f"{NEWEST}/{name}",))


def _crossed_shards(draw: random.Random, store: Path, kind: str) -> Fault:
    name = draw.choice(SHARDS)
    swap(store / NEWEST / name, store / SECOND / name)
    return Fault(kind, (name,), loads=THIRD, set_aside=(NEWEST, SECOND))


def _swapped_checkpoints(_draw: random.Random, store: Path, kind: str) -> Fault:
    swap(store / NEWEST, store / SECOND)
    return Fault(kind, (NEWEST, SECOND), loads=THIRD, set_aside=(NEWEST, SECOND))


def _claim(draw: random.Random, store: Path, kind: str) -> Fault:
    """The second attempt has saved nothing yet: its claim alone says what it started from."""
    for name in (NEWEST, SECOND):
        shutil.rmtree(store / name)
    if kind == "flip-claim":
        flip_bit(store / CLAIM, draw)
    else:
        with (store / CLAIM).open("r+b") as file:
            file.truncate(draw.randrange((store / CLAIM).stat().st_size))
    return Fault(kind, (CLAIM,), loads=THIRD, set_aside=(), may_refuse=True)


def _missing_claim(_draw: random.Random, store: Path, kind: str) -> Fault:
    (store / CLAIM).unlink()
    return Fault(kind, (CLAIM,), loads=NEWEST, set_aside=(), may_refuse=True)


KINDS: dict[str, tuple[int, Callable[[random.Random, Path, str], Fault]]] = {
    "flip-tensor": (20, _flip_shard),
    "flip-random": (8, _flip_shard),
    "flip-header": (8, _flip_shard),
    "flip-padding": (4, _flip_shard),
    "flip-manifest": (10, _flip_file),
    "flip-marker": (10, _flip_file),
    "cut-shard": (8, _cut),
    "cut-manifest": (4, _cut),
    "cut-marker": (4, _cut),
    "missing-shard": (4, _missing),
    "missing-manifest": (2, _missing),
    "missing-marker": (2, _uncommitted),
    "swapped-shards": (2, _swapped_shards),
    "older-shard": (3, _older_shard),
    "crossed-shards": (3, _crossed_shards),
    "swapped-checkpoints": (2, _swapped_checkpoints),
    "flip-claim": (4, _claim),
    "cut-claim": (1, _claim),
    "missing-claim": (1, _missing_claim),
}
"""How often, and by what."""


def _regions(shard: Path, part: str) -> list[tuple[int, int]]:
    """Where in a shard's file its header, the header's padding, the tensors or the random states lie."""
    data = shard.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text = 8 + len(data[8:end].rstrip(b" "))
    if part in ("header", "padding"):
        return [(0, text)] if part == "header" else [(text, end)]
    entries = json.loads(data[8:end])
    return [
        (end + entry["data_offsets"][0], end + entry["data_offsets"][1])
        for name, entry in entries.items()
        if name.startswith("rng-") == (part == "random")
    ]


def flip_bit(path: Path, draw: random.Random, first: int = 0, last: int | None = None) -> None:
    """One, drawn, of the bytes from `first` to before `last`."""
    data = bytearray(path.read_bytes())
    at = draw.randrange(first, len(data) if last is None else last)
    data[at] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def swap(one: Path, other: Path) -> None:
    """Give each the other's name."""
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
