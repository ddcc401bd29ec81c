"""Who makes room: elastic gangs that shrink, before any that stops and waits. Pure."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.cluster.capacity import Capacity, Fit
from orchestrator.cluster.model import UNKNOWN_NEED, Need, Placement
from orchestrator.schedule.gang import Gang, Held, Queue, Rules, Stop, Why
from orchestrator.schedule.order import borrows, share_of
from orchestrator.schedule.place import least_room, room_after, room_for
from orchestrator.schedule.standing import Loss
from orchestrator.schedule.yard import Yard


@dataclass(frozen=True)
class Room:
    """What to stop so that a gang fits, and where it then goes."""

    stops: tuple[Stop, ...]
    where: Fit
    need: Need


def sizes(gang: Gang) -> tuple[int, ...]:
    """Numbers of ranks that an elastic gang is resized to, most first: of its options, or halves of the most."""
    if gang.options is not None:
        return tuple(sorted({option.processes for option in gang.options}, reverse=True))
    found, size = [], gang.max_processes
    while size > gang.min_processes:
        found.append(size)
        size = max(gang.min_processes, size // 2)
    return (*found, gang.min_processes)


def may_stop(yard: Yard, gang: Gang, level: int, held: Held, ranks: Mapping[str, int], now: float) -> Why | None:
    """For what reason `held` may be stopped for the waiting `gang`, if for any; `ranks` is what queues will hold."""
    other = held.gang
    why = _why(yard, gang, level, (other.priority, -yard.level(other.job_id)), other.queue, ranks, now)
    return why if why is not None and _long_enough(yard.rules, held, why, now) else None


def _why(
    yard: Yard, gang: Gang, level: int, rank: tuple[int, int], queue: str, ranks: Mapping[str, int], now: float
) -> Why | None:
    """The same, of all that are of one class and level, the `rank`, and of one queue, once they ran long enough."""
    priority, turned = rank
    if priority != gang.priority:
        return Why.HIGHER_CLASS if priority < gang.priority else None
    if queue != gang.queue:
        mine, theirs = yard.queue(gang.queue), yard.queue(queue)
        wanted = ranks[mine.name] + gang.min_processes
        own = mine.guaranteed is not None and wanted <= mine.guaranteed
        if own and borrows(theirs, ranks[theirs.name]):
            return Why.QUOTA
        if share_of(mine, wanted) > share_of(theirs, ranks[theirs.name]):
            return None
    return Why.SHORTER if -turned > level and now >= gang.queued_at + yard.rules.patience_s else None


def _long_enough(rules: Rules, held: Held, why: Why, now: float) -> bool:
    if why is Why.SHORTER:
        return now >= held.since + rules.min_run_s and held.gang.evictions < rules.max_evictions
    return now >= held.since + rules.min_run_for_class_s


class Reach:
    """Who could make room, and for how many ranks: most who ask in vain are told so by sums that are kept.

    Of one decision: `ranks` is what queues will hold, and `changed` tells when that is something else.
    """

    def __init__(self, yard: Yard, ranks: Mapping[str, int], now: float) -> None:
        self.yard, self.ranks, self.now = yard, ranks, now
        self.standing = yard.standing
        self.shrinkable: Counter[int] = Counter()
        for held in yard.standing.elastic.values():
            if now >= held.since + yard.rules.min_run_for_class_s and (smaller := _smaller(held)):
                self.shrinkable[held.gang.priority] += held.processes - smaller[-1]
        self._longer: dict[tuple[int, int], list[tuple[str, int]]] = {}
        self._shares: dict[str, float] = {}
        self._patience_s = yard.rules.patience_s
        self._lower: dict[int, int] = {}
        self._gone_for_class: Counter[int] = Counter()
        self._gone_for_level: Counter[tuple[int, int, str]] = Counter()
        self._ranks = sorted(yard.standing.ranks)
        self._may_be_owed = any(queue.guaranteed is not None for queue in yard.queues.values())

    def changed(self, queue: str) -> None:
        self._shares.pop(queue, None)

    def stopped(self, held: Held) -> None:
        """It was told to stop in this decision, so that it makes room no more."""
        gang, level = held.gang, self.yard.level(held.gang.job_id)
        if self.now >= held.since + self.yard.rules.min_run_for_class_s:
            self._gone_for_class[gang.priority] += held.processes
            self._lower.clear()
        if _long_enough(self.yard.rules, held, Why.SHORTER, self.now):
            self._gone_for_level[gang.priority, level, gang.queue] += held.processes
            self._longer.clear()

    def shrinks(self, gang: Gang) -> int:
        """At most so many ranks are free when all have shrunk that may for `gang`."""
        return sum(ranks for priority, ranks in self.shrinkable.items() if priority <= gang.priority)

    def stops(self, gang: Gang, mine: Queue, level: int) -> int:
        """The same, when all have stopped: see may_stop. `mine` is the gang's queue."""
        priority = gang.priority
        total = self._lower.get(priority)
        if total is None:
            total = self._lower[priority] = self._of_lower(priority)
        wanted = self.ranks[mine.name] + gang.min_processes
        if mine.guaranteed is not None and wanted <= mine.guaranteed:
            return total + self.standing.for_class[priority] - self._gone_for_class[priority]
        if self.now < gang.queued_at + self._patience_s:
            return total
        longer = self._longer.get((priority, level))
        if longer is None:
            longer = self._longer[priority, level] = self._of_longer(priority, level)
        share, shares, own = wanted / mine.weight, self._shares, mine.name
        for name, held in longer:
            if name == own:
                total += held
                continue
            theirs = shares.get(name)
            if theirs is None:
                theirs = shares[name] = self._borrowed_share(name)
            if share <= theirs:
                total += held
        return total

    def _borrowed_share(self, name: str) -> float:
        """What a queue holds for its weight; below all others if it borrows nothing, so that nobody takes from it."""
        queue, ranks = self.yard.queue(name), self.ranks[name]
        return ranks / queue.weight if borrows(queue, ranks) else -math.inf

    def _of_lower(self, priority: int) -> int:
        """Ranks of lower classes."""
        for_class, gone = self.standing.for_class, self._gone_for_class
        return sum(ranks - gone[lower] for lower, ranks in for_class.items() if lower < priority)

    def _of_longer(self, priority: int, level: int) -> list[tuple[str, int]]:
        """Ranks of a class that are in later levels, by queue."""
        found = []
        for name, levels in self.standing.for_level.get(priority, {}).items():
            held = sum(ranks - self._gone_for_level[priority, at, name] for at, ranks in levels.items() if at > level)
            if held:
                found.append((name, held))
        return found

    def victims(self, gang: Gang, level: int, stopped: Mapping[str, Stop], why_of: dict[str, Why]) -> Iterator[Held]:
        """Gangs that may stop for `gang`, one after the other as long as more is needed; `why_of` gets the reasons.

        The lowest class goes first, then what has the most work ahead, then what loses the least since it last saved.
        """
        yard, gone = self.yard, Counter[str]()
        for rank in self._ranks:
            if rank[0] > gang.priority or (rank[0] == gang.priority and -rank[1] <= level and not yard.queues):
                return
            lower, whys = rank[0] < gang.priority, dict[str, Why | None]()
            ripe = [
                self._losses(processes, alike)
                for (for_class, for_level, processes), alike in self.standing.ranks[rank].items()
                if (for_class if lower else for_level or (for_class and self._may_be_owed))
            ]
            for _, job_id, held in heapq.merge(*ripe):
                name = held.gang.queue
                if name not in whys:
                    whys[name] = _why(yard, gang, level, rank, name, self.ranks, self.now)
                why = whys[name]
                if why is None or job_id in stopped or not _long_enough(yard.rules, held, why, self.now):
                    continue
                if why is Why.QUOTA and not borrows(yard.queue(name), self.ranks[name] - gone[name]):
                    continue  # with those before it gone, its queue holds no more than is its own
                gone[name] += held.processes
                why_of[job_id] = why
                yield held

    def _losses(self, processes: int, alike: Sequence[Loss]) -> Iterator[tuple[float, str, Held]]:
        """Gangs of one size with what each would lose (Held.lost_s), the least first."""
        now = self.now
        return ((processes * (now + safe), job_id, held) for safe, job_id, held in alike)


def make_room(
    yard: Yard,
    reach: Reach,
    future: Capacity,
    gang: Gang,
    level: int,
    stopped: Mapping[str, Stop],
    most: int,
) -> Room | None:
    """The cheapest stops after which `gang`, of at most `most` ranks, fits into `future`; None if none do.

    `future` is what will be free without them.
    """
    rules = yard.rules
    room = _Search(yard, future, gang, most)
    free = future.total(room.mask)
    if rules.resize and yard.standing.elastic and free + reach.shrinks(gang) >= gang.min_processes:
        elastic = [
            held for held in yard.standing.elastic.values() if _smaller(held) and held.gang.job_id not in stopped
        ]
        if elastic and (shrunk := _shrink(room, elastic, reach.now)) is not None:
            return shrunk
    if not rules.preempt or free + reach.stops(gang, yard.queue(gang.queue), level) < gang.min_processes:
        return None
    why_of: dict[str, Why] = {}
    found = room.after(reach.victims(gang, level, stopped, why_of))
    if found is None:
        return None
    where, need, gone = found
    kept = room.needed(where, need, gone)
    return Room(tuple(Stop(one.gang.job_id, why_of[one.gang.job_id], gang.job_id) for one in kept), where, need)


def _shrink(room: _Search, elastic: list[Held], now: float) -> Room | None:
    """Shrinking alone, as few gangs by as little as will do."""
    gang = room.gang
    allowed = [
        held
        for held in elastic
        if held.gang.priority <= gang.priority and now >= held.since + room.yard.rules.min_run_for_class_s
    ]
    allowed.sort(key=lambda held: (held.gang.priority, held.lost_s(now), held.gang.job_id))
    capacity = room.future.copy()
    most = capacity.total(room.mask)
    for count, held in enumerate(allowed, 1):
        capacity.give(held.placement)
        most += held.processes - _smaller(held)[-1]
        if most < gang.min_processes or room.fit(capacity) is None:
            continue
        shrunk = allowed[:count]
        for step in range(1, 1 + max(len(_smaller(one)) for one in shrunk)):
            found = _shrunk(room, shrunk, step)
            if found is None:
                continue
            for one in reversed(allowed[: count - 1]):
                fewer = [other for other in shrunk if other is not one]
                if (enough := _shrunk(room, fewer, step)) is not None:
                    shrunk, found = fewer, enough
            return found
    return None


def _shrunk(room: _Search, shrunk: Sequence[Held], step: int) -> Room | None:
    """Where the gang goes if these shrink by so many sizes, with room for what goes on of each."""
    gang, consolidate = room.gang, room.yard.rules.consolidate
    capacity = room.future.copy()
    for held in shrunk:
        capacity.give(held.placement)
    found = room.fit(capacity)
    if found is None:
        return None
    capacity.promise(found[0], gang.accelerator, found[1])
    stops = []
    for held in shrunk:
        smaller = _smaller(held)
        target = smaller[min(step, len(smaller)) - 1]
        again = room_for(capacity, held.gang, target, consolidate=consolidate)
        if again is None or sum(ranks for _, ranks in again[0]) < target:
            return None
        where, option = again
        capacity.promise(where, held.gang.accelerator, option.need if option is not None else UNKNOWN_NEED)
        stops.append(Stop(held.gang.job_id, Why.SHRINK, gang.job_id, target))
    return Room(tuple(stops), *found)


def _smaller(held: Held) -> list[int]:
    """The sizes below what a gang holds, most first."""
    return [size for size in sizes(held.gang) if size < held.processes]


class _Search:
    """Room for one gang after others have given theirs back."""

    def __init__(self, yard: Yard, future: Capacity, gang: Gang, most: int) -> None:
        self.yard = yard
        self.future = future
        self.gang = gang
        self.most = most
        self.mask = future.taking("cuda", gang.accelerator) | future.taking("cpu", gang.accelerator)

    def fit(self, capacity: Capacity) -> tuple[Fit, Need] | None:
        return least_room(capacity, self.gang, self.most, consolidate=self.yard.rules.consolidate)

    def after(self, victims: Iterable[Held]) -> tuple[Fit, Need, list[Held]] | None:
        """Where the gang goes once enough of `victims`, in this order, are gone, and those; None if that is never."""
        gone: list[Held] = []

        def leaving() -> Iterator[Placement]:
            for held in victims:
                gone.append(held)
                yield held.placement

        consolidate = self.yard.rules.consolidate
        found = room_after(self.future.copy(), self.gang, self.most, leaving(), consolidate=consolidate)
        return (found[1], found[2], gone) if found is not None else None

    def needed(self, where: Fit, need: Need, victims: Sequence[Held]) -> list[Held]:
        """Those of `victims` without whose slots there is no such room, the cheapest kept."""
        capacity = self.future.copy()
        wanted = {capacity.nodes[at].id: (at, ranks) for at, ranks in where}
        near = [held for held in victims if any(share.node in wanted for share in held.placement.shares)]
        for held in near:
            capacity.give(held.placement)
        kept = []
        for held in reversed(near):
            capacity.take(held.placement)
            on = [wanted[share.node] for share in held.placement.shares if share.node in wanted]
            if any(capacity.room_at(at, self.gang.accelerator, need) < ranks for at, ranks in on):
                capacity.give(held.placement)
                kept.append(held)
        return kept[::-1]


def growths(yard: Yard, now: float) -> Iterator[Held]:
    """Gangs that would go on with more ranks, those that have the fewest of what they may have first."""
    able = [
        held
        for held in yard.standing.elastic.values()
        if held.processes < held.gang.max_processes and now >= held.since + yard.rules.grow_after_s
    ]
    yield from sorted(able, key=lambda held: (-held.gang.priority, held.processes, held.gang.sequence))
