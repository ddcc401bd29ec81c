"""`python -m benchmarks.simulate_philly`: the simulator beside other simulators, and the yard's scheduler beside peers.

Exactness: 480 jobs on 4 nodes of 8 GPUs, which are a count, with free pre-emption: what two other simulators gave for
FIFO and EASY. Comparison: a week of Philly (10,650 jobs) on 40 nodes of 8, gangs on as few nodes as possible, 60 s a
pre-emption, nobody knows how long jobs run. It counts only if our FIFO and Tiresias are what Lucid's simulator gave for
them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.schedule.forecast import forecast
from orchestrator.schedule.gang import Rules
from orchestrator.simulate.conditions import Conditions, alike_nodes
from orchestrator.simulate.engine import simulate
from orchestrator.simulate.peers import POLICIES
from orchestrator.simulate.report import Report, report
from orchestrator.simulate.workload import Workload, read_csv

TRACES = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces"
EXACT = {"fifo": (45_616.61, 663_244.0), "easy": (1_483.57, 607_995.0)}
"""Of philly-480, mean wait and makespan. EASY's are those of a rule named in simulate/easy.py: see easy-strict."""
WITHIN_S = 0.5
FORECAST_EVERY = 100
PUBLISHED = {
    "fifo": {"avg_jct_s": (111_818, 0.03)},
    "tiresias": {"avg_jct_s": (11_888, 0.05), "preemptions": (3_978, 0.10)},
}
"""Of philly-oct, by Lucid's simulator, which charges 40 s for gangs up to 8 GPUs; and how far ours may be from it."""
ALSO_PUBLISHED = {"qssf": 15_015, "sjf": 13_009, "srtf": 8_630}
LIMITS = {
    "avg_jct_vs_tiresias": (1.3, "least"),
    "avg_jct_vs_fifo": (10.0, "least"),
    "p999_wait_vs_tiresias": (1.0, "most"),
    "preemptions_vs_tiresias": (1.25, "most"),
    "makespan_vs_tiresias": (1.02, "most"),
    "yard_cpu_s": (60.0, "most"),
}


def exact(workload: Workload) -> tuple[dict[str, Any], bool]:
    """Mean wait and makespan of each policy, and whether they are the published ones."""
    found, right = {}, True
    conditions = Conditions(preemption_cost_s=0, oracle=True)
    for name in (*EXACT, "easy-strict"):
        one = report(
            simulate(alike_nodes(4, 8), workload, POLICIES[name](), conditions, rules=Rules(consolidate=False))
        )
        found[name] = {"avg_wait_s": round(one.avg_wait_s, 2), "makespan_s": one.makespan_s}
        told = ""
        if name in EXACT:
            wait, makespan = EXACT[name]
            same = abs(one.avg_wait_s - wait) <= WITHIN_S and abs(one.makespan_s - makespan) <= WITHIN_S
            right &= same
            told = f"   published {wait:,.2f} and {makespan:,.0f}: {'the same' if same else 'OTHER'}"
        print(f"{name:12} average wait {one.avg_wait_s:12,.2f} s, makespan {one.makespan_s:9,.0f} s{told}")
    return found, right


def compare(workload: Workload, names: Sequence[str]) -> dict[str, Report]:
    """A report of each policy."""
    found = {}
    print(f"\n{'':12}{'avg JCT':>10}{'median':>9}{'p99':>10}{'p99.9 wait':>12}{'makespan':>11}{'pre-empt':>10}"
          f"{'a job':>7}{'worst FTF':>11}{'GPUs':>7}{'CPU':>8}")  # fmt: skip
    rules, conditions = Rules(consolidate=True), Conditions(forecast_every=FORECAST_EVERY)
    for name in names:
        told = forecast if name == "yard" else None
        outcome = simulate(alike_nodes(40, 8), workload, POLICIES[name](), conditions, rules=rules, forecast=told)
        one = found[name] = report(outcome)
        print(f"{name:12}{one.avg_jct_s:10,.0f}{one.p50_jct_s:9,.0f}{one.p99_jct_s:10,.0f}{one.p999_wait_s:12,.0f}"
              f"{one.makespan_s:11,.0f}{one.preemptions:10,}{one.max_preemptions_of_a_job:7}{one.worst_ftf:11,.1f}"
              f"{one.utilisation:7.1%}{one.cpu_s:7.1f}s", flush=True)  # fmt: skip
    return found


def on_few_nodes(workload: Workload) -> float:
    """Tiresias's mean JCT beside ours where two gangs need the whole cluster. No limit speaks of it."""
    rules, conditions = Rules(consolidate=True), Conditions()
    ours, theirs = (
        report(simulate(alike_nodes(4, 8), workload, POLICIES[name](), conditions, rules=rules)).avg_jct_s
        for name in ("yard", "tiresias")
    )
    return theirs / ours


def ratios(reports: dict[str, Report]) -> dict[str, float]:
    yard, tiresias, fifo = reports["yard"], reports["tiresias"], reports["fifo"]
    return {
        "avg_jct_vs_tiresias": tiresias.avg_jct_s / yard.avg_jct_s,
        "avg_jct_vs_fifo": fifo.avg_jct_s / yard.avg_jct_s,
        "p999_wait_vs_tiresias": yard.p999_wait_s / tiresias.p999_wait_s,
        "preemptions_vs_tiresias": yard.preemptions / max(1, tiresias.preemptions),
        "makespan_vs_tiresias": yard.makespan_s / tiresias.makespan_s,
        "yard_cpu_s": yard.cpu_s,
    }


def counts(reports: dict[str, Report]) -> dict[str, dict[str, float]]:
    """How far our peers are from the published ones."""
    return {
        name: {field: round(getattr(reports[name], field) / value - 1, 4) for field, (value, _) in published.items()}
        for name, published in PUBLISHED.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, default=TRACES, help="directory with philly-480.csv and philly-oct.csv")
    parser.add_argument("--all", action="store_true", help="all peers, not only those that limits speak of")
    options = parser.parse_args()
    absent = [name for name in ("philly-480.csv", "philly-oct.csv") if not (options.traces / name).is_file()]
    if absent:
        sys.exit(
            f"{options.traces} has no {' and no '.join(absent)}: name another directory with --traces, or make them of "
            "Philly's public trace (columns job_id, submit_s, duration_s, num_gpus, tenant; see docs/simulate.md)"
        )
    few = read_csv(options.traces / "philly-480.csv")
    figures, same = exact(few)
    names = list(POLICIES) if options.all else ["fifo", "tiresias", "yard"]
    reports = compare(read_csv(options.traces / "philly-oct.csv"), names)
    if options.all:
        for name, published in ALSO_PUBLISHED.items():
            beside = reports[name].avg_jct_s / published - 1
            print(f"Lucid's simulator gave {published:,} s for {name}: ours {beside:+.1%}")
    found, far = ratios(reports), counts(reports)
    print()
    for name, (limit, kind) in LIMITS.items():
        print(f"{name:26}{found[name]:8.2f}   at {kind} {limit:g}")
    small = on_few_nodes(few)
    print(f"{'philly-480 on 4 nodes':26}{small:8.2f}   Tiresias's mean JCT beside ours")
    valid = all(
        abs(far[name][field]) <= within for name, fields in PUBLISHED.items() for field, (_, within) in fields.items()
    )
    print(f"{'from what was published':26}{far}   {'within limits' if valid else 'TOO FAR'}")
    kept = all(
        found[name] >= limit if kind == "least" else found[name] <= limit for name, (limit, kind) in LIMITS.items()
    )
    print(
        json.dumps(
            {
                "exact": figures,
                "policies": {
                    name: {
                        key: round(value, 3) if isinstance(value, float) else value
                        for key, value in one.as_json().items()
                        if not isinstance(value, dict)
                    }
                    for name, one in reports.items()
                },
                "ratios": {name: round(value, 3) for name, value in found.items()},
                "limits": {name: limit for name, (limit, _) in LIMITS.items()},
                "avg_jct_vs_tiresias_on_4_nodes": round(small, 3),
                "from_published": far,
                "comparison_counts": valid,
                "within_limits": same and valid and kept,
            }
        )
    )


if __name__ == "__main__":
    main()
