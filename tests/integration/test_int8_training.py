"""A training whose products are of bytes: near fp32's under every engine, the same twice, and told as what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from launch.config import TrainSpec
from launch.contract import ExitCode, RankResult
from launch.instructions import NO_INT8, multiplies_int8
from tests.attempts import Job
from tests.worlds import a_contract, a_plan, a_spec, start, write_bert, write_messages

pytestmark = pytest.mark.skipif(not multiplies_int8(), reason=NO_INT8)
STEPS = 25


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    world = tmp_path_factory.mktemp("world")
    return a_spec(
        write_bert(world / "bert", hidden=128),
        write_messages(world / "messages.tsv", rows=147),
        train={"max_steps": STEPS, "global_batch_size": 16, "learning_rate": 2e-3, "precision": "int8"},
    )


def run(
    spec: TrainSpec, folder: Path, engine: str, world_size: int, precision: str = "int8", micro_batch: int = 8
) -> tuple[RankResult, dict[str, torch.Tensor]]:
    plan = a_plan(spec, engine, world_size, micro_batch, precision=precision)
    launched = start(a_contract(folder, plan, spec))
    ended = launched.wait()
    assert {exit_.code for exit_ in ended.values()} == {ExitCode.DONE}, launched.logs()
    result = ended[0].result
    assert result is not None
    return result, load_file(folder / "model" / "model.safetensors")


def losses(result: RankResult) -> np.ndarray:
    assert result.train is not None
    return np.array(result.train.losses)


@pytest.fixture(scope="module")
def in_fp32(spec: TrainSpec, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return losses(run(spec, tmp_path_factory.mktemp("fp32"), "single", 1, "fp32")[0])


@pytest.fixture(scope="module")
def alone(spec: TrainSpec, tmp_path_factory: pytest.TempPathFactory) -> tuple[RankResult, dict[str, torch.Tensor]]:
    return run(spec, tmp_path_factory.mktemp("int8"), "single", 1)


def test_it_learns_as_in_fp32(alone: tuple[RankResult, dict[str, torch.Tensor]], in_fp32: np.ndarray) -> None:
    result, weights = alone
    assert result.precision == "int8"
    found = losses(result)
    assert found[-3:].mean() < 0.2 * found[:3].mean()
    assert 0 < np.abs(found - in_fp32).max() < 0.02
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_it_is_the_same_twice(
    spec: TrainSpec, alone: tuple[RankResult, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    _, weights = run(spec, tmp_path, "single", 1)
    assert all(torch.equal(weight, weights[name]) for name, weight in alone[1].items())


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_every_engine_multiplies_bytes(spec: TrainSpec, in_fp32: np.ndarray, tmp_path: Path, engine: str) -> None:
    result, _ = run(spec, tmp_path, engine, 2)
    assert (result.engine, result.precision) == (engine, "int8")
    assert 0 < np.abs(losses(result) - in_fp32).max() < 0.02


def test_its_checkpoint_goes_on_in_another_precision(spec: TrainSpec, in_fp32: np.ndarray, tmp_path: Path) -> None:
    moved = Job(spec, tmp_path)
    moved.run("ddp", 2, stop_at=12)
    moved.plan = {"precision": "fp32"}
    ended = moved.run("zero2", 2)
    assert ended[0].result is not None
    assert ended[0].result.precision == "fp32"
    assert losses(ended[0].result) == pytest.approx(in_fp32, abs=0.02)
