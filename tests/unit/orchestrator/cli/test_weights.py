"""`tuneyard checkpoint export | import | diff` as a person runs them; what they do is tested where it is done."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from typer.testing import CliRunner

from launch.checkpoint import checkpoints_of
from orchestrator.cli.app import app


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of a small network, a step apart."""
    folder = tmp_path_factory.mktemp("store") / "checkpoints"
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    plain = torch.nn.Linear(4, 2)
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=0.1))
    checkpoints = checkpoints_of(accelerator, model, optimizer, folder)
    step = checkpoints.resume_step()
    for _ in range(2):
        accelerator.backward(model(torch.ones(3, 4)).square().sum())
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        checkpoints.save(step, wait=True)
    return folder


def run(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["checkpoint", *arguments], catch_exceptions=True)
    text = done.output + (str(done.exception) if done.exception else "")
    assert (done.exit_code == 0) == (status == 0), text
    return re.sub(r"\s+", " ", text)


def test_diff_tells_what_a_step_changed(store: Path) -> None:
    told = run("diff", str(store), "1", "2", status=1)
    assert "step: 1 in step-1.attempt-1, 2 in step-2.attempt-1" in told
    assert "optimizer_steps: 1.0" in told
    assert "weight/weight" in told
    assert "exp_avg/weight" in told


def test_diff_of_a_checkpoint_with_itself_is_nothing(store: Path) -> None:
    found = json.loads(run("diff", str(store), "2", "latest", "-o", "json"))
    assert found["equal"] > 6
    assert (found["changed"], found["facts"]) == ([], {})


def test_a_script_without_assets_cannot_be_exported(store: Path, tmp_path: Path) -> None:
    assert "checkpoint-without-assets" in run("export", str(store), "latest", str(tmp_path / "out"), status=1)
    assert "no dtype float8" in run(
        "export", str(store), "latest", str(tmp_path / "out"), "--dtype", "float8", status=1
    )


def test_import_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    told = run("import", str(tmp_path / "nothing"), str(tmp_path / "out"), "--model", "anything", status=1)
    assert "no checkpoint of DeepSpeed or Accelerate" in told
