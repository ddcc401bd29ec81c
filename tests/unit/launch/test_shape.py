"""Shapes by configuration against transformers' and peft's own models, made without memory."""

from __future__ import annotations

import json
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from launch.config import AdapterSpec, ModelSpec, Task, TrainSpec
from launch.errors import SpecError
from launch.shape import ModelShape, header_of, read_shape, shape_of_config, trained

CLASSES: Task = "sequence-classification"
TOKENS: Task = "causal-lm"
ENCODER = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
}
DECODER = ENCODER | {"num_key_value_heads": 2, "pad_token_id": 0}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}
MODELS: list[tuple[str, Task, dict[str, Any]]] = [
    ("bert", CLASSES, ENCODER),
    ("roberta", CLASSES, ENCODER),
    ("electra", CLASSES, ENCODER | {"embedding_size": 32}),
    ("distilbert", CLASSES, {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 100}),
    ("gpt2", TOKENS, GPT),
    ("gpt2", CLASSES, GPT),
    ("gpt_bigcode", TOKENS, GPT),
    ("gpt_bigcode", TOKENS, GPT | {"multi_query": False}),
    ("llama", TOKENS, DECODER),
    ("llama", TOKENS, DECODER | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", CLASSES, DECODER),
    ("mistral", TOKENS, DECODER),
    ("qwen2", TOKENS, DECODER),
    ("qwen3", TOKENS, DECODER),
    ("gemma", TOKENS, DECODER | {"head_dim": 32}),
    ("gemma2", TOKENS, DECODER),
    ("granite", TOKENS, DECODER),
    ("smollm3", TOKENS, DECODER),
]
NAMES = [f"{kind}-{task}-{len(sizes)}" for kind, task, sizes in MODELS]


def a_model(kind: str, task: Task, sizes: dict[str, Any]) -> Any:
    build = AutoModelForCausalLM if task == TOKENS else AutoModelForSequenceClassification
    with torch.device("meta"):
        return build.from_config(AutoConfig.for_model(kind, **sizes))


def a_shape(kind: str, task: Task, sizes: dict[str, Any]) -> ModelShape:
    shape = shape_of_config({"model_type": kind, **sizes}, task)
    assert shape is not None
    return shape


def a_spec(task: Task = TOKENS, adapter: AdapterSpec | None = None, **train: Any) -> TrainSpec:
    values = {
        "name": "job",
        "model": {"name_or_path": "org/model", "task": task},
        "data": {"train": "data"},
        "train": {"max_steps": 1, **train},
    }
    return TrainSpec.model_validate_json(json.dumps(values)).model_copy(update={"adapter": adapter})


@pytest.mark.parametrize(("kind", "task", "sizes"), MODELS, ids=NAMES)
def test_every_parameter_is_known_by_name(kind: str, task: Task, sizes: dict[str, Any]) -> None:
    model = a_model(kind, task, sizes)
    there = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for config in ({"model_type": kind, **sizes}, model.config.to_dict()):
        shape = shape_of_config(config, task)
        assert shape is not None
        assert {weight.name: weight.shape for weight in shape.weights} == there


@pytest.mark.parametrize(("kind", "task", "sizes"), MODELS, ids=NAMES)
@pytest.mark.parametrize("dora", [False, True])
def test_adapter_is_pefts(kind: str, task: Task, sizes: dict[str, Any], dora: bool) -> None:
    shape = a_shape(kind, task, sizes)
    new = sorted({name.rpartition(".")[0] for name in shape.new})
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if task == TOKENS else TaskType.SEQ_CLS,
        r=4,
        use_dora=dora,
        target_modules="all-linear",
        exclude_modules=new or None,
        modules_to_save=new or None,
    )
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        adapted = get_peft_model(a_model(kind, task, sizes), config)
    ours = trained(shape, a_spec(task, AdapterSpec(r=4, use_dora=dora)))
    assert ours.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert ours.parameters == sum(p.numel() for p in adapted.parameters())


def test_adapter_takes_the_named_modules() -> None:
    shape = a_shape("llama", TOKENS, DECODER)
    ours = trained(shape, a_spec(adapter=AdapterSpec(r=2, target_modules=("q_proj", "v_proj"))))
    assert {weight.module.rpartition(".")[2] for weight in ours.adapted} == {"q_proj", "v_proj"}
    assert ours.trainable == 2 * 2 * ((64 + 64) + (64 + 32))
    with pytest.raises(SpecError) as told:
        trained(shape, a_spec(adapter=AdapterSpec(target_modules=("nothing",))))
    assert told.value.code == "bad-adapter"


def test_freezing_is_by_name() -> None:
    shape = a_shape("bert", CLASSES, ENCODER)
    ours = trained(shape, a_spec(CLASSES, freeze=["bert.*"]))
    assert ours.trainable == 2 * 64 + 2
    with pytest.raises(SpecError) as told:
        trained(shape, a_spec(CLASSES, freeze=["no.such.*"]))
    assert told.value.code == "no-such-parameter"


def written(folder: Path, config: dict[str, Any], weights: dict[str, tuple[int, ...]] | None = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if weights is not None:
        header = json.dumps(
            {name: {"dtype": "F32", "shape": size, "data_offsets": [0, 0]} for name, size in weights.items()}
        )
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    return folder


def test_checkpoint_says_what_is_new(tmp_path: Path) -> None:
    config = {"model_type": "bert", **ENCODER}
    shape = a_shape("bert", CLASSES, ENCODER)
    base = {w.name.removeprefix("bert."): w.shape for w in shape.weights if "pooler" not in w.name and w.name[0] == "b"}
    folder = written(tmp_path / "base", config, base)
    spec = ModelSpec(name_or_path=str(folder), task=CLASSES)
    assert {name.partition(".")[0] for name in read_shape(spec).new} == {"bert", "classifier"}
    assert any("pooler" in name for name in read_shape(spec).new)
    whole = {w.name: w.shape for w in shape.weights}
    spec = ModelSpec(name_or_path=str(written(tmp_path / "whole", config, whole)), task=CLASSES)
    assert read_shape(spec).new == frozenset()
    assert read_shape(spec, labels=5).new == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("config", "task", "code"),
    [
        ({"model_type": "mixtral"}, TOKENS, "unknown-architecture"),
        ({"hidden_size": 3}, TOKENS, "no-model-config"),
        ({"model_type": "llama", "hidden_size": "wide"}, TOKENS, "no-model-config"),
        ({"model_type": "bert"}, TOKENS, "not-a-language-model"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, config: dict[str, Any], task: Task, code: str) -> None:
    folder = written(tmp_path / "model", config)
    with pytest.raises(SpecError) as told:
        read_shape(ModelSpec(name_or_path=str(folder), task=task))
    assert told.value.code == code
    assert told.value.hint


def test_hub_id_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SpecError) as told:
        read_shape(ModelSpec(name_or_path="org/nobody-has-this", task=TOKENS))
    assert told.value.code == "no-model-config"


def test_header_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xff" * 16)
    with pytest.raises(SpecError):
        header_of(path)
