"""Training on a real GPU: CUDA, NCCL, DeepSpeed, the caching allocator. `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch.config import AdapterSpec, CheckpointSpec, TrainSpec
from launch.contract import ExitCode, RankExit, RankResult
from tests.attempts import Job, losses
from tests.worlds import (
    Launched,
    a_contract,
    a_plan,
    a_spec,
    start,
    write_bert,
    write_dialogues,
    write_llama,
    write_messages,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
STEPS = 12
Losses = tuple[float, ...]
ENGINES = ["single", "zero1", "zero2", "zero3"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    write_bert(world / "bert")
    write_llama(world / "llama")
    write_messages(world / "messages.tsv", rows=147)
    write_dialogues(world / "dialogues.jsonl")
    return world


def a_job(world: Path, *, every: int | None = None, memory_every: int | None = None, **train: Any) -> TrainSpec:
    spec = a_spec(
        world / "bert", world / "messages.tsv", data={"split": None},
        train={"max_steps": STEPS, "adam_epsilon": 1e-4, "max_grad_norm": 0.1, "log_samples": True, **train},
    )  # fmt: skip
    return spec.model_copy(update={"checkpoint": CheckpointSpec(every_steps=every, memory_every_steps=memory_every)})


def a_causal_job(world: Path, **keys: Any) -> TrainSpec:
    train = {"max_steps": STEPS, "adam_epsilon": 1e-4, **keys.pop("train", {})}
    columns = {"prompt_column": "prompt", "response_column": "response"}
    data = {"split": None, "max_length": 96, **columns, **keys.pop("data", {})}
    spec = a_spec(
        world / "llama", world / "dialogues.jsonl", model={"task": "causal-lm"}, train=train, data=data
    )  # fmt: skip
    return spec.model_copy(update=keys)


def a_gpu_job(spec: TrainSpec, folder: Path, device: str = "cuda", **plan: Any) -> Job:
    job = Job(spec, folder, plan={"device": device, **plan})
    job.patience_s = 240.0  # DeepSpeed may compile what it offloads with
    return job


def weights(job: Job) -> dict[str, torch.Tensor]:
    return load_file(Path(job.attempts[-1].contract.output_dir) / "model.safetensors")


def result_of(ended: dict[int, RankExit]) -> RankResult:
    result = ended[0].result
    assert result is not None
    return result


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


@pytest.fixture(scope="module")
def on_cpu(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Losses, Job]:
    """The same job in fp32 on this machine's CPU."""
    job = a_gpu_job(a_job(world), tmp_path_factory.mktemp("cpu"), device="cpu")
    return losses(job.run("single", 1)), job


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_trains_as_a_cpu_does(
    world: Path, tmp_path: Path, on_cpu: tuple[Losses, Job], engine: str
) -> None:
    expected, reference = on_cpu
    job = a_gpu_job(a_job(world), tmp_path)
    ended = job.run(engine, 1)
    result = result_of(ended)
    assert (result.engine, result.zero_stage) == (engine, ENGINES.index(engine))
    assert losses(ended) == pytest.approx(expected, abs=1e-4)
    assert apart(weights(job), weights(reference)) < 1e-3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("engine", ["single", "zero2", "zero3"])
def test_half_precision_is_near(
    world: Path, tmp_path: Path, on_cpu: tuple[Losses, Job], engine: str, precision: str
) -> None:
    """Steps that fp16's loss scale leaves out are told of, and are few."""
    ended = a_gpu_job(a_job(world, precision=precision), tmp_path).run(engine, 1)
    assert result_of(ended).precision == precision
    assert losses(ended) == pytest.approx(on_cpu[0], abs=0.05)


def test_any_engine_goes_on_from_any_other_without_a_trace(world: Path, tmp_path: Path) -> None:
    """Stops are planned ones: no step is made twice."""
    whole = a_gpu_job(a_job(world), tmp_path / "whole")
    expected = losses(whole.run("single", 1))
    moved = a_gpu_job(a_job(world), tmp_path / "moved")
    moved.run("single", 1, stop_at=3)
    moved.run("zero3", 1, stop_at=6)
    moved.run("zero2", 1, stop_at=9)
    found = losses(moved.run("zero1", 1))
    assert found == pytest.approx(expected, abs=1e-5)
    assert apart(weights(moved), weights(whole)) < 1e-5


@pytest.mark.parametrize(("engine", "precision"), [("single", "bf16"), ("zero2", "bf16"), ("single", "fp16")])
def test_stops_in_half_precision_leave_no_trace(world: Path, tmp_path: Path, engine: str, precision: str) -> None:
    """With dropout, whose random numbers are a GPU's: losses and weights are bitwise those without the stop."""
    spec = a_job(world, precision=precision, deterministic=True)
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"dropout": 0.2})})
    whole, stopped = a_gpu_job(spec, tmp_path / "whole"), a_gpu_job(spec, tmp_path / "stopped")
    expected = losses(whole.run(engine, 1))
    stopped.run(engine, 1, stop_at=5)
    assert losses(stopped.run(engine, 1)) == expected
    assert apart(weights(stopped), weights(whole)) == 0


@pytest.mark.parametrize("engine", ["single", "zero3"])
def test_a_killed_rank_loses_a_step_at_most(world: Path, tmp_path: Path, engine: str) -> None:
    """A copy of its state, taken from the GPU after every step, is in shared memory."""
    spec = a_job(world, every=50, memory_every=1, max_steps=400)
    job = a_gpu_job(spec, tmp_path)
    first = job.begin(engine, 1)
    first.wait_for('"step":120', 120)
    first.end()
    last = steps_of(first)[-1]
    job.spec = spec.model_copy(update={"train": spec.train.model_copy(update={"max_steps": last + 20})})
    job.run(engine, 1)
    begun = steps_of(job.attempts[-1])[0]
    assert last - 1 <= begun <= last + 1, (begun, last)


def steps_of(launched: Launched) -> list[int]:
    """Steps that rank 0 has begun."""
    return [json.loads(line)["step"] for line in launched.files.samples(0).read_text().splitlines()]


def test_checkpoints_are_written_beside_the_training(world: Path, tmp_path: Path) -> None:
    job = a_gpu_job(a_job(world, every=4), tmp_path)
    ended = job.run("zero2", 1)
    assert {4, 8} <= {note.step for note in job.notes(1)}
    assert len(losses(ended)) == STEPS


def test_running_out_of_the_cards_memory_is_named(tmp_path: Path) -> None:
    from benchmarks.memory_world import write_model, write_rows

    rows, length = 2048, 512
    spec = a_spec(
        write_model("bert", tmp_path / "model", 1024, 24), write_rows("bert", length, tmp_path / "rows.tsv", rows),
        data={"split": None, "max_length": length}, train={"max_steps": 1, "global_batch_size": rows},
    )  # fmt: skip
    contract = a_contract(tmp_path / "run", a_plan(spec, "single", 1, rows, device="cuda"), spec)
    launched = start(contract, cold=True)
    ended = launched.wait(240)
    assert ended[0].code == ExitCode.OUT_OF_MEMORY, launched.logs()
    error = ended[0].error
    assert error is not None
    assert error.code == "cuda-out-of-memory"
    assert error.limit_bytes is not None
    assert error.limit_bytes > 4e9
    assert (error.used_bytes or 0) < error.limit_bytes


@pytest.mark.parametrize("engine", ["single", "zero2"])
def test_adapters_packing_and_the_loss_in_chunks(world: Path, tmp_path: Path, engine: str) -> None:
    keys: dict[str, Any] = {"data": {"packing": True}, "adapter": AdapterSpec(r=4, target_modules="auto")}
    found = {}
    for device in ("cpu", "cuda"):
        job = a_gpu_job(a_causal_job(world, **keys), tmp_path / device, device)
        found[device] = losses(job.run("single" if device == "cpu" else engine, 1))
        assert any("lora_B" in name for name in _adapter(job))
    assert found["cuda"] == pytest.approx(found["cpu"], abs=1e-4)


def _adapter(job: Job) -> dict[str, torch.Tensor]:
    return load_file(Path(job.attempts[-1].contract.output_dir) / "adapter_model.safetensors")


@pytest.mark.parametrize("loss", ["whole", "chunked"])
def test_a_language_model_with_checkpointed_activations(world: Path, tmp_path: Path, loss: str) -> None:
    spec = a_causal_job(world, train={"activation_checkpointing": True, "loss_mode": loss})
    cpu = losses(a_gpu_job(spec, tmp_path / "cpu", "cpu", loss=loss).run("single", 1))
    gpu = losses(a_gpu_job(spec, tmp_path / "cuda", loss=loss).run("single", 1))
    assert gpu == pytest.approx(cpu, abs=1e-4)


def test_tight_allocator_is_real(world: Path, tmp_path: Path) -> None:
    ended = a_gpu_job(a_job(world), tmp_path, allocator="tight").run("single", 1)
    assert result_of(ended).allocator == "tight"


@pytest.mark.parametrize(("engine", "offload"), [("zero2", "optimizer"), ("zero3", "all")])
def test_offloaded_state_trains_the_same(
    world: Path, tmp_path: Path, on_cpu: tuple[Losses, Job], engine: str, offload: str
) -> None:
    ended = a_gpu_job(a_job(world), tmp_path, offload=offload).run(engine, 1)
    assert result_of(ended).offload == offload
    assert losses(ended) == pytest.approx(on_cpu[0], abs=1e-3)


def test_a_yard_finds_its_gpu_plans_for_it_and_trains_there(world: Path, tmp_path: Path) -> None:
    from orchestrator.execute.local import LocalExecutor
    from orchestrator.job.lifecycle import JobState
    from tests.builders import a_training_job
    from tests.inhouse import carried_out

    executor = LocalExecutor(owned=True)
    (node,) = executor.nodes()
    assert len(node.gpus) == torch.cuda.device_count()
    job = a_training_job(
        model={"name_or_path": str(world / "bert"), "task": "sequence-classification"},
        data={"train": str(world / "messages.tsv"), "max_length": 32},
        train={"max_steps": 30, "global_batch_size": 16, "precision": "bf16"},
        resources={"accelerator": "gpu"},
    )
    started = time.monotonic()
    ended = carried_out(tmp_path, job, executor=executor, patience_s=200)
    assert ended.job.state == JobState.SUCCEEDED, ended.story()
    assert ended.attempts[-1].plan.device == "cuda"
    assert len(ended.losses) == 30
    print(f"{time.monotonic() - started:.1f} s", [(event.kind, event.data) for event in ended.events], ended.peaks)
