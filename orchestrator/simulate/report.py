"""What a simulation comes to, in figures."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.simulate.engine import Outcome, Told
from orchestrator.simulate.life import Life

ALMOST = 1e-9
LEAST_WAIT_S = 60.0
"""Of a forecast, an error is measured against a wait of at least so long."""


@dataclass(frozen=True)
class Group:
    """Jobs that have something in common. Seconds."""

    jobs: int
    avg_jct_s: float
    p50_jct_s: float
    p99_jct_s: float
    avg_wait_s: float
    p50_wait_s: float
    p99_wait_s: float
    preemptions: int


@dataclass(frozen=True)
class Report:
    """Seconds, unless a name says otherwise. Of a sorted list of n, the q-quantile is the one at int(n × q)."""

    policy: str
    jobs: int
    nodes: int
    gpus: int
    avg_wait_s: float
    """A job's wait: all time in the system in which it held no slots."""
    p50_wait_s: float
    p99_wait_s: float
    p999_wait_s: float
    avg_jct_s: float
    """Job completion time: from submission to end."""
    p50_jct_s: float
    p99_jct_s: float
    makespan_s: float
    """From the first submission to the last end."""
    preemptions: int
    max_preemptions_of_a_job: int
    resizes: int
    failures: int
    """Attempts that lost a node."""
    worst_ftf: float
    """Finish-time fairness (Mahajan et al., Themis, NSDI 2020): JCT beside the JCT with 1/N of the cluster for itself,
    N the mean number of jobs in the system while this one was. With so much, a job that asks for more GPUs than its
    share takes as many times longer. Above 1 is unfair."""
    unfair_fraction: float
    """Jobs with a finish-time fairness above 1."""
    utilisation: float
    """GPU-seconds held, of those of nodes that were up, until the last end."""
    fragmentation: float
    """The same, of GPU-seconds free on nodes that others use in part, while jobs wait."""
    idle_while_waiting: float
    """The same, of all that are free while jobs wait: fragmentation, and whole nodes that nobody fits or was let."""
    avg_queue: float
    """Jobs that wait, mean over time."""
    max_queue: int
    lost_gpu_s: float
    """GPU-seconds held for work that was done again, or for start-up: the sum of the three."""
    lost_to_preemption_gpu_s: float
    lost_to_failures_gpu_s: float
    lost_to_startup_gpu_s: float
    goodput: float
    """Work that was asked for, of GPU-seconds held: 1 where nothing was done twice and starting takes no time. Elastic
    jobs count on `num_gpus`."""
    eta_mape: float | None
    """Forecasts of a start: mean of |expected − true| / max(true wait, 60 s); None where none was made."""
    eta_in_band: float | None
    """Share of them whose band held the true start."""
    eta_asked: int
    decisions: int
    """How often the policy was asked."""
    wall_s: float
    """What the simulation took."""
    cpu_s: float
    """The same on a core of its own: of processor time."""
    by_size: dict[str, Group]
    by_tenant: dict[str, Group]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def report(outcome: Outcome) -> Report:
    """The figures of a simulation that has ended."""
    lives, meter = outcome.lives, outcome.meter
    jcts, waits = sorted(map(jct, lives)), sorted(life.waited_s for life in lives)
    fairness = [finish_time_fairness(life, outcome) for life in lives]
    lost = outcome.preemption_gpu_s, outcome.failure_gpu_s, outcome.startup_gpu_s
    mape, in_band = eta_error(outcome.told, {life.job.job_id: life for life in lives})
    return Report(
        policy=outcome.policy,
        jobs=len(lives),
        nodes=len(outcome.nodes),
        gpus=outcome.slots,
        avg_wait_s=mean(waits),
        p50_wait_s=quantile(waits, 0.5),
        p99_wait_s=quantile(waits, 0.99),
        p999_wait_s=quantile(waits, 0.999),
        avg_jct_s=mean(jcts),
        p50_jct_s=quantile(jcts, 0.5),
        p99_jct_s=quantile(jcts, 0.99),
        makespan_s=meter.now - meter.start,
        preemptions=sum(life.preemptions for life in lives),
        max_preemptions_of_a_job=max(life.preemptions for life in lives),
        resizes=sum(life.resizes for life in lives),
        failures=sum(life.failures for life in lives),
        worst_ftf=max(fairness),
        unfair_fraction=mean([rho > 1 + ALMOST for rho in fairness]),
        utilisation=meter.used_s / meter.all_s,
        fragmentation=meter.stranded_s / meter.all_s,
        idle_while_waiting=meter.idle_s / meter.all_s,
        avg_queue=meter.waiting_s / (meter.now - meter.start),
        max_queue=meter.most_waiting,
        lost_gpu_s=sum(lost),
        lost_to_preemption_gpu_s=lost[0],
        lost_to_failures_gpu_s=lost[1],
        lost_to_startup_gpu_s=lost[2],
        goodput=math.fsum(life.job.duration_s * life.job.num_gpus for life in lives) / meter.used_s,
        eta_mape=mape,
        eta_in_band=in_band,
        eta_asked=len(outcome.told) + outcome.untold,
        decisions=outcome.decisions,
        wall_s=outcome.wall_s,
        cpu_s=outcome.cpu_s,
        by_size=groups(lives, lambda life: size_class(life.job.num_gpus), SIZES),
        by_tenant=groups(lives, lambda life: life.job.tenant),
    )


def jct(life: Life) -> float:
    assert life.done_at is not None
    return life.done_at - life.job.submit_s


def quantile(ordered: Sequence[float], q: float) -> float:
    """Of a sorted list, the one at int(n × q)."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def finish_time_fairness(life: Life, outcome: Outcome) -> float:
    """See Report.worst_ftf."""
    job = life.job
    assert life.done_at is not None
    present = outcome.meter.mean_present(job.submit_s, life.done_at)
    alone = job.duration_s * max(1.0, job.num_gpus * max(1.0, present) / outcome.slots)
    return jct(life) / alone


def eta_error(told: Iterable[Told], lives: dict[str, Life]) -> tuple[float | None, float | None]:
    """Report.eta_mape and Report.eta_in_band."""
    errors, held = [], []
    for one in told:
        start = lives[one.job_id].attempts[0].since
        errors.append(abs(one.expected - start) / max(start - one.at, LEAST_WAIT_S))
        held.append(one.low <= start <= one.high)
    return (mean(errors), mean(held)) if errors else (None, None)


SIZES = ("1", "2-4", "5-8", "9-32", "33+")


def size_class(gpus: int) -> str:
    limits = (1, 4, 8, 32)
    return next((name for name, limit in zip(SIZES, limits, strict=False) if gpus <= limit), SIZES[-1])


def groups(lives: Iterable[Life], key: Callable[[Life], str], order: Sequence[str] = ()) -> dict[str, Group]:
    """By `key`: in `order`, or the most jobs first."""
    members: dict[str, list[Life]] = {}
    for life in lives:
        members.setdefault(key(life), []).append(life)
    count = Counter({name: len(several) for name, several in members.items()})
    names = [name for name in order if name in members] or sorted(members, key=lambda name: (-count[name], name))
    return {name: group(members[name]) for name in names}


def group(lives: Sequence[Life]) -> Group:
    jcts, waits = sorted(map(jct, lives)), sorted(life.waited_s for life in lives)
    return Group(
        jobs=len(lives),
        avg_jct_s=mean(jcts),
        p50_jct_s=quantile(jcts, 0.5),
        p99_jct_s=quantile(jcts, 0.99),
        avg_wait_s=mean(waits),
        p50_wait_s=quantile(waits, 0.5),
        p99_wait_s=quantile(waits, 0.99),
        preemptions=sum(life.preemptions for life in lives),
    )
