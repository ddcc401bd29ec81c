"""`tuneyard plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.footprint_record import Footprint
from orchestrator.cli import app
from orchestrator.cli import plan as verb
from orchestrator.cluster.gpus import GIB
from orchestrator.errors import ImpossibleGangError, SpecError

CONFIGS = Path(__file__).parents[4] / "configs"
KEYS = {
    "fits", "strategy", "offload", "micro_batch_size", "gradient_accumulation_steps", "activation_checkpointing",
    "predicted", "margin", "alternatives", "reason",
}  # fmt: skip


def run(*arguments: str | Path) -> tuple[int, str]:
    """Status and stdout."""
    done = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def planned(*arguments: str | Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(run(*arguments, "-o", "json")[1])
    return told


@pytest.mark.parametrize(
    ("job", "cluster", "engine"),
    [("llama-3-8b", "h100-8", "zero2"), ("llama-3-8b", "h100-64", "zero"), ("llama-3-70b", "h100-64", "zero3")],
)
def test_shipped_shapes_plan_without_weights_and_data(job: str, cluster: str, engine: str) -> None:
    told = planned(CONFIGS / "jobs" / f"{job}.yaml", "--cluster", CONFIGS / "clusters" / f"{cluster}.yaml")
    assert told.keys() >= KEYS
    assert told["fits"]
    assert told["strategy"].startswith(engine)
    assert 8 <= told["world_size"] <= 64
    rows = told["micro_batch_size"] * told["gradient_accumulation_steps"] * told["world_size"]
    assert rows >= 128
    for side in ("device", "host"):
        part = told["predicted"][side]
        assert sum(part["breakdown"].values()) == part["peak_bytes"]
    assert told["needed"]["device_bytes"] <= told["available"]["device_bytes"]
    assert told["source"] == "analytic"
    assert all(other["why_not"] for other in told["alternatives"])


def a_small_job(folder: Path, **changes: Any) -> Path:
    """A job for a small BERT; there is neither data nor weights."""
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    job = {
        "name": "small",
        "model": {"name_or_path": "model", "task": "sequence-classification"},
        "data": {"train": "none.csv", "max_length": 128},
        "train": {"max_steps": 1},
    }
    path = folder / "small.yaml"
    path.write_text(json.dumps(job | changes))
    return path


def a_cluster(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


SMALL = "nodes: [{name: pi, cores: 2, memory_gb: 2}]"


def test_a_way_to_make_the_loss_is_told_of_language_models_alone(tmp_path: Path) -> None:
    assert planned(a_small_job(tmp_path))["loss_mode"] is None
    job = CONFIGS / "jobs" / "llama-3-8b.yaml"
    assert planned(job, "--cluster", CONFIGS / "clusters" / "h100-8.yaml")["loss_mode"] in ("whole", "chunked")


def test_this_machine_is_planned_for(tmp_path: Path) -> None:
    told = planned(a_small_job(tmp_path))
    assert told["world_size"] == 1
    assert told["available"]["host_bytes"] > GIB


def test_what_does_not_fit_is_told_with_a_way_out(tmp_path: Path) -> None:
    job, cluster = a_small_job(tmp_path), a_cluster(tmp_path, SMALL)
    status, _ = run(job, "--cluster", cluster)
    assert status == 4
    told = planned(job, "--cluster", cluster)
    assert not told["fits"]
    assert "nothing fits" in told["reason"]
    assert told["nearest_change"]["sentence"].startswith("it fits ")


def test_people_are_shown_table_and_bar(tmp_path: Path) -> None:
    status, text = run(a_small_job(tmp_path), "--cluster", CONFIGS / "clusters" / "laptop.yaml")
    assert status == 0
    for word in ("fits: single on 1 × cpu", "why ", "memory a process", "█", "optimizer", "NEXT BEST", "WHY NOT"):
        assert word in text


def test_a_value_is_overridden(tmp_path: Path) -> None:
    laptop = CONFIGS / "clusters" / "laptop.yaml"
    told = planned(a_small_job(tmp_path), "--cluster", laptop, "--set", "train.micro_batch_size=3")
    assert told["micro_batch_size"] == 3


def test_trace_that_fails_is_told_and_formulas_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "trace", lambda *_: "not traced: no such thing")
    told = planned(a_small_job(tmp_path), "--trace", "--cluster", CONFIGS / "clusters" / "laptop.yaml")
    assert (told["source"], told["source_reason"]) == ("analytic", "not traced: no such thing")


def test_trace_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.config import ModelSpec
    from launch.shape import read_shape
    from orchestrator.memory.analytic import footprint
    from tests.builders import a_training_job

    job = a_small_job(tmp_path)
    shape = read_shape(ModelSpec(name_or_path=str(tmp_path / "model"), task="sequence-classification"))
    there: Footprint = footprint(shape, a_training_job(), "cpu").model_copy(update={"source": "traced"})
    monkeypatch.setattr(verb, "trace", lambda *_: there)
    assert planned(job, "--trace", "--cluster", CONFIGS / "clusters" / "laptop.yaml")["source"] == "traced"


def test_faults_are_typed(tmp_path: Path) -> None:
    laptop = CONFIGS / "clusters" / "laptop.yaml"
    many = a_small_job(tmp_path, resources={"num_processes": 16})
    with pytest.raises(ImpossibleGangError) as gang:
        run(many, "--cluster", laptop)
    assert gang.value.field == "resources"
    path = tmp_path / "run.yaml"
    path.write_text("{name: run, run: [python]}")
    with pytest.raises(SpecError) as command:
        run(path, "--cluster", laptop)
    assert command.value.code == "not-a-training-job"
    job = a_small_job(tmp_path)
    (tmp_path / "model" / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(SpecError) as model:
        run(job, "--cluster", laptop)
    assert (model.value.code, model.value.file) == ("unknown-architecture", str(job))
