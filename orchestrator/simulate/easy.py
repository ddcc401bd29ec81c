"""EASY backfilling, to compare with."""

from __future__ import annotations

import math
from bisect import insort

from orchestrator.cluster.capacity import Capacity, Fit
from orchestrator.cluster.model import Placement
from orchestrator.schedule.gang import Decisions, Gang, Held
from orchestrator.schedule.history import GRID, class_of
from orchestrator.schedule.place import fit
from orchestrator.schedule.reserve import ends_by
from orchestrator.schedule.yard import Yard
from orchestrator.simulate.policy import Packing, Policy


class Easy(Policy):
    """FIFO with EASY backfilling (Lifka, JSSPP 1995): the first has a reservation, others may not delay it.

    Run times are an oracle's, or what history expects: the median of what runs, and what nine of ten stay below of what
    would start beside the reservation. A gang that needs every GPU of the
    cluster gets no reservation, for which all of it would have to be drained: by this rule philly-480 comes to what
    other simulators gave for EASY, a mean wait of 1,483.57 s and a makespan of 607,995 s. By the letter it would be
    2,273.28 s and 658,763 s; that is EasyStrict.
    """

    name = "easy"
    drains = False
    """Whether a gang that needs the whole cluster has a reservation, too."""

    def __init__(self) -> None:
        self.queue: list[tuple[int, str]] = []
        self.ends: dict[str, tuple[float, float]] = {}
        """When running gangs are expected to end, and until when to believe it."""

    def waits(self, gang: Gang, /) -> None:
        insort(self.queue, (gang.sequence, gang.job_id))

    def stops(self, held: Held, _now: float, _done: bool, /) -> None:
        self.ends.pop(held.gang.job_id, None)

    def decide(self, yard: Yard, now: float, /) -> Decisions:
        if not self.queue:
            return Decisions()
        packing = Packing(yard)
        started = 0
        for _, job_id in self.queue:
            gang = yard.waiting[job_id]
            where = packing.find(gang)
            if not where:
                break
            packing.start(gang, where)
            started += 1
        del self.queue[:started]
        if self.queue and packing.free:
            self._backfill(yard, packing, now)
        return Decisions(tuple(packing.starts))

    def _backfill(self, yard: Yard, packing: Packing, now: float) -> None:
        head = yard.waiting[self.queue[0][1]]
        whole = head.min_processes >= sum(yard.capacity.ground.sizes)
        beside = _Beside(yard, packing, now)
        if self.drains or not whole:
            beside.reserve(head, [(self._end(yard, held, now), held.placement) for held in yard.running.values()])
        left = [self.queue[0]]
        for position, entry in enumerate(self.queue[1:], 1):
            if not packing.free:
                left += self.queue[position:]
                break
            if not beside.start(yard.waiting[entry[1]]):
                left.append(entry)
        self.queue = left

    def _end(self, yard: Yard, held: Held, now: float) -> float:
        gang = held.gang
        if gang.oracle_s is not None:
            return held.since + gang.oracle_s - gang.ran_s
        end, until = self.ends.get(gang.job_id, (0.0, -math.inf))
        if now >= until:
            ran = gang.ran_s + now - held.since
            left = yard.history.left_s(gang, ran, 0.5)
            end = now + left if left is not None else math.inf
            later = GRID[class_of(ran) + 1 :]
            until = now + (later[0] if later else math.inf) - ran if left is not None else now
            self.ends[gang.job_id] = end, until
        return max(end, now)


class EasyStrict(Easy):
    """EASY by the letter."""

    name = "easy-strict"
    drains = True


class _Beside:
    """What may start beside the first in the queue, if it has a reservation.

    With GPUs as a count, what is left beside the reservation is a number, as EASY was published; else slots of nodes.
    """

    def __init__(self, yard: Yard, packing: Packing, now: float) -> None:
        self.yard = yard
        self.packing = packing
        self.now = now
        self.at = math.inf
        """When the reservation begins; math.inf for never, and where nobody knows."""
        self.extra = 0
        """GPUs that are left then, of those that are free by then."""
        self.lasting: Capacity | None = None
        """Of what is free now, what is left then."""
        self.bounded = False
        self.full: set[int] = set()
        """Sizes for which there is no room now, and none beside the reservation."""
        self.late_full: set[int] = set()
        self.late: dict[object, bool] = {}
        """Of gangs that history cannot tell apart, whether they would outlast the reservation's beginning."""

    def reserve(self, head: Gang, ends: list[tuple[float, Placement]]) -> None:
        """For the first in the queue, given when those that run leave their slots."""
        packing = self.packing
        self.bounded = True
        ends += [(ends_by(self.yard, self.yard.waiting[one.job_id], self.now), one.placement) for one in packing.starts]
        ends.sort(key=lambda one: one[0])
        later, free = packing.capacity.copy(), packing.free
        where: Fit = ()
        for at, placement in ends:
            if where and at > self.at:
                break  # all that ends at that moment is there for the first
            later.give(placement)
            free += placement.world_size
            if not where and free >= head.min_processes:
                where = fit(later, head.min_processes, head.accelerator, consolidate=packing.consolidate)
                self.at = at if where else math.inf
        self.extra = free - head.min_processes
        if packing.consolidate:
            self.lasting = packing.capacity.copy()
            for node, ranks in where:
                spare = later.free_at[node] - ranks
                self.lasting.change(node, min(0, spare - self.lasting.free_at[node]))

    def start(self, gang: Gang) -> bool:
        """Whether it starts, because it delays the first in no way."""
        size, packing = gang.min_processes, self.packing
        if size > packing.free or size in self.full:
            return False
        late = self.bounded and self._is_late(gang)
        if late and (size in self.late_full or (not packing.consolidate and size > self.extra)):
            return False
        room = self.lasting if late and self.lasting is not None else packing.capacity
        where = fit(room, size, gang.accelerator, consolidate=packing.consolidate)
        if not where:
            (self.late_full if late else self.full).add(size)
            return False
        packing.start(gang, where)
        if late:
            self.extra -= size
        if self.lasting is not None:
            for node, ranks in where:
                free, lasting = packing.capacity.free_at[node], self.lasting.free_at[node]
                self.lasting.change(node, -ranks if late else min(0, free - lasting))
        return True

    def _is_late(self, gang: Gang) -> bool:
        if math.isinf(self.at):
            return True
        alike = gang.queue, gang.name, gang.min_processes, gang.ran_s, gang.oracle_s
        if alike not in self.late:
            self.late[alike] = ends_by(self.yard, gang, self.now) > self.at
        return self.late[alike]
