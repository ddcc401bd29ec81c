"""A model of which there is only the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.config import ModelSpec
from launch.errors import SpecError
from launch.footprint import NoMemory, traced_model
from launch.model import build_model, shape_model
from tests.worlds import a_spec

BERT = {"model_type": "bert", "num_hidden_layers": 6, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 50,
        "intermediate_size": 64}  # fmt: skip


def a_config(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_weights_are_not_read_and_the_head_is_new(tmp_path: Path) -> None:
    spec = ModelSpec(name_or_path=str(a_config(tmp_path / "m", **BERT)), task="sequence-classification")
    with NoMemory():
        model, missing = shape_model(spec, ("a", "b", "c"), 0)
    assert missing == ["classifier.weight", "classifier.bias"]
    assert tuple(model.classifier.weight.shape) == (3, 32)
    assert model.config.num_hidden_layers == 6


@pytest.mark.parametrize("kind", ["bert", "qwen2"])
def test_it_may_have_fewer_layers(tmp_path: Path, kind: str) -> None:
    spec = ModelSpec(name_or_path=str(a_config(tmp_path / "m", **(BERT | {"model_type": kind}))), task="causal-lm")
    with NoMemory():
        whole, fewer = (shape_model(spec, (), 0, layers)[0] for layers in (None, 2))
    assert (whole.config.num_hidden_layers, fewer.config.num_hidden_layers) == (6, 2)
    sizes = [sum(weight.numel() for weight in model.parameters()) for model in (whole, fewer)]
    layer = sum(weight.numel() for name, weight in whole.named_parameters() if ".layer.0." in name or "s.0." in name)
    assert sizes[0] - sizes[1] == 4 * layer > 0
    if kind == "qwen2":
        assert len(fewer.config.layer_types) == 2


def test_an_adapter_and_what_is_frozen_are_as_for_a_real_one(tmp_path: Path) -> None:
    folder = a_config(tmp_path / "m", **BERT)
    adapted = a_spec(folder, tmp_path / "d", adapter={"type": "lora", "r": 2})
    frozen = a_spec(folder, tmp_path / "d", train={"freeze": ["bert.*"]})
    with NoMemory():
        trained = [
            {name for name, weight in traced_model(spec, checkpointing=True, device="cpu").named_parameters()
             if weight.requires_grad}
            for spec in (adapted, frozen)
        ]  # fmt: skip
    assert all("lora_" in name or "classifier" in name for name in trained[0])
    assert any("lora_B" in name for name in trained[0])
    assert trained[1] == {"classifier.weight", "classifier.bias"}


def test_what_is_no_model_is_a_fault_of_the_job(tmp_path: Path) -> None:
    spec = a_spec(a_config(tmp_path / "m", model_type="unheard-of"), tmp_path / "d")
    with NoMemory(), pytest.raises(SpecError) as told:
        build_model(spec, ("a", "b"), 0, checkpointing=False, traced=True)
    assert told.value.code == "model-not-loaded"
    wrong = a_spec(a_config(tmp_path / "m", **BERT), tmp_path / "d", train={"freeze": ["no.such"]})
    with NoMemory(), pytest.raises(SpecError) as told:
        build_model(wrong, ("a", "b"), 0, checkpointing=False, traced=True)
    assert told.value.code == "no-such-parameter"
