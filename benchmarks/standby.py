"""From placement to the first optimizer step of a tiny model, with a standby and without.

    python -m benchmarks.standby [--rounds 5] [--processes 2]

Two Ray yards on this machine, one after the other: one that keeps a standby on its node, and one that keeps none. On
each, jobs run one at a time for each engine; a figure is the median over rounds, from the moment at which the
controller stores the placement to that at which rank 0 has taken its first step. A first job, whose data goes into
the token cache, is not counted. The limit is 1.5 s with a standby.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.latency import a_job, first_step
from tests.yards import Yard, a_yard

LIMIT_S = 1.5
ENGINES = ("single", "ddp", "zero2", "zero3")


def starts(yard: Yard, folder: Path, rounds: int, processes: int) -> dict[str, float]:
    """Engine → median seconds from placement to first step."""
    found = {}
    for engine in ENGINES:
        job_file = a_job(folder, 1 if engine == "single" else processes, engine)
        taken = []
        for index in range(rounds + 1):
            job = yard.submit(job_file)
            yard.json("wait", job, "-q")
            placed = yard.describe(job)["attempts"][0]["created_at"]
            taken.append(first_step(yard.attempt_dir(job)) - placed)
            print(f"{engine:<7} {index or 'warm-up'}  {taken[-1]:6.2f} s", file=sys.stderr)
        found[engine] = statistics.median(taken[1:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        for kind, standbys in (("standby", 1), ("cold", 0)):
            with a_yard(standbys=str(standbys)) as yard:
                while sum(node["standbys"]["count"] for node in yard.json("nodes")) < standbys:
                    time.sleep(0.2)
                found[kind] = starts(yard, Path(name), options.rounds, options.processes)
                if standbys:
                    held = [node["standbys"] for node in yard.json("nodes")]
                    figures["standbys"] = sum(node["count"] for node in held)
                    figures["standby_mib"] = round(sum(node["bytes"] for node in held) / 2**20)
    for kind, by_engine in found.items():
        figures[f"{kind}_s"] = {engine: round(seconds, 2) for engine, seconds in by_engine.items()}
    figures["standby_ratio"] = {
        engine: round(found["standby"][engine] / found["cold"][engine], 3) for engine in found["cold"]
    }
    figures["limit_s"] = LIMIT_S
    figures["within_limits"] = max(found["standby"].values()) <= LIMIT_S
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
