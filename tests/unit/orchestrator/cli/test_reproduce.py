"""`tuneyard reproduce` up to the point where it trains, and what it says of a difference."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launch.contract import Origin
from launch.errors import SpecError
from launch.provenance import RECORD, BaseWeights, NodeUse, surroundings
from orchestrator.cli import main, repetition
from orchestrator.cli.repetition import PinnedMachine, job_of, repeated
from orchestrator.cli.reproduce import likely_reasons, new_directory, warnings
from orchestrator.errors import ImpossibleGangError
from orchestrator.execute import local
from orchestrator.job.spec import AnyJob
from tests.builders import a_node, a_record

GPUS = a_node(gpus=2).gpus


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory whose run took place here."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / RECORD).write_text(a_record(surroundings=surroundings()).model_dump_json())
    save_file({"weight": torch.ones(2)}, directory / "model.safetensors")
    return directory


def status_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tuneyard", "reproduce", *arguments])
    with pytest.raises(SystemExit) as ending:
        main()
    return int(ending.value.code or 0)


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda model: (model / RECORD).unlink(), "no-record"),
        (lambda model: (model / RECORD).write_text('{"format": 99}'), "newer-record"),
        (lambda model: (model / "model.safetensors").unlink(), "no-weights"),
        (lambda model: model.with_name("model-reproduced").mkdir(), "output-exists"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_before_anything_runs(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    code: str,
) -> None:
    spoil(model)
    assert status_of(monkeypatch, str(model)) == 2
    told = capsys.readouterr()
    assert f"error[{code}]" in told.err
    assert "hint:" in told.err
    assert told.out == ""


def test_the_new_directory_lies_beside_the_original(model: Path) -> None:
    assert new_directory(model, None) == model.with_name("model-reproduced")


def test_a_named_directory_may_be_of_an_earlier_run_and_nothing_else(model: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else" / "where"
    assert new_directory(model, elsewhere) == elsewhere
    elsewhere.mkdir(parents=True)
    assert new_directory(model, elsewhere) == elsewhere
    (elsewhere / "thesis.tex").touch()
    for taken in (elsewhere, model, tmp_path, model / RECORD):
        with pytest.raises(SpecError) as told:
            new_directory(model, taken)
        assert told.value.code in ("output-exists", "output-not-writable")
        assert told.value.hint
    (elsewhere / RECORD).touch()
    assert new_directory(model, elsewhere) == elsewhere


def test_the_original_is_not_replaced_from_above(model: Path, tmp_path: Path) -> None:
    (tmp_path / RECORD).touch()
    with pytest.raises(SpecError) as told:
        new_directory(model, tmp_path)
    assert told.value.code == "output-exists"


def test_the_job_is_the_recorded_one() -> None:
    record = a_record(base=BaseWeights(commit="c0ffee"))
    job = job_of(record, Path("/there"))
    assert job.resources.bounds == (2, 2)
    assert job.resources.accelerator == "cpu"
    assert job.retry.max_restarts == 0
    expected = record.spec.model_copy(update={"output_dir": "/there"})
    assert job.train_spec() == expected.model_copy(
        update={"model": expected.model.model_copy(update={"revision": "c0ffee"})}
    )


def test_a_run_is_pinned_to_its_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Origin] = []

    def noted(_job: AnyJob, origin: Origin, *_: object) -> None:
        seen.append(origin)

    monkeypatch.setattr(repetition, "run_here", noted)
    record = a_record()
    repeated(record, tmp_path)
    (origin,) = seen
    assert origin.pinned is not None
    assert (origin.pinned.plan, origin.pinned.threads, origin.pinned.data) == (record.plan, record.threads, record.data)


def test_a_machine_has_a_slot_for_each_rank_and_no_gpus_for_a_run_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "local_gpus", lambda: GPUS)
    plan = a_record().plan.model_copy(update={"world_size": 64})
    (node,) = PinnedMachine(plan).nodes()
    assert (node.cpu_slots, node.gpus) == (64, ())
    (node,) = PinnedMachine(plan.model_copy(update={"device": "cuda"})).nodes()
    assert node.gpus == GPUS


def test_gpus_that_are_not_here_are_a_refusal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(local, "local_gpus", lambda: ())
    record = a_record()
    here = record.surroundings.model_copy(update={"gpus": ("H100", "H100")})
    record = record.model_copy(update={"plan": record.plan.model_copy(update={"device": "cuda"}), "surroundings": here})
    with pytest.raises(ImpossibleGangError) as told:
        repeated(record, tmp_path)
    assert told.value.code == "device-missing"
    assert "2 GPUs (H100)" in told.value.message


def test_what_differs_and_what_is_not_recorded_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    here = surroundings().model_copy(update={"tuneyard": None})
    assert warnings(a_record(surroundings=here)) == []
    old = here.model_copy(update={"versions": here.versions | {"torch": "1.0"}})
    monkeypatch.setenv("IS_SET", "1")
    version, env = warnings(a_record(surroundings=old, env=("IS_SET", "IS_NOT")))
    assert version.startswith("torch: 1.0 then")
    assert "IS_NOT" in env
    assert "IS_SET" not in env


def test_reasons_are_what_the_two_runs_tell_apart() -> None:
    record = a_record()
    (only,) = likely_reasons(record, record)
    assert "nothing" in only
    then = record.model_copy(
        update={"attempts": 3, "resumed_at": 40, "env": ("A",), "nodes": (NodeUse(processes=1, threads=1),) * 2}
    )
    told = " | ".join(likely_reasons(then, record.model_copy(update={"threads": (2, 2)})))
    for word in ("threads", "the job set A", "attempt 3", "step 40", "2 nodes"):
        assert word in told
    gpu = record.model_copy(update={"plan": record.plan.model_copy(update={"device": "cuda"})})
    assert "deterministic" in likely_reasons(gpu, gpu)[0]
