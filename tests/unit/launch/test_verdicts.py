"""Small decisions: which exit code a failure gets, when to stop early, whether what runs is what was planned."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from launch.config import OptimSpec
from launch.contract import ExecutionPlan, ExitCode
from launch.engine import build_engine, verify
from launch.errors import ContractError, DataError, SpecError
from launch.failure import exit_code_of
from launch.metrics import EarlyStop
from launch.model import drawn

PLAN = ExecutionPlan(
    engine="zero2", world_size=2, device="cpu", micro_batch_size=8, gradient_accumulation_steps=1, precision="bf16"
)


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (SpecError("x"), ExitCode.USER_ERROR),
        (DataError("x"), ExitCode.DATA_ERROR),
        (ContractError("x"), ExitCode.CONTRACT_MISMATCH),
        (MemoryError(), ExitCode.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), ExitCode.OUT_OF_MEMORY),
        (RuntimeError("Connection closed by peer"), ExitCode.CRASH),
        (ValueError("x"), ExitCode.CRASH),
    ],
)
def test_a_failure_has_a_code(problem: Exception, code: ExitCode) -> None:
    assert exit_code_of(problem) == code


def test_the_cpu_allocators_error_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert exit_code_of(caught.value) == ExitCode.OUT_OF_MEMORY


@pytest.mark.parametrize(
    "change",
    [
        {"engine": "ddp"},
        {"world_size": 1},
        {"device": "cuda"},
        {"micro_batch_size": 4},
        {"gradient_accumulation_steps": 2},
        {"precision": "fp32"},
        {"offload": "optimizer"},
        {"offload_path": "/disk"},
        {"activation_checkpointing": True},
    ],
)
def test_every_difference_from_the_plan_is_refused(change: dict[str, object]) -> None:
    verify(PLAN, PLAN)
    [name] = change
    with pytest.raises(ContractError, match=name):
        verify(PLAN.model_copy(update=change), PLAN)


@pytest.mark.parametrize("name", ["adafactor", "adamw-8bit", "lion-8bit"])
def test_a_plan_that_would_make_an_optimizer_something_else_is_refused(name: str) -> None:
    optim = OptimSpec.model_validate({"max_steps": 1, "optimizer": name})
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(ContractError, match=f"{name} needs whole weights, which zero2"):
        build_engine(Accelerator(cpu=True), model, PLAN, optim)


def test_early_stopping_counts_evaluations_without_improvement() -> None:
    stop = EarlyStop("f1_macro", patience=2, min_delta=0.01)
    assert [stop.sees({"f1_macro": value}) for value in (0.5, 0.6, 0.605, 0.7, 0.7, 0.705)] == [False] * 5 + [True]
    stop = EarlyStop("loss", patience=1, min_delta=0.0)
    assert [stop.sees({"loss": value}) for value in (2.0, 1.0, 1.0)] == [False, False, True]


def test_new_weights_depend_on_seed_and_name_alone() -> None:
    shape = torch.Size((3, 4))
    assert torch.equal(drawn(shape, "head.weight", 0, 0.02), drawn(shape, "head.weight", 0, 0.02))
    assert not torch.equal(drawn(shape, "head.weight", 0, 0.02), drawn(shape, "head.weight", 1, 0.02))
    assert not torch.equal(drawn(shape, "head.weight", 0, 0.02), drawn(shape, "other.weight", 0, 0.02))
    assert torch.equal(drawn(torch.Size((3,)), "norm.weight", 0, 0.02), torch.ones(3))
    assert torch.equal(drawn(torch.Size((3,)), "head.bias", 0, 0.02), torch.zeros(3))
