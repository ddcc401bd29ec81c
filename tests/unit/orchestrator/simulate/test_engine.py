"""The simulation itself: what jobs do, what stops, starts and failures cost, and what is not allowed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import IllegalTransitionError, ImpossibleGangError
from orchestrator.job.lifecycle import AttemptState, JobState
from orchestrator.schedule.gang import Decisions, Gang, Held, Queue, Rules, Start, Stop, Why
from orchestrator.schedule.history import History, Ran
from orchestrator.schedule.place import place
from orchestrator.schedule.yard import Yard
from orchestrator.simulate.conditions import Conditions, Failure, alike_nodes
from orchestrator.simulate.engine import Outcome, simulate
from orchestrator.simulate.errors import StuckError, UnsettledError
from orchestrator.simulate.life import Attempt, Life
from orchestrator.simulate.peers import POLICIES
from orchestrator.simulate.policy import Policy
from orchestrator.simulate.report import report
from orchestrator.simulate.workload import SimulatedJob, Workload, read_csv

FOUR = Path(__file__).parent / "four-jobs.csv"
FREE = Conditions(preemption_cost_s=0)


def a_workload(*jobs: SimulatedJob) -> Workload:
    return Workload(jobs, "test")


def a_job(name: str, submit: float, duration: float, gpus: int = 1, **more: Any) -> SimulatedJob:
    return SimulatedJob(name, submit, duration, gpus, **more)


def spans(outcome: Outcome) -> dict[str, list[tuple[float, float | None]]]:
    """From when to when each job held slots."""
    return {life.job.job_id: [(one.since, one.until) for one in life.attempts] for life in outcome.lives}


class Scripted(Policy):
    """Starts whatever fits, first come, first served, and does at given times what it is told."""

    name = "scripted"
    elastic = True

    def __init__(self, **script: Callable[[Yard], Decisions]) -> None:
        self.script = {float(at.removeprefix("at_")): does for at, does in script.items()}
        self.gangs: list[Gang] = []
        self.held: list[Held] = []
        self.yard: Yard | None = None

    def waits(self, gang: Gang, /) -> None:
        self.gangs.append(gang)

    def starts(self, held: Held, /) -> None:
        self.held.append(held)

    def decide(self, yard: Yard, now: float, /) -> Decisions:
        self.yard = yard
        next_at = min((at for at in self.script if at > now), default=None)
        if now in self.script:
            return replace(self.script.pop(now)(yard), next_at=next_at)
        free, starts = yard.capacity.copy(), []
        for gang in sorted(yard.waiting.values(), key=lambda one: (one.target is None, one.sequence)):
            placement = place(free, gang.target or gang.min_processes, "gpu")
            if placement is not None:
                free.take(placement)
                starts.append(Start(gang.job_id, placement))
        return Decisions(tuple(starts), next_at=next_at)


def stop(job_id: str, target: int | None = None) -> Callable[[Yard], Decisions]:
    why = Why.SHORTER if target is None else Why.SHRINK
    return lambda _: Decisions(stops=(Stop(job_id, why, None, target),))


@pytest.mark.parametrize(
    ("policy", "oracle", "wait", "makespan", "jct"),
    [
        # a 0-100, b 100-200, c 200-250, d 200-400: b blocks.
        ("fifo", False, (0 + 90 + 180 + 170) / 4, 400, (100 + 190 + 230 + 370) / 4),
        # c 20-70 beside a; b needs all GPUs and has no reservation: d 70-270, b 270-370.
        ("easy", True, (0 + 260 + 0 + 40) / 4, 370, (100 + 360 + 50 + 240) / 4),
        ("first-fit", False, (0 + 260 + 0 + 40) / 4, 370, (100 + 360 + 50 + 240) / 4),
        # b's reservation is for 100: c ends before that, d would not. b 100-200, d 200-400.
        ("easy-strict", True, (0 + 90 + 0 + 170) / 4, 400, (100 + 190 + 50 + 370) / 4),
        ("yard", True, (0 + 90 + 0 + 170) / 4, 400, (100 + 190 + 50 + 370) / 4),
        # Nobody knows how long jobs run, so nobody knows when b's reservation begins.
        ("yard", False, (0 + 260 + 0 + 40) / 4, 370, (100 + 360 + 50 + 240) / 4),
        # A round at 0: a. At 60: c and d wait with b, in this order: by count a 2, then b does not fit, c 2.
        # At 120: a is gone (100), c is gone (110): b 120-220. At 240: d.
        ("tiresias", False, (0 + 110 + 40 + 210) / 4, 440, (100 + 210 + 90 + 410) / 4),
    ],
)
def test_four_jobs_by_hand(policy: str, oracle: bool, wait: float, makespan: float, jct: float) -> None:
    conditions = Conditions(preemption_cost_s=0, oracle=oracle)
    found = report(simulate(alike_nodes(1, 4), read_csv(FOUR), POLICIES[policy](), conditions))
    assert (found.avg_wait_s, found.makespan_s, found.avg_jct_s) == (wait, makespan, jct)
    assert found.utilisation == pytest.approx((200 + 400 + 100 + 400) / (4 * makespan))
    assert found.preemptions == 0


def test_a_stop_adds_its_cost_to_the_work_and_frees_the_slots_at_once() -> None:
    policy = Scripted(at_40=stop("a"))
    workload = a_workload(a_job("a", 0, 100, 2, tenant="t"), a_job("b", 10, 30, 2))
    outcome = simulate(alike_nodes(1, 2), workload, policy, Conditions(preemption_cost_s=7))
    # Asked again at 40, it starts a, whose number is the lower one.
    assert spans(outcome) == {"a": [(0, 40), (40, 107)], "b": [(107, 137)]}
    again = policy.gangs[-1]
    assert (again.ran_s, again.evictions, again.queued_at, again.target) == (40, 1, 40, None)
    assert outcome.lives[0].preemptions == 1
    assert outcome.preemption_gpu_s == 14
    assert outcome.lives[1].waited_s == 97


def test_history_has_the_whole_run_time_of_what_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Ran] = []
    add = History.add
    monkeypatch.setattr(History, "add", lambda self, ran: (seen.append(ran), add(self, ran))[1])
    workload = a_workload(a_job("a", 0, 100, 2, tenant="t"), replace(a_job("b", 10, 5, tenant="t"), name="n"))
    conditions = Conditions(preemption_cost_s=7, startup_s=3)
    simulate(alike_nodes(1, 2), workload, Scripted(at_40=stop("a")), conditions)
    told = [(one.queue, one.name, one.processes, one.ran_s) for one in seen]
    assert told == [("default", "t", 2, 113), ("default", "n", 1, 8)]


@pytest.mark.parametrize(("looks_again", "asked"), [(False, [0, 10, 100]), (True, [0, 0, 10, 100, 100])])
def test_a_policy_may_want_to_be_asked_again_after_starts(looks_again: bool, asked: list[float]) -> None:
    policy = Scripted()
    policy.looks_again = looks_again
    times: list[float] = []
    decide = policy.decide
    policy.decide = lambda yard, now: (times.append(now), decide(yard, now))[1]  # type: ignore[method-assign]
    simulate(alike_nodes(1, 2), a_workload(a_job("a", 0, 100, 2), a_job("b", 10, 30, 2)), policy, FREE)
    assert times[: len(asked)] == asked


def test_start_up_holds_slots_and_does_no_work() -> None:
    outcome = simulate(
        alike_nodes(1, 2),
        a_workload(a_job("a", 0, 100, 2)),
        Scripted(at_5=stop("a"), at_50=stop("a")),
        Conditions(preemption_cost_s=0, startup_s=10),
    )
    # Stopped while it starts: nothing is done. Then 35 s of work, then 65.
    assert spans(outcome) == {"a": [(0, 5), (5, 50), (50, 125)]}
    assert [one.state for one in outcome.lives[0].attempts] == [AttemptState.ENDED] * 3
    assert report(outcome).lost_to_startup_gpu_s == 60


def test_an_elastic_gang_goes_on_with_its_target_as_fast_as_the_curve_says() -> None:
    policy = Scripted(at_40=stop("a", target=2))
    workload = a_workload(a_job("a", 0, 100, 4, min_gpus=2, max_gpus=4))
    nodes = alike_nodes(1, 4)

    def four(yard: Yard) -> Decisions:
        placement = place(yard.capacity, 4, "gpu")
        assert placement is not None
        return Decisions((Start("a", placement),))

    policy.script[0.0] = four
    outcome = simulate(nodes, workload, policy, Conditions(preemption_cost_s=0, speedup=0.5))
    assert spans(outcome)["a"][0] == (0, 40)
    assert spans(outcome)["a"][1] == (40, pytest.approx(40 + 60 * 2**0.5))
    assert policy.gangs[-1].target == 2
    assert (policy.held[-1].gang.target, policy.held[-1].gang.max_processes) == (None, 4)
    assert (outcome.lives[0].resizes, outcome.lives[0].preemptions, policy.gangs[-1].evictions) == (1, 0, 0)


def test_peers_run_elastic_gangs_as_they_were_asked_for() -> None:
    workload = a_workload(a_job("a", 0, 100, 4, min_gpus=2, max_gpus=4))
    outcome = simulate(alike_nodes(1, 4), workload, POLICIES["fifo"](), FREE)
    assert outcome.lives[0].attempts[0].processes == 4


def fails_at(outcome: Outcome) -> float:
    """When the first attempt lost its node."""
    lost = [life.attempts[0].until for life in outcome.lives if life.failures]
    assert lost
    assert lost[0] is not None
    return lost[0]


@pytest.mark.parametrize("every", [None, 100.0])
def test_a_failure_loses_exactly_the_work_since_the_last_commit(every: float | None) -> None:
    conditions = Conditions(preemption_cost_s=0, startup_s=10, checkpoint_s=every, mtbf_s=2_000, repair_s=500, seed=1)
    outcome = simulate(alike_nodes(1, 2), a_workload(a_job("a", 0, 3_000, 2)), POLICIES["fifo"](), conditions)
    (life,) = outcome.lives
    assert life.failures >= 1
    done = 0.0
    lost = 0.0
    for one, two in pairwise(life.attempts):
        assert one.until is not None
        worked = max(0.0, one.until - one.since - 10)
        kept = 0.0 if every is None else worked // every * every
        done += kept
        lost += worked - kept
        assert two.since == one.until + 500  # its only node is gone so long
    last = life.attempts[-1]
    assert last.until == pytest.approx(last.since + 10 + 3_000 - done)
    found = report(outcome)
    assert found.lost_to_failures_gpu_s == pytest.approx(2 * lost)
    assert found.failures == life.failures
    assert outcome.meter.all_s < 2 * found.makespan_s  # the node was not always there


def test_failures_at_known_times() -> None:
    """Of 100 s of work, committed every 10 s: 5 s are done again after the first failure, and 2 s after the second."""
    failures = (Failure(at_s=35, node=0, repair_s=1), Failure(at_s=60, node="n00000", repair_s=0))
    conditions = Conditions(startup_s=0, checkpoint_s=10, failures=failures)
    outcome = simulate(alike_nodes(1, 2), a_workload(a_job("a", 0, 100, 2)), POLICIES["fifo"](), conditions)
    (life,) = outcome.lives
    assert [attempt.until for attempt in life.attempts] == [35, 60, 110]
    assert [attempt.since for attempt in life.attempts] == [0, 36, 60]
    found = report(outcome)
    assert (found.failures, found.makespan_s) == (2, 110)
    assert found.goodput == pytest.approx(100 / 109)


def test_what_fails_is_a_matter_of_the_seed_alone() -> None:
    workload = a_workload(a_job("a", 0, 3_000, 2))

    def failure(seed: int, policy: str) -> float:
        conditions = Conditions(mtbf_s=2_000, repair_s=10, seed=seed)
        return fails_at(simulate(alike_nodes(1, 2), workload, POLICIES[policy](), conditions))

    assert failure(3, "fifo") == failure(3, "yard")
    assert failure(3, "fifo") != failure(4, "fifo")


def test_a_job_that_always_fails_is_told_of() -> None:
    conditions = Conditions(mtbf_s=10, repair_s=1)
    with pytest.raises(StuckError, match="job a lost its node 1000 times"):
        simulate(alike_nodes(1, 1), a_workload(a_job("a", 0, 100_000)), POLICIES["fifo"](), conditions)


def test_illegal_moves_raise() -> None:
    nodes = alike_nodes(1, 2)

    def twice(yard: Yard) -> Decisions:
        placement = place(yard.capacity, 1, "gpu")
        assert placement is not None
        return Decisions((Start("a", placement), Start("a", placement)))

    with pytest.raises(IllegalTransitionError, match="job a cannot go from running to starting"):
        simulate(nodes, a_workload(a_job("a", 0, 10)), Scripted(at_0=twice))
    with pytest.raises(IllegalTransitionError, match="job a cannot go from queued to stopping"):
        simulate(nodes, a_workload(a_job("a", 0, 10)), Scripted(at_0=stop("a")))
    life = Life(a_job("a", 0, 10))
    placement = place(Yard(nodes).capacity, 1, "gpu")
    assert placement is not None
    with pytest.raises(IllegalTransitionError):
        life.stop(1.0, 0.0)
    life.start(0.0, placement, 1.0, 0.0)
    with pytest.raises(IllegalTransitionError, match="cannot go from running to starting"):
        life.start(1.0, placement, 1.0, 0.0)
    life.end(10.0)
    assert life.state is JobState.SUCCEEDED
    life.attempt = Attempt(2, placement, 1, 0.0, 0.0, 1.0, 0.0)
    with pytest.raises(IllegalTransitionError, match="cannot go from succeeded to stopping"):
        life.stop(11.0, 0.0)


class Restless(Policy):
    """Always lets the other one of two jobs run."""

    name = "restless"

    def decide(self, yard: Yard, _now: float, /) -> Decisions:
        placement = place(yard.idle, 1, "gpu")
        assert placement is not None
        stops = tuple(Stop(job_id, Why.SHORTER) for job_id in yard.running)
        return Decisions((Start(next(iter(yard.waiting)), placement),), stops)


class Hurried(Scripted):
    """Wants to be asked again at once."""

    name = "hurried"

    def decide(self, yard: Yard, now: float, /) -> Decisions:
        return replace(super().decide(yard, now), next_at=now)


def test_a_policy_that_never_settles_is_told_of() -> None:
    workload = a_workload(a_job("a", 0, 10), a_job("b", 5, 10))
    with pytest.raises(
        UnsettledError, match=r"restless still stops jobs after \d+ decisions at 5 s: (a|b) \(shorter\)"
    ):
        simulate(alike_nodes(1, 1), workload, Restless())
    with pytest.raises(UnsettledError, match="hurried wants to be asked at 0"):
        simulate(alike_nodes(1, 1), workload, Hurried())


def test_jobs_that_can_never_start_are_told_of() -> None:
    class Lazy(Policy):
        name = "lazy"

        def decide(self, _yard: Yard, now: float, /) -> Decisions:
            return Decisions(next_at=now + 60)

    with pytest.raises(StuckError, match="1 jobs wait for ever on an idle cluster under lazy: a"):
        simulate(alike_nodes(1, 1), a_workload(a_job("a", 0, 10)), Lazy())
    ceiling = [Queue("small", ceiling=1)]
    conditions = Conditions(tenants_as_queues=True)
    with pytest.raises(StuckError, match="queue small holds 0 of at most 1"):
        simulate(
            alike_nodes(1, 2), a_workload(a_job("a", 0, 10, 2, tenant="small")), POLICIES["yard"](), conditions,
            queues=ceiling,
        )  # fmt: skip


def test_a_gang_that_never_fits_is_refused_by_name() -> None:
    workload = a_workload(a_job("fine", 0, 10, 8), a_job("huge", 1, 10, 12, line=3))
    with pytest.raises(ImpossibleGangError, match="job huge needs 12 GPUs") as refusal:
        simulate(alike_nodes(2, 5), workload, POLICIES["fifo"]())
    assert (refusal.value.line, refusal.value.field) == (3, "num_gpus")
    assert refusal.value.hint
    with pytest.raises(ImpossibleGangError, match="job fine needs 8"):  # 5 of one node and 3 of another
        simulate(alike_nodes(1, 5), workload, POLICIES["fifo"]())


def test_guarantees_of_queues_reach_the_scheduler() -> None:
    """Others hold all four GPUs, two of which are b's own."""
    jobs = [a_job(f"a{n}", n, 50_000, tenant="greedy") for n in range(4)]
    workload = a_workload(*jobs, a_job("b", 3_000, 9_000, 2, tenant="owner"))
    conditions = Conditions(preemption_cost_s=0, tenants_as_queues=True)

    def wait(*queues: Queue) -> float:
        outcome = simulate(alike_nodes(1, 4), workload, POLICIES["yard"](), conditions, queues=queues)
        return outcome.lives[-1].waited_s

    assert wait(Queue("owner", guaranteed=2)) == 0
    assert wait() > 0


def test_the_same_seed_gives_the_same_report() -> None:
    from orchestrator.simulate.generate import Generation, generate

    conditions = Conditions(mtbf_s=20_000, checkpoint_s=600, startup_s=30, seed=5)
    workload = generate(Generation(jobs=150, load=1.1, elastic=0.5), 16, seed=5)

    def run() -> str:
        outcome = simulate(alike_nodes(2, 8), workload, POLICIES["yard"](), conditions, rules=Rules(consolidate=True))
        return json.dumps(report(outcome).as_json() | {"wall_s": 0, "cpu_s": 0})

    assert run() == run()


def overlaps(outcome: Outcome) -> Counter[tuple[str, int]]:
    """GPUs that two attempts held at one time."""
    held: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for life in outcome.lives:
        for one in life.attempts:
            assert one.until is not None
            for share in one.placement.shares:
                for gpu in share.gpus:
                    held.setdefault((share.node, gpu), []).append((one.since, one.until))
    twice: Counter[tuple[str, int]] = Counter()
    for gpu, times in held.items():
        twice[gpu] += sum(one[1] > two[0] for one, two in pairwise(sorted(times)))
    return +twice


jobs_drawn = st.lists(
    st.tuples(st.integers(0, 3_000), st.integers(1, 4_000), st.sampled_from([1, 1, 2, 3, 4, 8]), st.booleans()),
    min_size=1,
    max_size=25,
)


@given(
    drawn=jobs_drawn,
    policy=st.sampled_from(sorted(POLICIES)),
    consolidate=st.booleans(),
    mtbf=st.sampled_from([None, 5_000.0]),
    startup=st.sampled_from([0.0, 15.0]),
)
@settings(max_examples=60, deadline=None)
def test_every_policy_runs_all_work_and_no_gpu_twice(
    drawn: Sequence[tuple[int, int, int, bool]], policy: str, consolidate: bool, mtbf: float | None, startup: float
) -> None:
    jobs = [
        a_job(
            f"j{n}", at, length, gpus, tenant=f"t{n % 3}", **({"min_gpus": gpus // 2, "max_gpus": gpus} if wide else {})
        )
        for n, (at, length, gpus, elastic) in enumerate(sorted(drawn))
        for wide in (elastic and gpus > 1,)
    ]
    conditions = Conditions(
        preemption_cost_s=20, startup_s=startup, mtbf_s=mtbf, repair_s=300, checkpoint_s=200, seed=1
    )
    rules = Rules(consolidate=consolidate)
    outcome = simulate(alike_nodes(2, 4), a_workload(*jobs), POLICIES[policy](), conditions, rules=rules)
    assert not overlaps(outcome)
    for life in outcome.lives:
        assert life.state is JobState.SUCCEEDED
        assert life.done_at is not None
        assert life.waited_s >= 0
        held = sum(one.until - one.since for one in life.attempts if one.until is not None)
        assert life.waited_s + held == pytest.approx(life.done_at - life.job.submit_s)
        if not (life.failures or life.resizes) and life.job.least == life.job.num_gpus:
            extra = 20 * life.preemptions
            worked = sum(one.worked_s(one.until) for one in life.attempts if one.until is not None)
            assert worked == pytest.approx(life.job.duration_s + extra)
    used = sum(
        one.processes * (one.until - one.since)
        for life in outcome.lives for one in life.attempts if one.until is not None
    )  # fmt: skip
    assert outcome.meter.used_s == pytest.approx(used)
    assert outcome.meter.used_s + outcome.meter.idle_s <= outcome.meter.all_s + 1e-6
    assert outcome.meter.stranded_s <= outcome.meter.idle_s + 1e-6
