"""A scrape: what the acting controller knows by heart, and a few sums of the database. Nothing is asked of nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

from orchestrator.cluster.model import Node
from orchestrator.errors import StoreError
from orchestrator.store.store import Store
from orchestrator.watch import families
from orchestrator.watch.families import Family

Labels = TypeVar("Labels", bound=tuple[str, ...])
FREE, USED, CLOSED = "free", "used", "closed"


@dataclass(frozen=True)
class Known:
    """What a controller knows of itself and its nodes."""

    version: str
    acting: bool = False
    ticks: int = 0
    tick_s: float = 0.0
    """Of all ticks together."""
    last_tick_at: float | None = None
    ends: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """(outcome, reason) of attempts."""
    nodes: Sequence[Node] = ()
    """As it saw them last."""


class Collector:
    """Reads on each scrape. A standby tells of itself alone, so that sums over controllers count nothing twice.

    `slot_seconds` tells what slots were held for, by category; None where that would take too long.
    """

    def __init__(
        self,
        store: Store,
        known: Callable[[], Known],
        slot_seconds: Callable[[], Mapping[str, float] | None],
        clock: Callable[[], float],
    ) -> None:
        self._store, self._known, self._slot_seconds, self._clock = store, known, slot_seconds, clock

    def registry(self) -> CollectorRegistry:
        """One that holds this collector alone."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return registry

    def collect(self) -> Iterator[Metric]:
        known = self._known()
        yield _gauge(families.BUILD, {(known.version,): 1.0})
        yield _gauge(families.ACTING, {(): float(known.acting)})
        if known.last_tick_at is not None:
            yield _gauge(families.LAST_TICK, {(): known.last_tick_at})
        ticks = SummaryMetricFamily(families.TICKS.name, families.TICKS.told)
        ticks.add_metric((), count_value=known.ticks, sum_value=known.tick_s)
        yield ticks
        yield _counter(families.ATTEMPTS_ENDED, known.ends)
        if not known.acting:
            return
        try:
            yield from list(self._stored(known))
        except StoreError:
            yield _gauge(families.STORE_UP, {(): 0.0})
        else:
            yield _gauge(families.STORE_UP, {(): 1.0})

    def _stored(self, known: Known) -> Iterator[Metric]:
        now, live = self._clock(), self._store.live_counts()
        yield _gauge(families.JOBS, {(one.queue, one.state): one.jobs for one in live})
        waits = {(one.queue,): max(0.0, now - one.waits_since) for one in live if one.waits_since is not None}
        yield _gauge(families.OLDEST_WAIT, waits)
        yield _counter(families.JOBS_ENDED, {(state,): count for state, count in self._store.ended_counts().items()})
        closed = {mark.name for mark in self._store.node_marks()}
        busy = Counter[str]()
        for placement in self._store.placements():
            for share in placement.shares:
                busy[share.node] += share.processes
        yield from slots(known.nodes, busy, closed)
        spent = self._slot_seconds()
        if spent is not None:
            yield _gauge(families.SLOT_SECONDS, {(category,): seconds for category, seconds in spent.items()})


def slots(nodes: Iterable[Node], busy: Mapping[str, int], closed: Iterable[str]) -> Iterator[Metric]:
    """Nodes and their slots by what they do; `busy` is ranks by node id, `closed` has names of nodes."""
    shut = set(closed)
    states, cpus, gpus = Counter[tuple[str]](), Counter[tuple[str]](), Counter[tuple[str, str]]()
    for node in nodes:
        total = len(node.gpus) or node.cpu_slots
        if not total:
            continue  # a head, which takes none
        used = min(total, busy.get(node.id, 0))
        idle = CLOSED if node.name in shut else FREE
        states[(idle if idle == CLOSED or not used else USED,)] += 1
        if node.gpus:
            kind = min(gpu.type for gpu in node.gpus)
            gpus[kind, USED] += used
            gpus[kind, idle] += total - used
        else:
            cpus[(USED,)] += used
            cpus[(idle,)] += total - used
    yield _gauge(families.NODES, {(state,): states[(state,)] for state in (FREE, USED, CLOSED)})
    yield _gauge(families.GPUS, gpus)
    yield _gauge(families.CPU_SLOTS, {(state,): cpus[(state,)] for state in (FREE, USED, CLOSED)})


def _gauge(family: Family, values: Mapping[Labels, float]) -> Metric:
    metric = GaugeMetricFamily(family.name, family.told, labels=family.labels)
    for labels, value in sorted(values.items()):
        metric.add_metric(labels, value)
    return metric


def _counter(family: Family, values: Mapping[Labels, float]) -> Metric:
    metric = CounterMetricFamily(family.name, family.told, labels=family.labels)
    for labels, value in sorted(values.items()):
        metric.add_metric(labels, value)
    return metric
