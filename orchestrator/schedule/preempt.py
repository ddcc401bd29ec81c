"""Who makes room: elastic gangs that shrink, before any that stops and waits. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.cluster.capacity import Capacity, Fit
from orchestrator.cluster.model import UNKNOWN_NEED, Need
from orchestrator.schedule.gang import Gang, Held, Stop, Why
from orchestrator.schedule.order import borrows, share_of
from orchestrator.schedule.place import least_room, room_for
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
    rules, other = yard.rules, held.gang
    if other.priority > gang.priority:
        return None
    ran = now - held.since
    if other.priority < gang.priority:
        return Why.HIGHER_CLASS if ran >= rules.min_run_for_class_s else None
    if other.queue != gang.queue:
        mine, theirs = yard.queue(gang.queue), yard.queue(other.queue)
        wanted = ranks[mine.name] + gang.min_processes
        own = mine.guaranteed is not None and wanted <= mine.guaranteed
        if own and borrows(theirs, ranks[theirs.name]):
            return Why.QUOTA if ran >= rules.min_run_for_class_s else None
        if share_of(mine, wanted) > share_of(theirs, ranks[theirs.name]):
            return None
    if (
        yard.level(other.job_id) <= level
        or ran < rules.min_run_s
        or other.evictions >= rules.max_evictions
        or now - gang.queued_at < rules.patience_s
    ):
        return None
    return Why.SHORTER


class Reach:
    """Ranks that could be made free, added up once a decision: most who ask in vain are told so at once."""

    def __init__(self, yard: Yard, now: float) -> None:
        rules = yard.rules
        self.yard, self.now = yard, now
        self.protected: Counter[int] = Counter()
        """By class, what ran long enough to stop for a higher one, or for a guarantee."""
        self.longer: dict[tuple[int, str], Counter[int]] = {}
        """By class, queue and level, what may stop for a shorter one."""
        self.shrinkable: Counter[int] = Counter()
        for (priority, turned), alike in yard.ranks.items():
            for held in alike.values():
                ran = now - held.since
                if ran >= rules.min_run_for_class_s:
                    self.protected[priority] += held.processes
                if ran >= rules.min_run_s and held.gang.evictions < rules.max_evictions:
                    levels = self.longer.setdefault((priority, held.gang.queue), Counter())
                    levels[-turned] += held.processes
        for held in yard.elastic.values():
            if now - held.since >= rules.min_run_for_class_s and (smaller := _smaller(held)):
                self.shrinkable[held.gang.priority] += held.processes - smaller[-1]

    def shrinks(self, gang: Gang) -> int:
        """At most so many ranks are free when all have shrunk that may for `gang`."""
        return sum(ranks for priority, ranks in self.shrinkable.items() if priority <= gang.priority)

    def stops(self, gang: Gang, level: int, ranks: Mapping[str, int]) -> int:
        """The same, when all have stopped: see may_stop."""
        total = sum(held for priority, held in self.protected.items() if priority < gang.priority)
        mine = self.yard.queue(gang.queue)
        wanted = ranks[mine.name] + gang.min_processes
        if mine.guaranteed is not None and wanted <= mine.guaranteed:
            return total + self.protected[gang.priority]
        if self.now - gang.queued_at < self.yard.rules.patience_s:
            return total
        share = share_of(mine, wanted)
        for (priority, name), levels in self.longer.items():
            if priority == gang.priority and (
                name == mine.name or share <= share_of(self.yard.queue(name), ranks[name])
            ):
                total += sum(held for at, held in levels.items() if at > level)
        return total


def make_room(
    yard: Yard,
    reach: Reach,
    future: Capacity,
    gang: Gang,
    level: int,
    stopped: Mapping[str, Stop],
    ranks: Mapping[str, int],
    most: int,
    now: float,
) -> Room | None:
    """The cheapest stops after which `gang`, of at most `most` ranks, fits into `future`; None if none do.

    `future` is what will be free without them, and `ranks` what queues will hold. The lowest class goes first, then
    what has the most work ahead, then what loses the least since it last saved.
    """
    rules = yard.rules
    room = _Search(yard, future, gang, most)
    free = future.total(room.mask)
    if rules.resize and yard.elastic and free + reach.shrinks(gang) >= gang.min_processes:
        elastic = [held for held in yard.elastic.values() if _smaller(held) and held.gang.job_id not in stopped]
        if elastic and (shrunk := _shrink(room, elastic, now)) is not None:
            return shrunk
    if not rules.preempt or free + reach.stops(gang, level, ranks) < gang.min_processes:
        return None
    why_of: dict[str, Why] = {}
    allowed: list[Held] = []
    gone: Counter[str] = Counter()
    for rank in sorted(yard.ranks):
        if rank[0] > gang.priority or (rank[0] == gang.priority and -rank[1] <= level and not yard.queues):
            break
        alike = []
        for job_id, held in yard.ranks[rank].items():
            if job_id not in stopped and (why := may_stop(yard, gang, level, held, ranks, now)) is not None:
                why_of[job_id] = why
                alike.append(held)
        alike.sort(key=lambda held: (held.lost_s(now), held.gang.job_id))
        for held in alike:
            queue, quota = yard.queue(held.gang.queue), why_of[held.gang.job_id] is Why.QUOTA
            if quota and not borrows(queue, ranks[queue.name] - gone[queue.name]):
                continue  # with those before it gone, its queue holds no more than is its own
            gone[queue.name] += held.processes
            allowed.append(held)
    found = room.after(allowed)
    if found is None:
        return None
    kept = room.needed(found, allowed)
    return Room(tuple(Stop(one.gang.job_id, why_of[one.gang.job_id], gang.job_id) for one in kept), *found)


def _shrink(room: _Search, elastic: list[Held], now: float) -> Room | None:
    """Shrinking alone, as few gangs by as little as will do."""
    gang = room.gang
    allowed = [
        held
        for held in elastic
        if held.gang.priority <= gang.priority and now - held.since >= room.yard.rules.min_run_for_class_s
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

    def after(self, victims: Sequence[Held]) -> tuple[Fit, Need] | None:
        """Where the gang goes once enough of `victims`, in this order, are gone; None if that is never."""
        wanted = self.gang.min_processes
        if self.future.total(self.mask) + sum(held.processes for held in victims) < wanted:
            return None
        capacity = self.future.copy()
        size = max((size for size, nodes in capacity.ground.of_size.items() if nodes & self.mask), default=0)
        one_node = wanted <= size
        free = capacity.total(self.mask)
        for held in victims:
            capacity.give(held.placement)
            free += held.processes
            if free < wanted:
                continue
            if one_node and self.yard.rules.consolidate and not self._room_on_one(capacity, held, wanted):
                continue
            if found := self.fit(capacity):
                return found
        return None

    def _room_on_one(self, capacity: Capacity, held: Held, wanted: int) -> bool:
        index = capacity.ground.index
        return any(
            capacity.free_at[index[share.node]] >= wanted for share in held.placement.shares if share.node in index
        )

    def needed(self, found: tuple[Fit, Need], victims: Sequence[Held]) -> list[Held]:
        """Those of `victims` without whose slots there is no such room, the cheapest kept."""
        where, need = found
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
        for held in yard.elastic.values()
        if held.processes < held.gang.max_processes and now - held.since >= yard.rules.grow_after_s
    ]
    yield from sorted(able, key=lambda held: (-held.gang.priority, held.processes, held.gang.sequence))
