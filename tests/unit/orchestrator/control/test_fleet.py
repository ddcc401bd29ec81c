"""How many nodes a fleet wants, from plain values."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.cluster.capacity import Capacity
from orchestrator.cluster.group import Group
from orchestrator.cluster.model import Placement
from orchestrator.control.fleet import Idle, Look, Present, Wishes, potential, wish
from orchestrator.job.lifecycle import ReasonCode
from orchestrator.schedule.place import place
from tests.builders import a_gang, a_node

IDLE_S = 100.0


def a_group(name: str = "cpu", replicas: int = 0, most: int = 4, least: int = 0, slots: int = 4, **node: Any) -> Group:
    return Group(name, replicas, least, most, a_node("like", slots, **node))


def nodes(group: Group, count: int, **keys: Any) -> list[Present]:
    some = [
        group.like.model_copy(update={"id": f"{group.name}-{n}", "name": f"{group.name}-{n}"}) for n in range(count)
    ]
    return [Present(node, group.name, **{"busy": False, **keys}) for node in some]


def wanted(look: Look, idle: Idle | None = None, now: float = 0.0) -> Wishes:
    return wish(look, idle or Idle(), IDLE_S, now)[0]


def long_idle(look: Look) -> Wishes:
    """What is wanted once everything has been as it is for long."""
    _, idle = wish(look, Idle(), IDLE_S, 0.0)
    return wish(look, idle, IDLE_S, IDLE_S)[0]


def on(present: Present, ranks: int) -> Placement:
    found = place(Capacity([present.node]), ranks, "any")
    assert found is not None
    return found


def test_it_grows_for_who_waits_and_by_no_more() -> None:
    group = a_group()
    grown = wanted(Look([group], [], [a_gang("j1", 6)]))
    assert grown.replicas == {"cpu": 2}
    assert grown.reasons["j1"].code == ReasonCode.NO_NODES
    assert grown.reasons["j1"].sentence == "the cluster grows for it: cpu to 2 nodes"
    assert wanted(Look([group], [], [])).replicas == {"cpu": 0}


def test_what_is_on_its_way_is_counted_once() -> None:
    group = a_group(replicas=2)
    assert wanted(Look([group], [], [a_gang("j1", 6)])).replicas == {"cpu": 2}
    assert wanted(Look([group], nodes(group, 1), [a_gang("j1", 6)])).replicas == {"cpu": 2}
    assert wanted(Look([group], [], [a_gang("j1", 6), a_gang("j2", 3)])).replicas == {"cpu": 3}


def test_all_of_a_gang_or_nothing() -> None:
    group = a_group(most=2)
    grown = wanted(Look([group], [], [a_gang("j1", 9), a_gang("j2", 2)]))
    assert grown.replicas == {"cpu": 1}
    assert "j1" not in grown.reasons


def test_slots_that_are_held_are_not_free() -> None:
    group = a_group(replicas=1)
    (there,) = nodes(group, 1, busy=True)
    look = Look([group], [there], [a_gang("j1", 2)], [on(there, 3)])
    assert wanted(look).replicas == {"cpu": 2}
    assert wanted(replace(look, held=[on(there, 2)])).replicas == {"cpu": 1}


def test_the_group_that_needs_fewest_nodes() -> None:
    small, large = a_group("small", slots=2), a_group("large", slots=8)
    assert wanted(Look([small, large], [], [a_gang("j1", 6)])).replicas == {"small": 0, "large": 1}
    assert wanted(Look([small, large], [], [a_gang("j1", 2)])).replicas == {"small": 1, "large": 0}


def test_the_group_of_its_accelerator() -> None:
    cpu, gpu = a_group("cpu"), a_group("gpu", gpus=8)
    assert wanted(Look([cpu, gpu], [], [a_gang("j1", 4, accelerator="H100")])).replicas == {"cpu": 0, "gpu": 1}
    assert wanted(Look([cpu, gpu], [], [a_gang("j1", 4, accelerator="A100")])).replicas == {"cpu": 0, "gpu": 0}


def test_bounds() -> None:
    assert wanted(Look([a_group(least=2)], [], [])).replicas == {"cpu": 2}
    full = a_group(replicas=4)
    assert wanted(Look([full], nodes(full, 4, busy=True), [a_gang("j1", 9)])).replicas == {"cpu": 4}


def test_an_idle_node_is_closed_first_and_given_back_later() -> None:
    group = a_group(replicas=2)
    busy, idle = nodes(group, 2)
    look = Look([group], [replace(busy, busy=True), idle], [], [on(busy, 1)])
    assert (wanted(look).close, wanted(look).replicas) == ((), {"cpu": 2})  # not for long enough
    closing = long_idle(look)
    assert (closing.close, closing.replicas, closing.give_back) == ((idle.node,), {"cpu": 2}, {"cpu": ()})
    closed = replace(look, nodes=[replace(busy, busy=True), replace(idle, closed=True)])
    assert long_idle(closed).replicas == {"cpu": 2}  # the scheduler has not looked since
    leaving = long_idle(replace(closed, settled={idle.node.id}))
    assert (leaving.give_back, leaving.replicas) == ({"cpu": (idle.node,)}, {"cpu": 1})


def test_a_node_with_ranks_is_never_given_back() -> None:
    group = a_group(replicas=1)
    (there,) = nodes(group, 1, busy=True, closed=True)
    kept = long_idle(Look([group], [there], [], [on(there, 1)], {there.node.id}))
    assert (kept.give_back, kept.replicas, kept.open) == ({"cpu": ()}, {"cpu": 1}, (there.node,))


def test_a_closed_node_is_opened_for_who_waits() -> None:
    group = a_group(replicas=1)
    (there,) = nodes(group, 1, closed=True)
    wishes = long_idle(Look([group], [there], [a_gang("j1", 2)], [], {there.node.id}))
    assert (wishes.open, wishes.replicas) == ((there.node,), {"cpu": 1})


def test_the_least_stays() -> None:
    group = a_group(replicas=2, least=1)
    wishes = long_idle(Look([group], nodes(group, 2), []))
    assert len(wishes.close) == 1


def test_what_others_closed_is_theirs() -> None:
    group = a_group(replicas=1)
    (there,) = nodes(group, 1, closed_for_others=True)
    wishes = long_idle(Look([group], [there], [a_gang("j1", 1)]))
    assert (wishes.close, wishes.open, wishes.give_back) == ((), (), {"cpu": ()})
    assert wishes.replicas == {"cpu": 2}  # nothing starts on it


def test_nodes_that_never_come_are_given_up_when_nobody_waits() -> None:
    group = a_group(replicas=3)
    look = Look([group], [], [])
    assert wanted(look).replicas == {"cpu": 3}
    assert long_idle(look).replicas == {"cpu": 0}
    assert long_idle(replace(look, waiting=[a_gang("j1", 9)])).replicas == {"cpu": 3}


def test_busy_for_a_moment_is_not_idle_for_long() -> None:
    group = a_group(replicas=1)
    (there,) = nodes(group, 1)
    look, busy = Look([group], [there], []), Look([group], [replace(there, busy=True)], [], [on(there, 1)])
    idle = Idle()
    for now, seen in ((0.0, look), (50.0, busy), (90.0, look), (150.0, look)):
        wishes, idle = wish(seen, idle, IDLE_S, now)
        assert wishes.close == ()
    wishes, _ = wish(look, idle, IDLE_S, 190.0)
    assert wishes.close == (there.node,)


def test_what_there_could_be() -> None:
    group = a_group(replicas=1, most=3)
    assert [node.id for node in potential([group], nodes(group, 1))] == ["cpu+1", "cpu+2"]


@pytest.mark.parametrize("waiting", [0, 1, 5, 40])
def test_it_settles(waiting: int) -> None:
    """Carried out at once, wishes come to rest, and never ask for what is needless."""
    group, idle = a_group(most=8), Idle()
    gangs = [a_gang(f"j{number}", 3) for number in range(waiting)]
    before = -1
    for step in range(20):
        look = Look([group], nodes(group, group.replicas), gangs)
        wishes, idle = wish(look, idle, IDLE_S, float(step))
        group = replace(group, replicas=wishes.replicas["cpu"])
        if step > 2:
            assert group.replicas == before
        before = group.replicas
    assert before == min(8, math.ceil(waiting * 3 / 4))  # of which each node has four slots
