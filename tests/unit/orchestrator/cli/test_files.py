"""What the command line reads of a job's model, to send it along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.files import read_job, read_sizing
from orchestrator.memory.sizing import Sizing
from tests.builders import a_command_job, a_training_job

CLASSES = "sequence-classification"


def a_model(folder: Path, config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def test_a_model_that_is_here_is_known_by_its_configuration(tmp_path: Path) -> None:
    """No weights are there, and torch is not needed."""
    folder = a_model(tmp_path / "model", {"model_type": "bert", "num_hidden_layers": 2})
    job = a_training_job(model={"name_or_path": str(folder), "task": CLASSES})
    found = Sizing.model_validate_json(read_sizing(job) or "")
    assert (found.family, found.cpu.source, found.cuda.source) == ("bert", "analytic", "analytic")
    assert found.cpu.length == job.data.max_length  # type: ignore[union-attr]
    assert found.work.layers == 2


@pytest.mark.parametrize("config", [{"model_type": "unheard-of"}, {}, "no json", "[]"])
def test_what_is_not_known_is_placed_by_numbers(tmp_path: Path, config: Any) -> None:
    folder = a_model(tmp_path / "model", config)
    assert read_sizing(a_training_job(model={"name_or_path": str(folder), "task": CLASSES})) is None


def test_a_model_that_is_nowhere_and_what_is_not_in_it_are_told_elsewhere(tmp_path: Path) -> None:
    """By the check of the job, or by the ranks: not knowing what it needs is no reason to refuse it."""
    for name in (str(tmp_path / "nowhere"), "org/model"):
        assert read_sizing(a_training_job(model={"name_or_path": name, "task": CLASSES})) is None
    folder = a_model(tmp_path / "model", {"model_type": "bert"})
    frozen = {"max_steps": 1, "freeze": ["no.such.weight"]}
    assert read_sizing(a_training_job(model={"name_or_path": str(folder), "task": CLASSES}, train=frozen)) is None


def test_a_command_has_none() -> None:
    assert read_sizing(a_command_job(2)) is None


def test_a_job_file_comes_with_it(tmp_path: Path) -> None:
    """Its paths are those of the job file's directory."""
    a_model(tmp_path / "model", {"model_type": "bert"})
    (tmp_path / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "data.tsv").write_text("text\tlabel\na\tb\nc\td\n")
    job = {
        "name": "small", "model": {"name_or_path": "model", "task": CLASSES}, "data": {"train": "data.tsv"},
        "train": {"max_steps": 1},
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    found, _ = read_job(tmp_path / "job.yaml", ["data.max_length=48"])
    sizing = Sizing.model_validate_json(read_sizing(found) or "")
    assert sizing.cpu.length == 48
