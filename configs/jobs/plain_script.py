"""A training script of one's own. It runs under `tuneyard run`, and by `accelerate launch` alone.

    TUNEYARD_PROGRESS_FILE   append one JSON object a line: `tuneyard describe` shows the last one
    TUNEYARD_STOP_FILE       when it appears, save and end with status 10: stopped, not failed
    TUNEYARD_CHECKPOINT_DIR  kept across restarts; `checkpoints_of` finds it
    TUNEYARD_OUTPUT_DIR      where the model goes

Its checkpoints are three lines, and load into any number of processes, with DeepSpeed or without.
It fits a small network to a fixed function, so there is nothing to download.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from launch.checkpoint import checkpoints_of

STOPPED = 10


def agree(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process says so: all of them have to leave the loop at the same step."""
    votes = torch.tensor([float(flag)], device=accelerator.device)
    return bool(accelerator.reduce(votes, reduction="sum").item() > 0)


def report(phase: str, step: int, steps: int, loss: float | None = None) -> None:
    """One progress line, if anybody reads it."""
    if "TUNEYARD_PROGRESS_FILE" in os.environ:
        line = {"time": time.time(), "phase": phase, "step": step, "steps": steps, "loss": loss}
        with Path(os.environ["TUNEYARD_PROGRESS_FILE"]).open("a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=10)
    args = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2))

    checkpoints = checkpoints_of(accelerator, model, optimizer)
    step = checkpoints.resume_step()

    stop_file = os.environ.get("TUNEYARD_STOP_FILE")
    loss = torch.tensor(0.0)
    while step < args.steps:
        # Rows depend on the step and the process alone, so a resumed run sees the rows it would have seen.
        generator = torch.Generator().manual_seed(step * accelerator.num_processes + accelerator.process_index)
        inputs = torch.randn(16, 4, generator=generator).to(accelerator.device)
        loss = torch.nn.functional.mse_loss(model(inputs), inputs.sin().sum(dim=1, keepdim=True))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        report("train", step, args.steps, loss.item())
        stop = agree(accelerator, stop_file is not None and Path(stop_file).exists())
        if stop or step % args.save_every == 0:
            checkpoints.save(step, wait=stop)  # otherwise it is written while training goes on
        if stop:
            return STOPPED

    checkpoints.finish()
    if accelerator.is_main_process:
        output = Path(os.environ.get("TUNEYARD_OUTPUT_DIR", "plain-script-model"))
        output.mkdir(parents=True, exist_ok=True)
        torch.save(accelerator.unwrap_model(model).state_dict(), output / "model.pt")
        print(f"loss {loss.item():.4f} after {step} steps; model in {output}")
    report("done", step, args.steps, loss.item())
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
