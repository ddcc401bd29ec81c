"""Optimizers: Lion's formula, and what each remembers."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch

from launch.config import OptimSpec
from launch.errors import SpecError
from launch.optimizers import Lion, make_optimizer, state_bytes


def test_lion_follows_the_paper() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = Lion([{"params": [weight], "weight_decay": 0.1}], lr=0.5, betas=(0.9, 0.99))
    # Each value alone, in plain Python numbers.
    expected, momentum = [1.0, -2.0, 3.0], [0.0, 0.0, 0.0]
    for gradients in ([1.0, -1.0, 0.0], [-0.05, 0.2, 0.0], [-0.3, 0.001, 1.0]):
        weight.grad = torch.tensor(gradients)
        optimizer.step()
        for i, gradient in enumerate(gradients):
            direction = 0.9 * momentum[i] + 0.1 * gradient
            sign = (direction > 0) - (direction < 0)
            expected[i] -= 0.5 * (sign + 0.1 * expected[i])
            momentum[i] = 0.99 * momentum[i] + 0.01 * gradient
        assert weight.tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("adamw", 2 * (6 * 4 + 5)),
        ("lion", 6 * 4 + 5),
        ("adafactor", 6 + 4 + 5),  # a row and a column of the matrix; a vector in full
    ],
)
def test_what_it_remembers_is_counted(name: str, numbers: int) -> None:
    matrix, vector, frozen = (torch.nn.Parameter(torch.ones(shape)) for shape in ((6, 4), (5,), (7, 7)))
    optim = OptimSpec.model_validate({"max_steps": 1, "optimizer": name, "learning_rate": 0.1})
    optimizer = make_optimizer([{"params": [matrix, vector, frozen], "weight_decay": 0.0}], optim)
    assert state_bytes(optimizer) == 0
    (matrix.sum() + vector.sum()).backward()
    optimizer.step()
    assert state_bytes(optimizer) == 4 * numbers
    assert float(matrix.detach().max()) < 1


class Recorded:
    """As bitsandbytes' classes are called."""

    calls: list[tuple[str, dict[str, Any]]] = []
    in_full: list[torch.Tensor] = []

    @classmethod
    def named(cls, name: str) -> Any:
        return lambda _groups, **arguments: cls.calls.append((name, arguments))

    @classmethod
    def get_instance(cls) -> type[Recorded]:
        return cls

    @classmethod
    def override_config(cls, weight: torch.Tensor, key: str, value: int) -> None:
        assert (key, value) == ("optim_bits", 32)
        cls.in_full.append(weight)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("adamw-8bit", ("AdamW8bit", {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6})),
        ("lion-8bit", ("Lion8bit", {"lr": 0.1, "betas": (0.7, 0.9)})),
    ],
)
def test_8_bit_optimizers_are_asked_for_as_the_job_says(
    monkeypatch: pytest.MonkeyPatch, name: str, made: tuple[str, dict[str, Any]]
) -> None:
    names = {each: Recorded.named(each) for each in ("AdamW8bit", "Lion8bit")}
    package = ModuleType("bitsandbytes")
    package.__spec__ = ModuleSpec("bitsandbytes", None)
    optim = ModuleType("bitsandbytes.optim")
    optim.__dict__.update(GlobalOptimManager=Recorded, **names)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    monkeypatch.setattr(Recorded, "calls", [])
    monkeypatch.setattr(Recorded, "in_full", [])
    words = torch.nn.Embedding(7, 3).weight
    said = OptimSpec.model_validate(
        {
            "max_steps": 1, "optimizer": name, "learning_rate": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95,
            "adam_epsilon": 1e-6, "lion_beta1": 0.7, "lion_beta2": 0.9,
        }
    )  # fmt: skip
    make_optimizer([{"params": [words], "weight_decay": 0.0}], said, [words])
    assert Recorded.calls == [made]
    assert Recorded.in_full == [words]


def test_a_node_without_8_bit_optimizers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.optimizers.find_spec", lambda _: None)
    with pytest.raises(SpecError) as caught:
        make_optimizer([], OptimSpec(max_steps=1, optimizer="adamw-8bit"))
    assert (caught.value.code, caught.value.field) == ("optimizer-not-installed", "train.optimizer")
    assert "tuneyard[gpu]" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")],
        ),
    ],
)
@pytest.mark.parametrize(
    ("name", "full", "bits", "blocks"), [("adamw", "adamw-8bit", 2, 2 * 4), ("lion", "lion-8bit", 1, 4)]
)
def test_8_bit_states_do_nearly_what_full_ones_do(name: str, full: str, bits: int, blocks: int, device: str) -> None:
    pytest.importorskip("bitsandbytes", reason="it is in an extra: pip install 'tuneyard[gpu]'")
    torch.manual_seed(0)
    start = [torch.randn(shape, device=device) for shape in ((64, 100), (30, 200), (200,))]
    weights = {}
    for optimizer in (name, full):
        weights[optimizer] = [torch.nn.Parameter(weight.clone()) for weight in start]
        optim = OptimSpec.model_validate({"max_steps": 1, "optimizer": optimizer, "learning_rate": 1e-2})
        groups = [{"params": weights[optimizer], "weight_decay": 0.1}]
        made = make_optimizer(groups, optim, weights[optimizer][1:2])
        torch.manual_seed(1)
        for _ in range(5):
            for weight in weights[optimizer]:
                weight.grad = torch.randn_like(weight)
            made.step()
        held = state_bytes(made)
    per_weight = 4 * bits  # in full: of the second, which counts as an embedding, and of the third, which is small
    tables = 256 * 4 * bits
    assert held == bits * 6400 + blocks * 6400 // 256 + per_weight * (6000 + 200) + tables
    for exact, rounded, before in zip(weights[name], weights[full], start, strict=True):
        moved = (exact - before).abs().mean()
        assert (exact - rounded).abs().mean() < 0.1 * moved
