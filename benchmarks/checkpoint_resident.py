"""`python -m benchmarks.checkpoint_resident`: two ranks under ZeRO-2 that stay up and resume from one damaged store
after the other. What to do is in the environment (benchmarks.checkpoint_flips); figures.json is what came of it.

The state is drawn, not trained: here it is bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from torch import distributed, nn

from benchmarks.checkpoint_flips import ENV_CASES, LATE, NEWEST, PLAN, THIRD, Fault, FlipFigures, damage
from benchmarks.checkpoint_victim import ENV_MISTAKE, install
from launch.checkpoint import random_state
from launch.checkpoint.checkpoints import Checkpoints
from launch.checkpoint.draft import Policy
from launch.checkpoint.manifest import QUARANTINED, CheckpointError
from launch.checkpoint.retention import Retention
from launch.checkpoint.state import STEPS, state_of
from launch.checkpoint.storage import LocalStorage
from launch.contract import AttemptFiles, RunContract
from launch.engine_config import deepspeed_config
from launch.progress import Progress


@dataclass(frozen=True)
class Memory:
    """What this rank holds."""

    tensors: list[torch.Tensor]
    """Its parts of the state, the weights and buffers of the model, and its random numbers."""
    steps: float


class World:
    """This rank, its live state, and what that was at each save."""

    def __init__(self) -> None:
        accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config(None, PLAN)),
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
        )
        torch.manual_seed(0)
        self._network = nn.Sequential(nn.Linear(32, 256), nn.BatchNorm1d(256), nn.Linear(256, 32))
        optimizer = torch.optim.AdamW(self._network.parameters())
        model, optimizer = accelerator.prepare(self._network, optimizer)
        self.rank = int(accelerator.process_index)
        self._state = state_of(accelerator, model, optimizer)
        self._saved: dict[str, Memory] = {}

    def build(self, store: Path) -> None:
        """The store that benchmarks.checkpoint_flips tells of."""
        first = self._checkpoints(store, 1)
        first.resume()
        for step in (2, 4, 6):
            self._save(first, step)
        late = store / LATE
        if self.rank == 0:
            late.rename(store.parent / LATE)
        distributed.barrier()
        second = self._checkpoints(store, 2)
        found = second.resume()
        assert found is not None
        assert found.id == THIRD
        for step in (6, 8):
            self._save(second, step)
        if self.rank == 0:
            (store.parent / LATE).rename(late)

    def resume(self, store: Path) -> tuple[str | None, str | None, bool]:
        """Which checkpoint a new attempt goes on from, the error that it ends by, and whether all that every rank holds
        is, bit by bit, what it held when that checkpoint was saved."""
        self._draw(99)
        checkpoints = self._checkpoints(store, None)
        loaded, refusal = None, None
        try:
            manifest = checkpoints.resume()
            loaded = manifest.id if manifest is not None else None
        except CheckpointError as problem:
            refusal = f"[{problem.code}] {problem.message}"
        checkpoints._ranks.part()
        intact = [loaded is not None and self._holds(self._saved[loaded])] * PLAN.world_size
        distributed.all_gather_object(intact, intact[0])
        return loaded, refusal, all(intact)

    def _checkpoints(self, store: Path, attempt: int | None) -> Checkpoints:
        return Checkpoints(
            self._state,
            LocalStorage(store),
            attempt=attempt,
            job="resident",
            plan=PLAN,
            rank=self.rank,
            policy=Policy(retention=Retention(keep_last=100)),
        )

    def _save(self, checkpoints: Checkpoints, step: int) -> None:
        assert checkpoints.attempt is not None
        self._draw(10 * step + checkpoints.attempt)
        self._saved[f"step-{step}.attempt-{checkpoints.attempt}"] = self._memory()
        checkpoints.save(step, wait=True)
        assert checkpoints.news()[-1].outcome == "committed"

    def _draw(self, seed: int) -> None:
        """Another state."""
        torch.manual_seed(1000 * seed + self.rank)
        random.seed(1000 * seed + self.rank)
        for part in self._state.parts():
            if part.tensor.is_floating_point():
                part.tensor.uniform_(0.5, 1.0)
            else:
                part.tensor.fill_(seed)
        self._state.set_scalars({STEPS: seed})
        self._state.loaded()

    def _memory(self) -> Memory:
        held = [part.tensor for part in self._state.parts()]
        held += [*self._network.state_dict().values(), *random_state.capture().values()]
        return Memory([tensor.detach().clone() for tensor in held], self._state.scalars()[STEPS])

    def _holds(self, saved: Memory) -> bool:
        now = self._memory()
        same = (torch.equal(one, other) for one, other in zip(now.tensors, saved.tensors, strict=True))
        return now.steps == saved.steps and all(same)


def judge(
    figures: FlipFigures, fault: Fault, store: Path, before: Sequence[str], outcome: tuple[Any, Any, bool]
) -> None:
    """Count what came of `fault` in `store`, whose newest checkpoints held the files `before`."""
    loaded, refusal, intact = outcome
    figures.flips += 1
    figures.by_kind[fault.kind] += 1
    right = (loaded == fault.loads and intact) or (refusal is not None and fault.may_refuse)
    told = f"{fault}: loaded {loaded}, {'as saved' if intact else 'not as saved'}, {refusal or 'no error'}"
    reasons = [refusal] if refusal is not None else []
    for name in fault.set_aside:
        note = store / name / QUARANTINED
        reasons.append(json.loads(note.read_bytes())["reason"] if note.exists() else "")
    figures.refused += refusal is not None and right
    figures.detected += right
    if loaded is not None and (loaded in fault.set_aside or (loaded == NEWEST != fault.loads)):
        figures.undetected += 1
    elif not right:
        figures.wrong_fallback += 1
    unnamed = [r for r in reasons if not any(all(part in r for part in name.split("/")) for name in fault.named)]
    gone = [name for name in before if name.split("/")[0] in fault.set_aside and not (store / name).exists()]
    figures.not_named += bool(unnamed)
    figures.not_kept += bool(gone)
    if not right or unnamed or gone:
        figures.wrong.append(f"{told}; reasons {reasons}; gone {gone}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--contract", type=Path, required=True)
    files = AttemptFiles(RunContract.read(parser.parse_args().contract).run_dir)
    cases, rank = json.loads(os.environ[ENV_CASES]), int(os.environ["RANK"])
    progress = Progress(files.progress(rank))
    log = os.open(files.log(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    install(None, os.environ.get(ENV_MISTAKE))
    torch.set_num_threads(1)

    folder = Path(cases["folder"])
    store, copy = folder / "store", folder / "copy"
    world, figures = World(), FlipFigures()
    world.build(store)
    begun = time.monotonic()
    for case in range(cases["flips"]):
        told: list[Any] = [None]
        before: list[str] = []
        if rank == 0:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(store, copy)
            told = [damage(random.Random(f"{cases['seed']}/{case}"), copy, cases["kinds"])]
            before = LocalStorage(copy).names("")
        distributed.broadcast_object_list(told, src=0)
        outcome = world.resume(copy)
        if rank == 0:
            judge(figures, told[0], copy, before, outcome)
            progress.phase("train", case + 1)
    if rank == 0:
        figures.case_ms = round(1000 * (time.monotonic() - begun) / max(1, cases["flips"]), 1)
        (folder / "figures.json").write_text(json.dumps(vars(figures)))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
