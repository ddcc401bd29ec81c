"""A last layer for the first token alone: the same logits and gradients, less work, less kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    XLMRobertaConfig,
)

from launch.dropout import drop_cheaply
from launch.families import ENCODERS
from launch.first_token import narrow_last_layer

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES: list[PreTrainedConfig] = [
    BertConfig(**SMALL, **NO_DROPOUT, pad_token_id=1),
    RobertaConfig(**SMALL, **NO_DROPOUT, pad_token_id=1, max_position_embeddings=12),
    XLMRobertaConfig(**SMALL, **NO_DROPOUT, pad_token_id=1, max_position_embeddings=12),
    ElectraConfig(**SMALL, **NO_DROPOUT, embedding_size=8, pad_token_id=1),
    DistilBertConfig(
        vocab_size=40,
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        pad_token_id=1,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
    ),
]
PADDED = torch.tensor([[3, 9, 37, 4, 6], [3, 5, 4, 1, 1], [3, 7, 1, 1, 1]])
FULL = torch.tensor([[3, 9, 37, 4, 6], [3, 5, 4, 8, 9]])


def a_pair(config: PreTrainedConfig, attention: str = "sdpa") -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    whole = AutoModelForSequenceClassification.from_config(config).train()
    narrow = AutoModelForSequenceClassification.from_config(config).train()
    narrow.load_state_dict(whole.state_dict())
    narrow_last_layer(narrow)
    return whole, narrow


def layer_of(model: PreTrainedModel) -> Any:
    base = model.base_model
    return (base.transformer if model.config.model_type == "distilbert" else base.encoder).layer[-1]


def gradients(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = model(input_ids=ids, attention_mask=(ids != 1).long()).logits
    logits.square().sum().backward()
    return logits.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def test_all_families_are_here() -> None:
    assert {config.model_type for config in FAMILIES} == ENCODERS


@pytest.mark.parametrize("ids", [PADDED, FULL], ids=["padded", "full"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_logits_and_gradients_are_the_same(config: PreTrainedConfig, attention: str, ids: torch.Tensor) -> None:
    whole, narrow = a_pair(config, attention)
    assert type(layer_of(narrow)) is not type(layer_of(whole))
    (expected, theirs), (found, ours) = gradients(whole, ids), gradients(narrow, ids)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_last_layer_gives_the_first_token_alone() -> None:
    _, narrow = a_pair(FAMILIES[0])
    states = narrow.base_model(input_ids=PADDED, attention_mask=(PADDED != 1).long()).last_hidden_state
    assert states.shape == (3, 1, 16)


def test_activations_can_be_checkpointed() -> None:
    whole, narrow = a_pair(FAMILIES[0])
    narrow.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls: list[int] = []
    layer_of(narrow).attention.self.query.register_forward_hook(lambda *_: calls.append(1))
    (expected, theirs), (found, ours) = gradients(whole, PADDED), gradients(narrow, PADDED)
    assert len(calls) == 2
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours["classifier.weight"], theirs["classifier.weight"])


def test_attention_drops_what_it_finds() -> None:
    config = BertConfig(**SMALL, pad_token_id=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    _, narrow = a_pair(config)
    drop_cheaply(narrow)
    mask = torch.ones_like(FULL)
    one, other = (narrow(input_ids=FULL, attention_mask=mask).logits for _ in range(2))
    assert not torch.equal(one, other)
    narrow.eval()
    one, other = (narrow(input_ids=FULL, attention_mask=mask).logits for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**SMALL, pad_token_id=1, is_decoder=True),
        BertConfig(**SMALL, pad_token_id=1, chunk_size_feed_forward=2),
        ModernBertConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
    ],
    ids=["decoder", "in chunks", "another family"],
)
def test_others_stay_as_they_are(config: PreTrainedConfig) -> None:
    model = AutoModelForSequenceClassification.from_config(config)
    before = [type(module) for module in model.modules()]
    narrow_last_layer(model)
    assert [type(module) for module in model.modules()] == before


def test_a_language_model_stays_as_it_is() -> None:
    model = AutoModelForCausalLM.from_config(BertConfig(**SMALL, pad_token_id=1, is_decoder=True))
    before = [type(module) for module in model.modules()]
    narrow_last_layer(model)
    assert [type(module) for module in model.modules()] == before
