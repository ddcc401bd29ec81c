"""The state that decisions are made from, kept up to date by small changes. No clock, no I/O."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from orchestrator.cluster.capacity import Capacity
from orchestrator.cluster.model import Node
from orchestrator.job.lifecycle import Reason
from orchestrator.schedule.dues import Dues
from orchestrator.schedule.gang import Gang, Held, Queue, Rules
from orchestrator.schedule.history import History, Kind, kind_of
from orchestrator.schedule.order import AT_ONCE, Levels, Lines, Shape, lifts, next_fall_s, next_lift_s
from orchestrator.schedule.standing import Standing

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
        self.leaving: dict[str, Held] = {}
        """Gangs that were told to stop and still hold their slots."""
        self.standing = Standing(self.rules, self.history)
        self._unnamed: dict[str, Queue] = {}
        self._kinds: dict[Kind, dict[str, None]] = {}
        self._table = Levels(self.history, self.rules)
        self._levels: dict[str, int] = {}
        self._due = Dues()
        """When time alone changes a level."""
        self._fresh = False
        """Whether levels, lines and standing are kept up: from the first decision on."""
        self._version = 0
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
        self.keepers = tuple(
            (queue.name, queue.guaranteed)
            for queue in self.queues.values()
            if queue.guaranteed is not None and not queue.lendable
        )
        """Those that do not lend, each with what is its own."""

    def queue(self, name: str) -> Queue:
        return self.queues.get(name) or self._unnamed.setdefault(name, Queue(name))

    def wait(self, gang: Gang) -> None:
        """A gang that wants to start, or is another one than before."""
        if gang.job_id in self.waiting:
            self.leave(gang.job_id)
        self.waiting[gang.job_id] = gang
        self._join(gang)
        if self._fresh:
            self.lines.add(gang, self._level_waiting(gang))

    def leave(self, job_id: str) -> None:
        """It does not wait any more."""
        gang = self.waiting.pop(job_id)
        self._part(gang)
        if self._fresh:
            self.lines.remove(gang, self._levels[job_id])
            self._unrate(job_id)

    def hold(self, held: Held) -> None:
        """A gang holds slots from now on, or holds them otherwise than before."""
        job_id = held.gang.job_id
        if job_id in self.waiting:
            self.leave(job_id)
        before = self.running.get(job_id)
        same = before is not None and before.placement == held.placement and before.gang.queue == held.gang.queue
        if same and before is not None:
            self._part(before.gang)
            self._unrate(job_id)
        elif before is not None:
            self.release(job_id)
        self.running[job_id] = held
        self._join(held.gang)
        if held.stopping:
            self.leaving[job_id] = held
        else:
            self.leaving.pop(job_id, None)
        if not same:
            self.capacity.take(held.placement)
            self.held[held.gang.queue] += held.processes
            if held.gang.group is not None:
                self.groups[held.gang.group] += 1
        if self._fresh:
            self._rate(held)

    def release(self, job_id: str) -> Held:
        """It holds nothing any more."""
        held = self.running.pop(job_id)
        self.leaving.pop(job_id, None)
        self._part(held.gang)
        self._unrate(job_id)
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
        new.keepers, new.leaving = self.keepers, self.leaving.copy()
        new._kinds = {kind: alike.copy() for kind, alike in self._kinds.items()}
        return new

    # What follows from it.

    def refresh(self, now: float) -> None:
        """Bring levels up to `now`: gangs rise as they wait and sink as they run; what history tells may be new."""
        version, self._version = self._version, self.history.version
        if not self._fresh or now < self._now:
            self._now, self._fresh = now, True
            self._begin()
            return
        self._now = now
        if version != self._version:
            for kind in self.history.changed(version, self._kinds):
                for job_id in self._kinds[kind]:
                    self._rate_again(job_id)
        for job_id in self._due.pop(now):
            self._rate_again(job_id)
        self.standing.refresh(now)

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

    def next_level_at(self) -> float:
        """When time alone changes a level; math.inf for never."""
        return self._due.next_at()

    def _join(self, gang: Gang) -> None:
        self._kinds.setdefault(kind_of(gang), {})[gang.job_id] = None

    def _part(self, gang: Gang) -> None:
        kind = kind_of(gang)
        del self._kinds[kind][gang.job_id]
        if not self._kinds[kind]:
            del self._kinds[kind]

    def _begin(self) -> None:
        """Levels, lines and standing of all that is here."""
        levels = self._levels = {}
        due: dict[str, float] = {}
        soonest = self._now + MOMENT_S
        for job_id, gang in self.waiting.items():
            levels[job_id], at = self._waits(gang)
            if at < math.inf:
                due[job_id] = max(at + MOMENT_S, soonest)
        self.lines.fill((gang, levels[job_id]) for job_id, gang in self.waiting.items())
        self._due = Dues(due)
        self.standing = Standing(self.rules, self.history)
        for held in self.running.values():
            self._rate(held)

    def _waits(self, gang: Gang) -> tuple[int, float]:
        """Level of a gang that waits, and until when."""
        if gang.target is not None:
            return AT_ONCE, math.inf
        lift = lifts(gang.waited_s + max(0.0, self._now - gang.queued_at), self.rules)
        level = self._table.at(gang, gang.ran_s, lift)
        return level, gang.queued_at + next_lift_s(lift, self.rules) - gang.waited_s if level else math.inf

    def _level_waiting(self, gang: Gang) -> int:
        level, at = self._waits(gang)
        self._look_again(gang, at)
        self._levels[gang.job_id] = level
        return level

    def _rate(self, held: Held) -> None:
        gang = held.gang
        ran, lift = gang.ran_s + max(0.0, self._now - held.since), lifts(gang.waited_s, self.rules)
        level = self._levels[gang.job_id] = self._table.at(gang, ran, lift)
        self.standing.add(held, level, self._now)
        if gang.oracle_s is not None:
            ran = next_fall_s(gang, ran, lift, self.rules)
        else:
            ran = self._table.next_class_s(gang, ran, lift)
        self._look_again(gang, held.since + ran - gang.ran_s)

    def _rate_again(self, job_id: str) -> None:
        if job_id in self.running:
            self.standing.remove(job_id)
            self._rate(self.running[job_id])
            return
        gang, before = self.waiting[job_id], self._levels[job_id]
        level = self._level_waiting(gang)
        if level != before:
            self.lines.remove(gang, before)
            self.lines.add(gang, level)

    def _unrate(self, job_id: str) -> None:
        self._levels.pop(job_id, None)
        self._due.drop(job_id)
        self.standing.remove(job_id)

    def _look_again(self, gang: Gang, at: float) -> None:
        """Its level is another one then; math.inf for never."""
        self._due.set(gang.job_id, max(at, self._now) + MOMENT_S)
