"""Products of bytes: exact in what they multiply, near fp32 in what comes out, and fp32 wherever bytes do not pay."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from launch import int8
from launch.errors import SpecError
from launch.instructions import NO_INT8, flags_here, multiplies_int8
from launch.int8 import (
    FEWEST,
    Int8Linear,
    Quantised,
    by_columns,
    by_rows,
    multiplied,
    multiply_in_int8,
    precision_of,
    transposed,
)
from launch.model import add_adapter
from launch.native import level_of
from tests.worlds import a_spec

pytestmark = pytest.mark.skipif(
    not multiplies_int8() or level_of(flags_here()) is None, reason=f"{NO_INT8}, or is not an x86-64 one with AVX2"
)
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


def a_matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def a_layer(into: int = 192, out: int = 160, *, bias: bool = True) -> Int8Linear:
    torch.manual_seed(0)
    layer = nn.Linear(into, out, bias=bias)
    layer.__class__ = Int8Linear
    assert isinstance(layer, Int8Linear)
    return layer


def a_bert(**changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **WIDE, **changes)).train()


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((found - exact).norm() / exact.norm()).detach())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 200),
    seed=st.integers(0, 99),
    size=st.sampled_from([1e-30, 1, 1e30]),
)
def test_a_matrix_is_rounded_to_127_steps_of_its_largest_number(
    rows: int, columns: int, seed: int, size: float
) -> None:
    values = a_matrix(rows, columns, seed) * size
    values[seed % rows] = 0  # zeros are zeros, and divide nothing
    for found, dim in ((by_rows(values), 1), (by_columns(values), 0)):
        largest = values.abs().amax(dim, keepdim=True)
        assert torch.equal(found.scales, (largest / 127).squeeze(dim))
        factor = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0.0)  # not of a reciprocal
        assert torch.equal(found.bytes, (values * factor).round().to(torch.int8))


@settings(max_examples=30, deadline=None)
@given(m=st.integers(2, 70), k=st.integers(2, 300), n=st.integers(2, 90), biased=st.booleans())
def test_a_product_is_that_of_what_the_bytes_stand_for(m: int, k: int, n: int, biased: bool) -> None:
    left, right = by_rows(a_matrix(m, k)), transposed(by_rows(a_matrix(n, k, 1)))
    bias = a_matrix(1, n, 2)[0] if biased else None
    exact = (left.bytes.double() * left.scales[:, None].double()) @ (right.bytes.double() * right.scales.double())
    assert torch.allclose(multiplied(left, right, bias).double(), exact + (0 if bias is None else bias), atol=1e-4)


def test_sums_are_exact_as_long_as_they_may_be() -> None:
    most = int8.MOST
    ones = Quantised(torch.full((2, most), 127, dtype=torch.int8), torch.ones(2))
    sums = multiplied(ones, transposed(ones))
    assert torch.equal(sums, torch.full((2, 2), 127 * 127 * most, dtype=torch.float32))
    assert 127 * 127 * most < 2**31 <= 127 * 127 * (most + 1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_none(bad: float) -> None:
    values = a_matrix(40, 192)
    values[3, 70] = bad
    found = a_layer()(values)
    assert found[3].isnan().all()
    assert found[:3].isfinite().all()
    assert by_columns(values).scales.isfinite().sum() == 191


def gradients(layer: nn.Module, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    values = values.clone().requires_grad_()
    layer.zero_grad()
    found = layer(values)
    # Of tokens some matter a thousand times as much as others.
    weights = torch.logspace(-3, 0, found.shape[1])[:, None]
    (found.square() * weights).sum().backward()
    assert values.grad is not None
    return (found.detach(), values.grad, *(one.grad.clone() for one in layer.parameters() if one.grad is not None))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("outlier", "most"), [(1, 0.015), (30, 0.06)])
def test_values_and_gradients_are_near_those_of_fp32(bias: bool, outlier: float, most: float) -> None:
    layer, values = a_layer(bias=bias), a_matrix(4 * 24, 192).view(4, 24, 192)
    values[..., 7] *= outlier  # a channel like those that trained encoders have
    values[1] *= 100
    found = gradients(layer, values)
    layer.__class__ = nn.Linear
    exact = gradients(layer, values)
    assert len(found) == len(exact) == 3 + bias
    for one, other in zip(found, exact, strict=True):
        assert one.shape == other.shape
        assert 0 < error(one, other) < most
        if outlier == 1 and one.dim() > 1:
            rows = (one - other).flatten(0, -2).norm(dim=-1) / other.flatten(0, -2).norm(dim=-1)
            assert float(rows.max()) < 0.05, "a small row is as exact as a large one"


def test_evaluation_is_that_of_the_exported_model() -> None:
    layer, values = a_layer().eval(), a_matrix(FEWEST, 192)
    assert torch.equal(layer(values), nn.functional.linear(values, layer.weight, layer.bias))


def test_few_rows_are_not_worth_bytes() -> None:
    layer, values = a_layer(), a_matrix(FEWEST, 192)
    exact = nn.functional.linear(values, layer.weight, layer.bias)
    assert torch.equal(layer(values[:-1]), exact[:-1])
    assert not torch.equal(layer(values), exact)


def test_one_input_of_several_layers_is_rounded_once_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded: list[torch.Tensor] = []
    real = int8.by_columns
    monkeypatch.setattr(int8, "by_columns", lambda values: (rounded.append(values), real(values))[1])
    query, key = a_layer(), a_layer()
    values = a_matrix(FEWEST, 192)
    first = query(values).detach()
    key(values)
    assert len(rounded) == 1
    assert torch.equal(query(values * 1), first), "another tensor of the same numbers"
    values.mul_(2)
    assert error(query(values) - query.bias, 2 * (first - query.bias)) < 1e-6, "what it is now"
    assert len(rounded) == 3
    rounded.clear()
    del values
    gc.collect()
    assert int8._inputs == []


def test_a_frozen_weight_keeps_nothing_of_what_goes_in() -> None:
    layer = a_layer()
    layer.weight.requires_grad = False
    values = a_matrix(64, 192).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: (kept.append(one), one)[1], lambda one: one):
        found = layer(values)
    assert [one.shape for one in kept] == [layer.weight.shape]
    found.sum().backward()
    assert layer.weight.grad is None
    assert values.grad is not None
    assert error(values.grad, layer.weight.sum(0).expand(64, -1)) < 0.01


def test_of_a_model_its_layers_multiply_bytes_and_nothing_else() -> None:
    model = a_bert()
    assert precision_of(model) == "fp32"
    names = model.state_dict().keys()
    multiply_in_int8(model)
    assert precision_of(model) == "int8"
    ours = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    assert len(ours) == 2 * 6
    assert all(".encoder.layer." in name for name in ours)
    assert model.state_dict().keys() == names


def test_an_adapters_own_halves_stay_fp32(tmp_path: Path) -> None:
    spec = a_spec(tmp_path, tmp_path, adapter={"type": "lora", "r": 128})
    assert spec.adapter is not None
    for rank, count in ((128, 2 * 6), (8, 2 * 6)):
        adapter = spec.adapter.model_copy(update={"r": rank})
        model = add_adapter(a_bert(), adapter, "sequence-classification", ["classifier.weight", "classifier.bias"], 0)
        multiply_in_int8(model)
        ours = [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]
        assert len([name for name in ours if "lora_" not in name]) == count
        assert bool([name for name in ours if "lora_" in name]) is (rank >= int8.NARROWEST)


def test_a_model_without_such_layers_is_refused() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=128, n_head=2, n_layer=2, vocab_size=64)
    with pytest.raises(SpecError) as caught:
        multiply_in_int8(AutoModelForCausalLM.from_config(config))
    assert (caught.value.code, caught.value.field) == ("precision-not-available", "train.precision")


def test_recomputed_activations_have_the_same_gradients() -> None:
    ids = torch.arange(4 * 16).view(4, 16) % 64
    found = []
    for checkpointing in (False, True):
        model = a_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        multiply_in_int8(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=ids, labels=torch.zeros(4, dtype=torch.int64)).loss.backward()
        found.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
