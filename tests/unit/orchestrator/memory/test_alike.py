"""What earlier jobs tell of where a new one should start."""

from __future__ import annotations

from typing import Any

import pytest

from launch.contract import ExecutionPlan
from orchestrator.memory.alike import Peak, key_of, remembered
from orchestrator.memory.ladder import Rung
from orchestrator.memory.plan import plan
from tests.builders import a_command_job, a_training_job

TRAIN = {"max_steps": 10, "global_batch_size": 16}
JOB = a_training_job(2, train=TRAIN)
WHOLE = plan(JOB, 2, "cpu")
TIGHT = WHOLE.model_copy(update={"allocator": "tight"})
SMALL = TIGHT.model_copy(update={"micro_batch_size": 4, "gradient_accumulation_steps": 2})


def a_row(ran: ExecutionPlan, time: float, *, ran_out: bool, job: str = "job-1", **changes: Any) -> Peak:
    values = {
        "key": key_of(JOB), "device_kind": "cpu", "world_size": 2, "plan": ran, "ran_out": ran_out, "job_id": job,
        "attempt": 1, "time": time,
    }  # fmt: skip
    return Peak.model_validate(values | changes)


def start(*rows: Peak, kind: str = "cpu") -> Any:
    return remembered(rows, JOB, WHOLE, kind)


def test_what_decides_on_memory_makes_jobs_alike() -> None:
    assert key_of(JOB) == key_of(a_training_job(4, name="other", train={**TRAIN, "learning_rate": 1.0, "seed": 5}))
    for keys in (
        {"train": {**TRAIN, "precision": "bf16"}},
        {"train": {**TRAIN, "optimizer": "lion"}},
        {"train": {**TRAIN, "freeze": ["*.embeddings.*"]}},
        {"data": {"train": "train.csv", "max_length": 64}},
        {"adapter": {"type": "lora", "r": 4}},
        {"model": {"name_or_path": "org/other", "task": "sequence-classification"}},
        {"model": {**JOB.model.model_dump(mode="json"), "vocabulary": "used"}},
    ):
        assert key_of(a_training_job(2, **{"train": TRAIN, **keys})) != key_of(JOB)
    assert key_of(a_command_job()) is None


def test_with_nothing_known_it_starts_as_it_would() -> None:
    assert start() is None
    assert start(a_row(WHOLE, 1, ran_out=False)) is None


def test_after_an_out_of_memory_it_starts_on_the_next_rung() -> None:
    found = start(a_row(WHOLE, 1, ran_out=True))
    assert plan(JOB, 2, "cpu", found.relief) == TIGHT
    assert found.sentence == "starts on rung allocator (allocator fast → tight), because job job-1 ran out of memory"


def test_it_starts_as_the_newest_one_that_then_fitted() -> None:
    rows = [a_row(WHOLE, 1, ran_out=True), a_row(TIGHT, 2, ran_out=True), a_row(SMALL, 3, ran_out=False)]
    found = start(*rows)
    assert plan(JOB, 2, "cpu", found.relief) == SMALL
    assert [taken.rung for taken in found.relief.taken] == [Rung.ALLOCATOR, Rung.MICRO_BATCH]
    assert "job job-1 ran out of memory and then fitted so" in found.sentence
    found = start(*rows, a_row(TIGHT, 4, ran_out=False, job="job-2"))
    assert plan(JOB, 2, "cpu", found.relief) == TIGHT
    assert "and job job-2 then fitted" in found.sentence


@pytest.mark.parametrize(
    "rows",
    [
        [a_row(WHOLE, 1, ran_out=True), a_row(WHOLE, 2, ran_out=False)],  # it fits now
        [a_row(WHOLE, 1, ran_out=True, device_kind="H100")],
        [a_row(WHOLE.model_copy(update={"world_size": 4}), 1, ran_out=True, world_size=4)],
        [a_row(WHOLE.model_copy(update={"micro_batch_size": 32}), 1, ran_out=True)],  # that was more than this takes
        [a_row(WHOLE.model_copy(update={"precision": "bf16"}), 1, ran_out=True)],  # of precision: auto
    ],
    ids=["fits-now", "other-device", "other-world-size", "more-demanding", "other-precision"],
)
def test_what_says_nothing_of_this_plan_changes_nothing(rows: list[Peak]) -> None:
    assert start(*rows) is None


def test_a_lesser_plan_that_ran_out_counts() -> None:
    found = start(a_row(SMALL, 1, ran_out=True))
    chosen = plan(JOB, 2, "cpu", found.relief)
    assert (chosen.allocator, chosen.micro_batch_size) == ("tight", 2)
