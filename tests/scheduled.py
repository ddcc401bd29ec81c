"""Yards, queues and gangs of any kind, and what becomes of them: for tests of the scheduler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import Phase
from hypothesis import strategies as st

from orchestrator.cluster.model import Gpu, Node, Option
from orchestrator.schedule.gang import Gang, Held, Queue, Rules, Start, Stop, Why
from orchestrator.schedule.yard import Yard
from tests.builders import a_gang, a_node, an_option

# Not shrunk: that takes minutes, and the steps of a failing yard are short enough to read.
QUICK = [Phase.explicit, Phase.reuse, Phase.generate]
EVICTED = (Why.HIGHER_CLASS, Why.QUOTA, Why.SHORTER)
RULES = Rules(
    first_level_s=60.0, starving_s=997.3, patience_s=10.0, min_run_s=100.0, min_run_for_class_s=20.0, max_evictions=3,
    grow_after_s=50.0,
)  # fmt: skip
NAMES = ("a", "b", "c")


def mixed(name: str) -> Node:
    """Its GPUs differ."""
    gpus = tuple(Gpu(index=at, type="AH"[at // 2], memory_bytes=(16 + 48 * (at // 2)) * 2**30) for at in range(4))
    return a_node(name, memory_gib=60).model_copy(update={"gpus": gpus})


racks = st.sampled_from([None, "r", "s"])
machines = st.one_of(
    st.builds(a_node, slots=st.integers(2, 5), memory_gib=st.sampled_from([None, 12, 30]), rack=racks),
    st.builds(
        a_node, gpus=st.sampled_from([2, 4]), gpu_type=st.sampled_from("AH"), memory_gib=st.just(40.0), rack=racks
    ),
    st.builds(mixed, st.just("m")),
)
yards = st.lists(machines, min_size=2, max_size=4).map(
    lambda found: tuple(node.model_copy(update={"id": f"n{at}", "name": f"n{at}"}) for at, node in enumerate(found))
)
queues = st.builds(
    Queue,
    name=st.sampled_from(NAMES),
    weight=st.sampled_from([0.5, 1.0, 3.0]),
    guaranteed=st.none() | st.integers(0, 4),
    ceiling=st.none() | st.integers(1, 8),
    lendable=st.booleans(),
)
ways = st.lists(
    st.builds(an_option, st.integers(1, 4), st.sampled_from([2.0, 7.0]), st.sampled_from([0, 0, 10, 40])),
    min_size=1,
    max_size=3,
).map(tuple)


@st.composite
def gangs(draw: st.DrawFn) -> Gang:
    """Without a name yet."""
    options: tuple[Option, ...] | None = draw(st.none() | st.none() | ways)
    low = draw(st.sampled_from([1, 1, 2, 3, 4])) if options is None else min(option.processes for option in options)
    high = low + draw(st.sampled_from([0, 0, 2, 4])) if options is None else max(option.processes for option in options)
    array = draw(st.sampled_from([None, None, None, "x", "y"]))
    return a_gang(
        "?",
        low,
        most=high,
        options=options,
        accelerator=draw(st.sampled_from(["any", "any", "cpu", "gpu", "A"])) if options is None else "any",
        priority=draw(st.sampled_from([0, 0, 0, 1, 2])),
        queue=draw(st.sampled_from(NAMES)),
        name=draw(st.sampled_from(["train", "eval"])),
        preemptible=draw(st.sampled_from([True, True, True, False])),
        group=array,
        at_once=draw(st.integers(1, 3)) if array is not None else None,
        left_s=draw(st.sampled_from([None, None, 500.0])),
        oracle_s=draw(st.sampled_from([None, None, None, 30.7, 2000.9])),
    )


def open_slots(yard: Yard, accelerator: str) -> int:
    """Free ones of nodes that take `accelerator` and are not closed, one by one."""
    ground = yard.capacity.ground
    return sum(
        max(0, yard.capacity.free(node, accelerator)) for at, node in enumerate(ground.nodes) if ground.open >> at & 1
    )


def on_open(yard: Yard, held: Held, accelerator: str) -> int:
    """Ranks of a gang on nodes that are not closed and take `accelerator`."""
    ground = yard.capacity.ground
    nodes = {node.id for at, node in enumerate(ground.nodes) if ground.open >> at & 1 and node.takes(accelerator)}
    return sum(share.processes for share in held.placement.shares if share.node in nodes)


def look(yard: Yard) -> list[Any]:
    """All that a yard is."""
    capacity = yard.capacity
    inside = (capacity.free_at, capacity.with_free, capacity._gpus, capacity._memory)
    return [dict(yard.waiting), dict(yard.running), dict(yard.held), dict(yard.groups), *map(list, inside)]


def started(yard: Yard, start: Start, now: float) -> None:
    gang = yard.waiting[start.job_id]
    waited = gang.waited_s + now - gang.queued_at
    yard.hold(Held(replace(gang, waited_s=waited, target=None), start.placement, now))


def back(yard: Yard, job_id: str, now: float, stop: Stop | None) -> None:
    """It has let go of its slots, and waits again."""
    held = yard.release(job_id)
    gang, ran = held.gang, now - held.since
    yard.wait(
        replace(
            gang,
            queued_at=now,
            ran_s=gang.ran_s + ran,
            left_s=None if gang.left_s is None else max(0.0, gang.left_s - ran),
            evictions=gang.evictions + (stop is not None and stop.why in EVICTED),
            target=stop.target if stop is not None else None,
        )
    )
