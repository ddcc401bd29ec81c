"""Saves, evaluations and first steps that take long: no rank may be said to hang.

    python -m benchmarks.patience [--phases 102] [--seconds 130] [--at-once 17]

Real gangs of two ranks under DDP and ZeRO-2, with limits as they are by default. In each job the first step, a save
(in the foreground) and one batch of an evaluation each stay in one place for `--seconds`, longer than a rank may stay
in one part of a step (120 s), and each of a gang's ranks does. They sleep, so that many run at once. `slow_phases` is
counted from the ranks' own pulses. The last line of stdout is JSON; the status is 1 if there was a false alarm.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launch.attempt import AttemptFiles
from launch.pulse import read_beat
from orchestrator.control.loop import Controller
from orchestrator.execute.processes import of_run
from orchestrator.execute.stall import PATIENCE_S
from orchestrator.settings import Settings
from orchestrator.store.store import Store
from tests.builders import a_training_job
from tests.inhouse import TICK_S, Here
from tests.victims import ENV_SLOW
from tests.worlds import write_bert, write_messages

PHASES = ("first-step", "save", "evaluate")
RANKS = 2


def a_job(folder: Path, strategy: str) -> Any:
    return a_training_job(
        RANKS,
        strategy=strategy,
        model={"name_or_path": str(folder / "bert"), "task": "sequence-classification"},
        data={"train": str(folder / "messages.tsv"), "split": {"validation": 0.2}, "max_length": 32},
        checkpoint={"every_steps": 4, "asynchronous": False},
        train={"max_steps": 8, "global_batch_size": 16, "learning_rate": 1e-3, "eval_every": 4},
    )


def measure(folder: Path, jobs: int, seconds: float, at_once: int) -> dict[str, Any]:
    write_bert(folder / "bert")
    write_messages(folder / "messages.tsv")
    store = Store(f"sqlite:///{folder / 'yard.db'}")
    store.prepare()
    slow = json.dumps(dict.fromkeys(PHASES, seconds))
    environment: dict[str, Any] = {ENV_SLOW: slow}
    here = Here(slots=RANKS * at_once, **environment)
    controller = Controller(store, here, Settings(home=folder))
    names = [f"patience-{os.getpid()}-{index}" for index in range(jobs)]  # a run id of its own on this machine
    for index, name in enumerate(names):
        store.add_job(name, a_job(folder, ("ddp", "zero2")[index % 2]), time.time())
    running = -1
    try:
        while live := [name for name in names if not store.job(name).state.final]:
            controller.tick()
            if len(live) != running:
                running = len(live)
                print(f"{jobs - running:4} of {jobs} jobs have ended", file=sys.stderr, flush=True)
            time.sleep(TICK_S)
    finally:
        for name in names:
            for attempt in store.attempts(name):
                for process in of_run(attempt.run.run_id):
                    process.kill()
    attempts = [attempt for name in names for attempt in store.attempts(name)]
    found = {
        "jobs": jobs,
        "attempts": len(attempts),
        "jobs_succeeded": sum(store.job(name).state == "succeeded" for name in names),
        "slow_phases": sum(was_slow(attempt.run.run_dir, phase, seconds) for attempt in attempts for phase in PHASES),
        "seconds_each": seconds,
        "false_alarms": sum(event.data.get("outcome") == "hung" for name in names for event in store.events(name)),
        "outcomes": sorted({str(attempt.outcome) for attempt in attempts}),
    }
    controller.close()
    store.close()
    return found


def was_slow(run_dir: str, phase: str, seconds: float) -> bool:
    """Whether all ranks of an attempt have spent so long in that phase."""
    beats = [read_beat(AttemptFiles(run_dir).pulse(rank)) for rank in range(RANKS)]
    return all(beat is not None and beat.spent.get(phase, 0.0) >= seconds for beat in beats)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", type=int, default=102, help="three of a job")
    parser.add_argument("--seconds", type=float, default=PATIENCE_S["step"] + 10)
    parser.add_argument("--at-once", type=int, default=17)
    options = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="patience-") as name:
        jobs = -(-options.phases // len(PHASES))
        found = measure(Path(name), jobs, options.seconds, options.at_once)
    found["took_s"] = round(time.monotonic() - begun)
    wanted = found["slow_phases"] >= options.phases and found["jobs_succeeded"] == found["attempts"] == jobs
    found["within_limits"] = wanted and found["false_alarms"] == 0
    print(json.dumps(found))
    return 0 if found["within_limits"] else 1


if __name__ == "__main__":
    sys.exit(main())
