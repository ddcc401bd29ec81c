"""Who comes first: classes of priority, then queues by their share, then levels of expected work. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from orchestrator.schedule.gang import Gang, Queue, Rules
from orchestrator.schedule.history import GRID, History, class_of

Shape = tuple[int, int, str, object]
"""Gangs of one shape fit where the others do: bounds, accelerator, what each way to run needs, and what to avoid."""
Entry = tuple[int, int, str]
"""A gang in its line: level, order of submission, job id."""
AT_ONCE = -1
"""Level of a gang that was stopped to go on with another number of ranks."""


def shape_of(gang: Gang) -> Shape:
    ways = None
    if gang.options is not None:
        ways = tuple((option.processes, option.device, option.need) for option in gang.options)
    return gang.min_processes, gang.most, gang.accelerator, (ways, gang.avoid) if gang.avoid else ways


class Levels:
    """Levels of gangs, where 0 is the best. Work is expected rank-seconds to the end, in powers of `level_factor`."""

    def __init__(self, history: History, rules: Rules) -> None:
        self._history, self._rules = history, rules
        self._version = history.version
        self._found: dict[tuple[str, str, int], Sequence[int]] = {}

    def of(self, gang: Gang) -> Sequence[int]:
        """In each class of run times, before waiting lifts it."""
        if self._version != self._history.version:
            self._version, self._found = self._history.version, {}
        alike = gang.queue, gang.name, gang.min_processes
        found = self._found.get(alike)
        if found is None:
            found = self._found[alike] = self._look_up(gang)
        return found

    def at(self, gang: Gang, ran_s: float, lift: int) -> int:
        """After it ran for so long, and with what waiting has lifted it by."""
        if gang.oracle_s is not None:
            return max(0, _level(gang, max(gang.oracle_s - ran_s, 1.0), self._rules) - lift)
        return max(0, self.of(gang)[class_of(ran_s) if ran_s else 0] - lift)

    def next_class_s(self, gang: Gang, ran_s: float, lift: int) -> float:
        """The run time at which a gang is in another level; math.inf if it never is."""
        levels = self.of(gang)
        at = class_of(ran_s)
        now = max(0, levels[at] - lift)
        for later in range(at + 1, len(GRID)):
            if max(0, levels[later] - lift) != now:
                return GRID[later]
        return math.inf

    def _look_up(self, gang: Gang) -> Sequence[int]:
        memo, expected_s = self._history.memo(gang)
        rules = self._rules
        key = gang.min_processes, rules.first_level_s, rules.level_factor, rules.levels
        if key not in memo:
            memo[key] = [_level(gang, expected, rules) for expected in expected_s]
        return cast(Sequence[int], memo[key])


def _level(gang: Gang, expected_s: float, rules: Rules) -> int:
    work = expected_s * gang.min_processes / rules.first_level_s
    level = round(math.log(work, rules.level_factor)) if work > 1 else 0
    return min(level, rules.levels - 1)


def next_fall_s(gang: Gang, ran_s: float, lift: int, rules: Rules) -> float:
    """The run time at which a gang whose end is known is in a better level; math.inf if it never is."""
    assert gang.oracle_s is not None
    work = max(gang.oracle_s - ran_s, 1.0) * gang.min_processes / rules.first_level_s
    level = min(round(math.log(work, rules.level_factor)), rules.levels - 1) if work > 1 else 0
    left = rules.first_level_s * rules.level_factor ** (level - 0.5) / gang.min_processes
    return gang.oracle_s - left if level > lift and left > 1 else math.inf


def lifts(waited_s: float, rules: Rules) -> int:
    """Levels that waiting has lifted a gang by: one after `starving_s`, another ever sooner after the one before."""
    return int(2.0 ** min(waited_s / rules.starving_s, 32.0)) - 1


def next_lift_s(lift: int, rules: Rules) -> float:
    """How long a gang must have waited for one more."""
    return rules.starving_s * math.log2(lift + 2)


def share_of(queue: Queue, held: int, more: int = 0) -> tuple[bool, float]:
    """The least comes first: what is guaranteed goes before what is borrowed. `more` is what the queue asks for."""
    return borrows(queue, held + more), held / queue.weight


def borrows(queue: Queue, held: int) -> bool:
    """Whether it holds more than is its own."""
    return queue.guaranteed is None or held > queue.guaranteed


class Lines:
    """Waiting gangs by class, queue and shape, each line in order. Entries are told apart by their job id."""

    def __init__(self) -> None:
        self.classes: dict[int, dict[str, dict[Shape, list[Entry]]]] = {}

    def add(self, gang: Gang, level: int) -> None:
        queues = self.classes.setdefault(gang.priority, {})
        line = queues.setdefault(gang.queue, {}).setdefault(shape_of(gang), [])
        insort(line, (level, gang.sequence, gang.job_id))

    def remove(self, gang: Gang, level: int) -> None:
        queues = self.classes[gang.priority]
        shapes = queues[gang.queue]
        shape = shape_of(gang)
        line = shapes[shape]
        entry = (level, gang.sequence, gang.job_id)
        at = bisect_left(line, entry)
        assert line[at] == entry
        del line[at]
        if not line:
            del shapes[shape]
            if not shapes:
                del queues[gang.queue]
                if not queues:
                    del self.classes[gang.priority]

    def fill(self, gangs: Iterable[tuple[Gang, int]]) -> None:
        """All at once, in place of what is there."""
        lines: dict[tuple[int, str, Shape], list[Entry]] = {}
        for gang, level in gangs:
            key = gang.priority, gang.queue, shape_of(gang)
            line = lines.get(key)
            if line is None:
                line = lines[key] = []
            line.append((level, gang.sequence, gang.job_id))
        self.classes = {}
        for (priority, queue, shape), line in lines.items():
            line.sort()
            self.classes.setdefault(priority, {}).setdefault(queue, {})[shape] = line

    def __iter__(self) -> Iterator[int]:
        """Classes, the highest first."""
        return iter(sorted(self.classes, reverse=True))
