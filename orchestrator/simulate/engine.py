"""The simulation: the production yard, decisions and states, with a virtual clock in place of time and of ranks."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.cluster.capacity import Capacity
from orchestrator.cluster.model import Node
from orchestrator.schedule.gang import Decisions, Gang, Held, Queue, Rules, Start, Stop, Why
from orchestrator.schedule.history import Ran
from orchestrator.schedule.yard import Yard
from orchestrator.simulate.clock import Clock, Happening, Kind
from orchestrator.simulate.conditions import Conditions, accelerator_of, number_of
from orchestrator.simulate.errors import StuckError, UnsettledError
from orchestrator.simulate.life import Life
from orchestrator.simulate.meter import Meter
from orchestrator.simulate.policy import Forecast, Policy
from orchestrator.simulate.workload import Workload, check_fits

MOST_ROUNDS = 100
"""At one instant a policy is asked again after every stop, or start; so often, and twice for every gang that runs."""
MOST_IDLE = 1000
"""A policy that starts nothing on an idle cluster is asked again so often, if it wants."""
MOST_FAILURES = 1000
"""A job that loses its work so often is not going to end."""


@dataclass(frozen=True)
class Told:
    """A forecast that was made, and when the job then started."""

    job_id: str
    at: float
    low: float
    expected: float
    high: float


@dataclass
class Outcome:
    """All that happened."""

    policy: str
    nodes: tuple[Node, ...]
    slots: int
    lives: list[Life]
    meter: Meter
    decisions: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    preemption_gpu_s: float = 0.0
    failure_gpu_s: float = 0.0
    startup_gpu_s: float = 0.0
    told: list[Told] = field(default_factory=list)
    untold: int = 0
    """Forecasts that were asked for, of which nothing could be said."""


def simulate(
    nodes: Sequence[Node],
    workload: Workload,
    policy: Policy,
    conditions: Conditions | None = None,
    *,
    rules: Rules | None = None,
    queues: Iterable[Queue] = (),
    forecast: Forecast | None = None,
) -> Outcome:
    """Run all of `workload` on `nodes` as `policy` decides.

    Raises:
        ImpossibleGangError: a job that would wait for ever.
        UnsettledError, StuckError: the policy makes no progress.
        IllegalTransitionError: it asks for what a job's state does not allow.
    """
    return _Engine(nodes, workload, policy, conditions or Conditions(), rules or Rules(), queues, forecast).run()


class _Engine:
    def __init__(
        self,
        nodes: Sequence[Node],
        workload: Workload,
        policy: Policy,
        conditions: Conditions,
        rules: Rules,
        queues: Iterable[Queue],
        forecast: Forecast | None,
    ) -> None:
        self.policy = policy
        self.conditions = conditions
        self.forecast = forecast
        self.nodes = tuple(nodes)
        self.down: Counter[int] = Counter()
        self.yard = Yard(nodes, queues=queues, rules=rules)
        self.accelerator = accelerator_of(nodes)
        check_fits(workload, self.yard.idle, self.accelerator, consolidate=rules.consolidate, elastic=policy.elastic)
        self.slots = self._slots(self.yard.capacity)
        self.clock = Clock()
        self.jobs = workload.jobs
        self.lives = [Life(job) for job in self.jobs]
        self.numbers = {job.job_id: number for number, job in enumerate(self.jobs)}
        self.to_come = len(self.jobs)
        self.unfinished = len(self.jobs)
        self.used = 0
        self.idle = 0
        """Decisions since anything ran, or was still to come."""
        self.draws = [random.Random(f"{conditions.seed}:{node.id}") for node in self.nodes]
        self.fresh: list[str] = []
        """Submitted at this instant."""
        self.waited = 0
        begin = self.jobs[0].submit_s
        self.outcome = Outcome(policy.name, self.nodes, self.yard.capacity.total(self.slots), self.lives, Meter(begin))
        for number, job in enumerate(self.jobs):
            self.clock.at(job.submit_s, Kind.SUBMIT, number)
        for number in range(len(self.nodes)):
            self._fails_next(number, begin)
        for index, failure in enumerate(conditions.failures):
            failing = number_of(failure, self.nodes)
            assert failing is not None, failure
            self.clock.at(begin + failure.at_s, Kind.FAIL, failing, 1 + index)

    def run(self) -> Outcome:
        began, computed = time.perf_counter(), time.process_time()
        clock, meter = self.clock, self.outcome.meter
        wake = math.inf
        while self.unfinished:
            now = min(clock.next_at, wake)
            if not math.isfinite(now):
                raise self._stuck()
            meter.pass_to(now)
            due = now >= wake
            self.fresh = []
            for happening in clock.forward(now):
                due |= self._happens(happening)
            if due:
                wake = self._settle(now)
                meter.read(self.yard.capacity, self.slots, self.used, len(self.yard.waiting), len(self.yard.running))
                if self.forecast is not None and self.fresh:
                    self._foretell(now)
        self.outcome.wall_s = time.perf_counter() - began
        self.outcome.cpu_s = time.process_time() - computed
        return self.outcome

    # What happens.

    def _happens(self, one: Happening) -> bool:
        """Whether the policy is to be asked."""
        if one.kind is Kind.SUBMIT:
            self.to_come -= 1
            self._wait(self._gang(one.number))
            self.fresh.append(self.jobs[one.number].job_id)
            return True
        if one.kind is Kind.FAIL or one.kind is Kind.RETURN:
            self._node(one.number, one.at, one.attempt, back=one.kind is Kind.RETURN)
            return True
        life = self.lives[one.number]
        attempt = life.attempt
        if attempt is None or attempt.number != one.attempt:
            return False  # that attempt was stopped, or lost
        if one.kind is Kind.END:
            self._end(life, one.at)
            return True
        if one.kind is Kind.RUNNING:
            life.runs()
            return False
        assert one.kind is Kind.SAVED
        attempt.saved_at = one.at
        self.yard.hold(replace(self.yard.running[life.job.job_id], saved_at=one.at))
        self._saves_next(one.number, attempt.number, one.at)
        return False

    def _gang(self, number: int) -> Gang:
        job = self.jobs[number]
        elastic = self.policy.elastic
        return Gang(
            job.job_id,
            number,
            job.priority,
            job.least if elastic else job.num_gpus,
            job.most if elastic else job.num_gpus,
            self.accelerator,
            queue=job.tenant if self.conditions.tenants_as_queues else "default",
            name=job.name or job.tenant,
            queued_at=job.submit_s,
            oracle_s=job.duration_s if self.conditions.oracle or self.policy.oracle else None,
        )

    def _wait(self, gang: Gang) -> None:
        self.yard.wait(gang)
        self.policy.waits(gang)

    def _end(self, life: Life, now: float) -> None:
        held = self._release(life, now, done=True)
        life.end(now)
        self.unfinished -= 1
        gang = held.gang
        self.yard.history.add(Ran(gang.queue, gang.name, gang.min_processes, gang.ran_s + (now - held.since)))

    def _release(self, life: Life, now: float, *, done: bool = False) -> Held:
        held = self.yard.release(life.job.job_id)
        self.used -= held.processes
        self.policy.stops(held, now, done)
        return held

    def _fails_next(self, number: int, now: float) -> None:
        if self.conditions.mtbf_s is not None:
            self.clock.at(now + self.draws[number].expovariate(1 / self.conditions.mtbf_s), Kind.FAIL, number)

    def _saves_next(self, number: int, attempt: int, saved_at: float) -> None:
        if self.conditions.checkpoint_s is not None:
            self.clock.at(saved_at + self.conditions.checkpoint_s, Kind.SAVED, number, attempt)

    def _node(self, number: int, now: float, known: int, *, back: bool) -> None:
        """`known` is 0 for a failure that was drawn, else that of the conditions, from 1."""
        if back:
            self.down[number] -= 1
            if not known:
                self._fails_next(number, now)
        else:
            self.down[number] += 1
            own_s = self.conditions.failures[known - 1].repair_s if known else None
            self.clock.at(now + (self.conditions.repair_s if own_s is None else own_s), Kind.RETURN, number, known)
            gone = self.nodes[number].id
            for held in tuple(self.yard.running.values()):
                if any(share.node == gone for share in held.placement.shares):
                    self._lose(held, now)
        self.yard.set_nodes(node for index, node in enumerate(self.nodes) if not self.down[index])
        self.slots = self._slots(self.yard.capacity)

    def _lose(self, held: Held, now: float) -> None:
        life = self.lives[self.numbers[held.gang.job_id]]
        self._release(life, now)
        assert life.attempt is not None
        # Start-up is counted as such, once.
        vain = life.fail(now)
        self.outcome.failure_gpu_s += vain * held.processes
        if life.failures >= MOST_FAILURES:
            raise StuckError(
                f"job {life.job.job_id} lost its node {life.failures} times and is not done: "
                f"it runs for {life.job.duration_s:g} s, and a node fails every {self.conditions.mtbf_s:g} s",
                hint="let jobs commit more often (--checkpoint-every), or let nodes fail less (--mtbf)",
            )
        self._requeue(life, held, now)

    def _requeue(self, life: Life, held: Held, now: float, stop: Stop | None = None) -> None:
        gang = held.gang
        ran_s = gang.ran_s + (now - held.since)
        preempted = stop is not None and stop.target is None and stop.why is not Why.DRAINED
        self._wait(
            replace(
                gang,
                queued_at=now,
                ran_s=ran_s,
                evictions=gang.evictions + preempted,
                target=stop.target if stop is not None else None,
                oracle_s=None if gang.oracle_s is None else ran_s + life.left_s,
            )
        )

    # What is decided.

    def _settle(self, now: float) -> float:
        """Ask the policy until it does nothing more. Returns when it wants to be asked again."""
        for _ in range(MOST_ROUNDS + 2 * len(self.yard.running)):
            self.outcome.decisions += 1
            decided = self.policy.decide(self.yard, now)
            for stop in decided.stops:
                self._stop(stop, now)
            for start in decided.starts:
                self._start(start, now)
            if not decided.stops and not (decided.starts and self.policy.looks_again):
                return self._wake(decided, now)
        raise UnsettledError(
            f"the policy {self.policy.name} still stops jobs after {MOST_ROUNDS} decisions at {now:g} s: "
            + ", ".join(f"{stop.job_id} ({stop.why})" for stop in decided.stops[:5]),
            hint="please report this with the trace",
        )

    def _wake(self, decided: Decisions, now: float) -> float:
        idle = self.yard.waiting and not (self.yard.running or self.to_come or self.down.total())
        self.idle = self.idle + 1 if idle else 0
        if self.idle > MOST_IDLE or (idle and decided.next_at is None):
            raise self._stuck(decided)
        if decided.next_at is None:
            return math.inf
        if decided.next_at <= now:
            raise UnsettledError(
                f"the policy {self.policy.name} wants to be asked at {decided.next_at} s, and it is {now} s",
                hint="please report this with the trace",
            )
        return decided.next_at

    def _stop(self, stop: Stop, now: float) -> None:
        life = self.lives[self.numbers[stop.job_id]]
        cost = self.conditions.preemption_cost_s
        life.stop(now, cost)
        held = self._release(life, now)
        if stop.target is None:
            life.preemptions += 1
        else:
            life.resizes += 1
        self.outcome.preemption_gpu_s += cost * life.job.num_gpus
        self._requeue(life, held, now, stop)

    def _start(self, start: Start, now: float) -> None:
        number = self.numbers[start.job_id]
        life = self.lives[number]
        processes = start.placement.world_size
        speed = self.conditions.speed(processes, life.job.num_gpus)
        attempt = life.start(now, start.placement, speed, self.conditions.startup_s)
        waiting = self.yard.waiting[start.job_id]
        lasts_s = self.conditions.startup_s + life.left_s / speed
        gang = replace(
            waiting,
            waited_s=waiting.waited_s + (now - waiting.queued_at),
            target=None,
            oracle_s=None if waiting.oracle_s is None else waiting.ran_s + lasts_s,
        )
        held = Held(gang, start.placement, now)
        self.yard.hold(held)
        self.used += processes
        self.policy.starts(held)
        self.outcome.startup_gpu_s += self.conditions.startup_s * processes
        if self.conditions.startup_s:
            self.clock.at(attempt.works_from, Kind.RUNNING, number, attempt.number)
        self.clock.at(now + lasts_s, Kind.END, number, attempt.number)
        self._saves_next(number, attempt.number, attempt.works_from)

    def _foretell(self, now: float) -> None:
        """Ask for the starts of some of those that were submitted and wait."""
        assert self.forecast is not None
        for job_id in self.fresh:
            if job_id not in self.yard.waiting:
                continue
            self.waited += 1
            if (self.waited - 1) % self.conditions.forecast_every:
                continue
            eta = self.forecast(self.yard, now, [job_id]).get(job_id)
            if eta is None or not math.isfinite(eta.expected):
                self.outcome.untold += 1
            else:
                self.outcome.told.append(Told(job_id, now, eta.low, eta.expected, eta.high))

    def _slots(self, capacity: Capacity) -> int:
        """The nodes that jobs may use, as a mask."""
        ground = capacity.ground
        return ground.taking("cuda", self.accelerator) | ground.taking("cpu", self.accelerator)

    def _stuck(self, decided: Decisions | None = None) -> StuckError:
        waiting = list(self.yard.waiting)
        why = {wait.job_id: wait.reason.sentence for wait in decided.waits} if decided is not None else {}
        told = next((f" ({why[job_id]})" for job_id in waiting if job_id in why), "")
        return StuckError(
            f"{len(waiting)} jobs wait for ever on an idle cluster under {self.policy.name}: "
            f"{', '.join(waiting[:5])}{told}",
            hint="see the ceilings of --queues, and guarantees that are not lent",
        )
