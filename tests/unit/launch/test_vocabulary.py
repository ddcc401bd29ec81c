"""The rows of a table that data use: found, looked up, trained, and put back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from launch.data import Rows
from launch.errors import SpecError
from launch.vocabulary import UsedRows, completed, keep_used, tokens_of
from tests.worlds import write_bert, write_llama


def rows_of(*tokens: int) -> Rows:
    return Rows(np.array(tokens, dtype=np.int32), np.array([0, len(tokens)]))


def test_tokens_of_all_parts_and_padding() -> None:
    assert tokens_of([rows_of(7, 3, 7), rows_of(9)], 0, None).tolist() == [0, 3, 7, 9]


def test_the_same_values_and_gradients_as_the_whole_table(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "bert")
    whole = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    used = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    used.load_state_dict(whole.state_dict())
    whole_table = whole.get_input_embeddings()
    keep_used(used, "used", [rows_of(2, 9, 5, 3)], 0)
    table = used.get_input_embeddings()
    assert isinstance(table, UsedRows)
    assert table.weight.shape == (5, 32)
    ids = torch.tensor([[2, 9, 5, 3], [2, 5, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    for model in (whole, used):
        model(input_ids=ids, attention_mask=mask).logits.sum().backward()
    logits = [model(input_ids=ids, attention_mask=mask).logits for model in (whole, used)]
    assert torch.equal(*logits)
    assert torch.equal(table.weight.grad, whole_table.weight.grad[table.rows])
    assert not table.weight.grad[0].any(), "padding"
    restored = completed(torch.full_like(whole_table.weight, 9), table.rows, table.weight.detach())
    assert torch.equal(restored[table.rows], whole_table.weight.detach()[table.rows])
    assert int((restored == 9).all(dim=1).sum()) == len(restored) - 5
    with pytest.raises(IndexError):
        table(torch.tensor([11]))


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}
FAMILIES: list[PreTrainedConfig] = [
    RobertaConfig(**SMALL, pad_token_id=1, max_position_embeddings=12),
    XLMRobertaConfig(**SMALL, pad_token_id=1, max_position_embeddings=12),
    ElectraConfig(**SMALL, embedding_size=8, pad_token_id=0),
    AlbertConfig(**SMALL, embedding_size=8, pad_token_id=0),
    DebertaV2Config(**SMALL, pad_token_id=0, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    ModernBertConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
    DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=16, pad_token_id=0),
    GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=12, pad_token_id=0),
    LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2),
]


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_every_family_says_the_same(config: PreTrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    pad = config.pad_token_id
    ids = torch.tensor([[3, 9, 37, 4], [3, 5, 4, pad]])
    mask = (ids != pad).long()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        keep_used(model, "used", [rows_of(3, 9, 37, 5, 4)], pad)
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    assert sum(isinstance(part, UsedRows) for part in model.modules()) == 1
    assert model.config.vocab_size == 40


def test_a_frozen_table_stays_frozen(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(write_bert(tmp_path / "bert"))
    model.get_input_embeddings().weight.requires_grad_(False)
    keep_used(model, "used", [rows_of(4)], 0)
    assert not model.get_input_embeddings().weight.requires_grad


def test_asked_for_the_whole_table_nothing_changes(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(write_bert(tmp_path / "bert"))
    keep_used(model, "whole", [rows_of(4)], 0)
    assert not isinstance(model.get_input_embeddings(), UsedRows)


def test_a_token_beyond_the_table_is_refused(tmp_path: Path) -> None:
    """Of a tokenizer that was given tokens which the model was not."""
    model = AutoModelForSequenceClassification.from_pretrained(write_bert(tmp_path / "bert"))
    with pytest.raises(SpecError, match="the data have the token 99"):
        keep_used(model, "used", [rows_of(4, 99)], 0)


def test_tables_that_are_more_than_a_table_are_refused(tmp_path: Path) -> None:
    bert = AutoModelForSequenceClassification.from_pretrained(write_bert(tmp_path / "bert"))
    bert.get_input_embeddings().max_norm = 1.0
    tied = AutoModelForCausalLM.from_pretrained(write_llama(tmp_path / "llama"))
    for model in (bert, tied):
        with pytest.raises(SpecError) as caught:
            keep_used(model, "used", [rows_of(4)], 0)
        assert (caught.value.code, caught.value.field) == ("vocabulary-not-available", "model.vocabulary")
