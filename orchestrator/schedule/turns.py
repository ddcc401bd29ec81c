"""In which order the waiting gangs of one class are looked at. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import NamedTuple

from orchestrator.schedule.gang import Gang
from orchestrator.schedule.order import AT_ONCE, Entry, Shape, share_of
from orchestrator.schedule.yard import Yard

_Head = tuple[Entry, int, Shape]
"""The best of its line, and where in it. No two entries are equal, so shapes, which have no order, are not compared."""
_Order = tuple[bool, tuple[bool, float], str]


class Turn(NamedTuple):
    """A gang that is looked at."""

    gang: Gang
    level: int
    shape: Shape
    modest: bool
    """While other queues ask for what is their own, an elastic gang takes no more than what is its queue's own."""


class Turns:
    """Queues by share, the least first; in a queue the best entry of all its shapes that are not stuck.

    Before all of them those that were stopped to go on at once, so that nobody takes what was left to them.
    """

    def __init__(self, yard: Yard, queues: Mapping[str, Mapping[Shape, list[Entry]]], held: Mapping[str, int]) -> None:
        self._yard = yard
        self._held = held
        """Ranks by queue, which change as gangs start."""
        self._queues = queues
        self._heads = {name: _heads(shapes) for name, shapes in queues.items()}
        self._order = [self._of(name) for name in self._heads]
        heapq.heapify(self._order)
        self._own = sum(not share[0] for _, share, _ in self._order)
        """Queues that ask for what is their own."""

    def next(self) -> Turn | None:
        """Who is looked at now; `went` tells what came of it, before the next."""
        if not self._order:
            return None
        later, (borrows, _), name = self._order[0]
        entry, _, shape = self._heads[name][0]
        own = later and not borrows
        return Turn(self._yard.waiting[entry[2]], entry[0], shape, modest=own and self._own > 1)

    def went(self, *, on: bool) -> None:
        """Whether what is behind it in its line is looked at: it fits no better."""
        _, share, name = self._order[0]
        line = self._heads[name]
        _, at, shape = line[0]
        entries = self._queues[name][shape]
        if on and at + 1 < len(entries):
            heapq.heapreplace(line, (entries[at + 1], at + 1, shape))
        else:
            heapq.heappop(line)
        self._own -= not share[0]
        if line:
            order = self._of(name)
            self._own += not order[1][0]
            heapq.heapreplace(self._order, order)
        else:
            heapq.heappop(self._order)

    def _of(self, name: str) -> _Order:
        entry, _, shape = self._heads[name][0]
        return entry[0] != AT_ONCE, share_of(self._yard.queue(name), self._held[name], shape[0]), name


def _heads(shapes: Mapping[Shape, list[Entry]]) -> list[_Head]:
    heads = [(entries[0], 0, shape) for shape, entries in shapes.items()]
    heapq.heapify(heads)
    return heads
