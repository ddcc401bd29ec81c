"""What time alone will change, and when. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

SPARE = 64
"""What is kept of what was said before, at most, beside as much as counts."""


class Dues:
    """When each of many jobs is to be looked at again. The last word on each counts."""

    def __init__(self, at: dict[str, float] | None = None) -> None:
        """`at` becomes its own."""
        self._at = at if at is not None else {}
        self._heap = [(at, job_id) for job_id, at in self._at.items()]
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._at)

    def set(self, job_id: str, at: float) -> None:
        """math.inf is never."""
        if not math.isfinite(at):
            self._at.pop(job_id, None)
        elif at != self._at.get(job_id):
            self._at[job_id] = at
            heapq.heappush(self._heap, (at, job_id))
            if len(self._heap) > 2 * len(self._at) + SPARE:
                self._heap = [(at, job_id) for job_id, at in self._at.items()]
                heapq.heapify(self._heap)

    def drop(self, job_id: str) -> None:
        self._at.pop(job_id, None)

    def next_at(self) -> float:
        """When the first is due; math.inf for never."""
        heap = self._heap
        while heap and self._at.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else math.inf

    def pop(self, now: float) -> Iterator[str]:
        """Those that are due, which may be set anew for later meanwhile."""
        while self.next_at() <= now:
            _, job_id = heapq.heappop(self._heap)
            del self._at[job_id]
            yield job_id
