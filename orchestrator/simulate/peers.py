"""Policies of other schedulers, to compare with: those that decide once. See also easy and preemptive.

All share yard, placement and costs with ours, and differ in decisions. They know neither queues nor classes of
priority, and run every gang on its num_gpus.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Mapping

from orchestrator.schedule.gang import Decisions, Gang, Held
from orchestrator.schedule.yard import Yard
from orchestrator.simulate.easy import Easy, EasyStrict
from orchestrator.simulate.policy import Packing, Policy, Production
from orchestrator.simulate.preemptive import ShortestRemaining, Tiresias


class InOrder(Policy):
    """One queue in a fixed order, no pre-emption: the first blocks all others until it fits."""

    def __init__(self) -> None:
        self.queue: list[tuple[float, int, str]] = []

    def rank(self, gang: Gang) -> float:
        """The least goes first; ties go by submission."""
        raise NotImplementedError

    def waits(self, gang: Gang, /) -> None:
        heapq.heappush(self.queue, (self.rank(gang), gang.sequence, gang.job_id))

    def decide(self, yard: Yard, _now: float, /) -> Decisions:
        packing = None
        while self.queue:
            gang = yard.waiting[self.queue[0][2]]
            packing = packing or Packing(yard)
            where = packing.find(gang)
            if not where:
                break
            heapq.heappop(self.queue)
            packing.start(gang, where)
        return Decisions(tuple(packing.starts)) if packing else Decisions()


class Fifo(InOrder):
    """First come, first served."""

    name = "fifo"

    def rank(self, gang: Gang) -> float:
        return gang.sequence


class ShortestFirst(InOrder):
    """The shortest job first, by an oracle."""

    name = "sjf"
    oracle = True

    def rank(self, gang: Gang) -> float:
        assert gang.oracle_s is not None
        return gang.oracle_s - gang.ran_s


class Quasi(InOrder):
    """Quasi-shortest service first (Hu et al., Helios, SC 2021): by GPU-seconds, predicted when a job is submitted.

    Their model is replaced by what is at hand here: the mean run time of the tenant's ended jobs of that size, or of
    all its jobs, or of everybody's.
    """

    name = "qssf"

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[object, tuple[int, float]] = defaultdict(lambda: (0, 0.0))

    def rank(self, gang: Gang) -> float:
        for key in ((gang.name, gang.min_processes), gang.name, None):
            jobs, ran_s = self.seen[key]
            if jobs:
                return ran_s / jobs * gang.min_processes
        return 0.0

    def stops(self, held: Held, now: float, done: bool, /) -> None:
        if done:
            gang = held.gang
            for key in ((gang.name, gang.min_processes), gang.name, None):
                jobs, ran_s = self.seen[key]
                self.seen[key] = jobs + 1, ran_s + gang.ran_s + now - held.since


class FirstFit(Policy):
    """In order of submission, each that fits: large gangs may starve."""

    name = "first-fit"

    def __init__(self) -> None:
        self.lines: dict[int, list[tuple[int, str]]] = defaultdict(list)
        """By size: where one does not fit, none behind it does."""

    def waits(self, gang: Gang, /) -> None:
        heapq.heappush(self.lines[gang.min_processes], (gang.sequence, gang.job_id))

    def decide(self, yard: Yard, _now: float, /) -> Decisions:
        packing = Packing(yard)
        heads = [(*line[0], size) for size, line in self.lines.items() if line and size <= packing.free]
        heapq.heapify(heads)
        while heads:
            _, job_id, size = heads[0]
            gang = yard.waiting[job_id]
            where = packing.find(gang)
            if where:
                packing.start(gang, where)
                heapq.heappop(self.lines[size])
            if where and self.lines[size]:
                heapq.heapreplace(heads, (*self.lines[size][0], size))
            else:
                heapq.heappop(heads)
        return Decisions(tuple(packing.starts))


POLICIES: Mapping[str, Callable[[], Policy]] = {
    "yard": Production,
    "fifo": Fifo,
    "first-fit": FirstFit,
    "easy": Easy,
    "easy-strict": EasyStrict,
    "sjf": ShortestFirst,
    "srtf": ShortestRemaining,
    "qssf": Quasi,
    "tiresias": Tiresias,
}
