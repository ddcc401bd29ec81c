"""The same kills on a plain training script that saves by Accelerate's save_state, under ZeRO-2 on two ranks.

`python -m benchmarks.checkpoint_stock --contract FILE` is a rank of that script. It saves to a directory named by the
step and goes on by load_state from the newest one, as Accelerate's examples do. `kill_stock` kills it, and looks what
load_state makes of what is left.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.checkpoint_kills import EVERY, LOSS_TOLERANCE, STEPS, Clock, ends_of, kill_at, lines_of, name_of
from benchmarks.checkpoint_victim import ENV_VICTIM, Victim, put
from launch.contract import (
    AttemptFiles,
    ExecutionPlan,
    ExitCode,
    RankError,
    RankProcess,
    RunContract,
    write_atomically,
)
from launch.ending import Ending
from launch.engine_config import deepspeed_config
from launch.progress import Progress
from tests.worlds import a_contract, start

PLAN = ExecutionPlan(
    engine="zero2", world_size=2, device="cpu", micro_batch_size=8, gradient_accumulation_steps=1, precision="fp32"
)
BOUNDARIES = ("file-begun", "in-file", "file-written")
FILES = (3, 2)
"""How many files each rank writes in a save by torch.save."""
SAVE_S = 0.06
"""About as long as a save takes."""


@dataclass
class StockFigures:
    """What load_state made of the newest directory after a kill."""

    stock_kills: int = 0
    stock_kills_at: Counter[str] = field(default_factory=Counter)
    stock_resumes: int = 0
    stock_torn: int = 0
    """Resumes from a directory that was not whole: the sum of the next three."""
    stock_fails_to_load: int = 0
    stock_loads_wrong: int = 0
    """No error, and the next loss is another one."""
    stock_loads_in_part: int = 0
    """No error and the same losses, and a file was missing or cut: random states are left as they were."""
    stock_latest_names_torn: int = 0
    """Those among them in which DeepSpeed had written its marker, `latest`."""
    stock_seconds: float = 0.0
    stock_errors: Counter[str] = field(default_factory=Counter)
    """Of a rank that failed first, after what was torn; after a kill those of its peers."""


def kill_stock(folder: Path, kills: int, seed: int, say: Callable[[str], None]) -> StockFigures:
    """Train, kill, go on; after a directory that was not whole, with a new job."""
    begun, figures = time.monotonic(), StockFigures()
    undisturbed = _run(folder / "undisturbed", folder / "undisturbed" / "saves", None)
    assert undisturbed is not None
    losses = undisturbed.losses
    whole = sizes(folder / "undisturbed" / "saves" / f"step_{STEPS}")
    number = 0
    while figures.stock_kills < kills:
        number += 1
        job = folder / f"job-{number}"
        for attempt in itertools.count(1):
            death = _death(random.Random(f"{seed}/{number}/{attempt}"), job / f"killed-{attempt}")
            newest = newest_save(job / "saves")
            held = sizes(newest) if newest is not None else {}
            ran = _run(job / f"attempt-{attempt}", job / "saves", death if figures.stock_kills < kills else None)
            if ran is None:
                continue
            if ran.killed:
                figures.stock_kills += 1
                figures.stock_kills_at[name_of(death)] += 1
            became = "whole"
            if newest is not None:
                cut = [name for name, size in whole.items() if held.get(name, 0) < 0.9 * size]
                became = ran.verdict(losses, in_part=bool(cut))
                figures.stock_resumes += 1
                say(f"{figures.stock_kills:4} stock kills  {newest.name} {became}")
            if became != "whole":
                figures.stock_torn += 1
                setattr(figures, f"stock_{became}", getattr(figures, f"stock_{became}") + 1)
                figures.stock_latest_names_torn += "latest" in held
                figures.stock_errors[ran.error or "none"] += 1
            if became != "whole" or not ran.killed:
                break
    figures.stock_seconds = round(time.monotonic() - begun, 1)
    return figures


@dataclass
class Ran:
    """What came of one attempt."""

    losses: list[float]
    first: int | None
    """The step from which it went on; None if it did not begin."""
    killed: bool
    error: str | None
    """The kind of the first of all ranks'."""

    def verdict(self, losses: list[float], *, in_part: bool) -> str:
        """What load_state made of a directory, of which files were missing or cut if `in_part`."""
        if self.first is None:
            return "fails_to_load"
        own = losses[self.first : self.first + len(self.losses)]
        near = all(abs(found - right) <= LOSS_TOLERANCE for found, right in zip(self.losses, own, strict=True))
        if not near:
            return "loads_wrong"
        return "loads_in_part" if in_part else "whole"


def _run(folder: Path, saves: Path, death: Victim | Clock | None) -> Ran | None:
    """None if it hung before there was a process group."""
    contract = a_contract(folder, PLAN, checkpoint_dir=str(saves), run_id=f"stock.{folder.name}")
    environment = {ENV_VICTIM: json.dumps(asdict(death))} if isinstance(death, Victim) else {}
    launched = start(contract, environment, module="benchmarks.checkpoint_stock")
    killed = kill_at(launched, death) is not None if isinstance(death, Clock) else False
    exits = ends_of(launched)
    if exits is None:
        assert not lines_of(launched.files.progress(0)), launched.logs()
        return None
    if isinstance(death, Victim):
        killed = Path(death.told).exists()
    lines = lines_of(launched.files.progress(0), "train")
    failed = sorted((end for end in exits.values() if end.error is not None), key=lambda end: end.time)
    return Ran(
        losses=[line.loss for line in lines if line.loss is not None],
        first=lines[0].step - 1 if lines else None,
        killed=killed,
        error=failed[0].error.code if failed and failed[0].error else None,
    )


def _death(draw: random.Random, told: Path) -> Victim | Clock:
    rank, save = draw.randrange(PLAN.world_size), draw.choice((1, 1, 2, 2, 3))
    if draw.random() < 0.5:
        return Victim(rank, draw.choice(BOUNDARIES), save, draw.random(), str(told))
    return Clock(rank, "save", save, draw.uniform(0, SAVE_S))


def newest_save(saves: Path) -> Path | None:
    """What Accelerate's examples resume from: the directory of the highest step."""
    return max(saves.glob("step_*"), default=None, key=lambda path: int(path.name.removeprefix("step_")))


def sizes(save: Path) -> dict[str, int]:
    """Bytes of every file of state in a directory, and of `latest`."""
    files = [*save.rglob("*.pt"), *save.rglob("*.pkl"), *save.glob("latest")]
    return {path.relative_to(save).as_posix(): path.stat().st_size for path in files}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--contract", type=Path, required=True)
    contract = RunContract.read(parser.parse_args().contract)
    files, rank = AttemptFiles(contract.run_dir), int(os.environ["RANK"])
    files.rank(rank).mkdir(parents=True, exist_ok=True)
    log = os.open(files.log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    process = psutil.Process()
    who = RankProcess(rank=rank, pid=process.pid, start_time=process.create_time(), host="here")
    write_atomically(files.process(rank), who.model_dump_json())
    if os.environ.get(ENV_VICTIM):
        watch(Victim(**json.loads(os.environ[ENV_VICTIM])), rank)
    ending = Ending(files, rank)
    try:
        train(contract, Progress(files.progress(rank)))
        ending.record(ExitCode.DONE)
    except Exception as problem:
        traceback.print_exc()
        ending.record(ExitCode.CRASH, error=RankError(code=type(problem).__name__, message=str(problem)))
    ending.leave()


def watch(victim: Victim, rank: int) -> None:
    """Let this rank kill itself around one of the files that it writes in a save; all go through torch.save."""
    if rank != victim.rank:
        return
    import torch

    save, last = torch.save, (victim.save - 1) * FILES[rank] + int(victim.share * FILES[rank])
    count = 0

    def passing(boundary: str) -> None:
        if boundary == victim.boundary and count == last:
            Path(victim.told).write_text(boundary)
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(state: object, file: Any, *arguments: Any, **options: Any) -> None:
        nonlocal count
        passing("file-begun")
        if victim.boundary == "in-file" and count == last:
            memory = io.BytesIO()
            save(state, memory, *arguments, **options)
            Path(file).write_bytes(memory.getvalue()[: len(memory.getvalue()) // 2])
        passing("in-file")
        save(state, file, *arguments, **options)
        passing("file-written")
        count += 1

    put(torch, save=counted)


def train(contract: RunContract, progress: Progress) -> None:
    """A small network on drawn data; the batch is a function of the step."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
    from torch import nn

    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config(None, PLAN)),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 32))
    model, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters(), lr=1e-2))
    rank, step, saves = accelerator.process_index, 0, Path(contract.checkpoint_dir)
    progress.phase("load")
    if (newest := newest_save(saves)) is not None:
        accelerator.load_state(str(newest))
        step = int(newest.name.removeprefix("step_"))
    progress.start_training(step, 0)
    while step < STEPS:
        draw = torch.Generator().manual_seed(step)
        rows = torch.randn(16, 32, generator=draw)
        mine = rows[rank :: accelerator.num_processes]
        loss = nn.functional.mse_loss(model(mine), mine.roll(1, dims=1))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        progress.step(step, STEPS, 0, float(accelerator.reduce(loss.detach(), "mean")), 1e-2, 0)
        if step % EVERY == 0:
            progress.phase("save", step)
            accelerator.save_state(str(saves / f"step_{step}"))
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
