"""What one tick does: who starts is decided when it is stored what has ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from launch.attempt import ExitCode
from launch.contract import RunContract
from orchestrator.cluster.status import AttemptStatus, Spent
from orchestrator.control.actions import EndAttempt, SendStop, StartAttempt
from orchestrator.control.loop import Controller
from orchestrator.settings import Settings
from orchestrator.store.store import Store
from tests.builders import a_command_job, a_node, a_training_job, an_exit
from tests.virtual import World


class Scene:
    """A controller of a node with four slots, or of others."""

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World([a_node(slots=4)])
        self.store = Store("sqlite:///:memory:")
        self.store.prepare()
        self.controller = Controller(self.store, self.world, Settings(), clock=lambda: self.world.now)

    def submit(self, job_id: str, job: Any) -> None:
        self.store.add_job(job_id, job, self.world.now)

    def tick(self, seconds: float = 0.0) -> list[Any]:
        self.world.now += seconds
        return self.controller.tick()

    def end(self, run_id: str, code: ExitCode) -> None:
        gang = self.world.gangs[run_id]
        for rank in range(gang.contract.plan.world_size):
            gang.exits[rank] = an_exit(rank, code, self.world.now)


@pytest.fixture
def scene() -> Iterator[Scene]:
    found = Scene()
    yield found
    found.controller.close()
    found.store.close()


def started(actions: list[Any]) -> dict[str, int]:
    return {one.job_id: one.placement.world_size for one in actions if isinstance(one, StartAttempt)}


def test_slots_of_an_attempt_that_ends_are_given_away_in_the_same_tick(scene: Scene) -> None:
    scene.submit("first", a_command_job(3))
    scene.submit("second", a_command_job(3))
    assert started(scene.tick()) == {"first": 3}
    scene.end("first.1", ExitCode.DONE)
    assert [type(action) for action in scene.tick(1.0)] == [EndAttempt, StartAttempt]


def test_what_comes_after_a_job_starts_in_the_tick_in_which_that_ends(scene: Scene) -> None:
    scene.submit("first", a_command_job(1))
    scene.submit("second", a_command_job(1, after=["first"]))
    assert started(scene.tick()) == {"first": 1}
    scene.end("first.1", ExitCode.DONE)
    assert started(scene.tick(1.0)) == {"second": 1}


def test_room_that_was_left_to_a_gang_that_shrinks_is_not_given_away_when_it_ends(scene: Scene) -> None:
    scene.submit("elastic", a_training_job("2..4"))
    assert started(scene.tick()) == {"elastic": 4}
    scene.world.now += 100.0
    scene.submit("high", a_training_job(2, priority="high"))
    scene.submit("other", a_training_job(2))
    (stop,) = (action for action in scene.tick() if isinstance(action, SendStop))
    assert (stop.job_id, stop.target) == ("elastic", 2)
    scene.end("elastic.1", ExitCode.STOPPED)
    assert started(scene.tick(5.0)) == {"high": 2, "elastic": 2}


def test_where_time_went_is_stored_while_an_attempt_runs_and_when_it_ends(scene: Scene) -> None:
    scene.submit("job", a_training_job(2))
    scene.tick()
    gang = scene.world.gangs["job.1"]
    gang.begun, gang.spent = True, Spent(began_at=scene.world.now, seconds={"load": 1.0}, phase="step", step=3)
    scene.tick(2.0)
    scene.tick(2.0)
    assert scene.store.attempts("job")[0].spent == gang.spent
    gang.spent = gang.spent.model_copy(update={"step": 9})
    failed_at = scene.world.now
    gang.exits = {0: an_exit(0, ExitCode.KILLED, failed_at), 1: an_exit(1, ExitCode.CRASH, failed_at + 1, echo=True)}
    scene.tick(2.0)
    assert scene.store.attempts("job")[0].spent == gang.spent.model_copy(update={"failed_at": failed_at})


class Sudden(World):
    """Nodes go while attempts are asked after."""

    going: str | None = None

    def poll(self, contracts: Sequence[RunContract], offsets: Mapping[str, int]) -> dict[str, AttemptStatus]:
        self.up.discard(self.going or "")
        return super().poll(contracts, offsets)


def test_nothing_starts_on_a_node_that_is_found_to_be_lost_in_the_same_tick() -> None:
    world = Sudden([a_node("n0"), a_node("n1")])
    scene = Scene(world)
    scene.submit("first", a_command_job(2))
    (start,) = (one for one in scene.tick() if isinstance(one, StartAttempt))
    world.going = start.placement.shares[0].node
    scene.submit("second", a_command_job(2))  # the rest of that node would suit it best
    (start,) = (one for one in scene.tick(1.0) if isinstance(one, StartAttempt))
    assert start.placement.shares[0].node != world.going
    scene.controller.close()
    scene.store.close()


def test_what_was_told_of_a_lost_node_stays(scene: Scene) -> None:
    scene.submit("job", a_training_job(2))
    scene.tick()
    gang = scene.world.gangs["job.1"]
    gang.begun, gang.spent = True, Spent(began_at=scene.world.now, phase="step", step=3)
    scene.tick(2.0)
    scene.tick(2.0)
    scene.world.up.clear()
    for _ in range(20):
        scene.tick(5.0)
    row = scene.store.attempts("job")[0]
    assert (row.outcome, row.spent) == ("node-lost", gang.spent)
