"""In which order the waiting gangs of one class are looked at. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import NamedTuple

from orchestrator.schedule.gang import Gang, Queue
from orchestrator.schedule.order import AT_ONCE, Entry, Shape, share_of
from orchestrator.schedule.yard import Yard

_Head = tuple[Entry, int, Shape]
"""The best of its line, and where in it. No two entries are equal, so shapes, which have no order, are not compared."""
_Order = tuple[bool, tuple[bool, float], str]


class Turn(NamedTuple):
    """A gang that is looked at."""

    gang: Gang
    queue: Queue
    level: int
    shape: Shape
    modest: bool
    """While other queues ask for what is their own, an elastic gang takes no more than what is its queue's own."""


class Turns:
    """Queues by share, the least first; in a queue the best entry of all its shapes that are not stuck.

    Before all of them those that were stopped to go on at once, so that nobody takes what was left to them.
    """

    def __init__(self, yard: Yard, queues: Mapping[str, Mapping[Shape, list[Entry]]], held: Mapping[str, int]) -> None:
        self._waiting = yard.waiting
        self._held = held
        """Ranks by queue, which change as gangs start."""
        self._lines = {name: _heads(shapes) for name, shapes in queues.items()}
        self._queues = {name: yard.queue(name) for name in queues}
        self._entries = queues
        self._order = [self._of(name) for name in self._lines]
        heapq.heapify(self._order)
        self._own = sum(not share[0] for _, share, _ in self._order)
        """Queues that ask for what is their own."""

    def next(self) -> Turn | None:
        """Who is looked at now; `went` tells what came of it, before the next."""
        if not self._order:
            return None
        later, share, name = self._order[0]
        entry, _, shape = self._lines[name][0]
        modest = self._own > 1 and later and not share[0]
        return Turn(self._waiting[entry[2]], self._queues[name], entry[0], shape, modest)

    def went(self, *, on: bool) -> None:
        """Whether what is behind it in its line is looked at: it fits no better."""
        place = self._order[0]
        name = place[2]
        line = self._lines[name]
        if on:
            _, at, shape = line[0]
            entries = self._entries[name][shape]
            if at + 1 < len(entries):
                heapq.heapreplace(line, (entries[at + 1], at + 1, shape))
            else:
                heapq.heappop(line)
        else:
            heapq.heappop(line)
        if not line:
            heapq.heappop(self._order)
            self._own -= not place[1][0]
            return
        order = self._of(name)
        if order != place:
            heapq.heapreplace(self._order, order)
            self._own += place[1][0] - order[1][0]

    def _of(self, name: str) -> _Order:
        entry, _, shape = self._lines[name][0]
        return entry[0] != AT_ONCE, share_of(self._queues[name], self._held[name], shape[0]), name


def _heads(shapes: Mapping[Shape, list[Entry]]) -> list[_Head]:
    heads = [(entries[0], 0, shape) for shape, entries in shapes.items()]
    heapq.heapify(heads)
    return heads
