"""`python -m tests.reshard`: one world that saves a checkpoint, or that loads those of all others one after the other.

What is compared is read by means of its own, not by launch.checkpoint: DeepSpeed's own accessors, and the model.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from launch.attempt import AttemptFiles
from launch.contract import RunContract
from launch.data import load_corpus
from launch.engine import Engine, build_engine, make_accelerator
from launch.host import take_share
from launch.model import build_model, load_tokenizer
from launch.objective import objective_of
from launch.progress import Progress
from launch.saving import Saving
from launch.stop import StopWish
from launch.train import Found, Loop
from launch.witness import agreed_fingerprint

ENV_TASK = "RESHARD"
"""JSON: `save` (a name), `load` (names), `any_step` (a number of steps) or `stock` (a name); and `root`, where
checkpoints and dumps lie by name."""
STEPS = 3


class World:
    """A contract's ranks, from the accelerator to the loop, whose checkpoints may be anywhere."""

    def __init__(self, contract: RunContract, rank: int) -> None:
        spec = contract.spec
        assert spec is not None
        self.contract, self.files = contract, AttemptFiles(contract.run_dir)
        self.files.rank(rank).mkdir(parents=True, exist_ok=True)
        take_share(contract.plan.device).pin()
        accelerator = make_accelerator(contract.plan, spec.train, (), contract.tracker_dir)
        self.tokenizer = load_tokenizer(spec.model, None)
        self.corpus = load_corpus(spec, self.tokenizer)
        pad = int(self.tokenizer.pad_token_id)
        model = build_model(spec, self.corpus.labels, pad, checkpointing=False)
        self.objective = objective_of(spec, model, None)
        self.engine = build_engine(accelerator, model, contract.plan, spec.train)
        self.progress = Progress(self.files.progress(rank))
        self.pad, self.rank = pad, rank
        self.fingerprint = agreed_fingerprint(self.engine, self.corpus.train)

    def loop(self, checkpoints: Path) -> Loop:
        """Begun and, if there is a checkpoint, resumed."""
        contract = self.contract.model_copy(update={"checkpoint_dir": str(checkpoints), "attempt": 0})
        saving = Saving(contract, self.engine, self.tokenizer, self.progress)
        spec = contract.spec
        assert spec is not None
        loop = Loop(
            contract, spec, self.engine, self.objective, self.corpus, self.fingerprint, self.pad, self.progress,
            StopWish(self.files), saving, Found("whole", "fast", 0),
        )  # fmt: skip
        self.progress.curve.clear()  # of the loop before
        loop.resume()
        self.engine.module.train()
        self.progress.start_training(loop.step, loop.consumed)
        return loop


def held(engine: Engine) -> dict[str, torch.Tensor]:
    """`weight|exp_avg|exp_avg_sq/NAME` whole, and the optimizer's count of steps, read without launch.checkpoint."""
    found: dict[str, torch.Tensor] = {}
    optimizer: Any = engine._optimizer.optimizer  # type: ignore[attr-defined]
    parameters = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    if engine.accelerator.distributed_type.value == "DEEPSPEED":
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        zero = engine._engine.optimizer  # type: ignore[attr-defined]
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in parameters:
            found[f"weight/{name}"] = safe_get_full_fp32_param(parameter).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{key}/{name}"] = safe_get_full_optimizer_state(parameter, key).clone()
        states = zero.optimizer.state.values()
    else:
        for name, parameter in parameters:
            found[f"weight/{name}"] = parameter.detach().clone()
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{key}/{name}"] = optimizer.state[parameter][key].clone()
        states = optimizer.state.values()
    steps = {float(state["step"]) for state in states}
    assert len(steps) == 1, steps
    found["steps"] = torch.tensor([steps.pop()])
    return {name: tensor.reshape(-1).cpu() for name, tensor in found.items()}


def next_losses(loop: Loop) -> list[float]:
    """Of two more steps: the first is a forward pass of what was loaded, the second shows its moments at work."""
    before = len(loop.losses)
    for _ in range(2):
        loop.train_step()
    return loop.losses[before:]


def save(world: World, root: Path, name: str) -> dict[str, Any]:
    loop = world.loop(root / name)
    assert loop.step == 0
    for _ in range(STEPS):
        loop.train_step()
    state = held(world.engine)
    loop.save(wait=True)
    if world.rank == 0:
        torch.save(state, root / f"{name}.pt")
    sizes = [parameter.numel() for parameter in world.engine.module.parameters()]
    return {"next": next_losses(loop), "sizes": sizes}


def load(world: World, root: Path, names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        loop = world.loop(root / name)
        state = held(world.engine)
        expected = torch.load(root / f"{name}.pt", weights_only=True)
        differing = [key for key in expected if key not in state or not torch.equal(state[key], expected[key])]
        found[name] = {
            "step": loop.step, "tensors": len(expected), "differing": differing[:5], "next": next_losses(loop),
            "read": loop.saving._checkpoints.read_bytes,
        }  # fmt: skip
    return found


def save_stock(world: World, root: Path, name: str) -> dict[str, Any]:
    """What Accelerate's own save_state writes, DeepSpeed's files in it where that is the engine."""
    loop = world.loop(root / f"{name}-unused")
    for _ in range(STEPS):
        loop.train_step()
    state = held(world.engine)
    world.engine.accelerator.save_state(str(root / name))
    if world.rank == 0:
        torch.save(state, root / f"{name}.pt")
    return {}


def any_step(world: World, root: Path, steps: int) -> dict[str, Any]:
    """Train `steps` steps; then again and again, each time saved after another step, led astray, and resumed."""
    start = world.loop(root / "any-step")
    start.save(wait=True)
    for _ in range(steps):
        start.train_step()
    whole, expected = list(start.losses), held(world.engine)
    differing = []
    for stop in range(1, steps):
        # A store of its own, whose first checkpoint is that of step 0.
        store = root / f"any-step-{stop}"
        if world.rank == 0:
            shutil.copytree(root / "any-step" / "step-0.attempt-1", store / "step-0.attempt-1")
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        first = world.loop(store)
        for _ in range(stop):
            first.train_step()
        first.save(wait=True)
        for _ in range(2):
            first.train_step()
        second = world.loop(store)
        assert second.step == stop, (second.step, stop)
        while second.step < steps:
            second.train_step()
        now = held(world.engine)
        if second.losses != whole or any(not torch.equal(now[name], expected[name]) for name in expected):
            differing.append(stop)
    return {"losses": whole, "differing": differing}


def main() -> None:
    contract = RunContract.read(Path(sys.argv[sys.argv.index("--contract") + 1]))
    rank = int(os.environ.get("RANK", "0"))
    log = AttemptFiles(contract.run_dir).log(rank)
    log.parent.mkdir(parents=True, exist_ok=True)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    task = json.loads(os.environ[ENV_TASK])
    world = World(contract, rank)
    root = Path(task["root"])
    if "stock" in task:
        result = save_stock(world, root, task["stock"])
    elif "any_step" in task:
        result = any_step(world, root, task["any_step"])
    else:
        result = save(world, root, task["save"]) if "save" in task else load(world, root, task["load"])
    world.files.rank(rank).joinpath("result.json").write_text(json.dumps(result))
    os._exit(0)  # as launch does


if __name__ == "__main__":
    main()
