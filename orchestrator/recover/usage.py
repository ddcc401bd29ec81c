"""What jobs held of a cluster in a time, what was idle, and what it cost. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.cluster.status import Energy, Slots
from orchestrator.recover.ledger import Account, Category, Span, share_of, total

HOUR_S = 3600.0
J_PER_KWH = 3.6e6
CPU = "cpu"

Inventory = tuple[float, Mapping[str, Slots]]
"""From when on, and by node id."""


@dataclass(frozen=True)
class Part:
    """A span of a job, and what held its slots."""

    span: Span
    kinds: Mapping[str, int]
    """Processes by the kind of their slots."""
    broke: bool
    """Whether it is of an attempt that failed."""

    @property
    def length_s(self) -> float:
        return self.span.until - self.span.since


@dataclass(frozen=True)
class Use:
    """Sums of parts. Seconds are those of jobs, slot-seconds the same times their processes."""

    seconds: Mapping[Category, float]
    slot_seconds: Mapping[Category, float]
    kind_seconds: Mapping[str, float]
    """Slot-seconds by the kind of the slots."""
    lost_to_preemption_slot_s: float
    """Slots held for work that a planned stop, or a damaged checkpoint, has undone."""
    lost_to_failures_slot_s: float
    """For work that was lost by an attempt that failed."""
    lost_to_startup_slot_s: float
    """By attempts that did not train yet."""

    @property
    def lost_slot_s(self) -> float:
        return self.lost_to_preemption_slot_s + self.lost_to_failures_slot_s + self.lost_to_startup_slot_s

    @property
    def useful(self) -> float | None:
        """Training, as a share of the slot-seconds that were held."""
        return share_of(self.slot_seconds, math.fsum(self.slot_seconds.values()))

    def cost(self, prices: Mapping[str, float]) -> float | None:
        """By prices of an hour of a slot; None where there are none, or not of all that was held."""
        known = {kind.lower(): price for kind, price in prices.items()}
        if not known or any(kind.lower() not in known for kind in self.kind_seconds):
            return None
        return math.fsum(seconds / HOUR_S * known[kind.lower()] for kind, seconds in self.kind_seconds.items())


def parts_of(account: Account, kinds: Mapping[int, Mapping[str, int]]) -> list[Part]:
    """The spans of a job; `kinds` is of its attempts."""
    return [
        Part(span, kinds.get(span.stint, {}) if span.stint is not None else {}, span.stint in account.broken)
        for span in account.spans
    ]


def within(parts: Iterable[Part], since: float, until: float) -> list[Part]:
    """What of them lies there."""
    found = ((part, part.span.within(since, until)) for part in parts)
    return [replace(part, span=span) for part, span in found if span is not None]


def use_of(parts: Sequence[Part]) -> Use:
    spans = [part.span for part in parts]
    kinds: dict[str, list[float]] = {}
    for part in parts:
        for kind, processes in part.kinds.items():
            kinds.setdefault(kind, []).append(part.length_s * processes)
    lost = {
        broke: math.fsum(
            part.span.seconds.get(Category.LOST, 0.0) * part.span.processes for part in parts if part.broke == broke
        )
        for broke in (True, False)
    }
    return Use(
        seconds=total(spans),
        slot_seconds=total(spans, slots=True),
        kind_seconds={kind: math.fsum(values) for kind, values in sorted(kinds.items())},
        lost_to_preemption_slot_s=lost[False],
        lost_to_failures_slot_s=lost[True],
        lost_to_startup_slot_s=math.fsum((span.until - span.since) * span.processes for span in spans if span.startup),
    )


def offered(inventories: Sequence[Inventory], since: float, until: float) -> tuple[float | None, dict[str, float]]:
    """From when on it is known which slots there were, None for nothing; and their slot-seconds by kind."""
    found: dict[str, list[float]] = {}
    first = None
    for index, (time, nodes) in enumerate(inventories):
        low, high = max(since, time), min(until, inventories[index + 1][0] if index + 1 < len(inventories) else until)
        if low >= until:
            break
        first = low if first is None else first
        for slots in nodes.values():
            found.setdefault(slots.kind, []).append(slots.slots * max(0.0, high - low))
    return first, {kind: math.fsum(values) for kind, values in sorted(found.items())}


def bins_of(parts: Iterable[Part], since: float, until: float, count: int) -> list[dict[Category, float]]:
    """Slot-seconds by category in each of `count` equal spans of time."""
    width = (until - since) / count
    found: list[dict[Category, float]] = [{} for _ in range(count)]
    for part in within(parts, since, until):
        if not part.span.processes:
            continue
        for at in range(int((part.span.since - since) / width), count):
            piece = part.span.within(since + at * width, since + (at + 1) * width)
            if piece is None:
                if since + at * width >= part.span.until:
                    break
                continue
            for category, seconds in piece.seconds.items():
                found[at][category] = found[at].get(category, 0.0) + seconds * piece.processes
    return found


def energy_of(told: Sequence[Energy | None] | None, *, whole: bool) -> Energy:
    """What an attempt took, by the counters of its nodes: null unless all of them told it. GPUs it held alone; what the
    processors took is its own only where it held `whole` nodes, else nobody knows whose it was."""
    gpu = _sum([None if one is None else one.gpu_j for one in told or ()])
    cpu = _sum([None if one is None else one.cpu_j for one in told or ()]) if whole else None
    return Energy(gpu_j=gpu, cpu_j=cpu)


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known and len(known) == len(values) else None
