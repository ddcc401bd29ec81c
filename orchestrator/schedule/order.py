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


def level_of(gang: Gang, ran_s: float, waited_s: float, history: History, rules: Rules) -> int:
    """0 is the best. Work is expected rank-seconds to the end, in powers of `level_factor`; waiting lifts."""
    if gang.oracle_s is not None:
        return max(0, _level(gang, max(gang.oracle_s - ran_s, 1.0), rules) - lifts(waited_s, rules))
    return max(0, levels_of(gang, history, rules)[class_of(ran_s)] - lifts(waited_s, rules))


def levels_of(gang: Gang, history: History, rules: Rules) -> Sequence[int]:
    """Its level in each class of run times, before waiting lifts it."""
    memo, expected_s = history.memo(gang)
    key = gang.min_processes, rules.first_level_s, rules.level_factor, rules.levels
    if key not in memo:
        memo[key] = [_level(gang, expected, rules) for expected in expected_s]
    return cast(Sequence[int], memo[key])


def _level(gang: Gang, expected_s: float, rules: Rules) -> int:
    work = expected_s * gang.min_processes / rules.first_level_s
    level = round(math.log(work, rules.level_factor)) if work > 1 else 0
    return min(level, rules.levels - 1)


def next_class_s(gang: Gang, ran_s: float, waited_s: float, history: History, rules: Rules) -> float:
    """The run time at which a gang is in another level; math.inf if it never is."""
    levels, lift = levels_of(gang, history, rules), lifts(waited_s, rules)
    at = class_of(ran_s)
    now = max(0, levels[at] - lift)
    return next((GRID[later] for later in range(at + 1, len(GRID)) if max(0, levels[later] - lift) != now), math.inf)


def next_fall_s(gang: Gang, ran_s: float, waited_s: float, rules: Rules) -> float:
    """The run time at which a gang whose end is known is in a better level; math.inf if it never is."""
    assert gang.oracle_s is not None
    work = max(gang.oracle_s - ran_s, 1.0) * gang.min_processes / rules.first_level_s
    level = min(round(math.log(work, rules.level_factor)), rules.levels - 1) if work > 1 else 0
    left = rules.first_level_s * rules.level_factor ** (level - 0.5) / gang.min_processes
    return gang.oracle_s - left if level > lifts(waited_s, rules) and left > 1 else math.inf


def lifts(waited_s: float, rules: Rules) -> int:
    """Levels that waiting has lifted a gang by: one after `starving_s`, another ever sooner after the one before."""
    return int(2.0 ** min(waited_s / rules.starving_s, 32.0)) - 1


def next_lift_s(waited_s: float, rules: Rules) -> float:
    """How long the gang must have waited for another one."""
    return rules.starving_s * math.log2(lifts(waited_s, rules) + 2)


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
        self.classes = {}
        for gang, level in gangs:
            queues = self.classes.setdefault(gang.priority, {})
            line = queues.setdefault(gang.queue, {}).setdefault(shape_of(gang), [])
            line.append((level, gang.sequence, gang.job_id))
        for queues in self.classes.values():
            for shapes in queues.values():
                for line in shapes.values():
                    line.sort()

    def __iter__(self) -> Iterator[int]:
        """Classes, the highest first."""
        return iter(sorted(self.classes, reverse=True))
