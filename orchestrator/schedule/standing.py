"""What running gangs are to those that wait: who would stop first, how much could, and when each ends. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass

from orchestrator.cluster.model import Placement
from orchestrator.schedule.dues import Dues
from orchestrator.schedule.gang import Held, Rules
from orchestrator.schedule.history import GRID, History, class_at

End = tuple[float, float, str, Placement]
"""When a gang is expected to leave its slots, when it took them, its job, and the slots."""


@dataclass(slots=True)
class _Known:
    held: Held
    level: int
    end: End | None = None
    for_class: bool = False
    for_level: bool = False


class Standing:
    """Kept in step with the gangs that run by small changes, and with the clock by `refresh`."""

    def __init__(self, rules: Rules, history: History) -> None:
        self.ranks: dict[tuple[int, int], dict[str, dict[str, Held]]] = {}
        """Gangs that can be told to stop, by class and by level turned round, then by queue: the first go first."""
        self.elastic: dict[str, Held] = {}
        """Those of them that could run with another number of ranks."""
        self.for_class: Counter[int] = Counter()
        """Ranks, by class, that ran long enough to stop for a higher one, or for a guarantee."""
        self.for_level: dict[int, dict[str, Counter[int]]] = {}
        """Ranks, by class, queue and level, that may stop for what is expected to take less long."""
        self.ends: list[End] = []
        """Of gangs that were not told to stop, in order. May be past; math.inf where nobody knows."""
        self.ripens = Dues()
        """When gangs may be stopped that may not yet."""
        self._rules = rules
        self._history = history
        self._expected_until = Dues()
        self._known: dict[str, _Known] = {}

    def add(self, held: Held, level: int, now: float) -> None:
        gang = held.gang
        known = self._known[gang.job_id] = _Known(held, level)
        if held.can_stop:
            queues = self.ranks.setdefault((gang.priority, -level), {})
            queues.setdefault(gang.queue, {})[gang.job_id] = held
            if gang.elastic:
                self.elastic[gang.job_id] = held
            self._ripen(known, now)
        if not held.stopping:
            self._expect(known, now)

    def remove(self, job_id: str) -> None:
        known = self._known.pop(job_id, None)
        if known is None:
            return
        held = known.held
        if held.can_stop:
            rank = held.gang.priority, -known.level
            queues = self.ranks[rank]
            del queues[held.gang.queue][job_id]
            if not queues[held.gang.queue]:
                del queues[held.gang.queue]
                if not queues:
                    del self.ranks[rank]
            self.elastic.pop(job_id, None)
            self._unripen(known)
        if known.end is not None:
            self._forget_end(known.end)
        self.ripens.drop(job_id)
        self._expected_until.drop(job_id)

    def refresh(self, now: float) -> None:
        for job_id in self.ripens.pop(now):
            self._unripen(self._known[job_id])
            self._ripen(self._known[job_id], now)
        for job_id in self._expected_until.pop(now):
            self._expect(self._known[job_id], now)

    def _ripen(self, known: _Known, now: float) -> None:
        held, rules = known.held, self._rules
        gang = held.gang
        at_class, at_level = held.since + rules.min_run_for_class_s, held.since + rules.min_run_s
        known.for_class = now >= at_class
        known.for_level = now >= at_level and gang.evictions < rules.max_evictions
        if known.for_class:
            self.for_class[gang.priority] += held.processes
        if known.for_level:
            levels = self.for_level.setdefault(gang.priority, {}).setdefault(gang.queue, Counter())
            levels[known.level] += held.processes
        self.ripens.set(gang.job_id, min((at for at in (at_class, at_level) if at > now), default=math.inf))

    def _unripen(self, known: _Known) -> None:
        gang, processes = known.held.gang, known.held.processes
        if known.for_class:
            self.for_class[gang.priority] -= processes
        if known.for_level:
            self.for_level[gang.priority][gang.queue][known.level] -= processes

    def _expect(self, known: _Known, now: float) -> None:
        """By the class of its run time, so that it is the same at any time."""
        held, history = known.held, self._history
        gang = held.gang
        end = held.since + gang.left_s if gang.left_s is not None else math.inf
        if gang.oracle_s is not None:
            end = min(end, held.since + gang.oracle_s - gang.ran_s)
        else:
            began = held.since - gang.ran_s
            at = class_at(began, now)
            left = history.median_left_s(gang, at)
            if left is not None:
                end = min(end, began + GRID[at] + left)
            self._expected_until.set(gang.job_id, began + GRID[at + 1] if at + 1 < len(GRID) else math.inf)
        if known.end is None or known.end[0] != end:
            if known.end is not None:
                self._forget_end(known.end)
            known.end = (end, held.since, gang.job_id, held.placement)
            insort(self.ends, known.end)

    def _forget_end(self, end: End) -> None:
        at = bisect_left(self.ends, end)  # placements are never compared: ids differ
        assert self.ends[at] is end
        del self.ends[at]
