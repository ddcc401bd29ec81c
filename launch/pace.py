"""Which rank is slower than the others, by the time that each needs before it waits for them. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

WARM_UP = 3
"""First steps that say nothing: they allocate and compile."""
STEPS = 20
"""Steps after which a judgement is made, and over which times are smoothed."""
RATIO = 1.5
LEAST_S = 1e-3
"""What takes less is noise."""


class Slow(NamedTuple):
    rank: int
    ratio: float
    """Its time for a step of its own, beside the others' middling one."""


class Pace:
    """Smoothed times of all ranks for their own part of a step."""

    def __init__(self) -> None:
        self._seen = 0
        self._times: list[float] = []

    def see(self, own_s: Sequence[float]) -> None:
        """One step's seconds, by rank; without meaning where one of them is 0."""
        if not all(own_s):
            return
        self._seen += 1
        if self._seen <= WARM_UP or not self._times:
            self._times = list(own_s)
            return
        share = max(1 / STEPS, 1 / (self._seen - WARM_UP + 1))
        self._times = [old + share * (new - old) for old, new in zip(self._times, own_s, strict=True)]

    def slowest(self) -> Slow | None:
        """The rank that is slow beside the others, if one is."""
        if self._seen < WARM_UP + STEPS or len(self._times) < 2:
            return None
        rank = max(range(len(self._times)), key=self._times.__getitem__)
        others = median(time for other, time in enumerate(self._times) if other != rank)
        ratio = self._times[rank] / max(others, LEAST_S)
        return Slow(rank, ratio) if ratio >= RATIO and self._times[rank] > LEAST_S else None
