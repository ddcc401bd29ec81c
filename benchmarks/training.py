"""What the benchmarks of training share: a training by this program, and how fast one was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import yaml

from launch.alone import plan_alone
from launch.attempt import AttemptFiles
from launch.config import load_train_spec
from launch.contract import NodeShare, ProgressLine, RankExit
from launch.document import read_document
from launch.engine_config import accelerate_config, deepspeed_config, launch_environment
from orchestrator.execute.local import free_port


class Run(NamedTuple):
    """One training."""

    marks: list[float]
    """When each step ended, in seconds."""
    f1_macro: float


def speed(repeats: list[list[float]], batch: int) -> float:
    """Samples a second between the end of the first step and the end of the last, each step at its fastest."""
    steps = [[after - before for before, after in pairwise(marks)] for marks in repeats]
    fastest = [min(times) for times in zip(*steps, strict=True)]
    return len(fastest) * batch / float(sum(fastest))


def ours(example: Path, folder: Path, name: str, sets: list[str], processes: int = 1) -> Run:
    """Train by `accelerate launch -m launch`, alone."""
    job = folder / f"{name}.yaml"
    keys = yaml.safe_load(example.read_text())
    keys["name"] = name
    keys["model"]["name_or_path"] = str(example.parent / keys["model"]["name_or_path"])
    keys["data"]["train"] = str(example.parent / keys["data"]["train"])
    job.write_text(yaml.safe_dump(keys))
    spec = load_train_spec(read_document(job, sets))
    plan = plan_alone(spec, processes, "cpu")
    share = NodeShare(
        node="n", address="127.0.0.1", processes=processes, threads=max(1, len(os.sched_getaffinity(0)) // processes)
    )
    config = folder / f"{name}-accelerate.yaml"
    deepspeed = folder / f"{name}-deepspeed.json" if plan.zero_stage else None
    config.write_text(
        yaml.safe_dump(accelerate_config(plan, [share], 0, free_port(), str(deepspeed) if deepspeed else None))
    )
    if deepspeed is not None:
        deepspeed.write_text(json.dumps(deepspeed_config(spec.train, plan)))
    flags = [flag for one in sets for flag in ("--set", one)]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "launch"]
    env = os.environ | launch_environment(plan, share) | {"HF_HUB_OFFLINE": "1"}
    asked = [*command, "--config", str(job), *flags]
    done = subprocess.run(asked, env=env, check=False, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    files = AttemptFiles(folder / "runs" / name)
    end = RankExit.model_validate_json(files.exit(0).read_bytes())
    assert end.result is not None
    assert end.result.metrics is not None
    lines = [ProgressLine.model_validate_json(line) for line in files.progress(0).read_text().splitlines()]
    marks = [line.time for line in lines if line.phase == "train"]
    return Run(marks, end.result.metrics.get("f1_macro", 0.0))
