"""Workloads drawn at random, the same for the same seed: for asking what a cluster would do that has no trace yet."""

from __future__ import annotations

import difflib
import math
import random
from dataclasses import dataclass, fields

from orchestrator.errors import SpecError
from orchestrator.schedule.gang import DAY_S
from orchestrator.simulate.workload import SimulatedJob, Workload, from_first

SIZES = {1: 0.70, 2: 0.10, 4: 0.09, 8: 0.08, 16: 0.02, 32: 0.01}
"""Share of jobs by GPUs; sizes that the cluster has not are left out."""
SIZE_POWER = 0.3
"""The median run time grows with so much of the logarithm of the size: large jobs run longer, and not in proportion."""


@dataclass(frozen=True)
class Generation:
    """What to draw; each may be set by name."""

    jobs: int = 1000
    load: float = 0.9
    """GPU-seconds asked for per GPU-second of the cluster, from the first submission to the last."""
    tenants: int = 8
    """The k-th submits 1/k as many jobs as the first (Zipf), and each has run times of its own."""
    median_s: float = 900.0
    """Run time of half of the jobs with one GPU."""
    sigma: float = 1.8
    """Spread of the logarithm of run times: log-normal."""
    longest_s: float = 3 * DAY_S
    diurnal: float = 0.6
    """How far the rate of submission swings within a day: 0 not at all, 1 down to none at night."""
    elastic: float = 0.0
    """Share of jobs with several GPUs that may run with half as many, or twice."""


LEAST: dict[str, float] = {"jobs": 1, "tenants": 1, "diurnal": 0, "elastic": 0, "sigma": 0}
MOST: dict[str, float] = {"jobs": 1_000_000, "tenants": 10_000, "diurnal": 1, "elastic": 1, "sigma": 5, "load": 100}


def parse_generation(text: str) -> Generation:
    """`jobs=1000,load=0.9` as a Generation. Raises SpecError."""
    known = {one.name: int if isinstance(one.default, int) else float for one in fields(Generation)}
    values: dict[str, int | float] = {}
    for part in filter(None, text.split(",")):
        name, _, written = (piece.strip() for piece in part.partition("="))
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise _bad(
                name, f"{name!r} cannot be set", f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
            )
        try:
            value = known[name](written)
        except ValueError:
            raise _bad(
                name, f"{name}={written} is no number", f"for example {name}={getattr(Generation, name)}"
            ) from None
        low, high = LEAST.get(name, 0), MOST.get(name, math.inf)
        if not (low <= value <= high and math.isfinite(value)) or (name not in LEAST and value == 0):
            raise _bad(name, f"{name}={written} is out of range", f"{'at least' if name in LEAST else 'above'} {low:g}"
                       + (f" and at most {high:g}" if math.isfinite(high) else ""))  # fmt: skip
        values[name] = value
    return Generation(**values)  # type: ignore[arg-type]


def generate(what: Generation, gpus: int, seed: int) -> Workload:
    """Jobs for a cluster of `gpus`."""
    draw = random.Random(seed)
    tenants = [f"t{number + 1}" for number in range(what.tenants)]
    shares = [1 / (number + 1) for number in range(what.tenants)]
    # Tenants differ, which is what makes history worth having.
    habits = {tenant: math.exp(draw.gauss(0, what.sigma / 2)) for tenant in tenants}
    own = what.sigma * math.sqrt(3) / 2  # with the tenants' spread, sigma again
    sizes = {size: share for size, share in SIZES.items() if size <= gpus}
    drawn = []
    for _ in range(what.jobs):
        tenant = draw.choices(tenants, shares)[0]
        size = draw.choices(list(sizes), list(sizes.values()))[0]
        median = what.median_s * size**SIZE_POWER * habits[tenant]
        length = round(min(max(median * math.exp(draw.gauss(0, own)), 1.0), what.longest_s)) or 1
        drawn.append((tenant, size, float(length), draw.random() < what.elastic))
    work = sum(size * length for _, size, length, _ in drawn)
    rate = what.jobs * what.load * gpus / work
    jobs = []
    for number, (at, (tenant, size, length, elastic)) in enumerate(
        zip(_arrivals(what, rate, draw), drawn, strict=False)
    ):
        bounds = (size // 2, min(2 * size, gpus)) if elastic and size > 1 else (0, 0)
        jobs.append(SimulatedJob(f"g{number}", round(at), length, size, tenant, min_gpus=bounds[0], max_gpus=bounds[1]))
    return Workload(from_first(jobs), f"generated with seed {seed}")


def _arrivals(what: Generation, rate: float, draw: random.Random) -> list[float]:
    """A Poisson process whose rate swings over the day, by thinning one of its highest rate (Lewis, Shedler 1979)."""
    at = 0.0
    times: list[float] = []
    most = rate * (1 + what.diurnal)
    while len(times) < what.jobs:
        at += draw.expovariate(most)
        # Least at midnight, most at noon.
        if draw.random() * most < rate * (1 - what.diurnal * math.cos(2 * math.pi * at / DAY_S)):
            times.append(at)
    return times


def _bad(name: str, message: str, hint: str) -> SpecError:
    return SpecError(f"--generate: {message}", code="bad-generate", field=name or None, hint=hint)
