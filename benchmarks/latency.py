"""From submit to the first optimizer step: Tuneyard against a plain `accelerate launch` of the same entry.

    python -m benchmarks.latency [--pairs 5] [--processes 2] [--strategy ddp]

Each round runs the three ways in turn, so that a drift of the machine hits all alike; a figure is the median over
rounds of the ratio within a round. The clock starts when the command is started (`accelerate launch`, `tuneyard run`,
`tuneyard submit`), its own start-up included, and stops when rank 0 has taken its first optimizer step. The Ray yard
is warm: it is up, and has run a job before. The limits are 1.15 for `tuneyard run` and 1.4 for the yard.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from launch.attempt import AttemptFiles
from launch.contract import NodeShare, RankExit
from launch.document import read_document
from launch.engine_config import accelerate_config, launch_environment
from orchestrator.execute.local import free_port
from orchestrator.job.spec import TrainingJob, load_job
from orchestrator.memory.plan import plan
from tests.worlds import write_bert, write_messages
from tests.yards import a_yard

LIMITS = {"local": 1.15, "ray": 1.4}
HEAVY = ("torch", "transformers", "ray", "deepspeed", "accelerate", "datasets")


def first_step(run_dir: Path) -> float:
    """Unix time of the first optimizer step, as rank 0 noted it."""
    end = RankExit.model_validate_json(AttemptFiles(run_dir).exit(0).read_bytes())
    assert end.result is not None
    assert end.result.train is not None
    assert end.result.train.first_step_at is not None, end
    return end.result.train.first_step_at


def a_job(folder: Path, processes: int, strategy: str) -> Path:
    """A job file for a tiny model: what is measured is everything but the training."""
    path = folder / "tiny.yaml"
    write_bert(folder / "bert")
    write_messages(folder / "messages.tsv")
    keys = {
        "name": "tiny",
        "model": {"name_or_path": "bert", "task": "sequence-classification"},
        "data": {"train": "messages.tsv", "split": {"test": 0.2}, "max_length": 32},
        "train": {"max_steps": 2, "global_batch_size": 8},
        "strategy": strategy,
        "resources": {"num_processes": processes},
    }
    path.write_text(yaml.safe_dump(keys))
    return path


def plain(job_file: Path, processes: int) -> Callable[[int], float]:
    """`accelerate launch -m launch --config`, with the configuration that Tuneyard itself would write."""
    job = load_job(read_document(job_file))
    assert isinstance(job, TrainingJob)
    chosen = plan(job, processes, "cpu")
    share = NodeShare(
        node="n", address="127.0.0.1", processes=processes, threads=max(1, len(os.sched_getaffinity(0)) // processes)
    )
    # With the programs of this environment, and without what the caller's shell set for Tuneyard.
    env = {key: value for key, value in os.environ.items() if not key.startswith("TUNEYARD_")}
    env |= launch_environment(chosen, share) | {"HF_HUB_OFFLINE": "1"}

    def run(index: int) -> float:
        config = job_file.with_name("accelerate.yaml")
        config.write_text(yaml.safe_dump(accelerate_config(chosen, [share], 0, free_port(), None)))
        name = f"plain-{index}"
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        entry = ["-m", "launch", "--config", str(job_file), "--set", f"name={name}"]
        started = time.time()
        subprocess.run([*launcher, *entry], env=env, check=True, capture_output=True, cwd=job_file.parent)
        return first_step(job_file.parent / "runs" / name) - started

    return run


def through(command: Callable[..., Any], job_file: Path, run_dirs: Callable[[str], Path]) -> float:
    """Seconds to the first step of a job that `command` runs to its end."""
    started = time.time()
    job: str = command(str(job_file))
    return first_step(run_dirs(job)) - started


def imports_on_submit_path(job_file: Path) -> list[str]:
    """Heavy packages that checking a job file and making a client load; should be none."""
    probe = (
        "import sys, pathlib, orchestrator.cli, orchestrator.client; from orchestrator.cli.files import read_job;"
        f"read_job(pathlib.Path({str(job_file)!r}), []);"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True)
    found: list[str] = json.loads(told.stdout.replace("'", '"'))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--strategy", default="ddp", choices=("single", "ddp", "zero1", "zero2", "zero3"))
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"plain": [], "local": [], "ray": []}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, a_yard() as yard:
        job_file = a_job(Path(folder), options.processes, options.strategy)
        launch_plainly = plain(job_file, options.processes)

        def run_locally(file: str) -> str:
            told: str = yard.json("run", file, "-q")["job"]
            return told

        def run_on_yard(file: str) -> str:
            job = yard.submit(Path(file))
            yard.json("wait", job, "-q")
            return job

        ways: dict[str, Callable[[int], float]] = {
            "plain": launch_plainly,
            "local": lambda _: through(
                run_locally, job_file, lambda job: yard.home / "runs" / job / "jobs" / job / "attempt-1"
            ),
            "ray": lambda _: through(run_on_yard, job_file, yard.attempt_dir),
        }
        for index in range(options.pairs + 1):
            for name, way in ways.items():
                took = way(index)
                if index:  # the first round warms caches, and the yard
                    seconds[name].append(took)
                print(f"{'warm-up' if not index else f'round {index}'}  {name:<6} {took:6.2f} s", file=sys.stderr)
        heavy = imports_on_submit_path(job_file)
    ratios = {
        name: statistics.median(ours / theirs for ours, theirs in zip(seconds[name], seconds["plain"], strict=True))
        for name in LIMITS
    }
    figures: dict[str, Any] = {f"{name}_ratio": round(ratio, 3) for name, ratio in ratios.items()}
    figures |= {f"{name}_limit": limit for name, limit in LIMITS.items()}
    figures |= {f"{name}_s": round(statistics.median(taken), 3) for name, taken in seconds.items()}
    figures |= {"pairs": options.pairs, "processes": options.processes, "strategy": options.strategy}
    figures["heavy_imports_on_submit_path"] = heavy
    figures["within_limits"] = all(ratios[name] <= limit for name, limit in LIMITS.items()) and not heavy
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
