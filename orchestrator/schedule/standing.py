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
Ripe = tuple[bool, bool, int]
"""Whether gangs ran long enough to stop for a higher class or a guarantee, and for less work; and how many ranks."""
Loss = tuple[float, str, Held]
"""A gang, by since when nothing holds what it has done, turned round."""


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
        self.ranks: dict[tuple[int, int], dict[Ripe, list[Loss]]] = {}
        """Gangs that may be told to stop, by class and by level turned round: the first go first. In each by size, in
        the order of what they would lose: of one size that is the same at any time."""
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
        if known.for_class or known.for_level:
            ripe = known.for_class, known.for_level, held.processes
            alike = self.ranks.setdefault((gang.priority, -known.level), {}).setdefault(ripe, [])
            insort(alike, (-held.safe_at, gang.job_id, held))
        if known.for_level:
            levels = self.for_level.setdefault(gang.priority, {}).setdefault(gang.queue, Counter())
            levels[known.level] += held.processes
        self.ripens.set(gang.job_id, min((at for at in (at_class, at_level) if at > now), default=math.inf))

    def _unripen(self, known: _Known) -> None:
        gang, held = known.held.gang, known.held
        if known.for_class:
            self.for_class[gang.priority] -= held.processes
        if known.for_level:
            self.for_level[gang.priority][gang.queue][known.level] -= held.processes
        if known.for_class or known.for_level:
            rank, ripe = (gang.priority, -known.level), (known.for_class, known.for_level, held.processes)
            alike = self.ranks[rank][ripe]
            del alike[bisect_left(alike, (-held.safe_at, gang.job_id))]
            if not alike:
                del self.ranks[rank][ripe]
                if not self.ranks[rank]:
                    del self.ranks[rank]

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
