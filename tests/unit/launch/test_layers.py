"""Freezing by name, and learning rates by layer, on real architectures."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from launch.errors import SpecError
from launch.layers import RATE_FACTOR, by_layer, freeze
from launch.model import weight_decay_groups


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    )


def llama(*, tied: bool) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
            intermediate_size=8, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def factors(model: PreTrainedModel, decay: float) -> dict[str, float]:
    """By parameter name."""
    of = {}
    for group in by_layer(weight_decay_groups(model, 0.1), model, decay):
        for parameter in group["params"]:
            assert parameter not in of
            assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0)
            of[parameter] = group[RATE_FACTOR]
    return {name: of[parameter] for name, parameter in model.named_parameters()}


def test_an_encoders_rates_go_down_with_its_layers() -> None:
    found = factors(bert(), 0.5)
    assert found["classifier.weight"] == found["classifier.bias"] == found["bert.pooler.dense.weight"] == 1
    assert found["bert.encoder.layer.1.output.dense.weight"] == 0.5
    assert found["bert.encoder.layer.0.attention.self.query.bias"] == 0.25
    assert {value for name, value in found.items() if "embeddings" in name} == {0.125}


def test_a_decoders_head_is_full_unless_it_is_the_embeddings() -> None:
    found = factors(llama(tied=False), 0.5)
    assert found["lm_head.weight"] == found["model.norm.weight"] == 1
    assert [found[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)] == [0.125, 0.25, 0.5]
    assert found["model.embed_tokens.weight"] == 0.0625
    tied = factors(llama(tied=True), 0.5)
    assert "lm_head.weight" not in tied
    assert tied["model.embed_tokens.weight"] == 0.0625
    gpt = factors(GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2, n_positions=8)), 0.5)
    assert [gpt[f"transformer.{name}.weight"] for name in ("wpe", "h.0.ln_1", "h.1.ln_1", "ln_f")] == [
        0.125, 0.25, 0.5, 1,
    ]  # fmt: skip


def test_layers_that_share_their_weights_have_no_order() -> None:
    config = AlbertConfig(
        vocab_size=9, embedding_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(SpecError, match="does not list its layers"):
        factors(AlbertForSequenceClassification(config), 0.5)


def test_frozen_parameters_are_those_whose_names_match() -> None:
    model = bert()
    freeze(model, ["bert.embeddings.*", "*.layer.[0]*"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith(("bert.encoder.layer.1.", "bert.pooler.", "classifier.")) for name in trained)
    assert len(trained) == 16 + 2 + 2
    given = [p for group in weight_decay_groups(model, 0.1) for p in group["params"]]
    assert len(given) == len(trained)


def test_a_pattern_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"no parameter's name matches 'bert\.embedings\.word\*'") as caught:
        freeze(bert(), ["bert.embedings.word*"])
    assert caught.value.field == "train.freeze"
    assert "bert.embeddings.word_embeddings.weight" in (caught.value.hint or "")


def test_something_must_be_left_to_train() -> None:
    with pytest.raises(SpecError, match="nothing is left to train"):
        freeze(torch.nn.Linear(2, 2), ["*"])
