"""A real Ray yard of three nodes: who makes room for a gang of a higher class loses no step, and goes on elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.config import TrainSpec
from tests.worlds import a_contract, a_plan, start, write_bert, write_messages
from tests.yards import Yard, a_yard, until

STEPS = 100_000  # none gets so far: they are cancelled
RULES = {"min_run_for_class_s": 0, "grow_after_s": 1}


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with a_yard("--nodes", "3", cpu_slots="2", rules=json.dumps(RULES)) as yard:
        yield yard


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("world")
    return {
        "model": {
            "name_or_path": str(write_bert(folder / "bert")), "task": "sequence-classification", "dropout": 0.0,
        },
        "data": {"train": str(write_messages(folder / "data.tsv")), "split": {"test": 0.2}, "max_length": 32},
        "train": {"max_steps": STEPS, "global_batch_size": 16, "learning_rate": 1e-4},
        "strategy": "ddp",
        "retry": {"max_restarts": 0},
    }  # fmt: skip


def running(yard: Yard, job: str, attempt: int, ranks: int) -> Any:
    """Whether this attempt of a job takes steps with so many ranks."""
    told = yard.describe(job)
    if len(told["attempts"]) < attempt:
        return None
    newest = told["attempts"][attempt - 1]
    taking = newest["plan"]["world_size"] == ranks and newest["progress"] and newest["progress"]["phase"] == "train"
    return newest if taking and newest["state"] == "running" else None


def curve(path: Path) -> dict[int, float]:
    """The loss of each step that rank 0 took."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["phase"] == "train" and line.get("loss") is not None}


def check_nothing_was_lost(yard: Yard, job: str, undisturbed: dict[int, float]) -> None:
    """Attempts take each step once, one after the other, with the losses of a training that nobody disturbed."""
    told = yard.describe(job)
    assert told["failures"] == 0
    resumed = {
        event["attempt"]: event["data"]["step"] for event in told["events"] if event["kind"] == "checkpoint-resumed"
    }
    taken: dict[int, float] = {}
    for attempt in range(1, len(told["attempts"]) + 1):
        steps = curve(yard.files(job, attempt).progress(0))
        if attempt > 1:
            assert resumed[attempt] == max(taken) == min(steps) - 1
        taken |= steps
    assert sorted(taken) == list(range(1, len(taken) + 1))
    for step, loss in taken.items():
        if step in undisturbed:
            assert loss == pytest.approx(undisturbed[step], abs=1e-4), step
    assert len(taken.keys() & undisturbed.keys()) > 0.9 * len(taken)


@contextmanager
def alone(world: dict[str, Any], folder: Path) -> Iterator[Callable[[int], dict[int, float]]]:
    """The same training on one process; ask for its curve up to a step."""
    spec = TrainSpec.model_validate_json(
        json.dumps({k: v for k, v in world.items() if k != "retry"} | {"name": "alone"})
    )
    launched = start(a_contract(folder, a_plan(spec, "ddp", 1, 16), spec))

    def until_step(step: int) -> dict[int, float]:
        path = launched.files.progress(0)
        until(lambda: path.exists() and max(curve(path), default=0) >= step, seconds=600)
        return curve(path)

    try:
        yield until_step
    finally:
        launched.end()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_room_is_made_and_nothing_is_lost(yard: Yard, world: dict[str, Any], tmp_path: Path) -> None:
    elastic = yard.submit(yard.job_file(name="elastic", resources={"num_processes": "2..4"}, **world))
    until(lambda: running(yard, elastic, 1, 4))
    victim = yard.submit(yard.job_file(name="victim", priority="low", resources={"num_processes": 2}, **world))
    before = until(lambda: running(yard, victim, 1, 2))

    # Where shrinking is enough, nobody is pre-empted.
    first = yard.submit(yard.ticker("first", priority="high"))
    until(lambda: yard.ticks(first))
    assert until(lambda: running(yard, elastic, 2, 2))
    assert yard.describe(victim)["state"] == "running"
    assert yard.describe(elastic)["preemptions"] == 0

    # Where it is not, the lower class makes room.
    second = yard.submit(yard.ticker("second", priority="high"))
    until(lambda: yard.ticks(second))
    told = yard.describe(victim)
    assert (told["state"], told["preemptions"]) == ("queued", 1)
    why = yard.json("why", victim)
    assert why["reason"]["code"] in ("insufficient-free", "preempted")
    assert why["turn"]["position"] == 1
    assert victim in yard.run("queue").stdout

    # It goes on where the first one was, and the elastic one grows back when both are gone.
    yard.json("cancel", first, "--wait")
    after = until(lambda: running(yard, victim, 2, 2))
    assert {share["node"] for share in after["nodes"]} != {share["node"] for share in before["nodes"]}
    yard.json("cancel", second, "--wait")
    until(lambda: running(yard, elastic, 3, 4))

    for job in (elastic, victim):
        yard.json("cancel", job, "--wait")
    assert yard.json("queue")["turns"] == []
    last = max(max(curve(yard.files(elastic, 3).progress(0))), max(curve(yard.files(victim, 2).progress(0))))
    with alone(world, tmp_path / "alone") as until_step:
        undisturbed = until_step(last)
    check_nothing_was_lost(yard, elastic, undisturbed)
    check_nothing_was_lost(yard, victim, undisturbed)
