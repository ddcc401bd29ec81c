"""A loss that explodes: the training goes back, leaves the batches out that did it, and is the one without them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.checkpoint.manifest import CheckpointId
from launch.contract import ExitCode, ProgressLine, RankExit
from tests.attempts import Job
from tests.integration.test_resume import job as a_job
from tests.worlds import Launched, write_bert, write_messages

ROWS, STEPS = 147, 14
GUARD = {"factor": 10.0, "window": 20, "steps": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    write_bert(world / "bert")
    write_messages(world / "messages.tsv", rows=ROWS)
    return world


def begin(job: Job, engine: str, steps: str, factor: str, **more: str) -> Launched:
    return job.begin(engine, 2, "bad-steps", BAD_STEPS=steps, BAD_FACTOR=factor, **more)


def end(launched: Launched) -> RankExit:
    ended = launched.wait()
    assert len({one.code for one in ended.values()}) == 1, launched.logs()
    return ended[0]


def guarded(world: Path, then: str, **changes: Any) -> Any:
    guard = {**GUARD, "then": then, **changes}
    return a_job(world, every=2, checkpoint={"keep_last": 9}, train={"max_steps": STEPS, "divergence": guard})


def rows_left_out(launched: Launched) -> dict[int, list[int]]:
    lines = [json.loads(line) for line in launched.files.samples(0).read_text().splitlines()]
    return {line["step"]: line["left_out"] for line in lines if "left_out" in line}


@pytest.mark.parametrize(
    "engine", ["zero3", pytest.param("ddp", marks=pytest.mark.slow), pytest.param("zero2", marks=pytest.mark.slow)]
)
def test_it_goes_back_and_leaves_out_what_did_it(world: Path, tmp_path: Path, engine: str) -> None:
    """Bit by bit what comes of leaving these steps out from the start, as is done where their loss is no number."""
    job = Job(guarded(world, "rollback"), tmp_path / "back")
    launched = begin(job, engine, "8,9", "1e3")
    ended = end(launched)
    assert ended.code == ExitCode.DONE, launched.logs()
    assert ended.result is not None
    summary = ended.result.train
    assert summary is not None
    assert (summary.steps, summary.skipped_steps, summary.rollbacks, len(summary.losses)) == (STEPS, 2, 1, STEPS - 2)

    # What was saved of it is gone; what is left out is told, by step, by sample and by row.
    (note,) = [note for note in job.notes(1) if note.outcome == "rolled-back"]
    assert (note.step, note.code) == (6, "loss-exploded")
    assert note.message is not None
    assert "as bad since step 8" in note.message
    assert "steps 8 to 9 are left out: samples 112 to 144" in note.message
    left_out = rows_left_out(launched)
    assert {step: len(rows) for step, rows in left_out.items()} == {8: 16, 9: 16}
    lines = [ProgressLine.model_validate_json(line) for line in launched.files.progress(0).read_text().splitlines()]
    trained = [line.step for line in lines if line.loss is not None]
    assert trained == [*range(1, 10), 7, *range(10, STEPS + 1)]
    assert job.catalogue.listing().quarantined == frozenset()
    assert CheckpointId(10, 1) in job.catalogue.listing().lineage()

    spec = a_job(world, every=2, train={"max_steps": STEPS, "on_nonfinite": "skip"})
    without = Job(spec, tmp_path / "without")
    assert end(begin(without, engine, "8,9", "nan")).code == ExitCode.DONE
    assert job.model() == without.model()


def test_what_is_left_out_stays_so_after_a_stop(world: Path, tmp_path: Path) -> None:
    """It is stopped after it has gone back: who goes on counts that once."""
    job = Job(guarded(world, "rollback"), tmp_path / "stopped")
    assert end(begin(job, "ddp", "6,7", "1e3", STOP_AT="8")).code == ExitCode.STOPPED
    assert [note.step for note in job.notes(1) if note.outcome == "rolled-back"] == [4]
    ended = end(begin(job, "ddp", "6,7", "1e3"))
    assert ended.code == ExitCode.DONE
    assert ended.result is not None
    assert ended.result.train is not None
    assert (ended.result.train.skipped_steps, ended.result.train.rollbacks) == (2, 1)
    whole = Job(guarded(world, "rollback"), tmp_path / "whole")
    assert end(begin(whole, "ddp", "6,7", "1e3")).code == ExitCode.DONE
    assert job.model() == whole.model()


@pytest.mark.parametrize(
    ("then", "steps", "told"),
    [
        pytest.param("stop", "8,9", "after a median of", id="stop"),
        pytest.param("rollback", "8,9,10,11,12,13", "after 2 rollbacks", id="again-and-again"),
        pytest.param("rollback", "6,7", "there is no checkpoint from before it", id="too-early"),
    ],
)
def test_it_ends_where_it_may_not_go_back(world: Path, tmp_path: Path, then: str, steps: str, told: str) -> None:
    spec = guarded(world, then, max_rollbacks=2)
    if "no checkpoint" in told:
        spec = spec.model_copy(update={"checkpoint": spec.checkpoint.model_copy(update={"every_steps": 7})})
    launched = begin(Job(spec, tmp_path), "ddp", steps, "1e3")
    ended = end(launched)
    assert ended.code == ExitCode.USER_ERROR, launched.logs()
    assert ended.error is not None
    assert (ended.error.code, ended.error.field) == ("loss-exploded", "train.divergence")
    assert told in ended.error.message
