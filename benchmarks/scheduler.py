"""What a decision costs: 10,000 queued gangs on 1,000 nodes of 8 GPUs, and from a tenth to ten times as many.

    python -m benchmarks.scheduler [--plot scheduler.png] [--largest]

A tick is what the controller's does: gangs end and history learns of them, others arrive, the yard is told, `decide` is
asked, and what it starts and stops is told to the yard. The yard has been running for a while: who runs and who waits
began at different times. A full re-plan is `decide` on a yard of which it
knows nothing yet.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import json
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.cluster.capacity import RACK_LABEL, SPINE_LABEL
from orchestrator.cluster.model import Gpu, Node
from orchestrator.control.collector import collect_seldom
from orchestrator.schedule.decide import decide
from orchestrator.schedule.gang import Decisions, Gang, Held, Queue
from orchestrator.schedule.history import Ran
from orchestrator.schedule.yard import Yard
from orchestrator.settings import Settings

TENANTS = 20
GPUS = 8
SIZES = {1: 0.45, 2: 0.15, 4: 0.12, 8: 0.15, 16: 0.06, 32: 0.03, 64: 0.02, 128: 0.01, 256: 0.007, 512: 0.003}
GRID = ((1_000, 100), (3_000, 300), (10_000, 1_000), (30_000, 3_000), (100_000, 10_000))
MAIN = (10_000, 1_000)
LIMITS = {"decisions_per_s": 1_000.0, "tick_p99_ms": 10.0, "replan_p99_ms": 250.0, "exponent": 1.1}
TICK_S = float(Settings.model_fields["tick"].default)
"""The controller's."""
NAMES = 5
"""What jobs of a tenant are called."""
WARM_UP = 100
"""Ticks that are not timed, in which a yard that was filled at one stroke comes to rest."""
PAST_S = 2 * 3600.0
"""Since when gangs run and wait that are there at the beginning."""


@dataclass
class Costs:
    """Seconds, of one size of world."""

    queued: int
    nodes: int
    fill_decisions_per_s: float
    tick_p50: float
    tick_p99: float
    replan_p50: float
    replan_p99: float
    ends_per_s: float
    """Of gangs, in the yard's time; as many arrive, and decisions are more."""
    decisions_per_s: float


class World:
    """A yard that is full, with as many gangs waiting as asked for."""

    def __init__(self, queued: int, nodes: int, seed: int = 0) -> None:
        self.draw = random.Random(seed)
        gpus = tuple(Gpu(index=index, type="H100") for index in range(GPUS))
        self.nodes = [
            Node(
                id=f"n{number:05}", name=f"n{number:05}", address="127.0.0.1", cores=64, cpu_slots=0, gpus=gpus,
                labels={RACK_LABEL: f"r{number // 16}", SPINE_LABEL: f"s{number // 256}"},
            )
            for number in range(nodes)
        ]  # fmt: skip
        shares = [Queue(f"t{tenant}", weight=1.0 + tenant % 3) for tenant in range(TENANTS)]
        self.yard = Yard(self.nodes, queues=shares)
        for _ in range(2_000):
            tenant = f"t{self.draw.randrange(TENANTS)}"
            self.yard.history.add(Ran(tenant, self.name(), self.size(), self.duration_s()))
        self.now, self.sequence = 0.0, 0
        self.ended = self.decided = 0
        """In the last tick."""
        self.left_s: dict[str, float] = {}
        """How long each gang truly runs yet, which the scheduler does not know."""
        self.ends: list[tuple[float, float, str]] = []
        self.sizes = [size for size in SIZES if size <= nodes * GPUS // 4]
        for _ in range(queued):
            self.arrive(self.now - self.draw.uniform(0, PAST_S))

    def size(self) -> int:
        return self.draw.choices(list(SIZES), list(SIZES.values()))[0]

    def name(self) -> str:
        return f"job-{self.draw.randrange(NAMES)}"

    def duration_s(self) -> float:
        return self.draw.lognormvariate(7.0, 2.0)

    def arrive(self, at: float) -> None:
        self.sequence += 1
        self.left_s[f"j{self.sequence}"] = self.duration_s()
        size = min(self.size(), self.sizes[-1])
        tenant = f"t{self.draw.randrange(TENANTS)}"
        priority = self.draw.choices((-100, 0, 100), (0.1, 0.85, 0.05))[0]
        self.yard.wait(
            Gang(f"j{self.sequence}", self.sequence, priority, size, size, "gpu", queue=tenant,
                 name=self.name(), queued_at=at)
        )  # fmt: skip

    def apply(self, decisions: Decisions) -> int:
        for stop in decisions.stops:
            held = self.yard.release(stop.job_id)
            self.left_s[stop.job_id] -= self.now - held.since
            ran = held.gang.ran_s + self.now - held.since
            self.yard.wait(replace(held.gang, queued_at=self.now, ran_s=ran, evictions=held.gang.evictions + 1))
        for start in decisions.starts:
            self.hold(Held(self.yard.waiting[start.job_id], start.placement, self.now))
        return len(decisions.starts) + len(decisions.stops)

    def hold(self, held: Held) -> None:
        self.yard.hold(held)
        job_id = held.gang.job_id
        heapq.heappush(self.ends, (held.since + self.left_s[job_id], held.since, job_id))

    def age(self) -> None:
        """As if those that run had started at different times, and not ended since."""
        for held in list(self.yard.running.values()):
            since = self.now - self.draw.uniform(0, PAST_S)
            self.left_s[held.gang.job_id] += self.now - since
            self.hold(replace(held, since=since))

    def tick(self) -> None:
        """Time passes, gangs end, as many others arrive, and a decision is made."""
        self.now += TICK_S
        ended = 0
        while self.ends and self.ends[0][0] <= self.now:
            _, since, job_id = heapq.heappop(self.ends)
            held = self.yard.running.get(job_id)
            if held is None or held.since != since:
                continue  # it was stopped before
            gang, ran = held.gang, held.gang.ran_s + self.now - held.since
            self.yard.release(job_id)
            del self.left_s[job_id]
            self.yard.history.add(Ran(gang.queue, gang.name, gang.min_processes, ran))
            ended += 1
        for _ in range(ended):
            self.arrive(self.now)
        self.decided = self.apply(decide(self.yard, self.now))
        self.ended = ended


def measure(queued: int, nodes: int, ticks: int, replans: int) -> Costs:
    world = World(queued, nodes)
    collect_seldom()  # as the controller does when it begins
    began = time.perf_counter()
    decided = world.apply(decide(world.yard, world.now))
    fill_s = time.perf_counter() - began
    for _ in range(queued - len(world.yard.waiting)):
        world.arrive(world.now - world.draw.uniform(0, PAST_S))
    world.age()
    for _ in range(WARM_UP):
        world.tick()
    tick_s, ended, made = [], 0, 0
    for _ in range(ticks):
        # Choosing who ends and who arrives is the benchmark's own, and is timed with the rest: it is little.
        began = time.perf_counter()
        world.tick()
        tick_s.append(time.perf_counter() - began)
        ended += world.ended
        made += world.decided
    replan_s = []
    for _ in range(replans):
        anew = world.yard.copy()
        began = time.perf_counter()
        decide(anew, world.now)
        replan_s.append(time.perf_counter() - began)
    gc.unfreeze()
    return Costs(
        queued, nodes, decided / fill_s, *_quantiles(tick_s), *_quantiles(replan_s), ended / (ticks * TICK_S),
        made / (ticks * TICK_S),
    )  # fmt: skip


def _quantiles(seconds: list[float]) -> tuple[float, float]:
    ordered = sorted(seconds)
    return ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, math.ceil(len(ordered) * 0.99) - 1)]


def exponent(rows: list[Costs], cost: str) -> float:
    """By which power the cost grows with n log n: 1 is proportional to it. Least squares over the logarithms."""
    points = [(math.log(row.queued * math.log(row.queued)), math.log(getattr(row, cost))) for row in rows]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def draw_plot(rows: list[Costs], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    sizes = [row.queued for row in rows]
    for cost, label, colour in (("tick", "tick", "C0"), ("replan", "full re-plan", "C1")):
        for quantile, line in (("p50", "-"), ("p99", "--")):
            costs = [getattr(row, f"{cost}_{quantile}") * 1e3 for row in rows]
            axes.loglog(sizes, costs, line, color=colour, marker="o", label=f"{label}, {quantile}")
    first = rows[0]
    scale = first.replan_p50 * 1e3 / (first.queued * math.log(first.queued))
    axes.loglog(sizes, [scale * size * math.log(size) for size in sizes], linestyle=":", label="n log n")
    axes.set_xlabel("queued gangs (a tenth as many nodes of 8 GPUs)")
    axes.set_ylabel("ms")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="Write the costs as a picture.")
    parser.add_argument("--ticks", type=int, default=2000)
    parser.add_argument("--replans", type=int, default=100)
    parser.add_argument("--only-main", action="store_true", help="Only 10,000 on 1,000 nodes.")
    arguments = parser.parse_args()
    rows = []
    for queued, nodes in (MAIN,) if arguments.only_main else GRID:
        larger = queued > MAIN[0]
        row = measure(queued, nodes, arguments.ticks // (5 if larger else 1), arguments.replans // (5 if larger else 1))
        rows.append(row)
        print(
            f"{queued:7} queued, {nodes:6} nodes: {row.fill_decisions_per_s:8.0f} decisions/s, "
            f"tick p50 {row.tick_p50 * 1e3:7.2f} p99 {row.tick_p99 * 1e3:7.2f} ms, "
            f"re-plan p50 {row.replan_p50 * 1e3:7.1f} p99 {row.replan_p99 * 1e3:7.1f} ms; "
            f"a second of the yard: {row.ends_per_s:.1f} gangs end, {row.decisions_per_s:.1f} decisions",
            flush=True,
        )
    if arguments.plot:
        draw_plot(rows, arguments.plot)
    main_row = next(row for row in rows if (row.queued, row.nodes) == MAIN)
    figures: dict[str, object] = {
        "decisions_per_s": round(main_row.fill_decisions_per_s, 1),
        "tick_p99_ms": round(main_row.tick_p99 * 1e3, 3),
        "replan_p99_ms": round(main_row.replan_p99 * 1e3, 3),
    }
    within = (
        main_row.fill_decisions_per_s >= LIMITS["decisions_per_s"]
        and main_row.tick_p99 * 1e3 <= LIMITS["tick_p99_ms"]
        and main_row.replan_p99 * 1e3 <= LIMITS["replan_p99_ms"]
    )
    if len(rows) > 1:
        figures |= {f"{cost}_exponent": round(exponent(rows, cost), 3) for cost in ("tick_p50", "replan_p50")}
        within = within and all(
            float(str(figures[f"{cost}_exponent"])) <= LIMITS["exponent"] for cost in ("tick_p50", "replan_p50")
        )
    figures |= {"limits": LIMITS, "within_limits": within, "rows": [row.__dict__ for row in rows]}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
