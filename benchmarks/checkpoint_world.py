"""`python -m benchmarks.checkpoint_world`: the ranks in which benchmarks.checkpoint saves, loads and compares."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from launch.attempt import AttemptFiles
from launch.contract import RunContract
from launch.train import Loop
from tests.reshard import World

ENV_TASK = "BENCH_CHECKPOINT"
"""JSON: `do` (saves | save | loads), `root`, and how many."""

STEPS_UNDER = 3


def together(seconds: float) -> float:
    """The longest of all ranks."""
    value = torch.tensor([seconds], dtype=torch.float64)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return float(value)


def timed_step(loop: Loop) -> float:
    begun = time.perf_counter()
    loop.train_step()
    return time.perf_counter() - begun


def saves(world: World, root: Path, count: int) -> dict[str, Any]:
    """`count` times, alternating: a save beside training, Accelerate's own save_state, and the bare writing of the same
    bytes."""
    loop = world.loop(root / "store")
    checkpoints = loop.saving._checkpoints
    found: dict[str, list[float]] = {
        name: [] for name in ("blocked", "stock", "quiet_step", "saving_step", "under", "save", "hash", "bare")
    }
    timed_step(loop)
    checkpoints.save(loop.step, wait=True)  # the first of each kind warms up
    checkpoints.news()
    size = 0
    for index in range(count):
        found["quiet_step"] += [timed_step(loop) for _ in range(2)]
        # Beside training.
        torch.distributed.barrier()
        checkpoints.save(loop.step)
        pending = checkpoints._pending
        assert pending is not None
        ended: list[float] = []
        pending.add_done_callback(lambda _: ended.append(time.perf_counter()))  # noqa: B023  # waited for below
        # As many steps on every rank, more than a save takes; those after its end are not counted.
        for _ in range(STEPS_UNDER):
            begun = time.perf_counter()
            loop.train_step()
            finished = time.perf_counter()
            if not ended or ended[0] > begun:
                found["saving_step"].append(finished - begun)
                found["under"].append(min(finished, ended[0] if ended else finished) - begun)
        checkpoints.finish()
        found["blocked"].append(together(pending.result().blocked_s or 0.0))
        # Stock, of the same state, while training waits.
        torch.distributed.barrier()
        begun = time.perf_counter()
        world.engine.accelerator.save_state(str(root / f"stock-{index}"))
        torch.distributed.barrier()
        found["stock"].append(time.perf_counter() - begun)
        if world.rank == 0:
            shutil.rmtree(root / f"stock-{index}")
        # The same bytes by the same processes to fresh files, and nothing else; then ours, nothing else running.
        checkpoints.news()
        for kind in ("bare", "save") if index % 2 else ("save", "bare"):
            loop.train_step()
            os.sync()  # what was deleted before, and written, is not this one's to wait for
            torch.distributed.barrier()
            if kind == "bare":
                found["bare"].append(together(bare(checkpoints, root / f"bare-{index}-{world.rank}")))
            else:
                checkpoints.save(loop.step, wait=True)
                (note,) = [note for note in checkpoints.news() if note.outcome == "committed"]
                size = checkpoints._buffer.layout.size if checkpoints._buffer else 0
                assert note.save_s is not None
                found["save"].append(together(note.save_s))
                found["hash"].append(together(note.hash_s or 0.0))
    total = torch.tensor([size])
    torch.distributed.all_reduce(total)
    return {**found, "bytes": int(total)}


def bare(checkpoints: Any, path: Path) -> float:
    """Seconds to write this rank's buffer to a fresh file, and sync it."""
    blocks = list(checkpoints._buffer.blocks())
    begun = time.perf_counter()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    for block in blocks:
        rest = block
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    os.fsync(descriptor)
    os.close(descriptor)
    took = time.perf_counter() - begun
    path.unlink()
    return took


def save(world: World, root: Path, name: str) -> dict[str, Any]:
    """One checkpoint, for others to load."""
    loop = world.loop(root / name)
    loop.train_step()
    loop.save(wait=True)
    return {}


def loads(world: World, root: Path, names: list[str], count: int) -> dict[str, Any]:
    """`count` times each of the stores `names`, in turn: seconds from the listing to the last weight in place."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(count + 1):
        for name in names:
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            begun = time.perf_counter()
            loop = world.loop(root / name)
            took = time.perf_counter() - begun
            found[name].append(together(took) if torch.distributed.is_initialized() else took)
            assert loop.step == 1
    return {name: times[1:] for name, times in found.items()}  # the first of each warms up


def main() -> None:
    contract = RunContract.read(Path(sys.argv[sys.argv.index("--contract") + 1]))
    rank = int(os.environ.get("RANK", "0"))
    files = AttemptFiles(contract.run_dir)
    files.rank(rank).mkdir(parents=True, exist_ok=True)
    os.dup2(os.open(files.log(rank), os.O_WRONLY | os.O_CREAT), 2)
    task = json.loads(os.environ[ENV_TASK])
    world, root = World(contract, rank), Path(task["root"])
    if task["do"] == "saves":
        result = saves(world, root, task["count"])
    elif task["do"] == "save":
        result = save(world, root, task["name"])
    else:
        result = loads(world, root, task["names"], task["count"])
    files.rank(rank).joinpath("result.json").write_text(json.dumps(result))
    os._exit(0)


if __name__ == "__main__":
    main()
