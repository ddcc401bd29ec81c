"""Faults of eleven kinds on a real yard with real trainings: seen how soon, got over how soon, and at what loss.

    python -m benchmarks.chaos --faults 60 --seed 3 [-o json] [--kinds rank-killed disk-full]

A Ray yard of three nodes on this machine, with PostgreSQL and Redis where they are installed, trains jobs of two and
three processes under DDP, ZeRO-2 and ZeRO-3; new ones are submitted as old ones end. One fault after the other is done
to it (benchmarks.chaos_faults), each waited for until its job trains again. Seconds to detection are until the first
event that tells of it is stored, or until the API answers that something is away; seconds back are until the first
step after it, or where no attempt ends until all is as before.

When all jobs have ended it is counted (benchmarks.chaos_audit) from what ranks wrote down, from checkpoints' claims and
from an observer that looks at /proc: jobs lost, damaged checkpoints loaded, rows seen twice or never on the way to the
final models, attempts of a job that lived at the same time, processes left, and attempts that ended without a fault.

Progress goes to stderr, and the last line of stdout is JSON. The status is 1 if anything was wrong. What is drawn by
the seed are kinds, jobs and ranks; where in its training a fault hits a job is not.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

LIMITS_S = {
    "rank-killed": (2.0, 30.0),
    "agent-killed": (5.0, 30.0),
    "raylet-killed": (5.0, 30.0),
    "rank-stopped": (60.0, None),
}
"""Kind → medians to detection and back."""


def kinds_in_turn(seed: int, kinds: Sequence[str]) -> Iterator[str]:
    """All kinds in an order drawn anew each round."""
    draw = random.Random(seed)
    while True:
        yield from draw.sample(kinds, len(kinds))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, and under `wrong` whatever was."""
    from benchmarks.chaos_audit import Observer, audit
    from benchmarks.chaos_faults import KINDS
    from benchmarks.chaos_memory import Cannot
    from benchmarks.chaos_yard import TooLate, a_world

    began = time.monotonic()
    cannot: dict[str, str] = {}
    late: list[str] = []
    with a_world(options.seed, options.length, say, keep=options.folder) as world:
        observer = Observer(world.yard.record.id)
        observer.start()
        turns = kinds_in_turn(options.seed, options.kinds)
        while len(world.struck) < options.faults and len(cannot) < len(options.kinds):
            if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
                say(f"         {options.minutes:g} minutes are over")
                break
            kind = next(turns)
            if kind in cannot:
                continue
            try:
                struck = KINDS[kind](world)
            except Cannot as problem:
                cannot[kind] = str(problem)
                say(f"         {kind}: {problem}")
                continue
            except TooLate as problem:
                late.append(f"{kind}: not within the time: {problem}")
                say(f"WRONG    {late[-1]}")
                continue
            detected, back = (math.nan if one is None else one for one in (struck.detected_s, struck.back_s))
            where = f"{struck.job}.{struck.attempt}  {struck.what}"
            say(f"{len(world.struck):4}     {kind:18} seen {detected:6.2f} s  back {back:6.2f} s  {where}")
        say("         letting the jobs end")
        try:
            world.finish()
        except TooLate as problem:
            late.append(f"not within the time: {problem}")
        found = audit(world, observer, world.struck)
        observer.close()
    found.wrong += late
    for wrong in found.wrong:
        say(f"WRONG    {wrong}")
    return figures(options, world.struck, cannot, found.figures(), found.clean, time.monotonic() - began)


def figures(
    options: argparse.Namespace,
    struck: Sequence[Any],
    cannot: dict[str, str],
    audited: dict[str, Any],
    clean: bool,
    seconds: float,
) -> dict[str, Any]:
    by_kind: dict[str, Any] = {}
    fast = True
    for kind in options.kinds:
        mine = [one for one in struck if one.kind == kind]
        if not mine:
            continue
        told: dict[str, Any] = {"count": len(mine)}
        for name in ("detected_s", "back_s"):
            values = [value for one in mine if (value := getattr(one, name)) is not None and not math.isnan(value)]
            told[name] = round(statistics.median(values), 2) if values else None
            told[f"{name}_most"] = round(max(values), 2) if values else None
            told[f"{name}_missing"] = len(mine) - len(values)
        by_kind[kind] = told
        for name, limit in zip(("detected_s", "back_s"), LIMITS_S.get(kind, (None, None)), strict=True):
            fast = fast and (limit is None or (told[name] is not None and told[name] <= limit))
    wrong = audited.pop("wrong")
    return {
        "faults": len(struck),
        "seed": options.seed,
        "seconds": round(seconds),
        **audited,
        "by_kind": by_kind,
        "not_possible_here": cannot,
        "each": [
            {
                "kind": one.kind,
                "job": one.job,
                "what": one.what,
                "detected_s": one.detected_s and round(one.detected_s, 2),
                "back_s": one.back_s and round(one.back_s, 2),
            }
            for one in struck
        ],
        "within_limits": clean and fast and not wrong,
        "wrong": wrong,
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    from benchmarks.chaos_faults import KINDS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--minutes", type=float, help="no more faults after so many, however many there were")
    parser.add_argument("--length", type=float, default=1.0, help="of the jobs; by default a minute or two")
    parser.add_argument("--folder", type=Path, help="work here, and leave models and data")
    parser.add_argument("-o", choices=("text", "json"), default="text")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started is ended all the same
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print as they are imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = measure(options)
    if options.o == "text":
        for key, value in found.items():
            print(f"{key:26} {value}", file=stdout)
    print(json.dumps(found), file=stdout, flush=True)
    return 0 if not found["wrong"] else 1


if __name__ == "__main__":
    sys.exit(main())
