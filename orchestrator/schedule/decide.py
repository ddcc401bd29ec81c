"""One scheduling decision: who starts now and where, who makes room, and why others wait. Pure.

Gang or nothing. Composes the order of the queue, places, reservations and pre-emption; see docs/scheduling.md.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass, replace
from operator import itemgetter

from orchestrator.cluster.capacity import Capacity, Fit
from orchestrator.cluster.model import UNKNOWN_NEED, Need
from orchestrator.job.lifecycle import Reason
from orchestrator.schedule import explain
from orchestrator.schedule.gang import Decisions, Gang, Held, Queue, Reservation, Start, Stop, Wait, Why
from orchestrator.schedule.order import Shape
from orchestrator.schedule.place import least_room, room_for
from orchestrator.schedule.preempt import Reach, growths, make_room, sizes
from orchestrator.schedule.quota import MANY, allowed, most
from orchestrator.schedule.reserve import ends_by, reserve
from orchestrator.schedule.standing import End
from orchestrator.schedule.turns import Turn, Turns
from orchestrator.schedule.yard import Yard

_when, _since = itemgetter(0), itemgetter(1, 2)


def decide(yard: Yard, now: float) -> Decisions:
    """What to do now. Gangs that are not named wait behind others; the yard itself is not changed."""
    yard.refresh(now)
    return _Pass(yard, now).run()


class _Pass:
    """One look at the whole queue, as far as there is room."""

    def __init__(self, yard: Yard, now: float) -> None:
        self.yard = yard
        self.now = now
        self.free = yard.capacity.copy()
        self.future: Capacity | None = None
        """What will be free when all that was told to stop has ended; None while that is the same."""
        self.lasting: Capacity | None = None
        """What is free for gangs that outlast the reservation's beginning; None while there is none."""
        self.reservation: Reservation | None = None
        self.reserved = 0
        """Nodes that it is on, as a mask."""
        self.held = Counter(yard.held)
        self.settled = Counter(yard.held)
        """Ranks by queue when all that was told to stop has ended, and what room was made for has started."""
        self.around: dict[str, _Around] = {}
        """For queues whose first gang waits for others of its queue."""
        self.groups = Counter(yard.groups)
        self.starts: list[Start] = []
        self.new_ends: list[End] = []
        """Of those that start now, if their end is known."""
        self.stops: dict[str, Stop] = {}
        self.waits: list[Wait] = []
        self.reach: Reach | None = None
        self.left: int | None = None
        """Slots that are free now; None where that is to be counted anew."""
        self.soon: int | None = None
        """The same of `future`."""
        self.no_room: set[tuple[bool, int, Shape]] = set()
        """For whom there was none: for those that outlast the reservation's beginning or not, with how many ranks at
        most. Within a decision nothing becomes free."""
        self.no_promise: set[tuple[bool, int, Shape]] = set()
        """The same of `future`, until more is told to stop; without the nodes of the reservation or with them."""
        self.patient_until = math.inf

    def run(self) -> Decisions:
        self._drain()
        leaving = [*self.yard.leaving.values(), *(self.yard.running[job_id] for job_id in self.stops)]
        if leaving:
            self.future = self.free.copy()
            for held in leaving:
                self.future.give(held.placement)
                self._settle(held.gang.queue, -held.processes)
            for held in sorted(leaving, key=lambda held: held.gang.sequence):
                self._left_to(held, held.target)
        for priority in self.yard.lines:
            turns = Turns(self.yard, self.yard.lines.classes[priority], self.held)
            while (turn := turns.next()) is not None:
                turns.went(on=self._try(turn))
        if self.yard.rules.resize:
            self._grow()
        times = [self.patient_until, self._protected_until()]
        if self.waits:
            times.append(self.yard.next_level_at())
        later = [at for at in times if self.now < at < math.inf]
        return Decisions(
            tuple(self.starts),
            tuple(self.stops.values()),
            tuple(self.waits),
            min(later, default=None),
            self.reservation,
        )

    def _drain(self) -> None:
        if not self.yard.drained:
            return
        for job_id, held in sorted(self.yard.running.items()):
            if held.can_stop and any(share.node in self.yard.drained for share in held.placement.shares):
                self.stops[job_id] = Stop(job_id, Why.DRAINED)

    def _try(self, turn: Turn) -> bool:
        """Whether to look at the next of its line: it starts, or waits for something of its own."""
        gang, queue, level, shape, modest = turn
        impossible = self._impossible(gang, shape)
        if impossible is not None:
            self.waits.append(Wait(gang.job_id, impossible))
            return True
        if gang.group is not None and gang.at_once is not None and self.groups[gang.group] >= gang.at_once:
            self.waits.append(Wait(gang.job_id, explain.array_full(gang.at_once)))
            return True
        allowed = MANY if queue.ceiling is None and not self.yard.keepers else self._allowed(queue)
        around, outlasts = self.around.get(queue.name), False
        if around is not None and ends_by(self.yard, gang, self.now) > around.at:
            allowed, outlasts = min(allowed, around.extra), True
        if modest and queue.guaranteed is not None:
            allowed = min(allowed, queue.guaranteed - self.held[queue.name])
        if allowed < gang.min_processes:
            return self._over_quota(gang, queue, allowed)
        if self._left() >= gang.min_processes and self._start(gang, shape, allowed):
            if around is not None and outlasts:
                around.extra -= self.starts[-1].placement.world_size
            return True
        stops: tuple[Stop, ...] = ()
        if self._reachable(gang, queue, level):
            if self.future is not None:  # nobody stops to get it what is reserved
                self.future.shut = self.reserved if self._late(gang) else 0
            if self._promised(gang, shape, allowed):
                self.waits.append(Wait(gang.job_id, explain.room_is_made()))
                return True
            stops = self._room(gang, level, allowed)
        if stops:
            self.waits.append(Wait(gang.job_id, explain.makes_room(stops)))
            # Who is only expected to take longer stops for one gang of a kind at a time.
            return all(stop.why is not Why.SHORTER for stop in stops)
        behind = self.reservation is not None
        self.waits.append(Wait(gang.job_id, explain.behind() if behind else self._reserved(gang, allowed)))
        return False

    def _over_quota(self, gang: Gang, queue: Queue, allowed: int) -> bool:
        """Others of its queue go around the first one, as far as they do not delay it."""
        if queue.name in self.around:
            self.waits.append(Wait(gang.job_id, explain.behind()))
            return False
        reason = explain.over_quota(gang.min_processes, queue, self.held[queue.name], allowed)
        self.waits.append(Wait(gang.job_id, reason))
        if gang.min_processes > most(self.yard, queue):
            return True
        leaving = self.held[queue.name] - self.settled[queue.name]
        at, extra = self.now, allowed + leaving - gang.min_processes
        for end, _, _, placement in self._ends(queue.name):
            if extra >= 0:
                break
            at, extra = max(self.now, end), extra + placement.world_size
        self.around[queue.name] = _Around(at, extra)
        return False

    def _left(self) -> int:
        """Slots that are free now."""
        if self.left is None:
            self.left = self.free.total(self.free.ground.open)
        return self.left

    def _reachable(self, gang: Gang, queue: Queue, level: int) -> bool:
        """Whether there could be room for a gang if all that may stopped for it; it may turn out otherwise."""
        rules = self.yard.rules
        if rules.preempt and self.now < (until := gang.queued_at + rules.patience_s) < self.patient_until:
            self.patient_until = until
        if self.soon is None:
            future = self.future if self.future is not None else self.free
            self.soon = future.total(future.ground.open)
        wanted = gang.min_processes - self.soon
        if wanted <= 0:
            return True
        if not (rules.preempt or rules.resize):
            return False
        if self.reach is None:
            self.reach = Reach(self.yard, self.settled, self.now)
        if self.reach.shrinkable and self.reach.shrinks(gang) >= wanted:
            return True
        return rules.preempt and self.reach.stops(gang, queue, level) >= wanted

    def _late(self, gang: Gang) -> bool:
        """Whether a gang that starts now may still be there when the reservation begins."""
        return self.reservation is not None and ends_by(self.yard, gang, self.now) > self.reservation.at

    def _start(self, gang: Gang, shape: Shape, allowed: int) -> bool:
        room, late = self.free, False
        if self.lasting is not None and self._late(gang):
            room, late = self.lasting, True
        tried = (late, min(allowed, gang.most), shape)
        if tried in self.no_room:
            return False
        found = room_for(room, gang, allowed, consolidate=self.yard.rules.consolidate)
        if found is None:
            self.no_room.add(tried)
            return False
        where, option = found
        need = option.need if option is not None else UNKNOWN_NEED
        placement = room.placement(where, gang.accelerator, need)
        self.starts.append(Start(gang.job_id, placement, option))
        if gang.oracle_s is not None or gang.left_s is not None:
            end = max(self.now, ends_by(self.yard, gang, self.now))
            self.new_ends.append((end, self.now, gang.job_id, placement))
        ranks = placement.world_size
        self.left = self.left - ranks if self.left is not None else None
        self.soon = self.soon - ranks if self.soon is not None else None
        self.free.take(placement)
        for other in (self.lasting, self.future):
            if other is not None:
                other.take(placement)
        self._count(gang, ranks)
        return True

    def _count(self, gang: Gang, ranks: int) -> None:
        self.held[gang.queue] += ranks
        self._settle(gang.queue, ranks)
        if gang.group is not None:
            self.groups[gang.group] += 1

    def _settle(self, queue: str, ranks: int) -> None:
        self.settled[queue] += ranks
        if self.reach is not None:
            self.reach.changed(queue)

    def _promised(self, gang: Gang, shape: Shape, allowed: int) -> bool:
        """Room that is being made, which nobody else gets."""
        if self.future is None:
            return False
        tried = (self.future.shut != 0, min(allowed, gang.most), shape)
        if tried in self.no_promise:
            return False
        found = least_room(self.future, gang, allowed, consolidate=self.yard.rules.consolidate)
        if found is None:
            self.no_promise.add(tried)
            return False
        self._keep(gang, *found)
        return True

    def _room(self, gang: Gang, level: int, allowed: int) -> tuple[Stop, ...]:
        """Tell others to stop, if that helps and is allowed."""
        yard = self.yard
        if not (yard.rules.preempt or yard.rules.resize):
            return ()
        future = self.future if self.future is not None else self.free
        if self.reach is None:
            self.reach = Reach(yard, self.settled, self.now)
        room = make_room(yard, self.reach, future, gang, level, self.stops, allowed)
        if room is None:
            return ()
        if self.future is None:
            self.future = self.free.copy()
        for stop in room.stops:
            held = yard.running[stop.job_id]
            self.stops[stop.job_id] = stop
            self.reach.stopped(held)
            self.future.give(held.placement)
            self._settle(held.gang.queue, -held.processes)
        self.no_promise.clear()
        self._keep(gang, room.where, room.need)
        for stop in room.stops:
            self._left_to(yard.running[stop.job_id], stop.target)
        return room.stops

    def _keep(self, gang: Gang, where: Fit, need: Need) -> None:
        """Let nobody else have the slots that a gang waits for, those that are free now among them."""
        self._promise(gang, where, need)
        self._count(gang, sum(ranks for _, ranks in where))

    def _left_to(self, held: Held, target: int | None) -> None:
        """The same of one that stops to go on at once, as far as it holds so many."""
        assert self.future is not None
        most = min(target or 0, held.processes)
        found = room_for(self.future, held.gang, most, consolidate=self.yard.rules.consolidate) if most else None
        if found is not None:
            where, option = found
            self._promise(held.gang, where, option.need if option is not None else UNKNOWN_NEED)
            self._settle(held.gang.queue, sum(ranks for _, ranks in where))

    def _promise(self, gang: Gang, where: Fit, need: Need) -> None:
        assert self.future is not None
        self.left = self.soon = None
        self.future.promise(where, gang.accelerator, need)
        for other in (self.free, self.lasting):
            if other is not None:
                other.limit(where, self.future)

    def _reserved(self, gang: Gang, allowed: int) -> Reason:
        soon = self.future if self.future is not None else self.free
        consolidate = self.yard.rules.consolidate
        shadow = reserve(self.free, soon, self._ends(), gang, allowed, self.now, consolidate=consolidate)
        if shadow is not None:
            self.reservation, self.lasting, self.reserved = shadow.reservation, shadow.lasting, shadow.nodes
            self.future = soon.copy()
            self.no_promise.clear()
            self.soon = None
        elif least_room(self.yard.idle, gang, allowed, consolidate=consolidate) is None:
            # Of the ways to run it, those that its queue may have are not those for which there are nodes.
            found = least_room(self.yard.idle, gang, gang.most, consolidate=consolidate)
            if found is not None:
                queue, needs = self.yard.queue(gang.queue), sum(ranks for _, ranks in found[0])
                return explain.over_quota(needs, queue, self.held[queue.name], allowed)
        return explain.no_room(self.free, gang)

    def _ends(self, queue: str | None = None) -> list[End]:
        """Of all that hold slots and are not told to stop, and of those that start now if their end is known; of one
        queue, or of all. In order; of those that should have ended, which held their slots longest come first."""
        yard, now = self.yard, self.now
        ends = yard.standing.ends
        if self.stops:
            ends = [end for end in ends if end[2] not in self.stops]
        if queue is not None:
            ends = [end for end in ends if yard.running[end[2]].gang.queue == queue]
        overdue = bisect_left(ends, now, key=_when)
        ends = sorted(ends[:overdue], key=_since) + ends[overdue:]
        for end in self.new_ends:
            if queue is None or yard.waiting[end[2]].queue == queue:
                insort(ends, end, lo=overdue)
        return ends

    def _allowed(self, queue: Queue) -> int:
        return allowed(self.yard, queue, self.held, self.free)

    def _impossible(self, gang: Gang, shape: Shape) -> Reason | None:
        consolidate = self.yard.rules.consolidate
        if gang.misfit is not None:
            return explain.why_impossible(self.yard.idle, gang, consolidate=consolidate)
        known = self.yard.impossible
        if shape not in known:
            known[shape] = explain.why_impossible(self.yard.idle, gang, consolidate=consolidate)
        return known[shape]

    def _grow(self) -> None:
        """Elastic gangs take what nobody waits for."""
        if self._for_room() or self.stops:
            return
        for held in growths(self.yard, self.now):
            gang = replace(held.gang, avoid=())  # it has done without that node for long enough
            allowed = held.processes + self._allowed(self.yard.queue(gang.queue))
            free = self.free.copy()
            free.give(held.placement)
            for size in sizes(gang):
                if size <= held.processes or size > allowed:
                    continue
                found = room_for(free, gang, size, consolidate=self.yard.rules.consolidate)
                if found is not None and sum(ranks for _, ranks in found[0]) == size:
                    self.stops[gang.job_id] = Stop(gang.job_id, Why.GROW, None, size)
                    return  # one at a time: the next tick knows better what is free

    def _for_room(self) -> bool:
        """Whether anybody waits for slots to become free."""
        return any(wait.reason.code not in explain.NOT_FOR_ROOM for wait in self.waits)

    def _protected_until(self) -> float:
        """When the first running gang may be stopped, or grow, that may not yet."""
        standing, rules = self.yard.standing, self.yard.rules
        if self._for_room():
            return standing.ripens.next_at() if rules.preempt or (rules.resize and standing.elastic) else math.inf
        elastic = standing.elastic.values() if rules.resize else ()
        times = (held.since + rules.grow_after_s for held in elastic if held.processes < held.gang.max_processes)
        return min((at for at in times if at > self.now), default=math.inf)


@dataclass(slots=True)
class _Around:
    """What the first gang of a queue that is over its quota leaves to others of the queue."""

    at: float
    """When it starts if others of its queue end as expected."""
    extra: int
    """Ranks beside it for those that outlast that."""
