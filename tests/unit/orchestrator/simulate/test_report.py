"""Figures of a simulation."""

from __future__ import annotations

import json
import math

import pytest

from orchestrator.cluster.capacity import Capacity
from orchestrator.schedule.forecast import Eta
from orchestrator.schedule.gang import Rules
from orchestrator.schedule.place import place
from orchestrator.schedule.yard import Yard
from orchestrator.simulate.conditions import Conditions, alike_nodes
from orchestrator.simulate.engine import Outcome, Told, simulate
from orchestrator.simulate.life import Life
from orchestrator.simulate.meter import Meter, partly_used
from orchestrator.simulate.peers import POLICIES
from orchestrator.simulate.plot import means
from orchestrator.simulate.policy import Forecast
from orchestrator.simulate.report import eta_error, quantile, report, size_class
from orchestrator.simulate.workload import SimulatedJob, Workload

ISSUE_KEYS = {
    "avg_wait_s", "avg_jct_s", "p50_jct_s", "p99_jct_s", "p999_wait_s", "makespan_s", "preemptions", "worst_ftf",
    "unfair_fraction", "utilisation", "eta_mape",
}  # fmt: skip


def run(*jobs: tuple[float, float, int, str], gpus: int = 4, forecast: Forecast | None = None) -> Outcome:
    workload = Workload(tuple(SimulatedJob(f"j{n}", *job) for n, job in enumerate(jobs)), "test")
    conditions = Conditions(preemption_cost_s=0, forecast_every=2)
    return simulate(alike_nodes(1, gpus), workload, POLICIES["fifo"](), conditions, rules=Rules(), forecast=forecast)


def test_quantiles_are_elements() -> None:
    ordered = [float(n) for n in range(10)]
    assert [quantile(ordered, q) for q in (0.0, 0.5, 0.99, 0.999)] == [0, 5, 9, 9]
    assert quantile([7.0], 0.5) == 7


def test_finish_time_fairness_is_beside_a_share_of_the_cluster() -> None:
    # Alone: 1. Two that each want the whole cluster: each would have half of it, and takes 200 s.
    assert report(run((0, 100, 4, "x"))).worst_ftf == 1
    found = report(run((0, 100, 4, "x"), (0, 100, 4, "x")))
    # The first has 2 in the system for 100 s; the second 2 for 100 s and 1 for 100 s: 1.5, so 150 s of its own.
    assert found.worst_ftf == pytest.approx(200 / 150)
    assert found.unfair_fraction == 0.5


def test_a_job_that_wants_less_than_its_share_is_treated_unfairly_by_any_wait() -> None:
    found = report(run((0, 100, 4, "x"), (50, 10, 1, "x")))
    assert found.worst_ftf == pytest.approx(60 / 10)


def test_time_is_accounted_for() -> None:
    # Four GPUs: 3 held from 0 to 100, while the second waits for 4 since 20; then 4 for 50 s.
    found = report(run((0, 100, 3, "x"), (20, 50, 4, "y")))
    assert found.makespan_s == 150
    assert found.utilisation == pytest.approx((300 + 200) / 600)
    assert found.idle_while_waiting == found.fragmentation == pytest.approx(80 / 600)
    assert found.avg_queue == pytest.approx(80 / 150)
    assert found.max_queue == 1


def test_groups_have_all_jobs() -> None:
    found = report(run((0, 10, 1, "x"), (0, 10, 2, "y"), (0, 10, 4, "y"), (0, 10, 3, "y")))
    assert {name: one.jobs for name, one in found.by_tenant.items()} == {"y": 3, "x": 1}
    assert list(found.by_tenant) == ["y", "x"]
    assert {name: one.jobs for name, one in found.by_size.items()} == {"1": 1, "2-4": 3}
    assert [size_class(gpus) for gpus in (1, 2, 5, 8, 9, 33, 512)] == ["1", "2-4", "5-8", "5-8", "9-32", "33+", "33+"]


def test_json_has_the_keys_that_were_asked_for() -> None:
    told = json.loads(json.dumps(report(run((0, 10, 1, "x"))).as_json()))
    assert told.keys() >= ISSUE_KEYS | {
        "fragmentation",
        "max_preemptions_of_a_job",
        "lost_gpu_s",
        "by_size",
        "by_tenant",
    }
    assert told["eta_mape"] is None


def test_forecasts_are_asked_for_of_every_other_job_that_waits() -> None:
    asked: list[tuple[float, list[str]]] = []

    def forecast(_yard: Yard, now: float, job_ids: list[str], /) -> dict[str, Eta]:
        asked.append((now, job_ids))
        return {job_ids[0]: Eta(now, now + 100, now + 200)} if now < 4 else {job_ids[0]: Eta(now, math.inf, math.inf)}

    # The first starts at once; of the others, which start at 100, 200, ..., the second, fourth and sixth are asked for.
    outcome = run(*((float(n), 100.0, 4, "x") for n in range(6)), forecast=forecast)  # type: ignore[arg-type]
    assert asked == [(1, ["j1"]), (3, ["j3"]), (5, ["j5"])]
    found = report(outcome)
    # Told 101, true 100: 1 of 99. Told 103, true 300: 197 of 297.
    assert found.eta_mape == pytest.approx((1 / 99 + 197 / 297) / 2)
    assert found.eta_in_band == 0.5
    assert found.eta_asked == 3


def test_a_short_wait_counts_as_a_minute() -> None:
    life = Life(SimulatedJob("a", 0, 10, 1))
    placement = place(Capacity(alike_nodes(1, 1)), 1, "gpu")
    assert placement is not None
    life.start(1.0, placement, 1.0, 0.0)
    assert eta_error([Told("a", 0.0, 0.0, 31.0, 40.0)], {"a": life}) == (0.5, 1.0)
    assert eta_error([], {}) == (None, None)


def test_the_meter_integrates() -> None:
    capacity = Capacity(alike_nodes(2, 4))
    meter = Meter(10.0)
    mask = 0b11
    meter.read(capacity, mask, 0, 0, 0)
    meter.pass_to(20.0)
    placement = place(capacity, 3, "gpu")
    assert placement is not None
    capacity.take(placement)
    assert partly_used(capacity, mask) == 1
    assert partly_used(capacity, 0b10) == 0
    meter.read(capacity, mask, 3, 2, 1)
    meter.read(capacity, mask, 3, 1, 1)  # at one instant the last counts
    meter.pass_to(50.0)
    assert (meter.used_s, meter.all_s, meter.waiting_s, meter.stranded_s, meter.idle_s) == (90, 320, 30, 30, 150)
    assert meter.mean_present(10, 50) == pytest.approx(2 * 30 / 40)
    assert meter.mean_present(30, 50) == 2
    hours, used = means(meter.times, meter.used_steps, meter.now)
    assert used[0] == 0
    assert used[-1] == pytest.approx(3)
    assert sum(used) / len(used) == pytest.approx(90 / 40)
    assert hours[-1] < 40 / 3600
