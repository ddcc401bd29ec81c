"""What is measured as time passes: use of GPUs, what is left on nodes that others use in part, jobs that wait."""

from __future__ import annotations

from array import array
from bisect import bisect_right

from orchestrator.cluster.capacity import Capacity


class Meter:
    """Integrals of the state over time. Between two readings the state is what the first said."""

    def __init__(self, start: float) -> None:
        self.start = self.now = start
        self.used = 0
        """Slots held, and slots of nodes that are there."""
        self.all = 0
        self.waiting = 0
        self.running = 0
        self.stranded = 0
        """Free slots on nodes that are used in part, while jobs wait."""
        self.used_s = self.all_s = self.waiting_s = self.stranded_s = self.idle_s = 0.0
        self.most_waiting = 0
        # For plots and for fairness: the steps themselves, and the integral of jobs in the system up to each.
        self.times = array("d", [start])
        self.used_steps = array("l", [0])
        self.waiting_steps = array("l", [0])
        self._present = array("l", [0])
        self._present_s = array("d", [0.0])

    def pass_to(self, now: float) -> None:
        """Time passes, and nothing changes."""
        span = now - self.now
        self.used_s += self.used * span
        self.all_s += self.all * span
        self.waiting_s += self.waiting * span
        self.stranded_s += self.stranded * span
        if self.waiting:
            self.idle_s += (self.all - self.used) * span
        self.now = now

    def read(self, capacity: Capacity, slots: int, used: int, waiting: int, running: int) -> None:
        """The state from now on; `slots` is a mask of the nodes that count."""
        self.used, self.waiting, self.running = used, waiting, running
        self.all = sum(size * (nodes & slots).bit_count() for size, nodes in capacity.ground.of_size.items())
        self.stranded = partly_used(capacity, slots) if waiting else 0
        self.most_waiting = max(self.most_waiting, waiting)
        last = len(self.times) - 1
        span = self.now - self.times[last]
        if span > 0:
            self.times.append(self.now)
            self._present_s.append(self._present_s[last] + span * self._present[last])
            for steps in (self.used_steps, self.waiting_steps, self._present):
                steps.append(0)
        self.used_steps[-1], self.waiting_steps[-1], self._present[-1] = used, waiting, waiting + running

    def mean_present(self, start: float, end: float) -> float:
        """Jobs in the system, waiting or running, on the average of a time."""
        return (self._integral(end) - self._integral(start)) / (end - start)

    def _integral(self, at: float) -> float:
        step = max(0, bisect_right(self.times, at) - 1)
        return self._present_s[step] + max(0.0, at - self.times[step]) * self._present[step]


def partly_used(capacity: Capacity, slots: int) -> int:
    """Free slots of nodes on which something runs."""
    whole = sum(
        size * (capacity.with_free[size] & nodes & slots).bit_count() for size, nodes in capacity.ground.of_size.items()
    )
    return capacity.total(slots) - whole
