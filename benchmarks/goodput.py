"""What faults cost: steps of a run with a fault every few minutes, beside those of one without; and what the simulator
says of it.

    python -m benchmarks.goodput [--minutes 30] [--every 5] [--seed 3] [--kinds rank-killed agent-killed ...]

On the yard of benchmarks.chaos (three Ray nodes, standbys, PostgreSQL and Redis where installed) one job of two
processes trains, alone on the machine, and saves every 10 s. First and last it is left in peace for a while. In
between, a fault is done to it in each span of `--every` minutes, at a moment drawn from the span.

By the times that rank 0 wrote down, `goodput` is the share of the time that went into steps that were kept, beside that
in peace; the limit is 0.93. `by_ledger` is the same by the yard's own account (`tuneyard goodput`), `by_steps` by steps
a second, which other load on the machine changes, too.

The simulator is given a job of as many seconds as the kept steps took, the times of the faults, for each how long the
yard took to see it, and what one start takes, which is measured before any fault, after pauses. What it says must be
within 5 points of `goodput`. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

LIMIT, POINTS = 0.93, 0.05
EVERY_S = 10.0
KINDS = ("rank-killed", "agent-killed", "rank-killed", "raylet-killed", "rank-killed", "controller-killed")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.chaos_faults import KINDS as FAULTS
    from benchmarks.chaos_yard import a_world

    draw = random.Random(options.seed)
    kinds = [options.kinds[index % len(options.kinds)] for index in range(int(options.minutes / options.every))]
    with a_world(options.seed, 1.0, say) as world:
        world.feeding = False
        job = submit(world)
        world.until(lambda: world.trained(job, 0.0) and standbys_are_there(world), "the first step")
        startup_s = statistics.median(a_start(world, job) for _ in range(3))

        def looked_at(seconds: float) -> Window:
            """What became of the next `seconds`."""
            begun, trained = time.time(), training_s(world, job)
            time.sleep(seconds)
            return window(world, job, begun, trained)

        def in_peace() -> Window:
            world.until(lambda: settled(world, job), "it trains")
            return looked_at(60 * options.peace)

        before = in_peace()
        say(f"         {before.steps_per_s:.2f} steps/s in peace; a start takes {startup_s:.1f} s")
        begun, trained = time.time(), training_s(world, job)
        for index, kind in enumerate(kinds):
            span_s = 60 * options.every
            moment = begun + span_s * index + draw.uniform(0.1, 0.6) * span_s
            time.sleep(max(0.0, moment - time.time()))
            if kind == "raylet-killed" and on_head(world, job):
                say("         the job is on the head's node: its agent is killed instead")
                kind = "agent-killed"
            struck = FAULTS[kind](world)
            say(f"{index + 1:4}     {kind:18} seen {struck.detected_s:6.2f} s  back {struck.back_s:6.2f} s")
            world.until(world.whole, "all is up again")
        time.sleep(max(0.0, begun + 60 * options.minutes - time.time()))
        during = window(world, job, begun, trained)
        after = in_peace()
        world.client.cancel(job)
        world.until(lambda: world.view(job).state.final, "it ends")
        figures = {
            name: getattr(during, key) / statistics.mean([getattr(before, key), getattr(after, key)])
            for name, key in (("goodput", "kept"), ("by_ledger", "training"), ("by_steps", "steps_per_s"))
        }
        faults = [(one.at - begun, one.detected_s, bool(one.ends)) for one in world.struck]
        predicted = simulated(during.kept * during.wall_s, startup_s, faults)
        goodput = figures["goodput"]
        return {
            "minutes": round(during.wall_s / 60, 1),
            "faults": len(world.struck),
            **{name: round(figure, 4) for name, figure in figures.items()},
            "predicted": round(predicted, 4),
            "points_between": round(abs(goodput - predicted), 4),
            "in_peace": [round(one.kept, 4) for one in (before, after)],
            "startup_s": round(startup_s, 2),
            "each": [
                {"kind": one.kind, "at_s": round(one.at - begun), "seen_s": round(one.detected_s or 0, 2),
                 "back_s": round(one.back_s or 0, 2)}
                for one in world.struck
            ],
            "within_limits": goodput >= LIMIT and abs(goodput - predicted) <= POINTS,
        }  # fmt: skip


@dataclass(frozen=True)
class Window:
    """What became of a stretch of time."""

    wall_s: float
    kept: float
    """The share that went into steps that were kept."""
    training: float
    """The same as the yard accounts for it."""
    steps_per_s: float
    """Kept ones."""


def window(world: Any, job: str, begun: float, trained_s: float) -> Window:
    """That from `begun`, when the yard told of `trained_s` seconds of training, until now."""
    ended = time.time()
    wall_s = ended - begun
    kept = kept_steps(lines(world, job), begun, ended)
    more_s = training_s(world, job) - trained_s
    return Window(wall_s, sum(kept) / wall_s, more_s / wall_s, len(kept) / wall_s)


def kept_steps(all_lines: Sequence[tuple[int, float, int]], begun: float, ended: float) -> list[float]:
    """Seconds that each step took which ended between these times and was not done again."""
    by_attempt: dict[int, list[tuple[float, int]]] = {}
    for attempt, when, step in all_lines:
        by_attempt.setdefault(attempt, []).append((when, step))
    again_from = math.inf
    found: list[float] = []
    for attempt in sorted(by_attempt, reverse=True):
        steps = by_attempt[attempt]
        took = [two[0] - one[0] for one, two in pairwise(steps)]
        # When an attempt's first step began it does not say.
        timed = zip(steps, [statistics.median(took) if took else 0.0, *took], strict=True)
        found += [seconds for (when, step), seconds in timed if begun < when <= ended and step < again_from]
        again_from = min(again_from, steps[0][1])
    return found


def submit(world: Any) -> str:
    path = world.yard.job_file(
        name="long",
        model={"name_or_path": str(world.folder / "bert"), "task": "sequence-classification"},
        data={"train": str(world.folder / "data.tsv"), "max_length": 48},
        train={"max_steps": 10**7, "global_batch_size": 64, "micro_batch_size": 32, "learning_rate": 1e-5},
        strategy="ddp",
        resources={"num_processes": 2},
        checkpoint={"every_steps": None, "every_minutes": EVERY_S / 60},
        retry={"max_restarts": 99},
    )
    job: str = world.yard.submit(path)
    return job


def standbys_are_there(world: Any) -> bool:
    return all(node["standbys"]["count"] for node in world.yard.json("nodes"))


def a_start(world: Any, job: str) -> float:
    """Seconds from placement to first step of an attempt that comes after a pause."""
    world.yard.json("pause", job, "--wait")
    paused, above = time.time(), world.client.job(job).attempts
    world.yard.json("resume", job)
    first: float = world.until(lambda: world.trained(job, paused, above), "it trains again")
    return first - float(world.client.attempts(job)[-1].created_at)


def on_head(world: Any, job: str) -> bool:
    from benchmarks.chaos_yard import Victim
    from launch.attempt import AttemptFiles

    attempt = world.client.attempts(job)[-1]
    raylet = Victim(job, attempt, AttemptFiles(attempt.run_dir)).agent(0).parent()
    return raylet is None or world.node_of(raylet) == 0


def lines(world: Any, job: str) -> list[tuple[int, float, int]]:
    """Attempt, time and step of each line of a step."""
    found = []
    for attempt in range(1, world.client.job(job).attempts + 1):
        path: Path = world.yard.files(job, attempt).progress(0)
        for text in path.read_text().splitlines() if path.exists() else ():
            line = json.loads(text)
            if line.get("loss") is not None:
                found.append((attempt, line["time"], line["step"]))
    return found


def training_s(world: Any, job: str) -> float:
    """Seconds of training so far, as the yard accounts for them."""
    return float(world.client.goodput_of(job).seconds["training"])


def settled(world: Any, job: str) -> bool:
    newest = lines(world, job)
    return bool(newest) and time.time() - newest[-1][1] < EVERY_S


def simulated(work_s: float, startup_s: float, faults: Sequence[tuple[float, float | None, bool]]) -> float:
    """The share of its time in which a job of so much work gets on, as the simulator has it. Of each fault: when it
    was, how soon it was seen, and whether the attempt ended."""
    from orchestrator.simulate.conditions import Conditions, Failure, alike_nodes
    from orchestrator.simulate.engine import simulate
    from orchestrator.simulate.peers import POLICIES
    from orchestrator.simulate.workload import SimulatedJob, Workload

    # It is only the job's node that counts: a fault of which no attempt ends is none to the simulator.
    failures = tuple(
        Failure(at_s=startup_s + at_s, node=0, repair_s=seen_s or 0.0) for at_s, seen_s, ends in faults if ends
    )
    conditions = Conditions(startup_s=startup_s, checkpoint_s=EVERY_S, failures=failures)
    job = SimulatedJob(job_id="long", submit_s=0.0, duration_s=work_s, num_gpus=2, tenant="default")
    outcome = simulate(alike_nodes(1, 2), Workload((job,), "benchmarks.goodput"), POLICIES["yard"](), conditions)
    assert outcome.lives[0].done_at is not None
    return work_s / (outcome.lives[0].done_at - startup_s)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    from benchmarks.chaos_faults import KINDS as FAULTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=5.0, metavar="MINUTES")
    parser.add_argument("--peace", type=float, default=5.0, metavar="MINUTES", help="before and after")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=list(FAULTS), default=list(KINDS), metavar="KIND")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended all the same
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print as they are imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = measure(options)
    print(json.dumps(found), file=stdout, flush=True)
    return 0 if found["within_limits"] else 1


if __name__ == "__main__":
    sys.exit(main())
