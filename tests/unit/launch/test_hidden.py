"""Hidden states in autocast's type from layer to layer: gradients as bf16 gives them, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from launch.first_token import narrow_last_layer
from launch.hidden import carry_narrow
from launch.model import build_model
from tests.builders import a_training_job
from tests.unit.launch.test_first_token import FAMILIES, PADDED
from tests.worlds import write_bert, write_llama


def a_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(copy.deepcopy(config)).train()
    narrow_last_layer(model)
    return model


def stack_of(model: PreTrainedModel) -> nn.ModuleList:
    base: Any = model.base_model
    layers: nn.ModuleList = (base.transformer if model.config.model_type == "distilbert" else base.encoder).layer
    return layers


@contextmanager
def what_goes_in(model: PreTrainedModel) -> Iterator[list[torch.dtype]]:
    """The types of what each layer is given."""
    found: list[torch.dtype] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0].dtype))
        for layer in stack_of(model)
    ]
    yield found
    for hook in hooks:
        hook.remove()


def gradients(model: PreTrainedModel, *, autocast: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=PADDED, attention_mask=(PADDED != 1).long()).logits
    logits.float().square().sum().backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    assert found.keys() == exact.keys()
    off = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
    return (off / sum(float(one.square().sum()) for one in exact.values())) ** 0.5


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "fp32"])
@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_layers_are_given_what_products_take(config: PreTrainedConfig, autocast: bool) -> None:
    """And in fp32 nothing changes."""
    model = a_model(config)
    exact = gradients(model, autocast=False)
    carry_narrow(model)
    with what_goes_in(model) as types:
        carried = gradients(model, autocast=autocast)
    assert types == [torch.bfloat16 if autocast else torch.float32] * 2
    assert all(gradient.dtype == torch.float32 for gradient in carried.values())
    # bf16 has eight bits, and a head's ReLU may open otherwise.
    assert error(carried, exact) <= (0.05 if autocast else 0.0)


def test_encoders_without_an_adapter_do_so(tmp_path: Any) -> None:
    write_bert(tmp_path / "bert")
    write_llama(tmp_path / "llama")

    def hooked(model: str, task: str, **keys: Any) -> bool:
        job = a_training_job(
            model={"name_or_path": str(tmp_path / model), "task": task},
            data={"train": "rows.csv"},
            train={"max_steps": 1, "precision": "bf16"},
            **keys,
        )
        labels = ("no", "yes") if task == "sequence-classification" else ()
        built = build_model(job, labels, 0, checkpointing=False)
        return any(module._forward_hooks for module in built.modules())

    assert hooked("bert", "sequence-classification")
    assert not hooked("bert", "sequence-classification", adapter={"type": "lora"})
    assert not hooked("llama", "causal-lm")
    assert not hooked("llama", "sequence-classification")
