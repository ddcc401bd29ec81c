"""Policies of other schedulers that pre-empt, to compare with."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from orchestrator.cluster.capacity import Capacity
from orchestrator.schedule.gang import Decisions, Gang, Held, Stop, Why
from orchestrator.schedule.yard import Yard
from orchestrator.simulate.policy import Packing, Policy

Entry = TypeVar("Entry", tuple[int, str, int], tuple[float, int, str, int])
"""A job in a sorted line."""


class ByCount(Policy):
    """Pre-emptive: GPUs are handed out by count in an order over all jobs, running and waiting.

    Who is not reached is stopped; who is reached and waits is then placed, which may fail for fragmentation.
    """

    def order(self, now: float, /) -> Iterable[tuple[str, int]]:
        """Jobs, best first, each with its GPUs."""
        raise NotImplementedError

    def shares(self, yard: Yard, now: float) -> Decisions:
        ground = yard.capacity.ground
        left = sum(size * (nodes & ground.open).bit_count() for size, nodes in ground.of_size.items())
        chosen: list[str] = []
        for job_id, gpus in self.order(now):
            if gpus <= left:
                left -= gpus
                chosen.append(job_id)
                if not left:
                    break
        reached = set(chosen)
        stops = tuple(Stop(job_id, Why.SHORTER) for job_id in yard.running if job_id not in reached)
        if stops:
            return Decisions(stops=stops)  # what they leave is handed out when they are gone
        packing = Packing(yard)
        for job_id in chosen:
            gang = yard.waiting.get(job_id)
            if gang is not None and (where := packing.find(gang)):
                packing.start(gang, where)
        return Decisions(tuple(packing.starts))


class ShortestRemaining(ByCount):
    """The shortest remaining time first, by an oracle, whenever something ends or is submitted."""

    name = "srtf"
    oracle = True

    def __init__(self) -> None:
        self.waiting: list[tuple[float, int, str, int]] = []
        self.running: list[tuple[float, int, str, int]] = []
        """By what is left; by the end."""
        self.entries: dict[str, tuple[float, int, str, int]] = {}

    def waits(self, gang: Gang, /) -> None:
        assert gang.oracle_s is not None
        self._enter(self.waiting, gang, gang.oracle_s - gang.ran_s)

    def starts(self, held: Held, /) -> None:
        gang = held.gang
        assert gang.oracle_s is not None
        _remove(self.waiting, self.entries[gang.job_id])
        self._enter(self.running, gang, held.since + gang.oracle_s - gang.ran_s)

    def stops(self, held: Held, _now: float, _done: bool, /) -> None:
        _remove(self.running, self.entries.pop(held.gang.job_id))

    def _enter(self, line: list[tuple[float, int, str, int]], gang: Gang, key: float) -> None:
        entry = self.entries[gang.job_id] = (key, gang.sequence, gang.job_id, gang.min_processes)
        insort(line, entry)

    def decide(self, yard: Yard, now: float, /) -> Decisions:
        return self.shares(yard, now)

    def order(self, now: float, /) -> Iterable[tuple[str, int]]:
        running = ((end - now, sequence, job_id, gpus) for end, sequence, job_id, gpus in self.running)
        for _, _, job_id, gpus in heapq.merge(running, self.waiting):
            yield job_id, gpus


class Tiresias(ByCount):
    """Two-dimensional least attained service, discretised (Gu et al., NSDI 2019), by the rules of Lucid's simulator.

    Every 60 s: two classes, by whether a job has had more than 18,000 GPU-seconds; first come, first served in each.
    That simulator lets a pre-emption cost 40 s of work for gangs up to 8 GPUs and 60 s for larger ones; here it costs
    what it costs every policy. With 60 s for all, philly-oct gives 11,813 s and 4,005 pre-emptions, with its rule
    11,690 s and 3,958; it published 11,888 s and 3,978.
    """

    name = "tiresias"

    def __init__(self, round_s: float = 60.0, threshold: float = 18_000.0) -> None:
        self.round_s = round_s
        self.threshold = threshold
        self.classes: tuple[list[tuple[int, str, int]], list[tuple[int, str, int]]] = ([], [])
        self.crossings: list[tuple[float, int, str, int]] = []
        """When running jobs of the first class will have had their share."""
        self.capacity: Capacity | None = None
        self.dirty = True
        """Whether the next round may decide otherwise than the last."""

    def waits(self, gang: Gang, /) -> None:
        entry = (gang.sequence, gang.job_id, gang.min_processes)
        insort(self.classes[gang.ran_s * gang.min_processes > self.threshold], entry)
        self.dirty = True

    def starts(self, held: Held, /) -> None:
        gang = held.gang
        if gang.ran_s * held.processes <= self.threshold:
            at = held.since + self.threshold / held.processes - gang.ran_s
            heapq.heappush(self.crossings, (at, gang.sequence, gang.job_id, held.processes))

    def stops(self, held: Held, _now: float, _done: bool, /) -> None:
        gang = held.gang
        entry = (gang.sequence, gang.job_id, held.processes)
        if not _remove(self.classes[0], entry):
            _remove(self.classes[1], entry)
        self.dirty = True

    def decide(self, yard: Yard, now: float, /) -> Decisions:
        if yard.capacity is not self.capacity:
            self.capacity, self.dirty = yard.capacity, True
        begins = now % self.round_s == 0
        if begins:
            self._sink(yard, now)
        decided = Decisions()
        if begins and self.dirty:
            decided = self.shares(yard, now)
            self.dirty = bool(decided.stops)
        # It is told of starts after this: the next round finds out when those will have had their share.
        if self.dirty or decided.starts:
            return replace(decided, next_at=self._after(now) if yard.waiting else None)
        return replace(decided, next_at=self._next(yard, now))

    def _next(self, yard: Yard, now: float) -> float | None:
        """The first round in which a job sinks."""
        if not yard.waiting:
            return None
        return max(self._after(self.crossings[0][0]), self._after(now)) if self.crossings else None

    def _after(self, at: float) -> float:
        return (math.floor(at / self.round_s) + 1) * self.round_s

    def _sink(self, yard: Yard, now: float) -> None:
        while self.crossings and self.crossings[0][0] < now:
            _, sequence, job_id, gpus = heapq.heappop(self.crossings)
            held = yard.running.get(job_id)
            entry = (sequence, job_id, gpus)
            # It may have been stopped meanwhile, and run again since.
            if held is None or (held.gang.ran_s + now - held.since) * gpus <= self.threshold:
                continue
            if _remove(self.classes[0], entry):
                insort(self.classes[1], entry)
                self.dirty = True

    def order(self, _now: float, /) -> Iterable[tuple[str, int]]:
        for line in self.classes:
            for _, job_id, gpus in line:
                yield job_id, gpus


def _remove(entries: list[Entry], entry: Entry) -> bool:
    """Whether it was there."""
    at = bisect_left(entries, entry)
    if at == len(entries) or entries[at] != entry:
        return False
    del entries[at]
    return True
