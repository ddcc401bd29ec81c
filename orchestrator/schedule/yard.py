"""The state that decisions are made from, kept up to date by small changes. No clock, no I/O."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from orchestrator.cluster.capacity import Capacity
from orchestrator.cluster.model import Node
from orchestrator.job.lifecycle import Reason
from orchestrator.schedule.gang import Gang, Held, Queue, Rules
from orchestrator.schedule.history import History
from orchestrator.schedule.order import AT_ONCE, Lines, Shape, level_of, next_fall_s, next_lift_s

MOMENT_S = 1e-3
"""Levels are looked at so much after they should change, so that rounding does not make it too early."""


class Yard:
    """Nodes, gangs that wait and gangs that hold slots. `decide` reads it; a yard built anew decides the same."""

    def __init__(
        self,
        nodes: Iterable[Node] = (),
        *,
        queues: Iterable[Queue] = (),
        rules: Rules | None = None,
        history: History | None = None,
        closed: Iterable[str] = (),
        drained: Iterable[str] = (),
    ) -> None:
        self.rules = rules or Rules()
        self.history = history or History()
        self.waiting: dict[str, Gang] = {}
        self.running: dict[str, Held] = {}
        self.groups: Counter[str] = Counter()
        """Gangs of an array that hold slots."""
        self.held: Counter[str] = Counter()
        """Ranks by queue."""
        self.lines = Lines()
        self.impossible: dict[Shape, Reason | None] = {}
        """Why no gang of a shape could start if nothing ran; forgotten when the nodes change."""
        self.ranks: dict[tuple[int, int], dict[str, Held]] = {}
        """Gangs that can be told to stop, by class and by level turned round: the first would go first."""
        self.elastic: dict[str, Held] = {}
        """Those of them that could run with another number of ranks."""
        self._ends: dict[str, tuple[float, float]] = {}
        self._levels: dict[str, int] = {}
        self._due: list[tuple[float, str]] = []
        self._due_at: dict[str, float] = {}
        """Which entry of a gang counts: others are left of what it was before."""
        self._version = -1
        self._now = -math.inf
        self.set_queues(queues)
        self.set_nodes(nodes, closed=closed, drained=drained)

    # What happened.

    def set_nodes(self, nodes: Iterable[Node], *, closed: Iterable[str] = (), drained: Iterable[str] = ()) -> None:
        """Other nodes, by id: nothing starts on the `closed` ones, and on the `drained` ones nothing goes on."""
        self.drained = frozenset(drained)
        closed = {*closed, *self.drained}
        self.capacity = Capacity.of(nodes, (held.placement for held in self.running.values()), closed)
        self.idle = self.capacity.idle()
        self.impossible = {}

    def set_queues(self, queues: Iterable[Queue]) -> None:
        """Those that are not named have a weight of 1 and no bounds."""
        self.queues: Mapping[str, Queue] = {queue.name: queue for queue in queues}

    def queue(self, name: str) -> Queue:
        return self.queues.get(name) or Queue(name)

    def wait(self, gang: Gang) -> None:
        """A gang that wants to start, or is another one than before."""
        if gang.job_id in self.waiting:
            self.leave(gang.job_id)
        self.waiting[gang.job_id] = gang
        if self._fresh:
            self._enter(gang)

    def leave(self, job_id: str) -> None:
        """It does not wait any more."""
        gang = self.waiting.pop(job_id)
        level = self._levels.pop(job_id, 0)
        self._due_at.pop(job_id, None)
        if self._fresh:
            self.lines.remove(gang, level)

    def hold(self, held: Held) -> None:
        """A gang holds slots from now on, or holds them otherwise than before."""
        job_id = held.gang.job_id
        before = self.running.get(job_id)
        if job_id in self.waiting:
            self.leave(job_id)
        if before is not None and before.placement == held.placement and before.gang.queue == held.gang.queue:
            self.running[job_id] = held
            if self._fresh:
                self._unrate(before)
                self._rate(held)
            return
        if before is not None:
            self.release(job_id)
        self.running[job_id] = held
        self.capacity.take(held.placement)
        self.held[held.gang.queue] += held.processes
        if held.gang.group is not None:
            self.groups[held.gang.group] += 1
        if self._fresh:
            self._rate(held)

    def release(self, job_id: str) -> Held:
        """It holds nothing any more."""
        held = self.running.pop(job_id)
        self._unrate(held)
        self._due_at.pop(job_id, None)
        self.capacity.give(held.placement)
        self.held[held.gang.queue] -= held.processes
        if held.gang.group is not None:
            self.groups[held.gang.group] -= 1
        return held

    def stopping(self, job_id: str, target: int | None = None) -> None:
        """It was told to stop; to go on with at most `target` ranks, or to wait its turn."""
        self.hold(replace(self.running[job_id], stopping=True, target=target))

    def copy(self) -> Yard:
        """One that may change without this one; what history tells is the same for both."""
        new = Yard(rules=self.rules, history=self.history)
        new.capacity, new.idle = self.capacity.copy(), self.idle
        new.drained, new.queues, new.impossible = self.drained, self.queues, self.impossible
        new.waiting, new.running = self.waiting.copy(), self.running.copy()
        new.groups, new.held = self.groups.copy(), self.held.copy()
        return new

    # What follows from it.

    def refresh(self, now: float) -> None:
        """Bring levels up to `now`: gangs rise as they wait and sink as they run."""
        if not self._fresh or now < self._now:
            self._now, self._version = now, self.history.version
            self._due, self._due_at, self._levels, self._ends, self.ranks, self.elastic = [], {}, {}, {}, {}, {}
            self.lines.fill((gang, self._level_waiting(gang)) for gang in self.waiting.values())
            for held in self.running.values():
                self._rate(held)
            return
        self._now = now
        while self._due and (self._due[0][0] <= now or self._due_at.get(self._due[0][1]) != self._due[0][0]):
            at, job_id = heapq.heappop(self._due)
            if self._due_at.get(job_id) != at:
                continue
            if job_id in self.running:
                self._unrate(self.running[job_id])
                self._rate(self.running[job_id])
            elif job_id in self.waiting:
                gang = self.waiting[job_id]
                self.lines.remove(gang, self._levels[job_id])
                self._enter(gang)

    def in_order(self) -> Iterator[Gang]:
        """Waiting gangs in the order of the queue as it stands, by class, level and submission."""
        entries = sorted(
            (-priority, entry)
            for priority, queues in self.lines.classes.items()
            for shapes in queues.values()
            for line in shapes.values()
            for entry in line
        )
        return (self.waiting[entry[2]] for _, entry in entries)

    def level(self, job_id: str) -> int:
        """As of the last refresh."""
        return self._levels[job_id]

    def ends_at(self, job_id: str) -> float:
        """When a running gang is expected to leave its slots; may be past, and math.inf where nobody knows."""
        end, until = self._ends.get(job_id, (0.0, -math.inf))
        if self._now >= until:
            end, until = self._ends[job_id] = self._expect(self.running[job_id])
        return end

    def next_level_at(self) -> float | None:
        """When time alone changes a level."""
        return self._due[0][0] if self._due else None

    @property
    def _fresh(self) -> bool:
        return self._version == self.history.version

    def _enter(self, gang: Gang) -> None:
        self.lines.add(gang, self._level_waiting(gang))

    def _level_waiting(self, gang: Gang) -> int:
        waited = gang.waited_s + max(0.0, self._now - gang.queued_at)
        level = AT_ONCE
        if gang.target is None:
            level = level_of(gang, gang.ran_s, waited, self.history, self.rules)
        rises = level > 0
        self._look_again(gang, gang.queued_at + next_lift_s(waited, self.rules) - gang.waited_s if rises else math.inf)
        self._levels[gang.job_id] = level
        return level

    def _rate(self, held: Held) -> None:
        gang = held.gang
        ran = gang.ran_s + max(0.0, self._now - held.since)
        level = self._levels[gang.job_id] = level_of(gang, ran, gang.waited_s, self.history, self.rules)
        if held.can_stop:
            self.ranks.setdefault((gang.priority, -level), {})[gang.job_id] = held
            if gang.elastic:
                self.elastic[gang.job_id] = held
        if gang.oracle_s is not None:
            ran = next_fall_s(gang, ran, gang.waited_s, self.rules)
        else:
            ran = self.history.next_class_s(ran)
            while math.isfinite(ran) and level_of(gang, ran, gang.waited_s, self.history, self.rules) == level:
                ran = self.history.next_class_s(ran)
        self._look_again(gang, held.since + ran - gang.ran_s)

    def _look_again(self, gang: Gang, at: float) -> None:
        """Its level is another one then; math.inf for never."""
        at = max(at, self._now) + MOMENT_S
        if at != self._due_at.get(gang.job_id):
            self._due_at[gang.job_id] = at
            if math.isfinite(at):
                heapq.heappush(self._due, (at, gang.job_id))

    def _unrate(self, held: Held) -> None:
        gang = held.gang
        self._ends.pop(gang.job_id, None)
        self.elastic.pop(gang.job_id, None)
        level = self._levels.pop(gang.job_id, None)
        if level is not None and held.can_stop:
            alike = self.ranks[gang.priority, -level]
            del alike[gang.job_id]
            if not alike:
                del self.ranks[gang.priority, -level]

    def _expect(self, held: Held) -> tuple[float, float]:
        """The end, and until when to believe it: by the class of its run time, so that it is the same at any time."""
        gang = held.gang
        limit = held.since + gang.left_s if gang.left_s is not None else math.inf
        if gang.oracle_s is not None:
            return min(limit, held.since + gang.oracle_s - gang.ran_s), math.inf
        ran = gang.ran_s + max(0.0, self._now - held.since)
        start = self.history.class_of(ran)
        left = self.history.left_s(gang, start, 0.5)
        end = min(limit, held.since - gang.ran_s + start + left if left is not None else math.inf)
        return end, held.since - gang.ran_s + self.history.next_class_s(ran)
