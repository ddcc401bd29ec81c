"""How long jobs run, learned from those that have ended: of their queue and size, and of all. Causal, and pure.

The order of the queue follows Gittins' index (Gittins, Bandit Processes and Dynamic Allocation Indices, 1979): of a
job that has run for a, the least expected run time per completion, over all spans that one might give it next. Of
all orders that do not know how long jobs take, it has the least mean time in the system on one server; with little
history it is least attained service.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, cast

GRID = (0.0, *(30 * 1.6**step for step in range(24)))
"""Seconds of run time at which one class of jobs begins; the last has no end."""
PRIOR = 0.5
"""Weight, in jobs, with which each class is expected before anything is known: any order of magnitude alike."""
SMOOTHING = 30.0
"""Weight, in jobs, of the queue's history beside that of like jobs, and of everybody's beside the queue's."""
FEW = 10
"""Jobs below which a quantile is a guess."""
REMEMBERED = 4096
"""Changes of answers that can be told apart."""

Kind = tuple[str, str, int]
"""Jobs that are alike: of the same queue, name and magnitude of size."""


class Job(Protocol):
    """What tells jobs apart."""

    @property
    def queue(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def min_processes(self) -> int: ...


@dataclass(frozen=True)
class Ran:
    """A job that has ended."""

    queue: str
    name: str
    processes: int
    ran_s: float


class _Table:
    """Jobs by their run time: how many in each class, and how long together."""

    def __init__(self, parent: _Table | None) -> None:
        self.parent = parent
        self.count = [0.0] * len(GRID)
        self.sum = [0.0] * len(GRID)
        self.jobs = 0
        self.due = 1
        self.smooth: tuple[list[float], list[float]]
        self.index: list[float]
        self.memo: dict[Hashable, Any] = {}
        """What others have worked out from these answers."""
        self.conclude()

    def add(self, ran_s: float) -> bool:
        """Whether answers change: each time there are a tenth more."""
        at = bisect_right(GRID, ran_s) - 1
        self.count[at] += 1
        self.sum[at] += ran_s
        self.jobs += 1
        if self.jobs < self.due:
            return False
        self.due = self.jobs + max(5, self.jobs // 10)
        self.conclude()
        return True

    def conclude(self) -> None:
        """What few jobs tell is mixed with what the more general table says."""
        count, total = self.count, self.sum
        if self.parent is None:
            prior = [math.sqrt(max(start, 10.0) * end) for start, end in pairwise(GRID)]
            count = [*(own + PRIOR for own in count[:-1]), count[-1]]
            total = [*(own + PRIOR * typical for own, typical in zip(total, prior, strict=False)), total[-1]]
        else:
            share = SMOOTHING / sum(self.parent.smooth[0])
            count = [own + share * theirs for own, theirs in zip(count, self.parent.smooth[0], strict=True)]
            total = [own + share * theirs for own, theirs in zip(total, self.parent.smooth[1], strict=True)]
        self.smooth = count, total
        self.index = _index(count, total)
        self.memo = {}


class History:
    """What has been seen of run times: of all jobs, of each queue's, and of those of the same name and size there."""

    def __init__(self) -> None:
        self._everybody = _Table(None)
        self._queues: dict[str, _Table] = {}
        self._alike: dict[Kind, _Table] = {}
        self.version = 0
        """Counts changes of answers."""
        self._changes: deque[str | Kind | None] = deque(maxlen=REMEMBERED)
        """Which table each was of: of everybody, of a queue, or of a kind."""

    def add(self, ran: Ran) -> None:
        queue = self._queues.get(ran.queue) or self._queues.setdefault(ran.queue, _Table(self._everybody))
        kind = (ran.queue, ran.name, _magnitude(ran.processes))
        alike = self._alike.get(kind) or self._alike.setdefault(kind, _Table(queue))
        # The general ones first: the special ones draw on them. The first job of a table is a change, too.
        for name, table in ((None, self._everybody), (ran.queue, queue), (kind, alike)):
            if table.add(ran.ran_s):
                self._changes.append(name)
                self.version += 1
        if self._everybody.jobs == FEW:  # from here on quantiles are answered, of all kinds
            self._changes.clear()
            self.version += 1

    def changed(self, version: int, kinds: Collection[Kind]) -> Collection[Kind]:
        """Those of `kinds` for which answers are others than at `version`, or perhaps are."""
        changes = self.version - version
        if changes > len(self._changes):
            return kinds
        names = {self._changes[-1 - back] for back in range(changes)}
        if None not in names and not any(isinstance(name, str) for name in names):
            return [name for name in names if name in kinds]  # type: ignore[misc]
        alike, queues = self._alike, self._queues
        # By the table that answers for the kind.
        return [kind for kind in kinds if (kind if kind in alike else kind[0] if kind[0] in queues else None) in names]

    def expected_s(self, job: Job, ran_s: float) -> float:
        """Seconds per completion, if the job that ran for `ran_s` runs on: Gittins' index, turned over."""
        return self._table(job).index[class_of(ran_s)]

    def memo(self, job: Job) -> tuple[dict[Hashable, Any], list[float]]:
        """Room for what follows from the answers for jobs like this one, which is empty whenever they are others; and
        `expected_s` at the beginning of each class."""
        table = self._table(job)
        return table.memo, table.index

    def median_left_s(self, job: Job, at: int) -> float | None:
        """`left_s` at the beginning of class `at`, as likely more as less."""
        if self._everybody.jobs < FEW:
            return None
        memo = self._table(job).memo
        if ("median", at) not in memo:
            memo["median", at] = self.left_s(job, GRID[at], 0.5)
        return cast("float | None", memo["median", at])

    def left_s(self, job: Job, ran_s: float, quantile: float) -> float | None:
        """What a job that ran for `ran_s` has left, with such a probability at most; None where too few were seen."""
        if self._everybody.jobs < FEW:
            return None
        table = self._table(job)
        if ran_s:
            return _left_s(table, ran_s, quantile)
        if ("left", quantile) not in table.memo:  # that of most who wait
            table.memo["left", quantile] = _left_s(table, ran_s, quantile)
        return cast(float, table.memo["left", quantile])

    def _table(self, job: Job) -> _Table:
        return self._alike.get(kind_of(job)) or self._queues.get(job.queue) or self._everybody


def class_of(ran_s: float) -> int:
    """Which of GRID's classes a run time is in."""
    return bisect_right(GRID, ran_s) - 1


def class_at(began: float, now: float) -> int:
    """The same of a job that runs since `began`: it changes at the very moment `began` + GRID[...], however that
    rounds."""
    at = class_of(max(0.0, now - began))
    if at + 1 < len(GRID) and began + GRID[at + 1] <= now:
        return at + 1
    return at - 1 if at and began + GRID[at] > now else at


def kind_of(job: Job) -> Kind:
    return job.queue, job.name, _magnitude(job.min_processes)


def _magnitude(processes: int) -> int:
    return (processes - 1).bit_length()


def _index(count: list[float], total: list[float]) -> list[float]:
    """For each class, the least of (time spent) / (jobs done) over spans that end with a later class."""
    last = len(GRID) - 1
    index = []
    for at in range(len(GRID)):
        alive = sum(count[at:])
        start, done, spent, best = GRID[at], 0.0, 0.0, math.inf
        for end in range(at, last):
            done += count[end]
            spent += total[end] - count[end] * start
            alive -= count[end]
            if done:
                best = min(best, (spent + max(alive, 0.0) * (GRID[end + 1] - start)) / done)
        # Past everything that was seen: as long again as it ran already.
        index.append(best if math.isfinite(best) else max(start, GRID[1]))
    return index


def _left_s(table: _Table, ran_s: float, quantile: float) -> float:
    count, total = table.smooth
    at = class_of(ran_s)
    upper = GRID[at + 1] if at + 1 < len(GRID) else max(2 * ran_s, GRID[-1])
    # Of its own class, those that took longer than it has already.
    here = count[at] * (upper - ran_s) / (upper - GRID[at])
    wanted = quantile * (here + sum(count[at + 1 :]))
    if wanted <= here:
        return (upper - ran_s) * (wanted / here if here else 1.0)
    seen = here
    for later in range(at + 1, len(GRID)):
        if seen + count[later] >= wanted and count[later]:
            start = GRID[later]
            end = GRID[later + 1] if later + 1 < len(GRID) else 2 * total[later] / count[later] - start
            return start + (end - start) * (wanted - seen) / count[later] - ran_s
        seen += count[later]
    return GRID[-1] - ran_s if ran_s < GRID[-1] else ran_s
