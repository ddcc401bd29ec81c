"""Accelerate's trackers get what the progress file says, and an attempt goes on with the run of the one before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.config import CheckpointSpec
from launch.contract import ExitCode, ProgressLine
from launch.tracking import values_of
from tests.worlds import a_contract, a_plan, a_spec, start, write_bert, write_messages

STEPS = 8


def test_one_run_over_two_attempts(tmp_path: Path) -> None:
    """The first attempt ends after step 5; the second goes on from the checkpoint of step 4."""
    spec = a_spec(
        write_bert(tmp_path / "bert"),
        write_messages(tmp_path / "messages.tsv", rows=60),
        train={"max_steps": STEPS, "eval_every": 4},
        data={"split": {"test": 0.2}},
        trackers=["tensorboard", "wandb", "mlflow"],
    ).model_copy(update={"checkpoint": CheckpointSpec(every_steps=4)})
    plan = a_plan(spec, "ddp", 2, 8)
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    shared = {
        "checkpoint_dir": str(tmp_path / "job" / "checkpoints"),
        "tracker_dir": str(tmp_path / "job" / "trackers"),
        "job_id": "tracked-1",
    }
    lines: list[ProgressLine] = []
    for number, mutant in ((1, "crash-at-6"), (2, None)):
        contract = a_contract(tmp_path / f"attempt-{number}", plan, spec, attempt=number, **shared)
        if mutant:
            launched = start(contract, {**environment, "MUTANT": mutant}, module="tests.mutants")
        else:
            launched = start(contract, environment)
        ended = launched.wait()
        assert ended[0].code == (ExitCode.CRASH if mutant else ExitCode.DONE), launched.logs()
        file = launched.files.progress(0).read_text()
        lines += [ProgressLine.model_validate_json(line) for line in file.splitlines()]

    folder = tmp_path / "job" / "trackers"
    events = EventAccumulator(str(folder / "small"))
    events.Reload()
    seen = events.Scalars("train/loss")
    assert [scalar.step for scalar in seen] == list(range(1, STEPS + 1)), "each step once, the lost one hidden"
    # What stands is what the progress file says: of steps told twice, the last word.
    told = {line.step: line.loss for line in lines if line.loss is not None}
    assert [scalar.value for scalar in seen] == pytest.approx([told[step] for step in sorted(told)])
    evaluated = {line.step: line.metrics for line in lines if line.metrics}
    assert {scalar.step: scalar.value for scalar in events.Scalars("eval/f1_macro")} == pytest.approx(
        {step: metrics["f1_macro"] for step, metrics in evaluated.items()}
    )

    known = json.loads((folder / "runs.json").read_text())
    runs = [path for path in (folder / "mlflow").glob("*/*") if (path / "meta.yaml").exists() and path.is_dir()]
    assert [path.name for path in runs] == [known["mlflow"]], "one run"
    history = [line.split() for line in (runs[0] / "metrics" / "train" / "loss").read_text().splitlines()]
    assert {int(step) for _, _, step, *_ in history} == set(range(1, STEPS + 1))
    parameters = {path.name: path.read_text() for path in (runs[0] / "params").iterdir()}
    assert parameters["train.learning_rate"] == "0.001"
    assert parameters["model.task"] == "sequence-classification"

    offline = [path.name for path in (folder / "wandb").glob("offline-run-*")]
    assert len(offline) == 2
    assert all(name.endswith("-tracked-1") for name in offline), "two parts of one run"


def test_a_line_without_numbers_is_no_value() -> None:
    assert dict(values_of(ProgressLine(time=0, phase="save", step=3))) == {}
    assert dict(values_of(ProgressLine(time=0, phase="train", step=3, skipped=1))) == {}
    line = ProgressLine(time=0, phase="evaluate", step=3, metrics={"loss": 0.5})
    assert dict(values_of(line)) == {"eval/loss": 0.5}


def test_a_tracker_that_cannot_be_started_is_said(tmp_path: Path) -> None:
    spec = a_spec(
        write_bert(tmp_path / "bert"), write_messages(tmp_path / "messages.tsv", rows=60), trackers=["mlflow"]
    )
    launched = start(
        a_contract(tmp_path / "run", a_plan(spec, "single", 1, 8), spec), {"MLFLOW_TRACKING_URI": "no-such-scheme://x"}
    )
    ended = launched.wait()
    error = ended[0].error
    assert error is not None, launched.logs()
    assert (ended[0].code, error.code, error.field) == (ExitCode.USER_ERROR, "tracker-not-started", "trackers")
