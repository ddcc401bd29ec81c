"""Slots are written down when they change, and not otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestrator.cluster.status import Slots
from orchestrator.control.inventory import slots_of
from orchestrator.control.loop import Controller
from tests.builders import a_command_job, a_node
from tests.unit.orchestrator.control.test_loop import Scene


@pytest.fixture
def scene() -> Iterator[Scene]:
    found = Scene()
    yield found
    found.store.close()


def written(scene: Scene) -> list[tuple[float, dict[str, int]]]:
    return [(row.time, {node: one.slots for node, one in row.nodes.items()}) for row in scene.store.inventories(-1.0)]


def test_a_node_with_gpus_takes_a_rank_on_each() -> None:
    nodes = [a_node("a", slots=4), a_node("b", slots=4, gpus=2, gpu_type="A100"), a_node("head", slots=0)]
    assert slots_of(nodes) == {"a": Slots(name="a", kind="cpu", slots=4), "b": Slots(name="b", kind="A100", slots=2)}


def test_a_row_whenever_the_slots_change(scene: Scene) -> None:
    begin = scene.world.now
    scene.tick()
    scene.tick(1.0)
    scene.world.all = (*scene.world.all, a_node("n1", slots=2))
    scene.world.up.add("n1")
    scene.tick(1.0)
    scene.tick(1.0)
    assert written(scene) == [(begin, {"n0": 4}), (begin + 2, {"n0": 4, "n1": 2})]


def test_the_next_controller_goes_on_from_what_is_written(scene: Scene) -> None:
    scene.submit("job", a_command_job(1))
    scene.tick()
    scene.controller.close()
    assert len(written(scene)) == 1  # the job holds on to them
    scene.controller = Controller(scene.store, scene.world, scene.controller.settings, clock=lambda: scene.world.now)
    scene.tick(1.0)
    assert len(written(scene)) == 1


def test_slots_of_a_yard_that_is_down_are_not_idle(scene: Scene) -> None:
    scene.tick()
    scene.world.now += 5
    scene.controller.close()
    assert [nodes for _, nodes in written(scene)] == [{"n0": 4}, {}]
    scene.tick(5.0)
    assert [nodes for _, nodes in written(scene)] == [{"n0": 4}, {}, {"n0": 4}]
