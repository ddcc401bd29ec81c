"""The virtual clock: what happens when. At one instant, ends precede submissions, and all of it a decision."""

from __future__ import annotations

import enum
import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass


class Kind(enum.IntEnum):
    """In the order in which they happen at one instant."""

    END = 0
    RUNNING = 1  # what precedes the first step is over
    SAVED = 2
    RETURN = 3  # of a node
    FAIL = 4
    SUBMIT = 5


@dataclass(frozen=True, slots=True, order=True)
class Happening:
    at: float
    kind: Kind
    number: int
    """Of the job, or of the node."""
    attempt: int = 0
    """Of the job; of a node, which of the known failures."""


class Clock:
    """A heap of happenings."""

    def __init__(self) -> None:
        self.now = -math.inf
        self._heap: list[tuple[float, int, int, int]] = []

    def at(self, when: float, kind: Kind, number: int, attempt: int = 0) -> None:
        heapq.heappush(self._heap, (when, kind, number, attempt))

    @property
    def next_at(self) -> float:
        """math.inf where nothing is to come."""
        return self._heap[0][0] if self._heap else math.inf

    def forward(self, to: float) -> Iterator[Happening]:
        """What happens up to `to`, which then is now."""
        assert to >= self.now
        self.now = to
        while self._heap and self._heap[0][0] <= to:
            when, kind, number, attempt = heapq.heappop(self._heap)
            yield Happening(when, Kind(kind), number, attempt)
