"""Memory saved for real: states in bytes, and state on a disk, train as they should, and go on after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.config import CheckpointSpec, TrainSpec
from launch.contract import ExitCode, RankResult
from tests.worlds import a_contract, a_plan, a_spec, start, write_bert, write_messages

STEPS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough: bitsandbytes keeps small weights in full, and DeepSpeed what is less than a MiB in memory."""
    world = tmp_path_factory.mktemp("world")
    write_bert(world / "bert", hidden=256)
    write_messages(world / "messages.tsv", rows=147)
    return world


def job(world: Path, **train: Any) -> TrainSpec:
    spec = a_spec(
        world / "bert", world / "messages.tsv", data={"split": None}, model={"dropout": 0.1},
        train={"max_steps": STEPS, **train},
    )  # fmt: skip
    return spec.model_copy(update={"checkpoint": CheckpointSpec(every_steps=None)})


class Attempts:
    """Of one job."""

    def __init__(self, spec: TrainSpec, folder: Path) -> None:
        self.spec, self.folder, self.count = spec, folder, 0

    def run(self, engine: str, size: int, stop_at: int | None = None, **plan: Any) -> RankResult:
        """Rank 0's result, or what it had when it was asked to stop."""
        self.count += 1
        contract = a_contract(
            self.folder / f"attempt-{self.count}", a_plan(self.spec, engine, size, 4, **plan), self.spec,
            attempt=self.count, checkpoint_dir=str(self.folder / "checkpoints"), run_id=f"small.{self.count}",
            output_dir=str(self.folder / "model"),
        )  # fmt: skip
        stops = {"MUTANT": "stop-at", "STOP_AT": str(stop_at)} if stop_at is not None else {}
        launched = start(contract, stops, module="tests.mutants" if stops else "launch")
        ended = launched.wait()
        expected = ExitCode.STOPPED if stops else ExitCode.DONE
        assert [ended[rank].code for rank in range(size)] == [expected] * size, launched.logs()
        assert ended[0].result is not None
        return ended[0].result

    def model(self) -> bytes:
        return (self.folder / "model" / "model.safetensors").read_bytes()


def losses(result: RankResult) -> tuple[float, ...]:
    assert result.train is not None
    assert len(result.train.losses) == STEPS
    return result.train.losses


@pytest.mark.parametrize(("full", "optimizer", "rate"), [("adamw", "adamw-8bit", 1e-3), ("lion", "lion-8bit", 1e-4)])
def test_states_in_bytes_go_on_after_a_stop(
    world: Path, tmp_path: Path, full: str, optimizer: str, rate: float
) -> None:
    """On as many ranks bitwise, on others nearly."""
    pytest.importorskip("bitsandbytes", reason="it is in an extra: pip install 'tuneyard[gpu]'")
    spec = job(world, optimizer=optimizer, learning_rate=rate)
    whole = Attempts(spec, tmp_path / "whole")
    found = whole.run("ddp", 2)
    stopped = Attempts(spec, tmp_path / "stopped")
    stopped.run("ddp", 2, stop_at=5)
    assert losses(stopped.run("ddp", 2)) == losses(found)
    assert stopped.model() == whole.model()
    in_full = Attempts(job(world, optimizer=full, learning_rate=rate), tmp_path / "full").run("ddp", 2)
    assert losses(found) == pytest.approx(losses(in_full), abs=0.02)
    assert found.moment_bytes < 0.35 * in_full.moment_bytes

    # Without dropout, whose masks are another on other ranks.
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"dropout": 0.0})})
    moved = Attempts(spec, tmp_path / "moved")
    moved.run("ddp", 2, stop_at=3)
    expected = losses(Attempts(spec, tmp_path / "one").run("single", 1))
    assert losses(moved.run("single", 1)) == pytest.approx(expected, abs=1e-3)


def no_disk() -> str | None:
    """Why nothing can be offloaded to a disk here; compiling DeepSpeed's operation is not a test's work."""
    from deepspeed.git_version_info import installed_ops

    return None if installed_ops.get("async_io") else "DeepSpeed's async_io is not compiled in: make setup AIO=1"


@pytest.mark.parametrize("offload", ["optimizer", pytest.param("all", marks=pytest.mark.slow)])
def test_state_on_a_disk_goes_on_after_a_stop(world: Path, tmp_path: Path, offload: str) -> None:
    """It is the same training as in memory, which another attempt may go on with."""
    if (reason := no_disk()) is not None:
        pytest.skip(reason)
    disk = {"offload": offload, "offload_path": str(tmp_path / "disk")}
    in_memory = Attempts(job(world), tmp_path / "memory").run("zero3", 2)
    whole = Attempts(job(world), tmp_path / "whole")
    on_disk = whole.run("zero3", 2, **disk)
    assert losses(on_disk) == pytest.approx(losses(in_memory), abs=2e-5)
    assert on_disk.moment_bytes + on_disk.master_bytes < 0.1 * (in_memory.moment_bytes + in_memory.master_bytes)
    stopped = Attempts(job(world), tmp_path / "stopped")
    stopped.run("zero3", 2, stop_at=3, **disk)
    assert losses(stopped.run("zero3", 2, **disk)) == losses(on_disk)
    assert stopped.model() == whole.model()
    moved = Attempts(job(world), tmp_path / "moved")
    moved.run("zero3", 2, stop_at=3, **disk)
    moved.run("zero3", 2, stop_at=6)
    assert losses(moved.run("zero3", 2, **disk)) == pytest.approx(losses(in_memory), abs=2e-5)
    assert list((tmp_path / "disk").iterdir()) == []
