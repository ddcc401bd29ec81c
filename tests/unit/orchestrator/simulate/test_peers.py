"""Other schedulers, on small cases by hand and on the traces that other simulators ran."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.schedule.gang import Rules
from orchestrator.simulate.conditions import Conditions, alike_nodes
from orchestrator.simulate.engine import Outcome, simulate
from orchestrator.simulate.peers import POLICIES
from orchestrator.simulate.preemptive import Tiresias
from orchestrator.simulate.report import report
from orchestrator.simulate.workload import SimulatedJob, Workload, read_csv

TRACES = Path(__file__).resolve().parents[5] / "shared" / "data" / "traces"
philly = pytest.mark.skipif(
    not (TRACES / "philly-480.csv").is_file(), reason=f"no traces in {TRACES}: the folder `shared` is not here"
)


def run(policy: str, *jobs: tuple[float, float, int], nodes: int = 1, gpus: int = 4, **conditions: float) -> Outcome:
    workload = Workload(tuple(SimulatedJob(f"j{n}", *job) for n, job in enumerate(jobs)), "test")
    rules = Rules(consolidate=True)
    given = Conditions(**{"preemption_cost_s": 0, **conditions})  # type: ignore[arg-type]
    return simulate(alike_nodes(nodes, gpus), workload, POLICIES[policy](), given, rules=rules)


def starts(outcome: Outcome) -> list[list[float]]:
    return [[one.since for one in life.attempts] for life in outcome.lives]


def test_tiresias_lets_those_go_first_that_had_less_than_its_threshold() -> None:
    # The first has had 18,000 GPU-seconds at 4,500, more in the round of 4,560. The second needs half of the GPUs, and
    # is done at 5,160, a round, too.
    outcome = run("tiresias", (0, 10_000, 4), (3_030, 600, 2), preemption_cost_s=60)
    assert starts(outcome) == [[0, 5_160], [4_560]]
    first, second = outcome.lives
    assert first.done_at == 5_160 + 10_000 - 4_560 + 60
    assert (first.waited_s, second.waited_s, first.preemptions) == (600, 1_530, 1)


def test_tiresias_decides_in_rounds() -> None:
    outcome = run("tiresias", (0, 100, 4), (10, 100, 4), (65, 10, 4))
    assert starts(outcome) == [[0], [120], [240]]


def test_tiresias_hands_out_by_count_and_then_may_find_no_place() -> None:
    # Two nodes of four. 3 and 3 GPUs leave 2 by count, which are on two nodes.
    outcome = run("tiresias", (0, 1_000, 3), (0, 1_000, 3), (0, 50, 2), nodes=2)
    assert starts(outcome) == [[0], [0], [1_020]]


def test_tiresias_does_not_sink_a_job_that_it_stopped_before() -> None:
    policy = Tiresias(round_s=10, threshold=100)
    jobs = (SimulatedJob("a", 0, 200, 1), SimulatedJob("b", 0, 30, 1))
    outcome = simulate(alike_nodes(1, 1), Workload(jobs, "test"), policy, Conditions(preemption_cost_s=0))
    assert starts(outcome) == [[0, 140], [110]]  # a is past its threshold after 100 s, at the round of 110


def test_srtf_stops_what_has_more_left() -> None:
    outcome = run("srtf", (0, 1_000, 4), (100, 50, 4), (120, 40, 4), preemption_cost_s=5)
    # At 100: 900 or 50. At 120: 30 or 40.
    assert starts(outcome) == [[0, 190], [100], [150]]
    assert outcome.lives[0].done_at == 190 + 900 + 5


def test_sjf_goes_by_true_run_time_and_its_first_blocks() -> None:
    outcome = run("sjf", (0, 100, 3), (1, 50, 1), (2, 80, 4), (3, 90, 1))
    # At 1 one GPU is free. The third is next, shorter than the fourth, and waits for all of them.
    assert starts(outcome) == [[0], [1], [100], [180]]


def test_first_fit_passes_over_what_does_not_fit() -> None:
    outcome = run("first-fit", (0, 100, 3), (1, 50, 4), (2, 80, 1), (3, 90, 1))
    assert starts(outcome) == [[0], [172], [2], [82]]


def test_qssf_learns_from_the_tenants_jobs() -> None:
    def job(name: str, at: float, length: float, tenant: str) -> SimulatedJob:
        return SimulatedJob(name, at, length, 1, tenant)

    jobs = (
        job("a", 0, 100, "long"), job("b", 1, 10, "short"), job("c", 2, 500, "busy"),
        job("d", 120, 90, "long"), job("e", 121, 9, "short"), job("f", 122, 9, "new"),
    )  # fmt: skip
    outcome = simulate(alike_nodes(1, 1), Workload(jobs, "test"), POLICIES["qssf"](), Conditions())
    # Nothing is known at first. When c ends, at 610, d's tenant has had 100 s a job, e's 10 s, and all together 55 s.
    assert starts(outcome) == [[0], [100], [110], [628], [610], [619]]


@pytest.mark.parametrize(("oracle", "later"), [(True, [100, 2, 150, 150]), (False, [300, 2, 92, 92])])
def test_easy_keeps_its_reservation_on_nodes_and_backfills_beside_it(oracle: bool, later: list[float]) -> None:
    jobs = [(0.0, 100.0, 4), (0.0, 300.0, 2), (1.0, 50.0, 6), (2.0, 90.0, 2), (3.0, 500.0, 1), (4.0, 60.0, 1)]
    workload = Workload(tuple(SimulatedJob(f"j{n}", *job) for n, job in enumerate(jobs)), "test")
    rules = Rules(consolidate=True)
    outcome = simulate(alike_nodes(2, 4), workload, POLICIES["easy"](), Conditions(oracle=oracle), rules=rules)
    # The third needs a whole node, free at 100, and two GPUs of the other. The fourth is gone by then; what comes after
    # it would not be, which nobody knows without an oracle.
    assert starts(outcome) == [[0], [0], *([one] for one in later)]


@philly
@pytest.mark.parametrize(
    ("policy", "wait", "makespan"),
    [("fifo", 45_616.61, 663_244), ("easy", 1_483.57, 607_995), ("easy-strict", 2_273.28, 658_763)],
)
def test_as_other_simulators_on_philly_480(policy: str, wait: float, makespan: float) -> None:
    """The last is EASY by the letter: see simulate/easy.py."""
    workload = read_csv(TRACES / "philly-480.csv")
    conditions = Conditions(preemption_cost_s=0, oracle=True)
    found = report(simulate(alike_nodes(4, 8), workload, POLICIES[policy](), conditions))
    assert found.avg_wait_s == pytest.approx(wait, abs=0.5)
    assert found.makespan_s == pytest.approx(makespan, abs=0.5)


@philly
def test_tiresias_and_sjf_are_near_lucids_on_philly_oct() -> None:
    workload = read_csv(TRACES / "philly-oct.csv")

    def found(policy: str) -> tuple[float, int]:
        rules = Rules(consolidate=True)
        one = report(simulate(alike_nodes(40, 8), workload, POLICIES[policy](), Conditions(), rules=rules))
        return one.avg_jct_s, one.preemptions

    jct, preemptions = found("tiresias")
    assert jct == pytest.approx(11_888, rel=0.05)
    assert preemptions == pytest.approx(3_978, rel=0.10)
    assert found("fifo")[0] == pytest.approx(111_818, rel=0.03)
    assert found("sjf")[0] == pytest.approx(13_009, rel=0.001)
