"""The formulas of activations against what torch keeps of small models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import launch.int8
from launch.config import AdapterSpec, Task
from launch.contract import ExecutionPlan
from launch.first_token import narrow_last_layer
from launch.footprint_record import Footprint
from launch.hidden import carry_narrow
from launch.instructions import NO_INT8, multiplies_int8
from launch.int8 import multiply_in_int8
from launch.shape import ModelShape, shape_of_config, trained
from orchestrator.memory.activations import (
    AUTOCAST,
    BYTES,
    CARRIED,
    HALF,
    WHOLE,
    Numbers,
    Setting,
    ends,
    kept,
    kept_of_last,
)
from orchestrator.memory.analytic import CHUNK_BYTES, footprint
from orchestrator.memory.estimate import predict
from tests.builders import a_training_job

TOKENS: Task = "causal-lm"
CLASSES: Task = "sequence-classification"
DECODER = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 64,
    "pad_token_id": 0,
}
ENCODER = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256, "vocab_size": 64}
PLAIN = ENCODER | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT = {"n_embd": 64, "n_head": 4, "vocab_size": 64, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
ROWS, LENGTH = 4, 44
NUMBERS = {"fp32": WHOLE, "native": HALF, "autocast": AUTOCAST, "carried": CARRIED, "int8": BYTES}


BERT = PLAIN | {"num_hidden_layers": 2}
DISTILBERT = {
    "dim": 64, "n_heads": 4, "hidden_dim": 256, "vocab_size": 64, "n_layers": 2, "dropout": 0.0,
    "attention_dropout": 0.0, "seq_classif_dropout": 0.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def narrow_layers(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Layers as small as these multiply bytes, too, where they are asked to."""
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("numbers") == "int8" and not multiplies_int8():
        pytest.skip(NO_INT8)
    monkeypatch.setattr(launch.int8, "NARROWEST", 16)


def kept_by_torch(kind: str, task: Task, sizes: dict[str, Any], numbers: Numbers, attention: str) -> float:
    """Bytes a token and layer that autograd keeps, beside weights: of two layers more."""
    layers = {"gpt2": "n_layer", "gpt_bigcode": "n_layer"}.get(kind, "num_hidden_layers")
    one, three = (
        saved_bytes(AutoConfig.for_model(kind, **sizes, **{layers: count}), task, numbers, attention)
        for count in (1, 3)
    )
    return (three - one) / 2 / (ROWS * LENGTH)


def saved_bytes(config: Any, task: Task, numbers: Numbers, attention: str, *, narrow: bool = False) -> int:
    config._attn_implementation = attention
    config.pad_token_id = 0
    build = AutoModelForCausalLM if task == TOKENS else AutoModelForSequenceClassification
    model = build.from_config(config, dtype=torch.bfloat16 if numbers is HALF else torch.float32).train()
    if narrow:
        narrow_last_layer(model)
    if numbers is CARRIED:
        carry_narrow(model)
    if numbers is BYTES:
        multiply_in_int8(model)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    sizes = {tuple(sorted(weight.shape)) for weight in model.parameters()}  # of their casts, too
    ids = torch.zeros((ROWS, LENGTH), dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    stored: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and tuple(sorted(tensor.shape)) not in sizes:
            stored[place] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=numbers.autocast),
    ):
        more = {} if task == CLASSES else {"use_cache": False}
        logits = model(input_ids=ids, attention_mask=mask, **more).logits
    total = sum(tensor.untyped_storage().nbytes() for tensor in stored.values())
    assert logits.requires_grad
    return total


CASES: list[tuple[str, Task, dict[str, Any], str]] = [
    ("bert", CLASSES, PLAIN, "sdpa"),
    ("bert", CLASSES, PLAIN, "eager"),
    ("gpt2", TOKENS, GPT, "sdpa"),
    ("llama", TOKENS, DECODER, "sdpa"),
    ("llama", TOKENS, DECODER, "eager"),
    ("qwen3", TOKENS, DECODER | {"head_dim": 16}, "sdpa"),
    ("gemma", TOKENS, DECODER | {"head_dim": 16}, "sdpa"),
]


@pytest.mark.parametrize(
    ("numbers", "kind", "task", "sizes", "attention"),
    [
        (numbers, *case)
        for numbers in NUMBERS
        for case in CASES
        if (numbers != "carried" or case[1] == CLASSES) and (numbers != "int8" or case[0] != "gpt2")
    ],
)
def test_what_a_layer_keeps(numbers: str, kind: str, task: Task, sizes: dict[str, Any], attention: str) -> None:
    shape = shape_of_config({"model_type": kind, **sizes}, task)
    assert shape is not None
    at = Setting(numbers=NUMBERS[numbers], length=LENGTH, attention=attention, device="cpu")
    found = kept_by_torch(kind, task, sizes, NUMBERS[numbers], attention)
    assert sum(kept(shape.traits, at).values()) == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("kind", "sizes"), [("bert", BERT), ("distilbert", DISTILBERT)])
def test_what_a_last_layer_for_the_first_token_keeps_less(
    kind: str, sizes: dict[str, Any], attention: str, numbers: str
) -> None:
    shape = shape_of_config({"model_type": kind, **sizes}, CLASSES)
    assert shape is not None
    at = Setting(numbers=NUMBERS[numbers], length=LENGTH, attention=attention, device="cpu")
    whole, narrow = (
        saved_bytes(AutoConfig.for_model(kind, **sizes), CLASSES, NUMBERS[numbers], attention, narrow=narrow)
        for narrow in (False, True)
    )
    layer, last = (sum(found(shape.traits, at).values()) for found in (kept, kept_of_last))
    ends_differ = ends(shape.traits, at) - ends(shape.traits, at, first_token=True)
    found = (whole - narrow) / (ROWS * LENGTH)
    assert layer - last + ends_differ == pytest.approx(found, rel=0.03)


def a_llama(**changes: Any) -> ModelShape:
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    sizes |= {"intermediate_size": 14336, "vocab_size": 128256}
    shape = shape_of_config({"model_type": "llama", **sizes, **changes}, TOKENS)
    assert shape is not None
    return shape


def a_footprint(precision: str = "bf16", length: int = 2048, **keys: Any) -> Footprint:
    job = a_training_job(
        model={"name_or_path": "org/model", "task": "causal-lm"},
        data={"train": "data", "max_length": length},
        train={"max_steps": 1, "precision": precision},
        **keys,
    )
    return footprint(a_llama(), job, "cuda")


def a_plan(**changes: Any) -> ExecutionPlan:
    values = {"engine": "single", "world_size": 1, "device": "cuda", "micro_batch_size": 4}
    values |= {"gradient_accumulation_steps": 1, "precision": "bf16"}
    return ExecutionPlan(**(values | changes))


def beside(found: Footprint, **changes: Any) -> float:
    passes = found.of(a_plan(**changes))
    assert passes is not None
    return passes.beside_gradients.at(4)


def test_footprint_counts_the_model() -> None:
    found = a_footprint()
    assert (found.source, found.parameters, found.trainable) == ("analytic", 8_030_261_248, 8_030_261_248)
    assert found.moments_bytes == 8 * found.parameters
    assert found.largest == 128256 * 4096
    assert found.small == 65 * 4096


def test_saving_saves() -> None:
    found = a_footprint()
    assert beside(found, activation_checkpointing=True) < 0.4 * beside(found)
    assert beside(found, loss="chunked") < beside(found, loss="whole")
    assert beside(found, engine="zero2") < beside(found)  # nothing is cast, and hidden states are in bf16
    assert beside(a_footprint("fp32"), precision="fp32") > beside(found)


def test_chunks_are_the_ranks() -> None:
    from launch.head import CHUNK_BYTES as theirs

    assert theirs == CHUNK_BYTES


def test_whole_logits_peak_at_three_copies_in_fp32() -> None:
    found = a_footprint("fp32", length=4096)
    both = {
        loss: beside(found, precision="fp32", activation_checkpointing=True, loss=loss) for loss in ("whole", "chunked")
    }
    assert both["whole"] > 12 * 4 * 4096 * 128256 > both["chunked"]


def test_adapter_has_a_small_state() -> None:
    found = a_footprint(adapter={"r": 8})
    parts = trained(a_llama(), a_training_job().model_copy(update={"adapter": AdapterSpec()}))
    assert found.trainable == parts.trainable < 0.01 * found.parameters
    assert found.moments_bytes == 8 * found.trainable


def test_frozen_layers_keep_nothing() -> None:
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    shape = shape_of_config({"model_type": "bert", **sizes}, CLASSES)
    assert shape is not None
    job = a_training_job(train={"max_steps": 1, "freeze": "bert.*"})
    few = footprint(shape, job, "cuda").passes[0].at_loss.at(8)
    assert few < 0.1 * footprint(shape, a_training_job(), "cuda").passes[0].at_loss.at(8)


def test_every_plan_can_be_predicted() -> None:
    found = a_footprint()
    for engine in ("single", "ddp", "zero1", "zero2", "zero3"):
        for checkpointing in (False, True):
            plan = a_plan(
                engine=engine, world_size=1 if engine == "single" else 8, activation_checkpointing=checkpointing
            )
            assert predict(found, plan).device.peak_bytes > 0
